package builtin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/cni/ipam"
	"github.com/nodeagent/nodeagent/cni/nat"
	"github.com/nodeagent/nodeagent/cni/rtnl"
)

// Live is one attachment that exists, for Reconcile.
type Live struct {
	Attachment
	IPs []netip.Addr // as Attach returned them; nil if that is not known
	// KeepPorts: Ports are not known; the host ports that lead to its addresses stay as they are.
	KeepPorts bool
}

// Reconcile frees every link, address, route and host port of this instance that belongs to none of
// live, and restores address records and host ports of live ones that are missing. It waits for calls
// under way; namespaces that this process has prewired count as live.
func (n *Network) Reconcile(_ context.Context, live []Live) error {
	n.life.Lock()
	defer n.life.Unlock()
	n.mu.Lock()
	defer n.mu.Unlock()
	return errors.Join(n.reconcileLinks(live), n.reconcileAddresses(live), n.reconcilePorts(live))
}

func (n *Network) reconcileLinks(live []Live) error {
	names := map[string]bool{}
	for _, l := range live {
		names[n.LinkName(l.Key)] = true
	}
	for _, w := range n.warm {
		names[w.Name] = true
	}
	links, err := n.rt.Links("veth")
	if err != nil {
		return fmt.Errorf("reconcile links: %w", err)
	}
	var b rtnl.Batch
	for _, l := range links {
		if l.Group == n.group && !names[l.Name] {
			b.SetGroupByName(l.Name, n.dead)
		}
	}
	if err := n.rt.Do(&b); err != nil {
		return fmt.Errorf("reconcile links: %w", err)
	}
	var del rtnl.Batch
	del.DelGroup(n.dead)
	if err := n.rt.Do(&del); err != nil {
		return fmt.Errorf("reconcile links: %w", err)
	}
	return nil
}

func (n *Network) reconcileAddresses(live []Live) error {
	type key struct{ sandbox, ifName string }
	known := map[key]map[netip.Addr]bool{}
	addrs := map[netip.Addr]bool{}
	var errs []error
	for _, l := range live {
		k := key{l.SandboxID, l.ifName()}
		known[k] = map[netip.Addr]bool{}
		for _, ip := range l.IPs {
			known[k][ip], addrs[ip] = true, true
		}
	}
	freed, err := n.pool.Keep(n.cfg.Name, func(r ipam.Record) bool {
		ips, ok := known[key{r.Sandbox, r.IfName}]
		return ok && (len(ips) == 0 || ips[r.Addr])
	}, func(a netip.Addr) bool { return addrs[a] })
	if err != nil {
		errs = append(errs, fmt.Errorf("reconcile addresses: %w", err))
	}
	if len(freed) > 0 {
		n.log.Info("addresses of sandboxes that are gone were released", "addresses", len(freed))
	}
	for _, l := range live {
		owner := ipam.Owner{Network: n.cfg.Name, Sandbox: l.SandboxID, IfName: l.ifName(), Netns: l.Netns}
		for _, ip := range l.IPs {
			if err := n.pool.Claim(owner, ip); err != nil {
				errs = append(errs, fmt.Errorf("reconcile addresses: %w", err))
			}
		}
	}
	if err := n.pool.Sweep(); err != nil {
		errs = append(errs, fmt.Errorf("reconcile addresses: %w", err))
	}
	held, _, err := n.pool.Held(n.cfg.Name)
	if err != nil {
		return errors.Join(append(errs, fmt.Errorf("reconcile addresses: %w", err))...)
	}
	err = n.dropFormer(func(p netip.Prefix) bool {
		for _, r := range held {
			if p.Contains(r.Addr) {
				return true
			}
		}
		return false
	})
	if err != nil {
		errs = append(errs, fmt.Errorf("reconcile pod ranges: %w", err))
	}
	return errors.Join(errs...)
}

func (n *Network) reconcilePorts(live []Live) error {
	held, _, err := n.pool.Held(n.cfg.Name)
	if err != nil {
		return fmt.Errorf("reconcile host ports: %w", err)
	}
	ips := map[string][]netip.Addr{}
	for _, r := range held {
		ips[r.Sandbox+"/"+r.IfName] = append(ips[r.Sandbox+"/"+r.IfName], r.Addr)
	}
	var pods []nat.Pod
	keep := map[netip.Addr]bool{}
	for _, l := range live {
		mine := l.IPs
		if len(mine) == 0 {
			mine = ips[l.SandboxID+"/"+l.ifName()]
		}
		switch {
		case l.KeepPorts:
			for _, ip := range mine {
				keep[ip] = true
			}
		case len(l.Ports) > 0 && len(mine) > 0:
			pods = append(pods, nat.Pod{IPs: mine, Ports: l.Ports})
		}
	}
	n.nat.Ranges(n.cidr.all())
	if err := n.nat.Sync(pods, func(pod netip.Addr) bool { return keep[pod] }); err != nil {
		return fmt.Errorf("reconcile host ports: %w", err)
	}
	return nil
}

// Remove takes away what the network made on the host for all pods together: the nftables table, the
// host's addresses and the unreachable routes, and links of warm namespaces. The next Attach makes it all anew.
//
// Errors: FailedPrecondition, and nothing is done, while a sandbox has an address.
func (n *Network) Remove(context.Context) error {
	n.life.Lock()
	defer n.life.Unlock()
	n.mu.Lock()
	defer n.mu.Unlock()
	held, _, err := n.pool.Held(n.cfg.Name)
	if err != nil {
		return fmt.Errorf("remove the built-in network: %w", err)
	}
	if len(held) > 0 {
		return fmt.Errorf("remove the built-in network: sandbox %s and maybe others are on it: %w", held[0].Sandbox, errdefs.ErrFailedPrecondition)
	}
	for path, w := range n.warm {
		w.pod.Close()
		delete(n.warm, path)
	}
	errs := []error{n.reconcileLinks(nil), n.nat.Destroy()}
	var b rtnl.Batch
	for _, p := range n.cidr.all() {
		r, err := ipam.NewRange(p)
		if err != nil {
			continue
		}
		b.DelRoute(p, Protocol, "delete unreachable route "+p.String())
		b.DelAddr(loopbackIndex, host(r.Host()), "delete the host's address "+r.Host().String())
	}
	errs = append(errs, n.rt.Do(&b))
	n.node = nil
	return errors.Join(errs...)
}
