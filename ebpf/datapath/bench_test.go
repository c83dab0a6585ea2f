//go:build linux

package datapath

import (
	"encoding/binary"
	"net/netip"
	"reflect"
	"testing"
	"time"

	ciliumebpf "github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/ebpf/frame"
	"github.com/nodeagent/nodeagent/ebpf/lab"
	"github.com/nodeagent/nodeagent/ebpf/policy"
)

// hashLookup is a program that looks up a packet's source in a hash map of n
// addresses and does nothing else: what a policy by hash maps costs at least.
func hashLookup(b *testing.B, n int, addr func(int) netip.Addr) *ciliumebpf.Program {
	b.Helper()
	m, err := ciliumebpf.NewMap(&ciliumebpf.MapSpec{Type: ciliumebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 131072, Flags: 1}) // no prealloc
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { m.Close() })
	keys, values := make([][4]byte, n), make([]uint32, n)
	for i := range keys {
		keys[i], values[i] = addr(i).As4(), 1
	}
	if _, err := m.BatchUpdate(keys, values, nil); err != nil {
		b.Fatal(err)
	}
	const data, end, source = 76, 80, 26 // of __sk_buff, and in the frame
	prog, err := ciliumebpf.NewProgram(&ciliumebpf.ProgramSpec{Type: ciliumebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.LoadMem(asm.R3, asm.R1, data, asm.Word),
		asm.LoadMem(asm.R4, asm.R1, end, asm.Word),
		asm.Mov.Reg(asm.R5, asm.R3),
		asm.Add.Imm(asm.R5, source+4),
		asm.JGT.Reg(asm.R5, asm.R4, "out"),
		asm.LoadMem(asm.R5, asm.R3, source, asm.Word),
		asm.StoreMem(asm.R10, -4, asm.R5, asm.Word),
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.R10),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R0, asm.R0, 0, asm.Word),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("out"),
		asm.Return(),
	}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { prog.Close() })
	return prog
}

// BenchmarkPacket: ns/packet are the best of 60 runs of 20,000 in the kernel;
// take off what the empty program needs,
// which with random sources chooses them as well.
func BenchmarkPacket(b *testing.B) {
	ifs := inNamespace(b, 2)
	d := open(b, Config{Conntrack: 65536, Events: -1})
	own, peer := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.1.0.1")
	if err := d.Insert(1, int(ifs[0]), []netip.Addr{own}); err != nil {
		b.Fatal(err)
	}
	const peers = 131000
	plan := &policy.Plan{
		Classes: 8192, Bank: &policy.Bank{Classes: 3, Intervals: []policy.Interval{
			{Range: policy.Range{Proto: 0, First: 0, Last: 79}, Class: 1}, {Range: policy.Range{Proto: 0, First: 80, Last: 80}, Class: 2},
			{Range: policy.Range{Proto: 0, First: 81, Last: 65535}, Class: 1},
		}},
		Profiles: map[uint16][policy.BitmapSize]byte{3: {0: 1 << 2}},
	}
	w := policy.RowWrite{Endpoint: 1, Dir: policy.In, Blank: true}
	for c := range uint32(8192) {
		w.Cells = append(w.Cells, policy.Cell{Class: c, Profile: 3})
	}
	plan.Prepare = []policy.RowWrite{w}
	plan.Words = []policy.EndpointWord{{Endpoint: 1, Word: policy.Word{Active: true, Isolated: [2]bool{policy.In: true}}}}
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(1 + i>>16), byte(i >> 8), byte(i)}) }
	for i := range peers {
		plan.Exact = append(plan.Exact, policy.Address{Addr: addr(i), Class: uint32(2 + i%8000)})
	}
	if err := d.Apply(plan); err != nil {
		b.Fatal(err)
	}
	packet := func(src netip.Addr) []byte {
		return frame.Packet{Src: src, Dst: own, Protocol: 6, SrcPort: 40000, DstPort: 80, TCP: frame.ACK}.Bytes()
	}
	b.Run("empty", func(b *testing.B) { loop(b, d.objs.NaClock, packet(peer), ifs[0], false) })
	b.Run("policy/hot", func(b *testing.B) { loop(b, d.objs.NaToPod, packet(addr(5)), ifs[0], true) })
	b.Run("policy+conntrack/hot", func(b *testing.B) { loop(b, d.objs.NaToPod, packet(addr(5)), ifs[0], false) })
	random := packet(peer)
	b.Run("empty/random-source", func(b *testing.B) { loop(b, randomized(b, d.objs.NaClock, peers), random, ifs[0], true) })
	hash := hashLookup(b, peers, addr)
	b.Run("one-hash-lookup/131k-random-peers", func(b *testing.B) { loop(b, randomized(b, hash, peers), random, ifs[0], true) })
	b.Run("policy/131k-random-peers", func(b *testing.B) { loop(b, randomized(b, d.objs.NaToPod, peers), random, ifs[0], true) })
}

