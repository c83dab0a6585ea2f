//go:build linux

package datapath

import (
	"errors"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	ciliumebpf "github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/ebpf/flows"
	"github.com/nodeagent/nodeagent/ebpf/frame"
	"github.com/nodeagent/nodeagent/ebpf/policy"
)

// wire sends frames into an interface of the test's namespace by its peer.
type wire struct {
	t    *testing.T
	fd   int
	peer int
}

func newWire(t *testing.T, name, peer string) *wire {
	t.Helper()
	for _, n := range []string{name, peer} {
		l, err := netlink.LinkByName(n)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
	}
	l, err := netlink.LinkByName(peer)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return &wire{t, fd, l.Attrs().Index}
}

func (w *wire) send(p frame.Packet) {
	w.t.Helper()
	if err := unix.Sendto(w.fd, p.Bytes(), 0, &unix.SockaddrLinklayer{Ifindex: w.peer, Protocol: 8}); err != nil {
		w.t.Fatal(err)
	}
}

// stranger is another's program, which counts the frames that it sees: of this
// size only, since a network has traffic of its own.
type stranger struct {
	prog  *ciliumebpf.Program
	count *ciliumebpf.Map
}

const strangeSize = 14 + 20 + 20 + 321

func newStranger(t *testing.T, typ ciliumebpf.ProgramType) *stranger {
	t.Helper()
	m, err := ciliumebpf.NewMap(&ciliumebpf.MapSpec{Type: ciliumebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	result, size := int32(-1), asm.LoadMem(asm.R2, asm.R1, 0, asm.Word) // __sk_buff.len
	ins := asm.Instructions{size}
	if typ == ciliumebpf.XDP {
		result = xdpPass
		ins = asm.Instructions{asm.LoadMem(asm.R2, asm.R1, 4, asm.Word), asm.LoadMem(asm.R3, asm.R1, 0, asm.Word), asm.Sub.Reg(asm.R2, asm.R3)}
	}
	ins = append(ins,
		asm.JNE.Imm(asm.R2, strangeSize, "out"),
		asm.LoadMapValue(asm.R1, m.FD(), 0),
		asm.Mov.Imm(asm.R2, 1),
		asm.StoreXAdd(asm.R1, asm.R2, asm.DWord),
		asm.Mov.Imm(asm.R0, result).WithSymbol("out"),
		asm.Return())
	p, err := ciliumebpf.NewProgram(&ciliumebpf.ProgramSpec{Name: "stranger", Type: typ, License: "GPL", Instructions: ins})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close(); m.Close() })
	return &stranger{p, m}
}

func (s *stranger) seen(t *testing.T) (n uint64) {
	t.Helper()
	if err := s.count.Lookup(uint32(0), &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// until waits for a condition; a frame takes its time through a veth.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in 60 s: %s", what)
		}
	}
}

func (s *stranger) filter(t *testing.T, ifindex uint32, priority uint16) *netlink.BpfFilter {
	t.Helper()
	qdisc := &netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: int(ifindex), Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		t.Fatal(err)
	}
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: int(ifindex), Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: priority},
		Fd:          s.prog.FD(), Name: "stranger", DirectAction: true,
	}
	if err := netlink.FilterAdd(f); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestForeignPrograms: other people's tcx programs and clsact filters on a pod's
