package builtin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/cni/netns"
	"github.com/nodeagent/nodeagent/cni/rtnl"
	"golang.org/x/sys/unix"
)

// The pod's gateways: addresses that exist only as neighbour entries.
var (
	gateway4 = netip.MustParseAddr("169.254.1.1")
	gateway6 = netip.MustParseAddr("fe80::1")
)

// wired is a namespace with its veth pair made and everything set up that no address is needed for.
type wired struct {
	rtnl.Veth
	pod       *rtnl.Conn // in the pod's namespace; keeps it alive, so it is closed soon
	hostIndex int
	podIndex  int
	v6        bool // the pod's namespace has IPv6
}

// Prewire makes the pair of the namespace at netns ahead of Attach. The key of the later
// Attachment must be the path. A namespace that is wired already is left as it is.
func (n *Network) Prewire(ctx context.Context, path string) error {
	n.life.RLock()
	defer n.life.RUnlock()
	n.mu.Lock()
	_, known := n.warm[path]
	n.mu.Unlock()
	if known {
		return nil
	}
	node, err := n.prepare(ctx)
	if err != nil {
		return err
	}
	w, err := n.wire(ctx, node, Attachment{Netns: path, Key: path})
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.warm[path] = w
	return nil
}

// Unwire undoes Prewire for a namespace that is thrown away. One not wired is success.
func (n *Network) Unwire(_ context.Context, path string) error {
	n.life.RLock()
	defer n.life.RUnlock()
	if w := n.takeWarm(path); w != nil {
		w.pod.Close()
	}
	return n.dropLink(n.LinkName(path))
}

// Wired says whether the namespace at path was wired by this process and is not attached yet.
func (n *Network) Wired(path string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.warm[path] != nil
}

func (n *Network) takeWarm(path string) *wired {
	n.mu.Lock()
	defer n.mu.Unlock()
	w := n.warm[path]
	delete(n.warm, path)
	return w
}

// wire makes the pair and sets the pod's side up as far as possible without addresses.
func (n *Network) wire(ctx context.Context, node *node, a Attachment) (_ *wired, err error) {
	ns, err := netns.Open(a.Netns)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	w := &wired{Veth: n.pair(a.Key), v6: node.v6}
	w.Peer, w.MTU, w.PeerNS = a.ifName(), node.mtu, ns.FD()
	if w.pod, err = rtnl.Dial(ns); err != nil {
		return nil, err
	}
	var steps undo
	defer func() {
		if err != nil {
			err = steps.run(err)
		}
	}()
	steps.add(func(context.Context) error { return w.pod.Close() })

	if err := n.addVeth(w.Veth); err != nil {
		return nil, err
	}
	steps.add(func(context.Context) error { return n.dropLink(w.Name) })
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	link, err := n.rt.LinkByName(w.Name)
	if err != nil {
		return nil, err
	}
	w.hostIndex, w.podIndex = link.Index, link.Peer

	var host rtnl.Batch
	host.Alias(w.hostIndex, n.alias("", a.Netns))
	if node.v6 {
		host.NoAutoAddr(w.hostIndex)
	}
	if err := n.rt.Do(&host); err != nil {
		return nil, err
	}
	if err := n.protect(w); err != nil {
		return nil, err
	}
	if err := w.preparePod(); err != nil {
		return nil, err
	}
	return w, nil
}

// protect keeps the host from believing a pod: what it sends from another address than its own is dropped (IPv4; for
// IPv6 the kernel has no such check), and its router advertisements are ignored (CVE-2020-10749).
func (n *Network) protect(w *wired) error {
	set := []string{"net/ipv4/conf/" + w.Name + "/rp_filter", "1"}
	if w.v6 {
		set = append(set, "net/ipv6/conf/"+w.Name+"/accept_ra", "0")
	}
	return n.sysctl(set...)
}

// addVeth makes the pair. If it is there, that may be one already given up and not yet deleted.
func (n *Network) addVeth(v rtnl.Veth) error {
	var b rtnl.Batch
	b.AddVeth(v)
	err := n.rt.Do(&b)
	if errors.Is(err, unix.EEXIST) {
		n.deleteDead()
		err = n.rt.Do(&b)
	}
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%w (the namespace is attached already, or has a link %s): %w", err, v.Peer, errdefs.ErrAlreadyExists)
	}
	return err
}

// preparePod does the pod's side: loopback, link, neighbours, routes.
func (w *wired) preparePod() error {
	var b rtnl.Batch
	b.LinkUp(1, "set pod's loopback up")
	if w.v6 {
		b.NoAutoAddr(w.podIndex)
	}
	b.LinkUp(w.podIndex, "set pod's "+w.Peer+" up")
	b.AddNeigh(w.podIndex, gateway4, w.MAC, "add pod's neighbour "+gateway4.String())
	b.AddRoute(rtnl.Route{Dst: host(gateway4), Link: w.podIndex, Protocol: Protocol}, "add pod's route to "+gateway4.String())
	b.AddRoute(rtnl.Route{Dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Gateway: gateway4, Link: w.podIndex, Protocol: Protocol}, "add pod's default route")
	if err := w.pod.Do(&b); err != nil {
		return err
	}
	if !w.v6 {
		return nil
	}
	var v6 rtnl.Batch
	v6.AddAddr(w.podIndex, netip.PrefixFrom(w.linkLocal(), 64), "add pod's link-local address")
	v6.AddNeigh(w.podIndex, gateway6, w.MAC, "add pod's neighbour "+gateway6.String())
	v6.AddRoute(rtnl.Route{Dst: netip.PrefixFrom(netip.IPv6Unspecified(), 0), Gateway: gateway6, Link: w.podIndex, Protocol: Protocol}, "add pod's IPv6 default route")
	err := w.pod.Do(&v6)
	if noIPv6(err) {
		w.v6 = false
		return nil
	}
	return err
}

// linkLocal is fe80:: and the EUI-64 of the pod's MAC.
func (w *wired) linkLocal() netip.Addr {
	m := w.PeerMAC
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]})
}

// noIPv6 says whether err means that IPv6 is turned off in the namespace or on the link.
func noIPv6(err error) bool {
	return errors.Is(err, unix.EACCES) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// alias is the mark a person sees: "nodeagent sandbox=... netns=...", at most 255 bytes.
func (n *Network) alias(sandbox, path string) string {
	s := "nodeagent instance=" + n.cfg.Name
	if sandbox != "" {
		s += " sandbox=" + sandbox
	}
	if path != "" {
		s += " netns=" + path
	}
	return strings.ToValidUTF8(s[:min(len(s), 255)], "")
}

// dropLink gives the link called name up: it leaves the group of links in use at once, and is deleted by
// Run together with others, or here if Run is not there.
func (n *Network) dropLink(name string) error {
	var b rtnl.Batch
	b.SetGroupByName(name, n.dead)
	if err := n.rt.Do(&b); err != nil {
		return err
	}
	return n.deleteSoon()
}

func (n *Network) deleteSoon() error {
	if n.running.Load() {
		kick(n.reap)
		return nil
	}
	var b rtnl.Batch
	b.DelGroup(n.dead)
	return n.rt.Do(&b)
}