// randomized is a program that gives a packet one of n sources from 10.1.0.0 on
// by chance and goes on with p: PROG_RUN repeats a packet as it is.
func randomized(b *testing.B, p *ciliumebpf.Program, n int32) *ciliumebpf.Program {
	b.Helper()
	next, err := ciliumebpf.NewMap(&ciliumebpf.MapSpec{Type: ciliumebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { next.Close() })
	if err := next.Put(uint32(0), p); err != nil {
		b.Fatal(err)
	}
	const data, end, source = 76, 80, 26 // of __sk_buff, and in the frame
	prog, err := ciliumebpf.NewProgram(&ciliumebpf.ProgramSpec{Type: ciliumebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.FnGetPrandomU32.Call(),
		asm.Mov.Reg32(asm.R7, asm.R0),
		asm.Mod.Imm32(asm.R7, n),
		asm.Add.Imm32(asm.R7, 10<<24|1<<16),
		asm.HostTo(asm.BE, asm.R7, asm.Word),
		asm.LoadMem(asm.R1, asm.R6, data, asm.Word),
		asm.LoadMem(asm.R2, asm.R6, end, asm.Word),
		asm.Mov.Reg(asm.R3, asm.R1),
		asm.Add.Imm(asm.R3, source+4),
		asm.JGT.Reg(asm.R3, asm.R2, "out"),
		asm.StoreMem(asm.R1, source, asm.R7, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.LoadMapPtr(asm.R2, next.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("out"),
		asm.Return(),
	}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { prog.Close() })
	return prog
}

// BenchmarkAmongOthers: ns/run of a program that a system call a run lies
// between, by the kernel's own count: memory and code have to be fetched again, as
// between packets that a busy network stack handles. Of an empty one as well.
func BenchmarkAmongOthers(b *testing.B) {
	ifs := inNamespace(b, 1)
	d := open(b, Config{Conntrack: 65536, Events: -1})
	own, peer := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.1.0.1")
	if err := d.Insert(1, int(ifs[0]), []netip.Addr{own}); err != nil {
		b.Fatal(err)
	}
	if err := d.Apply(bothWays(1, 64, policy.Cell{Class: policy.World, Profile: policy.ProfileAllow})); err != nil {
		b.Fatal(err)
	}
	stats, err := ciliumebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		b.Fatal(err)
	}
	defer stats.Close()
	packet := frame.Packet{Src: peer, Dst: own, Protocol: 6, SrcPort: 40000, DstPort: 80, TCP: frame.ACK}.Bytes()
	for _, c := range []struct {
		name string
		p    *ciliumebpf.Program
	}{{"empty", d.objs.NaClock}, {"policy+conntrack", d.objs.NaToPod}} {
		b.Run(c.name, func(b *testing.B) {
			best := 1e9
			for range 20 {
				before, err := c.p.Stats()
				if err != nil {
					b.Fatal(err)
				}
				for range 2000 {
					var ctx [contextSize]byte
					binary.NativeEndian.PutUint32(ctx[36:], 4242)
					binary.NativeEndian.PutUint32(ctx[40:], ifs[0])
					if _, err := c.p.Run(&ciliumebpf.RunOptions{Data: packet, Context: &ctx, Repeat: 1}); err != nil {
						b.Fatal(err)
					}
				}
				after, err := c.p.Stats()
				if err != nil {
					b.Fatal(err)
				}
				best = min(best, float64((after.Runtime-before.Runtime).Nanoseconds())/float64(after.RunCount-before.RunCount))
			}
			b.ReportMetric(best, "ns/run")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkMemory: what all maps hold on a node of 110 pods, isolated both ways,
// with 10,000 peers in 1000 classes, and conntrack full.
func BenchmarkMemory(b *testing.B) {
	ifs := inNamespace(b, 1)
	d := open(b, Config{})
	plan := &policy.Plan{Classes: 1000, Profiles: map[uint16][policy.BitmapSize]byte{3: {0: 1 << 2}}}
	for i := range uint32(110) {
		if err := d.Insert(i, int(ifs[0])+int(i), lab.PodIPs(int(i))); err != nil {
			b.Fatal(err)
		}
		for dir := range policy.Dir(2) {
			plan.Prepare = append(plan.Prepare, policy.RowWrite{Endpoint: i, Dir: dir, Blank: true, Cells: []policy.Cell{{Class: 999, Profile: 3}}})
		}
		plan.Words = append(plan.Words, policy.EndpointWord{Endpoint: i, Word: policy.Word{Active: true, Isolated: [2]bool{true, true}}})
	}
	for i := range uint32(10_000) {
		for _, ip := range []netip.Addr{netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}), netip.AddrFrom16([16]byte{0xfd, 9, 14: byte(i >> 8), 15: byte(i)})} {
			plan.Exact = append(plan.Exact, policy.Address{Addr: ip, Class: 2 + i%998})
		}
	}
	if err := d.Apply(plan); err != nil {
		b.Fatal(err)
	}
	maps := reflect.ValueOf(d.objs.naMaps)
	total := uint64(0)
	for i := range maps.NumField() {
		m := maps.Field(i).Interface().(*ciliumebpf.Map)
		info, err := m.Info()
		if err != nil {
			b.Fatal(err)
		}
		size, _ := info.Memlock() // none of a map that takes none yet
		b.Logf("%-10s %8.2f MB", info.Name, float64(size)/1e6)
		total += size
	}
	b.ReportMetric(float64(total)/1e6, "MB")
	b.ReportMetric(0, "ns/op")
}

func loop(b *testing.B, p *ciliumebpf.Program, packet []byte, ifindex uint32, dryRun bool) {
	best := 1e9
	for range 60 {
		n := 20_000 // short: some of them nothing interrupts
		began := time.Now()
		var ctx [contextSize]byte
		binary.NativeEndian.PutUint32(ctx[36:], 4242)
		binary.NativeEndian.PutUint32(ctx[40:], ifindex)
		if dryRun {
			binary.NativeEndian.PutUint32(ctx[48:], dry)
		}
		if _, err := p.Run(&ciliumebpf.RunOptions{Data: packet, Context: &ctx, Repeat: uint32(n)}); err != nil {
			b.Fatal(err)
		}
		best = min(best, float64(time.Since(began).Nanoseconds())/float64(n))
	}
	b.ReportMetric(best, "ns/packet")
	b.ReportMetric(0, "ns/op")
}
