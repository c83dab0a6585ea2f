package builtin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/cni/ipam"
	"github.com/nodeagent/nodeagent/cni/rtnl"
	"golang.org/x/sys/unix"
)

// Attach gives the namespace its addresses and connects it. All or nothing: on an error, or when ctx
// ends before the last step, everything made is undone (the pair too, even one made by Prewire).
//
// Errors: ResourceExhausted without a free address; AlreadyExists if it is attached already or a
// host port is taken; NotFound if there is no namespace; FailedPrecondition if the host cannot do it.
func (n *Network) Attach(ctx context.Context, a Attachment) (_ Attached, err error) {
	n.life.RLock()
	defer n.life.RUnlock()
	defer func() {
		if err != nil {
			err = fmt.Errorf("attach sandbox %s to the built-in network: %w", a.SandboxID, err)
		}
	}()
	node, err := n.prepare(ctx)
	if err != nil {
		return Attached{}, err
	}
	var steps undo
	defer func() {
		if err != nil {
			err = steps.run(err)
		}
	}()
	w := n.takeWarm(a.Key)
	if w == nil {
		if w, err = n.wire(ctx, node, a); err != nil {
			return Attached{}, err
		}
	}
	defer w.pod.Close()
	steps.add(func(context.Context) error { return n.dropLink(w.Name) })

	ips, err := n.addresses(node, a, w, &steps)
	if err != nil {
		return Attached{}, err
	}
	if len(a.Ports) > 0 {
		if err := n.openPorts(a, w, ips, &steps); err != nil {
			return Attached{}, err
		}
	}
	if err := n.limit(a, w); err != nil {
		return Attached{}, err
	}
	if n.cfg.BeforeUp != nil {
		if err := n.cfg.BeforeUp(ctx, a.SandboxID, w.hostIndex, ips); err != nil {
			return Attached{}, fmt.Errorf("prepare link %s before it goes up: %w", w.Name, err)
		}
	}
	if err := ctx.Err(); err != nil {
		return Attached{}, err
	}
	if err := n.connect(node, a, w, ips); err != nil {
		return Attached{}, err
	}
	return Attached{IPs: ips, HostInterface: w.Name, HostIndex: w.hostIndex, HostMAC: w.MAC, MAC: w.PeerMAC, MTU: node.mtu}, nil
}

// addresses allocates one address of each family that host and pod have, and puts them on the pod's link.
func (n *Network) addresses(node *node, a Attachment, w *wired, steps *undo) ([]netip.Addr, error) {
	owner := ipam.Owner{Network: n.cfg.Name, Sandbox: a.SandboxID, IfName: a.ifName(), Netns: a.Netns}
	var ips []netip.Addr
	for family, ranges := range node.ranges {
		if len(ranges) == 0 || family == 1 && !w.v6 {
			continue
		}
		ip, err := n.pool.Allocate(owner, ranges)
		if err != nil {
			return nil, err
		}
		steps.add(func(context.Context) error { return n.pool.Free(ip) })
		err = w.addAddress(ip)
		if family == 1 && noIPv6(err) {
			// It was turned off in the namespace after it was wired: IPv4 alone serves.
			n.log.Info("pod has no IPv6", "sandbox", a.SandboxID, "err", err)
			w.v6 = false
			if err := n.pool.Free(ip); err != nil {
				return nil, err
			}
			*steps = (*steps)[:len(*steps)-1]
			continue
		}
		if err != nil {
			return nil, err
		}
		ips = append(ips, ip)
	}
	if len(ips) == 0 {
		return nil, fmt.Errorf("no address family is left: pod ranges are IPv6 only and the namespace has no IPv6: %w", errdefs.ErrFailedPrecondition)
	}
	return ips, nil
}

// addAddress puts ip on the pod's link.
func (w *wired) addAddress(ip netip.Addr) error {
	var b rtnl.Batch
	b.AddAddr(w.podIndex, host(ip), "add pod's address "+ip.String())
	if ip.Is6() {
		b.AddRoute(localRoute(w.podIndex, ip), "add pod's local route "+ip.String())
	}
	return w.pod.Do(&b)
}

// localRoute makes the pod's namespace take packets to ip at once. The kernel adds this route itself, but for IPv6 from a
// worker (net/ipv6/addrconf.c, addrconf_dad_work, even without duplicate address detection), and until then drops them.
// Its own has a smaller metric and so stands before this one.
func localRoute(link int, ip netip.Addr) rtnl.Route {
	return rtnl.Route{Dst: host(ip), Link: link, Protocol: Protocol, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Metric: 4096}
}

