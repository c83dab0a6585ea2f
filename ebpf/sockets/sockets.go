//go:build linux

// Package sockets reads which flows the sockets of a network namespace have,
// and who opened them, so that conntrack knows flows of pods that ran before
// they were watched.
//
// It changes nothing. Callers: package ebpf, once per pod after start. No
// goroutines, no locks; functions may be called from any goroutine.
package sockets

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/ebpf/datapath"
	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// List reads the connected TCP and UDP sockets of the namespace at path. A TCP
// connection to a port on which the namespace listens was opened by the peer,
// another by the namespace; who connects a UDP socket opens.
func List(path string) ([]datapath.Flow, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, fmt.Errorf("ask network namespace %s for sockets: %w", path, err)
	}
	defer h.Close()
	var out []datapath.Flow
	var errs []error
	for _, proto := range []uint8{objects.TCP, objects.UDP} {
		list, err := dump(h, proto)
		if err != nil {
			errs = append(errs, fmt.Errorf("list sockets of protocol %d in %s: %w", proto, path, err))
		}
		out = append(out, flowsOf(proto, list)...)
	}
	return out, errors.Join(errs...)
}

// dump lists both families. A list that changed while it was read is taken as
// it is: what is missing has just come or gone.
func dump(h *netlink.Handle, proto uint8) (list []*netlink.Socket, err error) {
	ask := h.SocketDiagTCP
	if proto == objects.UDP {
		ask = h.SocketDiagUDP
	}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		found, e := ask(family)
		if e != nil && !errors.Is(e, netlink.ErrDumpInterrupted) {
			err = errors.Join(err, e)
		}
		list = append(list, found...)
	}
	return list, err
}

func flowsOf(proto uint8, list []*netlink.Socket) (out []datapath.Flow) {
	listens := map[uint16]bool{}
	for _, s := range list {
		if proto == objects.TCP && s.State == netlink.TCP_LISTEN {
			listens[s.ID.SourcePort] = true
		}
	}
	for _, s := range list {
		if !connected(proto, s) {
			continue
		}
		local, ok := addrPort(s.ID.Source, s.ID.SourcePort)
		remote, ok2 := addrPort(s.ID.Destination, s.ID.DestinationPort)
		if !ok || !ok2 || local.Addr().IsLoopback() || local.Addr().Is4() != remote.Addr().Is4() {
			continue
		}
		out = append(out, datapath.Flow{Protocol: proto, Local: local, Remote: remote, Opened: !listens[local.Port()]})
	}
	return out
}

// connected: TCP past its opening and not gone, UDP that has a peer.
func connected(proto uint8, s *netlink.Socket) bool {
	switch s.State {
	case netlink.TCP_ESTABLISHED:
		return s.ID.DestinationPort != 0
	case netlink.TCP_FIN_WAIT1, netlink.TCP_FIN_WAIT2, netlink.TCP_CLOSE_WAIT, netlink.TCP_LAST_ACK, netlink.TCP_CLOSING:
		return proto == objects.TCP
	}
	return false
}

func addrPort(ip []byte, port uint16) (netip.AddrPort, bool) {
	a, ok := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port), ok
}
