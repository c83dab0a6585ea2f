package rtnl

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/nodeagent/nodeagent/cni/lab"
	"github.com/nodeagent/nodeagent/cni/netns"
	"golang.org/x/sys/unix"
)

func dial(t *testing.T) *Conn {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: network namespaces")
	}
	l := lab.New(t)
	h, err := netns.Open(l.Node)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	c, err := Dial(h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestBatchReportsWhatFailed(t *testing.T) {
	c := dial(t)
	var b Batch
	b.AddAddr(1, netip.MustParsePrefix("10.0.0.1/32"), "first")
	b.AddRoute(Route{Dst: netip.MustParsePrefix("10.1.0.0/24"), Link: 99}, "second")
	b.AddAddr(1, netip.MustParsePrefix("10.0.0.2/32"), "third")
	b.AddAddr(1, netip.MustParsePrefix("10.0.0.1/32"), "fourth")
	b.AddAddr(1, netip.MustParsePrefix("10.0.0.1/32"), "fifth", unix.EEXIST)
	err := c.Do(&b)
	var e *Error
	if !errors.As(err, &e) || e.What != "second" || !errors.Is(err, unix.ENODEV) || !errors.Is(err, unix.EEXIST) {
		t.Fatalf("error %v", err)
	}
	for _, no := range []string{"first", "third", "fifth"} {
		if strings.Contains(err.Error(), no) {
			t.Errorf("%q is in %v", no, err)
		}
	}
	addrs, err := c.Addrs()
	if err != nil || len(addrs) < 2 {
		t.Errorf("addresses %v, %v", addrs, err)
	}
	// A batch may be sent again, and longer ones go in parts.
	var long Batch
	for i := range 200 {
		a := netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)})
		long.AddAddr(1, netip.PrefixFrom(a, 32), "long", unix.EEXIST)
	}
	for range 2 {
		if err := c.Do(&long); err != nil {
			t.Fatal(err)
		}
	}
	if addrs, err = c.Addrs(); err != nil || len(addrs) < 202 {
		t.Errorf("%d addresses, %v", len(addrs), err)
	}
	if err := c.Do(&Batch{}); err != nil {
		t.Error(err)
	}
	c.Close()
	if err := c.Do(&b); err == nil {
		t.Error("a closed socket works")
	}
	if _, err := c.Links(""); err == nil {
		t.Error("a closed socket works")
	}
}

func TestLinkByName(t *testing.T) {
	c := dial(t)
	lo, err := c.LinkByName("lo")
	if err != nil || lo.Index != 1 || lo.Name != "lo" || lo.Flags&unix.IFF_UP == 0 {
		t.Errorf("%+v, %v", lo, err)
	}
	if _, err := c.LinkByName("none"); !errors.Is(err, unix.ENODEV) {
		t.Errorf("error %v", err)
	}
	if _, err := c.LinkByName("a-name-that-is-far-too-long"); err == nil {
		t.Error("no error for a name that cannot be")
	}
}

// TestEmptyGroup: deleting the links of a group in which none is must not touch others.
func TestEmptyGroup(t *testing.T) {
	c := dial(t)
	var b Batch
	b.DelGroup(0x6e123456)
	b.SetGroupByName("none", 5)
	if err := c.Do(&b); err != nil {
		t.Error(err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{})
	var b Batch
	b.AddAddr(1, netip.MustParsePrefix("fd00::1/128"), "x")
	b.AddVeth(Veth{Name: "a", Peer: "b"})
	b.AddRoute(Route{Dst: netip.MustParsePrefix("10.0.0.0/8"), Gateway: netip.MustParseAddr("10.0.0.1"), Link: 3}, "x")
	b.end()
	f.Add(b.buf)
	f.Add(binary.NativeEndian.AppendUint32(nil, 0xffffffff))
	f.Fuzz(func(t *testing.T, p []byte) {
		_ = each(p, func(h unix.NlMsghdr, body []byte) error {
			decodeLink(body)
			decodeRoute(body)
			if e := decodeError("x", body, h.Flags); e != nil {
				_ = e.Error()
			}
			return nil
		})
		decodeLink(p)
		decodeRoute(p)
	})
}