// interface stay and run, before and behind ours, while ours are attached,
// replaced by another process and taken off; by way of tcx and of clsact.
func TestForeignPrograms(t *testing.T) {
	for _, tcx := range []bool{true, false} {
		ifs := inNamespace(t, 1)
		w := newWire(t, "d0", "e0")
		strangers := map[string]*stranger{}
		add := func(name string) *stranger {
			strangers[name] = newStranger(t, ciliumebpf.SchedCLS)
			return strangers[name]
		}
		if tcx {
			l, err := link.AttachTCX(link.TCXOptions{Interface: int(ifs[0]), Program: add("tcx before").prog, Attach: ciliumebpf.AttachTCXIngress})
			if errors.Is(err, ciliumebpf.ErrNotSupported) {
				t.Log("no tcx before 6.6")
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
		}
		add("filter before").filter(t, ifs[0], 1)
		sent, passed := uint64(0), uint64(0)
		check := func(what string, enforced bool) {
			t.Helper()
			for range 3 {
				p := tcp(first[0], world, 40000, 443, frame.SYN)
				p.Payload = make([]byte, 321)
				w.send(p)
				p.Src = second[0] // not the pod's
				w.send(p)
			}
			sent += 6
			passed += 3
			if !enforced {
				passed += 3
			}
			for name, s := range strangers {
				want := passed
				if name == "tcx before" || name == "filter before" && !tcx {
					want = sent
				}
				until(t, what+": "+name+" sees the packets", func() bool { return s.seen(t) >= want })
				if n := s.seen(t); n != want {
					t.Errorf("%s: %s has seen %d packets, want %d", what, name, n, want)
				}
			}
		}
		fs := mounted(t)
		next := func() *Datapath {
			d := open(t, Config{Dir: filepath.Join(fs, "na"), Conntrack: 1024, RowBlocks: 64})
			d.noTCX = !tcx
			if err := d.Insert(1, int(ifs[0]), first); err != nil {
				t.Fatal(err)
			}
			if err := d.Apply(&policy.Plan{Words: []policy.EndpointWord{{Endpoint: 1, Word: policy.Word{Active: true}}}}); err != nil {
				t.Fatal(err)
			}
			return d
		}
		check("alone", false)
		d := next()
		if _, err := d.AttachPod(int(ifs[0])); err != nil {
			t.Fatal(err)
		}
		if tcx {
			l, err := link.AttachTCX(link.TCXOptions{Interface: int(ifs[0]), Program: newStranger(t, ciliumebpf.SchedCLS).prog, Attach: ciliumebpf.AttachTCXIngress})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
		}
		late := add("filter behind")
		late.filter(t, ifs[0], 60000)
		if err := late.count.Put(uint32(0), passed); err != nil {
			t.Fatal(err)
		}
		check("attached", true)
		d = next()
		a, err := d.AttachPod(int(ifs[0]))
		if err != nil {
			t.Fatal(err)
		}
		check("taken over", true)
		if err := d.Detach(int(ifs[0]), a); err != nil {
			t.Fatal(err)
		}
		passed = sent // those before are what they were
		for name, s := range strangers {
			if name != "tcx before" {
				if err := s.count.Put(uint32(0), sent); err != nil {
					t.Fatal(err)
				}
			}
		}
		if tcx {
			until(t, "ours are gone", func() bool { return programsOn(t, ifs[0], ciliumebpf.AttachTCXIngress) == 2 })
		}
		check("taken off", false)
	}
}

// mounted is a BPF filesystem of the test's own.
func mounted(t *testing.T) string {
	t.Helper()
	fs := filepath.Join(t.TempDir(), "bpf")
	if err := Mount(fs); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(fs, 0); err != nil {
			t.Error(err)
		}
	})
	return fs
}

func early(t *testing.T, d *Datapath, h flows.Hook) (n uint64) {
	t.Helper()
	list, err := d.Counters()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list {
		if c.Hook == h && c.Reason == flows.Early {
			n = c.Packets
		}
	}
	return n
}

