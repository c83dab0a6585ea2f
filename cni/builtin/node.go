package builtin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/cni/ipam"
	"github.com/nodeagent/nodeagent/cni/netns"
	"github.com/nodeagent/nodeagent/cni/rtnl"
	"golang.org/x/sys/unix"
)

// loopbackIndex is the index of lo in every namespace.
const loopbackIndex = 1

// prepare makes what all pods share, once; a failure is tried again at the next call.
func (n *Network) prepare(ctx context.Context) (*node, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.node != nil {
		return n.node, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := n.keepCIDRs(); err != nil {
		return nil, err
	}
	nd, err := n.inspect()
	if err != nil {
		return nil, fmt.Errorf("prepare the host for pods: %w", err)
	}
	if err := n.forwarding(nd); err != nil {
		return nil, fmt.Errorf("prepare the host for pods: %w", err)
	}
	if err := n.hostAddresses(nd); err != nil {
		return nil, fmt.Errorf("prepare the host for pods: %w", err)
	}
	n.warnOfFirewall()
	n.nat.Ranges(n.cidr.all())
	if n.cfg.Masquerade {
		if err := n.nat.Masquerade(n.cidr.all(), n.cfg.NoMasquerade); err != nil {
			return nil, fmt.Errorf("prepare the host for pods: %w", err)
		}
	}
	n.node = nd
	return nd, nil
}

// warnOfFirewall says when a firewall of others stands in the pods' way.
func (n *Network) warnOfFirewall() {
	drops, err := n.nat.ForwardDrops()
	if err != nil || len(drops) == 0 {
		return // without nftables that is said when it is needed
	}
	n.log.Warn("a firewall drops forwarded packets: allow the pods' ranges there, or they reach nothing outside the host",
		"chains", drops, "ranges", n.cidr.all())
}

// inspect reads what the host has: IPv6, MTU, and whether the pods' ranges are free.
func (n *Network) inspect() (*node, error) {
	// The pods' links take over "default".
	nd := &node{v6: n.readSysctl("net/ipv6/conf/all/disable_ipv6") == "0" && n.readSysctl("net/ipv6/conf/default/disable_ipv6") == "0"}
	ranges, err := ipam.NewRanges(n.cidrs())
	if err != nil {
		return nil, err
	}
	dropped := false
	for _, r := range ranges {
		i := 0
		if r.Prefix().Addr().Is6() {
			if i = 1; !nd.v6 {
				dropped = true
				continue
			}
		}
		nd.ranges[i] = append(nd.ranges[i], r)
		if !nd.src[i].IsValid() {
			nd.src[i] = r.Host()
		}
	}
	if len(nd.ranges[0])+len(nd.ranges[1]) == 0 {
		return nil, fmt.Errorf("pod ranges are IPv6 only and this host has no IPv6 (net.ipv6.conf.all or default.disable_ipv6 is set, or the kernel has no support): %w", errdefs.ErrFailedPrecondition)
	}
	if dropped {
		n.log.Warn("this host has no IPv6: pods get IPv4 addresses only")
	}
	links, err := n.rt.Links("")
	if err != nil {
		return nil, err
	}
	if nd.mtu, err = n.mtu(links); err != nil {
		return nil, err
	}
	return nd, n.overlap(ranges, links)
}

// mtu is the configured one, or the smallest of the links that lead away from the host.
func (n *Network) mtu(links []rtnl.Link) (int, error) {
	if n.cfg.MTU != 0 {
		return n.cfg.MTU, nil
	}
	out, err := n.rt.DefaultRouteLinks()
	if err != nil {
		return 0, err
	}
	least := 0
	for _, l := range links {
		for _, o := range out {
			if l.Index == o && (least == 0 || l.MTU < least) {
				least = l.MTU
			}
		}
	}
	switch {
	case least == 0:
		return 1500, nil
	case least < 1280:
		return 1280, nil
	}
	return min(least, 65535), nil
}

// overlap refuses pod ranges that hold an address of another link of the host.
func (n *Network) overlap(ranges []ipam.Range, links []rtnl.Link) error {
	addrs, err := n.rt.Addrs()
	if err != nil {
		return err
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Index] = l.Name
	}
	for _, a := range addrs {
		for _, r := range ranges {
			if a.Link != loopbackIndex && r.Prefix().Overlaps(a.Prefix.Masked()) {
				return fmt.Errorf("pod range %s overlaps %s of link %s, choose another: %w", r.Prefix(), a.Prefix, names[a.Link], errdefs.ErrFailedPrecondition)
			}
		}
	}
	return nil
}

