package builtin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/cni/rtnl"
	"golang.org/x/sys/unix"
)

// Check compares an attachment with what Attach made and names every difference: address records, the
// host's link and routes, the pod's link, addresses and default routes.
//
// Errors: FailedPrecondition if something is missing or different.
func (n *Network) Check(_ context.Context, a Attachment, ips []netip.Addr) error {
	n.life.RLock()
	defer n.life.RUnlock()
	var faults []error
	fault := func(format string, args ...any) {
		faults = append(faults, fmt.Errorf(format+": %w", append(args, errdefs.ErrFailedPrecondition)...))
	}
	for _, ip := range ips {
		rec, err := n.pool.Get(ip)
		if err != nil {
			faults = append(faults, err)
		} else if rec.Sandbox != a.SandboxID || rec.Network != n.cfg.Name {
			fault("address %s is held by sandbox %s of network %s", ip, rec.Sandbox, rec.Network)
		}
	}
	want := n.pair(a.Key)
	link, err := n.rt.LinkByName(want.Name)
	switch {
	case errors.Is(err, unix.ENODEV):
		fault("link %s is missing", want.Name)
	case err != nil:
		return fmt.Errorf("check sandbox %s: %w", a.SandboxID, err)
	case link.Flags&unix.IFF_UP == 0:
		fault("link %s is down", want.Name)
	case link.Group != n.group:
		fault("link %s is in interface group %d, not %d", want.Name, link.Group, n.group)
	}
	routes, err := n.rt.Routes()
	if err != nil {
		return fmt.Errorf("check sandbox %s: %w", a.SandboxID, err)
	}
	for _, ip := range ips {
		if !hasRoute(routes, host(ip), link.Index) {
			fault("route to %s by %s is missing", ip, want.Name)
		}
	}
	if err := n.checkPod(a, link.Peer, ips, fault); err != nil {
		return fmt.Errorf("check sandbox %s: %w", a.SandboxID, err)
	}
	if err := errors.Join(faults...); err != nil {
		return fmt.Errorf("check sandbox %s: %w", a.SandboxID, err)
	}
	return nil
}

func hasRoute(routes []rtnl.Route, dst netip.Prefix, link int) bool {
	for _, r := range routes {
		if r.Dst == dst && r.Link == link {
			return true
		}
	}
	return false
}

// checkPod looks at the pod's side.
func (n *Network) checkPod(a Attachment, index int, ips []netip.Addr, fault func(string, ...any)) error {
	c, err := rtnl.DialPath(a.Netns)
	if err != nil {
		return err
	}
	defer c.Close()
	links, err := c.Links("")
	if err != nil {
		return err
	}
	found := false
	for _, l := range links {
		if l.Index == loopbackIndex && l.Flags&unix.IFF_UP == 0 {
			fault("pod's loopback is down")
		}
		if l.Name == a.ifName() && l.Index == index {
			if found = true; l.Flags&unix.IFF_UP == 0 {
				fault("pod's %s is down", l.Name)
			}
		}
	}
	if !found {
		fault("pod's %s is missing", a.ifName())
	}
	addrs, err := c.Addrs()
	if err != nil {
		return err
	}
	have := map[rtnl.Addr]bool{}
	for _, ad := range addrs {
		have[ad] = true
	}
	routes, err := c.Routes()
	if err != nil {
		return err
	}
	for _, ip := range ips {
		if !have[rtnl.Addr{Link: index, Prefix: host(ip)}] {
			fault("pod has not the address %s", ip)
		}
		all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if ip.Is6() {
			all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		if !hasRoute(routes, all, index) {
			fault("pod has no default route for %s", ip)
		}
	}
	return nil
}
