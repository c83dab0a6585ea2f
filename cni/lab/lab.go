// Package lab builds network namespaces for tests: a node of one's own, pods, and an outside host
// behind the node's uplink. Only tests import it. Everything it makes is gone when the test ends.
// It needs root; New skips the test without. No locks; a Lab belongs to one test.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/nodeagent/nodeagent/cni/netns"
	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Addresses of the uplink: the node's and the outside host's, IPv4 and IPv6.
var (
	NodeIP4    = netip.MustParseAddr("192.0.2.1")
	NodeIP6    = netip.MustParseAddr("2001:db8::1")
	OutsideIP4 = netip.MustParseAddr("192.0.2.2")
	OutsideIP6 = netip.MustParseAddr("2001:db8::2")
)

// Lab is a node and what is around it.
type Lab struct {
	t       testing.TB
	Dir     string
	Node    string // path of the node's namespace
	Outside string // "" without WithOutside
	nodeH   *netns.Handle
}

// New makes a node: a namespace with loopback up.
func New(t testing.TB) *Lab {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: network namespaces")
	}
	l := &Lab{t: t, Dir: t.TempDir()}
	l.Node = l.Netns("node")
	h, err := netns.Open(l.Node)
	if err != nil {
		t.Fatal(err)
	}
	l.nodeH = h
	t.Cleanup(func() { h.Close() })
	l.In(l.Node, func() error { return up("lo") })
	return l
}

// Netns makes a namespace pinned at a path that is returned.
func (l *Lab) Netns(name string) string {
	l.t.Helper()
	path := filepath.Join(l.Dir, name)
	if err := Pin(path); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { Unpin(path) })
	return path
}

// Pin makes a new network namespace and binds it to path.
func Pin(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	f.Close()
	done := make(chan error)
	go func() {
		// The thread is not unlocked: it ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	}()
	return <-done
}

// Unpin drops a namespace made by Pin.
func Unpin(path string) {
	_ = unix.Unmount(path, unix.MNT_DETACH)
	_ = os.Remove(path)
}

// Do runs f in the namespace at path.
func Do(path string, f func() error) error {
	h, err := netns.Open(path)
	if err != nil {
		return err
	}
	defer h.Close()
	return netns.Do(h, f)
}

// In runs f in the namespace at path and fails the test on an error.
func (l *Lab) In(path string, f func() error) {
	l.t.Helper()
	if err := Do(path, f); err != nil {
		l.t.Fatalf("in %s: %v", filepath.Base(path), err)
	}
}

// WithOutside adds a host behind the node's link "uplink", which has the default routes. The outside host
// knows no route to pods, so only masqueraded packets are answered.
func (l *Lab) WithOutside(mtu int) *Lab {
	l.t.Helper()
	l.Outside = l.Netns("outside")
	out, err := vnetns.GetFromPath(l.Outside)
	if err != nil {
		l.t.Fatal(err)
	}
	defer out.Close()
	l.In(l.Node, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = "uplink", mtu
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "uplink", PeerNamespace: netlink.NsFd(out)}); err != nil {
			return err
		}
		return errors.Join(addr("uplink", NodeIP4, 24), addr("uplink", NodeIP6, 64), up("uplink"))
	})
	l.In(l.Outside, func() error {
		return errors.Join(up("lo"), addr("uplink", OutsideIP4, 24), addr("uplink", OutsideIP6, 64), up("uplink"))
	})
	l.In(l.Node, func() error {
		return errors.Join(defaultRoute(OutsideIP4), defaultRoute(OutsideIP6))
	})
	return l
}

func up(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

func addr(name string, ip netip.Addr, bits int) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(bits, ip.BitLen())}}
	if ip.Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrAdd(link, a)
}

func defaultRoute(via netip.Addr) error {
	link, err := netlink.LinkByName("uplink")
	if err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{Gw: via.AsSlice(), LinkIndex: link.Attrs().Index})
}

// Links lists the names of the node's links that begin with prefix.
func (l *Lab) Links(prefix string) []string {
	l.t.Helper()
	var names []string
	l.In(l.Node, func() error {
		links, err := netlink.LinkList()
		for _, link := range links {
			if strings.HasPrefix(link.Attrs().Name, prefix) {
				names = append(names, link.Attrs().Name)
			}
		}
		return err
	})
	return names
}