// forwarding lets the host route. Turning it on for IPv6 makes the kernel ignore router
// advertisements on links with accept_ra=1, which would cost the host its own default route: they get 2.
func (n *Network) forwarding(nd *node) error {
	if len(nd.ranges[0]) > 0 {
		if err := n.sysctl("net/ipv4/ip_forward", "1"); err != nil {
			return err
		}
	}
	if len(nd.ranges[1]) == 0 || n.readSysctl("net/ipv6/conf/all/forwarding") == "1" {
		return nil
	}
	err := netns.Do(n.host, func() error {
		dirs, err := os.ReadDir("/proc/sys/net/ipv6/conf")
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		for _, d := range dirs {
			key := "net/ipv6/conf/" + d.Name() + "/accept_ra"
			if d.Name() == "all" || d.Name() == "default" || readSysctl(key) != "1" {
				continue
			}
			if err := writeSysctl(key, "2"); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return n.sysctl("net/ipv6/conf/all/forwarding", "1")
}

// hostAddresses gives the host its own address in each family's first range, and answers for addresses of the
// ranges that no pod has with "unreachable" instead of sending them to the default route.
func (n *Network) hostAddresses(nd *node) error {
	var b rtnl.Batch
	b.LinkUp(loopbackIndex, "set lo up")
	for _, src := range nd.src {
		if src.IsValid() {
			b.AddAddr(loopbackIndex, host(src), "add the host's address "+src.String()+" to lo", unix.EEXIST)
		}
	}
	for _, ranges := range nd.ranges {
		for _, r := range ranges {
			b.AddRoute(unreachable(r.Prefix()), "add unreachable route "+r.Prefix().String())
		}
	}
	return n.rt.Do(&b)
}

func unreachable(p netip.Prefix) rtnl.Route {
	return rtnl.Route{Dst: p, Protocol: Protocol, Type: unix.RTN_UNREACHABLE, Metric: 4096}
}

// sysctl writes values in the host's namespace, given as key, value, key, value. One that is set already needs no
// permission.
func (n *Network) sysctl(keyValues ...string) error {
	return netns.Do(n.host, func() error {
		for i := 0; i < len(keyValues); i += 2 {
			if err := writeSysctl(keyValues[i], keyValues[i+1]); err != nil {
				return err
			}
		}
		return nil
	})
}

func writeSysctl(key, value string) error {
	err := os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0)
	if err == nil || readSysctl(key) == value {
		return nil
	}
	name := strings.ReplaceAll(key, "/", ".")
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) {
		return fmt.Errorf("set sysctl %s=%s: %w: not permitted here, set it yourself: %w", name, value, err, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("set sysctl %s=%s: %w", name, value, err)
}

// readSysctl is the value in the thread's namespace, "" if there is none.
func readSysctl(key string) string {
	p, err := os.ReadFile(filepath.Join("/proc/sys", key))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(p))
}

// readSysctl is the value in the host's namespace, "" if there is none.
func (n *Network) readSysctl(key string) string {
	var v string
	_ = netns.Do(n.host, func() error {
		v = readSysctl(key)
		return nil
	})
	return v
}

// Status is nil when pods can be attached: the host is prepared, or could be right now.
func (n *Network) Status(ctx context.Context) error {
	_, err := n.prepare(ctx)
	return err
}
