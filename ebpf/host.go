//go:build linux

package ebpf

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// host is what policy needs of this node: its addresses and its interfaces.
type host struct {
	addrs []netip.Addr
	links []hostLink
}

type hostLink struct {
	index        int
	name         string
	ethernet     bool
	defaultRoute bool
}

// watchHost calls changed now and whenever addresses, interfaces or default
// routes have changed, at most ten times a second. A listing that others'
// changes interrupted is taken again; a subscription that overflowed is renewed.
func watchHost(ctx context.Context, changed func(host)) error {
	var last string
	for ctx.Err() == nil {
		err := followHost(ctx, func(h host) {
			if now := fmt.Sprint(h); now != last {
				last = now
				changed(h)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// followHost ends without an error when the subscriptions have to be renewed.
func followHost(ctx context.Context, seen func(host)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	addrs, links, routes := make(chan netlink.AddrUpdate, 64), make(chan netlink.LinkUpdate, 64), make(chan netlink.RouteUpdate, 64)
	if err := netlink.AddrSubscribe(addrs, ctx.Done()); err != nil {
		return fmt.Errorf("watch addresses: %w", err)
	}
	if err := netlink.LinkSubscribe(links, ctx.Done()); err != nil {
		return fmt.Errorf("watch interfaces: %w", err)
	}
	if err := netlink.RouteSubscribe(routes, ctx.Done()); err != nil {
		return fmt.Errorf("watch routes: %w", err)
	}
	for {
		h, err := readHost()
		switch {
		case errors.Is(err, netlink.ErrDumpInterrupted), errors.Is(err, unix.EINTR):
			if !drain(ctx, 20*time.Millisecond, addrs, links, routes) {
				return nil
			}
			continue
		case err != nil:
			return err
		}
		seen(h)
		open := true
		select {
		case <-ctx.Done():
			return nil
		case _, open = <-addrs:
		case _, open = <-links:
		case _, open = <-routes:
		}
		if !open || !drain(ctx, 100*time.Millisecond, addrs, links, routes) {
			time.Sleep(100 * time.Millisecond) // not in a hurry to overflow again
			return nil
		}
	}
}

// drain takes what else is told for a while: pods come and go in numbers. It
// returns false when a subscription has ended.
func drain(ctx context.Context, d time.Duration, addrs chan netlink.AddrUpdate, links chan netlink.LinkUpdate, routes chan netlink.RouteUpdate) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for open := true; open; {
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case _, open = <-addrs:
		case _, open = <-links:
		case _, open = <-routes:
		}
	}
	return false
}

func readHost() (host, error) {
	var h host
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return h, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			h.addrs = append(h.addrs, ip.Unmap())
		}
	}
	filter := &netlink.Route{Table: unix.RT_TABLE_MAIN}
	def := map[int]bool{}
	for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(f, filter, netlink.RT_FILTER_TABLE)
		if err != nil {
			return h, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if r.Dst != nil {
				if ones, _ := r.Dst.Mask.Size(); ones != 0 {
					continue
				}
			}
			def[r.LinkIndex] = true
			for _, hop := range r.MultiPath {
				def[hop.LinkIndex] = true
			}
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		return h, fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		a := l.Attrs()
		h.links = append(h.links, hostLink{index: a.Index, name: a.Name, ethernet: a.EncapType == "ether", defaultRoute: def[a.Index]})
	}
	return h, nil
}
