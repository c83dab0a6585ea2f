//go:build linux

package sockets

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/nodeagent/nodeagent/ebpf/datapath"
)

// TestList: connections in both directions, of both families and by way of a
// socket for both, are found with who opened them.
func TestList(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	path := make(chan string)
	quit := make(chan struct{})
	var want []datapath.Flow
	go func() { // the thread, and the namespace with it, ends with the goroutine
		runtime.LockOSThread()
		defer close(path)
		ns, err := netns.New()
		if err != nil {
			t.Error(err)
			return
		}
		defer ns.Close()
		if want, err = talk(); err != nil {
			t.Error(err)
			return
		}
		path <- fmt.Sprintf("/proc/self/fd/%d", int(ns))
		<-quit
	}()
	at, ok := <-path
	if !ok {
		t.FailNow()
	}
	defer close(quit)
	got, err := List(at)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range want {
		if !slices.Contains(got, w) {
			t.Errorf("%+v is missing", w)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d flows, want %d: %+v", len(got), len(want), got)
	}
	if _, err := List("/nowhere"); err == nil {
		t.Error("a namespace that is not there has sockets")
	}
}

// talk connects to two addresses of the calling thread's namespace.
func talk() (want []datapath.Flow, err error) {
	l := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "d0"}, PeerName: "d1"}
	if err := netlink.LinkAdd(l); err != nil {
		return nil, err
	}
	for _, text := range []string{"192.0.2.1/24", "2001:db8::1/64"} {
		a, err := netlink.ParseAddr(text)
		if err != nil {
			return nil, err
		}
		a.Flags = 2 // nodad
		if a.IP.To4() != nil {
			a.Flags = 0
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return nil, err
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	for _, x := range []netlink.Link{l, lo} {
		if err := netlink.LinkSetUp(x); err != nil {
			return nil, err
		}
	}
	ln, err := net.Listen("tcp", ":0") // both families: IPv4 as mapped addresses
	if err != nil {
		return nil, err
	}
	port := ln.Addr().(*net.TCPAddr).Port
	for _, host := range []string{"192.0.2.1", "2001:db8::1"} {
		c, err := net.Dial("tcp", net.JoinHostPort(host, fmt.Sprint(port)))
		if err != nil {
			return nil, err
		}
		s, err := ln.Accept()
		if err != nil {
			return nil, err
		}
		u, err := net.Dial("udp", net.JoinHostPort(host, "53"))
		if err != nil {
			return nil, err
		}
		ca, sa, ua := c.LocalAddr().(*net.TCPAddr).AddrPort(), s.LocalAddr().(*net.TCPAddr).AddrPort(), u.LocalAddr().(*net.UDPAddr)
		ur := u.RemoteAddr().(*net.UDPAddr)
		want = append(want,
			datapath.Flow{Protocol: 6, Local: unmapped(ca), Remote: unmapped(sa), Opened: true},
			datapath.Flow{Protocol: 6, Local: unmapped(sa), Remote: unmapped(ca)},
			datapath.Flow{Protocol: 17, Local: unmapped(ua.AddrPort()), Remote: unmapped(ur.AddrPort()), Opened: true})
	}
	return want, nil
}

func unmapped(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
