package metrics

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

// podNet makes a namespace with eth0, the peer of host in this test's own
// "host" namespace, where the calling goroutine stays until the test ends.
func podNet(t testing.TB) (path, host string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	runtime.LockOSThread() // never unlocked: the thread is in our namespace
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skip(err)
	}
	hostNS, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	podNS, err := netns.New() // moves the thread
	if err != nil {
		t.Fatal(err)
	}
	if err := netns.Set(hostNS); err != nil {
		t.Fatal(err)
	}
	host = "natest0"
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: host}, PeerName: "eth0", PeerNamespace: netlink.NsFd(podNS)}); err != nil {
		t.Fatal(err)
	}
	link, err := netlink.LinkByName(host)
	if err != nil {
		t.Fatal(err)
	}
	addr, _ := netlink.ParseAddr("10.250.0.1/24")
	must(t, netlink.AddrAdd(link, addr))
	must(t, netlink.LinkSetUp(link))
	path = filepath.Join(t.TempDir(), "net")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, unix.Mount(fmt.Sprintf("/proc/self/fd/%d", int(podNS)), path, "", unix.MS_BIND, ""))
	t.Cleanup(func() {
		must(t, unix.Unmount(path, unix.MNT_DETACH))
		podNS.Close()
		hostNS.Close()
	})
	must(t, netns.Set(podNS))
	for _, name := range []string{"lo", "eth0"} {
		l, err := netlink.LinkByName(name)
		must(t, err)
		if name == "eth0" {
			addr, _ := netlink.ParseAddr("10.250.0.2/24")
			must(t, netlink.AddrAdd(l, addr))
		}
		must(t, netlink.LinkSetUp(l))
	}
	must(t, netns.Set(hostNS))
	return path, host
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Both ways of reading give the pod's view, and what was sent is in it.
func TestNetwork(t *testing.T) {
	path, host := podNet(t)
	send(t, 100, 1000)
	var n network
	defer n.close()
	index := 0
	// Neighbour discovery and DAD go on for a while; until they have settled
	// the two readings may differ.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		outside, err := n.hostSide(host, &index)
		must(t, err)
		nets, errs := inNamespaces([]string{path, "/does/not/exist"})
		must(t, errs[0])
		if errs[1] == nil || nets[1] != nil {
			t.Fatal("a namespace that is not there: no error")
		}
		if len(nets[0].Interfaces) != 1 {
			t.Fatalf("interfaces %+v, want eth0 alone", nets[0].Interfaces)
		}
		in, out := nets[0].Interfaces[0], outside.Interfaces[0]
		// What the host's end drops on the way in, the pod's never sees.
		in.Rx.Dropped, out.Rx.Dropped = 0, 0
		if in == out && in.Name == "eth0" && in.Rx.Packets > 50 && in.Rx.Bytes > 50_000 {
			break
		}
		send(t, 10, 1000) // some are lost while the neighbour is unknown
		if time.Now().After(deadline) {
			t.Fatalf("from outside %+v, from inside %+v", out, in)
		}
	}
	// The link comes back under the same name with another index.
	l, err := netlink.LinkByName(host)
	must(t, err)
	must(t, netlink.LinkDel(l))
	if _, err := n.hostSide(host, &index); err == nil {
		t.Error("a link that is gone: no error")
	}
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: host}, PeerName: "natest1"}))
	again, err := n.hostSide(host, &index)
	must(t, err)
	if got := again.Interfaces[0]; got.Rx.Bytes != 0 {
		t.Errorf("a new link has counters: %+v", got)
	}
	index = 1 << 20 // an index of a link that is gone is found out
	_, err = n.hostSide(host, &index)
	must(t, err)
}

// send sends packets from the host's end to the pod.
func send(t testing.TB, count, size int) {
	t.Helper()
	c, err := net.Dial("udp", "10.250.0.2:9")
	must(t, err)
	defer c.Close()
	for range count {
		// An error is of an earlier packet (nobody listens, and ICMP says so),
		// and then this one was not sent.
		for tries := 0; tries < 3; tries++ {
			if _, err := c.Write(make([]byte, size)); err == nil {
				break
			}
		}
	}
}

// Nothing of a sample stays open: not the namespaces either.
func TestNetworkLeaks(t *testing.T) {
	path, host := podNet(t)
	s, err := New(Config{MaxAge: time.Nanosecond, Group: func(string, string) (Group, error) { return &fakeGroup{}, nil }})
	must(t, err)
	defer s.Close()
	one := func() {
		pods, err := s.Sample(context.Background(), []sample.PodTarget{
			{ID: "foreign", Netns: path},
			{ID: "lost", Netns: path, HostInterface: "nosuch0"}, // falls back to the namespace
			{ID: "host"},
			{ID: "gone", Netns: "/does/not/exist"},
		}, sample.Pods)
		must(t, err)
		if pods[0].Network == nil || pods[1].Network == nil || pods[2].Network != nil || pods[3].Network != nil {
			t.Fatalf("networks %v %v %v %v", pods[0].Network, pods[1].Network, pods[2].Network, pods[3].Network)
		}
	}
	_ = host
	one()
	before := descriptors(t)
	for range 50 {
		one()
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors, then %d", before, after)
	}
}

func descriptors(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(list)
}

func TestCountDescriptors(t *testing.T) {
	var c counter
	c.dir = make([]byte, 512) // several reads of the directory
	before, sockets := c.descriptors(os.Getpid())
	var open []*os.File
	for range 50 {
		f, err := os.Open("/dev/null")
		must(t, err)
		open = append(open, f)
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	must(t, err)
	after, more := c.descriptors(os.Getpid())
	if after-before < 51 || more-sockets != 1 {
		t.Errorf("descriptors %d then %d, sockets %d then %d", before, after, sockets, more)
	}
	l.Close()
	for _, f := range open {
		f.Close()
	}
	if n, _ := c.descriptors(1 << 30); n != 0 {
		t.Errorf("no such process: %d", n)
	}
}

func BenchmarkHostSide(b *testing.B) {
	_, host := podNet(b)
	var n network
	defer n.close()
	index := 0
	b.ReportAllocs()
	for b.Loop() {
		if _, err := n.hostSide(host, &index); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkInNamespaces(b *testing.B) {
	path, _ := podNet(b)
	for _, count := range []int{1, 50} {
		b.Run(strconv.Itoa(count), func(b *testing.B) {
			paths := make([]string, count)
			for i := range paths {
				paths[i] = path
			}
			for b.Loop() {
				if _, errs := inNamespaces(paths); errs[0] != nil {
					b.Fatal(errs[0])
				}
			}
		})
	}
}

func FuzzNetlink(f *testing.F) {
	f.Add([]byte{}, uint32(1))
	f.Add([]byte("\x10\x00\x00\x00\x03\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00"), uint32(1))
	f.Add([]byte("\x14\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\xed\xff\xff\xff"), uint32(1))
	f.Add([]byte("\x28\x00\x00\x00\x10\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00"+"\x00\x00\x01\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"+"\x08\x00\x03\x00eth0"), uint32(1))
	f.Fuzz(func(t *testing.T, b []byte, seq uint32) {
		var n sample.Network
		messages(b, seq, func(kind uint16, b []byte) error { return addLink(&n, kind, b) })
		defaultFirst(n.Interfaces)
		for name, rest := nextDirent(b); name != nil; name, rest = nextDirent(rest) {
			if len(name) == 0 || len(rest) >= len(b) {
				t.Fatalf("name %q", name)
			}
		}
	})
}