// TestXDP: where it is asked for, a NIC drops openings that policy denies before
// the stack sees them, and only those; another process takes the link over;
// without being asked nothing is attached, nor by "auto" to a veth; another's
// XDP program stays.
func TestXDP(t *testing.T) {
	r := &rig{t: t, ifs: inNamespace(t, 2)}
	w := newWire(t, "d0", "e0")
	fs := mounted(t)
	nic := int(r.ifs[0])
	attached := func() (uint32, bool) {
		l, err := netlink.LinkByIndex(nic)
		if err != nil {
			t.Fatal(err)
		}
		x := l.Attrs().Xdp
		if x == nil {
			return 0, false
		}
		return x.ProgId, x.Attached
	}
	next := func(mode string) (*Datapath, *Attached) {
		t.Helper()
		d := open(t, Config{Dir: filepath.Join(fs, "na"), Conntrack: 1024, RowBlocks: 64, XDP: mode})
		if err := d.Insert(2, int(r.ifs[1]), second); err != nil {
			t.Fatal(err)
		}
		plan := &policy.Plan{Classes: 64,
			Prepare:  []policy.RowWrite{{Endpoint: 2, Dir: policy.In, Blank: true, Cells: []policy.Cell{{Class: 9, Profile: policy.ProfileAllow}}}},
			Words:    []policy.EndpointWord{{Endpoint: 2, Word: policy.Word{Active: true, Isolated: [2]bool{policy.In: true}}}},
			Prefixes: []policy.Prefix{{Prefix: netip.MustParsePrefix("198.51.100.0/24"), Class: 9}, {Prefix: netip.MustParsePrefix("2001:db8:9::/48"), Class: 9}},
		}
		if err := d.Apply(plan); err != nil {
			t.Fatal(err)
		}
		a, err := d.AttachUplink(nic)
		if err != nil {
			t.Fatal(err)
		}
		return d, a
	}
	for _, mode := range []string{"off", "auto"} {
		d, a := next(mode)
		if _, on := attached(); on {
			t.Errorf("XDP %q is on a veth", mode)
		}
		if err := d.Detach(nic, a); err != nil {
			t.Fatal(err)
		}
	}
	foreign, err := link.AttachXDP(link.XDPOptions{Program: newStranger(t, ciliumebpf.XDP).prog, Interface: nic, Flags: link.XDPGenericMode})
	if err != nil {
		t.Fatal(err)
	}
	before, _ := attached()
	d, a := next("generic")
	if id, _ := attached(); id != before {
		t.Error("another's XDP program was replaced")
	}
	if err := d.Detach(nic, a); err != nil {
		t.Fatal(err)
	}
	if err := foreign.Close(); err != nil {
		t.Fatal(err)
	}
	until(t, "another's XDP program is gone", func() bool { _, on := attached(); return !on })

	behind := newStranger(t, ciliumebpf.SchedCLS)
	behind.filter(t, r.ifs[0], 1)
	passed, dropped := uint64(0), uint64(0)
	traffic := func() {
		t.Helper()
		send := func(pass bool, src, dst netip.Addr, flags uint8, options int) {
			p := tcp(src, dst, 40000, 80, flags)
			p.Options = options
			p.Payload = make([]byte, strangeSize-len(p.Bytes()))
			w.send(p)
			if pass {
				passed++
			} else {
				dropped++
			}
		}
		good, bad := netip.MustParseAddr("198.51.100.7"), world
		for i := range 2 {
			send(true, good, second[i], frame.SYN, 0)
			send(false, bad, second[i], frame.SYN, 0)
			send(true, bad, second[i], frame.ACK, 0)
			send(true, bad, second[i], frame.SYN|frame.ACK, 0)
			send(true, bad, first[i], frame.SYN, 0) // not of this node
			good, bad = netip.MustParseAddr("2001:db8:9::7"), netip.MustParseAddr("2001:db8::9")
		}
		send(false, world, second[0], frame.SYN, 3)
		until(t, "openings dropped", func() bool { return early(t, d, flows.XDP) >= dropped })
		until(t, "the rest passed", func() bool { return behind.seen(t) >= passed })
		if n, m := early(t, d, flows.XDP), behind.seen(t); n != dropped || m != passed {
			t.Errorf("%d dropped, %d passed; want %d and %d", n, m, dropped, passed)
		}
	}
	d, _ = next("generic")
	one, on := attached()
	if !on {
		t.Fatal("XDP is not attached")
	}
	traffic()
	d.Close()
	dropped = 0 // a new process counts anew
	d, a = next("generic")
	if two, on := attached(); !on || two == one {
		t.Error("the link was not taken over")
	}
	traffic()
	if err := d.Detach(nic, a); err != nil {
		t.Fatal(err)
	}
	until(t, "XDP is gone", func() bool { _, on := attached(); return !on })
	next("generic")
	next("off")
	until(t, "XDP that is no longer wanted is gone", func() bool { _, on := attached(); return !on })
}