// Echo answers every connection or datagram at addr in the namespace at path: it sends back the address of the
// peer, a blank and what came. It ends with the test.
func (l *Lab) Echo(path, network, addr string) {
	l.t.Helper()
	l.In(path, func() error {
		if strings.HasPrefix(network, "udp") {
			pc, err := net.ListenPacket(network, addr)
			if err != nil {
				return err
			}
			l.t.Cleanup(func() { pc.Close() })
			go func() {
				buf := make([]byte, 2048)
				for {
					n, from, err := pc.ReadFrom(buf)
					if err != nil {
						return
					}
					_, _ = pc.WriteTo([]byte(hostOf(from)+" "+string(buf[:n])), from)
				}
			}()
			return nil
		}
		ln, err := net.Listen(network, addr)
		if err != nil {
			return err
		}
		l.t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					buf := make([]byte, 2048)
					n, _ := c.Read(buf)
					_, _ = c.Write([]byte(hostOf(c.RemoteAddr()) + " " + string(buf[:n])))
				}()
			}
		}()
		return nil
	})
}

func hostOf(a net.Addr) string {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return a.String()
	}
	return ap.Addr().Unmap().String()
}

// Ask sends a word from the namespace at path to an Echo at addr and returns the address the echo saw.
// Datagrams are sent again a few times.
func Ask(path, network, addr string) (peer string, err error) {
	return AskFrom(path, network, "", addr)
}

// AskFrom is Ask with the local address local ("": any).
func AskFrom(path, network, local, addr string) (peer string, err error) {
	for try := range 4 {
		var c net.Conn
		err = Do(path, func() error {
			d := net.Dialer{Timeout: time.Second}
			if local != "" {
				if strings.HasPrefix(network, "udp") {
					d.LocalAddr = net.UDPAddrFromAddrPort(netip.MustParseAddrPort(local))
				} else {
					d.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(local))
				}
			}
			var err error
			c, err = d.DialContext(context.Background(), network, addr)
			return err
		})
		if err == nil {
			peer, err = exchange(c, fmt.Sprintf("word%d", try))
			if err == nil {
				return peer, nil
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	return "", err
}

func exchange(c net.Conn, word string) (string, error) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(500 * time.Millisecond))
	if _, err := c.Write([]byte(word)); err != nil {
		return "", err
	}
	buf := make([]byte, 2048)
	n, err := c.Read(buf)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	peer, got, _ := strings.Cut(string(buf[:n]), " ")
	if got != word {
		return "", fmt.Errorf("sent %q, got back %q", word, got)
	}
	return peer, nil
}

// Ping sends one ICMP or ICMPv6 echo from the namespace at path and waits for the answer.
func Ping(path string, ip netip.Addr) error {
	network, body := "ip4:icmp", []byte{8, 0, 0, 0, 0x6e, 0x61, 0, 1}
	if ip.Is6() {
		network, body = "ip6:ipv6-icmp", []byte{128, 0, 0, 0, 0x6e, 0x61, 0, 1}
	} else {
		sum := uint16(0x0800) + 0x6e61 + 1
		body[2], body[3] = byte(^sum>>8), byte(^sum)
	}
	var c net.Conn
	if err := Do(path, func() (err error) {
		c, err = net.Dial(network, ip.String())
		return err
	}); err != nil {
		return err
	}
	defer c.Close()
	var err error
	for range 4 {
		if _, err = c.Write(body); err != nil {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		_ = c.SetReadDeadline(time.Now().Add(400 * time.Millisecond))
		buf := make([]byte, 256)
		var n int
		for {
			if n, err = c.Read(buf); err != nil {
				break
			}
			msg := buf[:n]
			if ip.Is4() && n >= 20 {
				msg = msg[20:] // Read leaves the IPv4 header in place
			}
			if len(msg) >= 8 && (msg[0] == 0 || msg[0] == 129) {
				return nil
			}
		}
	}
	return fmt.Errorf("ping %s: %w", ip, err)
}

// In runs f in the namespace at path and fails the test on an error.
func In(t testing.TB, path string, f func() error) {
	t.Helper()
	if err := Do(path, f); err != nil {
		t.Fatalf("in %s: %v", filepath.Base(path), err)
	}
}

// SendLoopbackAway makes a pod's namespace send packets to 127.0.0.0/8 out of eth0 to via, as a hostile pod can.
func SendLoopbackAway(via netip.Addr) error {
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	for _, key := range []string{"eth0/route_localnet", "all/rp_filter", "eth0/rp_filter"} {
		value := "0"
		if strings.HasSuffix(key, "localnet") {
			value = "1"
		}
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+key, []byte(value), 0); err != nil {
			return err
		}
	}
	loopback := &net.IPNet{IP: net.IPv4(127, 0, 0, 0).To4(), Mask: net.CIDRMask(8, 32)}
	away, local := netlink.NewRule(), netlink.NewRule()
	away.Priority, away.Table, away.Dst = 5, 100, loopback
	local.Priority, local.Table = 10, unix.RT_TABLE_LOCAL
	first := netlink.NewRule()
	first.Priority, first.Table = 0, unix.RT_TABLE_LOCAL
	return errors.Join(netlink.RuleAdd(away), netlink.RuleAdd(local), netlink.RuleDel(first),
		netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: via.AsSlice(), Dst: loopback, Table: 100}))
}
