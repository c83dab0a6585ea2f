//go:build linux

package datapath

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	ciliumebpf "github.com/cilium/ebpf"

	"github.com/nodeagent/nodeagent/ebpf/flows"
	"github.com/nodeagent/nodeagent/ebpf/frame"
	"github.com/nodeagent/nodeagent/ebpf/policy"
)

// BenchmarkPacket: ns/packet are the best of five runs of 200,000 in the kernel;
// take off what the empty program needs.
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
	// Random peers cannot be repeated in the kernel: the system call is measured with them and without.
	r := rand.New(rand.NewPCG(1, 1))
	packets := make([][]byte, 1<<16)
	for i := range packets {
		packets[i] = packet(addr(r.IntN(peers)))
	}
	b.Run("policy/131k-random-peers-with-syscall", func(b *testing.B) { each(b, d, packets, ifs[0]) })
	b.Run("policy/one-peer-with-syscall", func(b *testing.B) { each(b, d, [][]byte{packet(addr(5))}, ifs[0]) })
}

func loop(b *testing.B, p *ciliumebpf.Program, packet []byte, ifindex uint32, dryRun bool) {
	best := 1e9
	for range 5 {
		n := 200_000
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

func each(b *testing.B, d *Datapath, packets [][]byte, ifindex uint32) {
	i := 0
	for b.Loop() {
		out, err := d.Run(flows.ToPod, Input{Packet: packets[i%len(packets)], Ifindex: ifindex, IngressIfindex: 4242, Dry: true})
		if err != nil {
			b.Fatal(err)
		}
		if !out.Pass {
			b.Fatal(fmt.Sprint(out))
		}
		i++
	}
}