// limit puts the pod's bandwidth limits in place: each on the sending end of the pair.
func (n *Network) limit(a Attachment, w *wired) error {
	for _, l := range []struct {
		bits  uint64
		conn  *rtnl.Conn
		index int
		what  string
	}{{a.Ingress, n.rt, w.hostIndex, "limit what the pod receives"}, {a.Egress, w.pod, w.podIndex, "limit what the pod sends"}} {
		if l.bits == 0 {
			continue
		}
		rate := max(l.bits/8, 1)
		burst := max(rate/20, 128<<10) // 50 ms, and at least two of the largest packets that segmentation offload makes
		var b rtnl.Batch
		b.Shape(l.index, rate, burst, burst+rate/10, l.what)
		if err := l.conn.Do(&b); err != nil {
			return fmt.Errorf("%w (needs the kernel's sch_tbf): %w", err, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// connect sets the host's end up, which lets packets pass, and adds the routes.
func (n *Network) connect(node *node, a Attachment, w *wired, ips []netip.Addr) error {
	var b rtnl.Batch
	b.Alias(w.hostIndex, n.alias(a.SandboxID, a.Netns))
	for _, ip := range ips {
		b.AddNeigh(w.hostIndex, ip, w.PeerMAC, "add neighbour "+ip.String())
	}
	b.LinkUp(w.hostIndex, "set link "+w.Name+" up")
	for _, ip := range ips {
		b.AddRoute(n.podRoute(node, w.hostIndex, ip), "add route to "+ip.String())
		if ip.Is6() && len(a.Ports) > 0 {
			b.AddRoute(loopbackRoute(w.hostIndex), "add route of answers to ::1")
		}
	}
	if err := n.rt.Do(&b); err != nil {
		return err
	}
	// The host's end could send as soon as it was up; the question only makes its state known sooner.
	if _, err := n.rt.LinkByIndex(w.hostIndex); err != nil {
		return err
	}
	return w.ready()
}

// ready waits until the pod's end can send. It got its carrier when the host's end went up, but drops everything until
// the kernel's link watch, a worker, has seen that; only then is it "operationally up". From kernel 6.14 asking
// for the link makes the kernel catch up first, so one question is enough (commit "net: ethtool/rtnetlink: synchronize
// carrier state with link watch"); before, it may take a moment, at most a second.
func (w *wired) ready() error {
	const operUp = 6
	for deadline := time.Now().Add(time.Second); ; time.Sleep(200 * time.Microsecond) {
		link, err := w.pod.LinkByIndex(w.podIndex)
		if err != nil || link.Oper == operUp || time.Now().After(deadline) {
			return err
		}
	}
}

func (n *Network) podRoute(node *node, link int, ip netip.Addr) rtnl.Route {
	src := node.src[0]
	if ip.Is6() {
		src = node.src[1]
	}
	return rtnl.Route{Dst: host(ip), Link: link, Src: src, Protocol: Protocol}
}

// loopbackRoute lets the answer to a connection from ::1 to one of the pod's host ports come in by link: the
// kernel looks up loopback addresses among the routes of the incoming link only (net/ipv6/route.c, rt6_need_strict).
// It opens nothing: a packet that has ::1 in it on the wire is dropped before (ip6_rcv_core). The metric
// keeps it behind that of lo.
func loopbackRoute(link int) rtnl.Route {
	return rtnl.Route{Dst: host(netip.IPv6Loopback()), Link: link, Protocol: Protocol, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Metric: 4096}
}

// openPorts makes the pod's host ports, and lets the host's loopback addresses be sources on its link.
func (n *Network) openPorts(a Attachment, w *wired, ips []netip.Addr, steps *undo) error {
	steps.add(func(context.Context) error { return n.nat.Remove(ips) })
	if err := n.nat.Add(a.Ports, ips); err != nil {
		return err
	}
	n.forgetSoon()
	return n.sysctl("net/ipv4/conf/"+w.Name+"/route_localnet", "1")
}

// forgetSoon has Run forget connections of UDP host ports, or does it if Run is not there.
func (n *Network) forgetSoon() {
	switch {
	case !n.nat.Stale():
	case n.running.Load():
		kick(n.stale)
	default:
		n.forgetConnections()
	}
}

// Detach takes the attachment away: routes and addresses now, the link soon. ips are those Attach returned; without them
// they are looked up in the address records. What is gone already is success.
func (n *Network) Detach(_ context.Context, a Attachment, ips []netip.Addr) error {
	n.life.RLock()
	defer n.life.RUnlock()
	if w := n.takeWarm(a.Key); w != nil {
		w.pod.Close()
	}
	held, err := n.heldBy(a, ips)
	errs := []error{err}
	var b rtnl.Batch
	b.SetGroupByName(n.LinkName(a.Key), n.dead)
	for _, ip := range held {
		b.DelRoute(host(ip), Protocol, "delete route to "+ip.String())
	}
	if err := n.rt.Do(&b); err != nil {
		errs = append(errs, err)
	}
	if len(a.Ports) > 0 || len(ips) == 0 && len(held) > 0 || n.nat.Has(held) {
		if err := n.nat.Remove(held); err != nil {
			errs = append(errs, err)
		}
		n.forgetSoon()
	}
	// Only now may others have the addresses.
	if errors.Join(errs...) == nil {
		for _, ip := range held {
			errs = append(errs, n.pool.Release(n.cfg.Name, a.SandboxID, ip))
		}
	}
	errs = append(errs, n.deleteSoon())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("detach sandbox %s from the built-in network: %w", a.SandboxID, err)
	}
	return nil
}

// heldBy is which of ips the attachment still holds, or everything it holds if ips are not known. What another got
// since, when this is a second removal, is left alone.
func (n *Network) heldBy(a Attachment, ips []netip.Addr) ([]netip.Addr, error) {
	var held []netip.Addr
	mine := func(r ipam.Record) bool {
		return r.Network == n.cfg.Name && r.Sandbox == a.SandboxID && r.IfName == a.ifName()
	}
	if len(ips) == 0 {
		recs, _, err := n.pool.Held(n.cfg.Name)
		for _, r := range recs {
			if mine(r) {
				held = append(held, r.Addr)
			}
		}
		return held, err
	}
	for _, ip := range ips {
		switch rec, err := n.pool.Get(ip); {
		case err == nil && mine(rec):
			held = append(held, ip)
		case err != nil && !errors.Is(err, errdefs.ErrNotFound):
			return held, err
		}
	}
	return held, nil
}
