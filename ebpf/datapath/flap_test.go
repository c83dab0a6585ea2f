//go:build linux

package datapath

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"github.com/nodeagent/nodeagent/ebpf/flows"
	"github.com/nodeagent/nodeagent/ebpf/frame"
	"github.com/nodeagent/nodeagent/ebpf/lab"
	"github.com/nodeagent/nodeagent/ebpf/objects"
	"github.com/nodeagent/nodeagent/ebpf/policy"
	"github.com/nodeagent/nodeagent/ebpf/reference"
)

// steady is a flow whose verdict an update must not change.
type steady struct {
	probe  lab.Probe
	hook   flows.Hook
	input  Input
	passes bool
}

// TestNoFlap hammers flows whose verdict is the same before and after an
// update while the update is written: none may change for a moment. 1500
// random updates, or $NODEAGENT_FLAPS.
func TestNoFlap(t *testing.T) {
	updates, _ := strconv.Atoi(os.Getenv("NODEAGENT_FLAPS"))
	limit := time.Hour
	if updates == 0 {
		updates, limit = 1500, 40*time.Second
	}
	if testing.Short() {
		updates = 100
	}
	ifs := inNamespace(t, 4)
	here, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	d := open(t, Config{Conntrack: 1024})
	work, done := make(chan []steady), make(chan string)
	var started, stop atomic.Bool
	var runs atomic.Int64
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(here); err != nil {
			panic(err)
		}
		for set := range work {
			bad := ""
			for !stop.Load() {
				for _, s := range set {
					out, err := d.Run(s.hook, s.input)
					runs.Add(1)
					if (err != nil || out.Pass != s.passes) && bad == "" {
						bad = fmt.Sprintf("%+v: %v becomes %v (%s, class %d, profile %d) %v", s.probe, s.passes, out.Pass, out.Reason, out.Class, out.Profile, err)
					}
				}
				started.Store(true)
			}
			done <- bad
		}
	}()
	defer close(work)
	began, total, judged := time.Now(), 0, 0
	for seed := uint64(1000); total < updates && time.Since(began) < limit; seed++ {
		b := newBench(t, d, seed, 0, ifs)
		for range 50 {
			before := *b.cl
			before.Pods, before.Namespaces = append([]objects.Pod(nil), before.Pods...), append([]objects.Namespace(nil), before.Namespaces...)
			var what []string
			for range 1 + b.w.R.IntN(3) {
				what = append(what, b.w.Mutate(b.cl))
			}
			set := b.steady(&before, b.cl, 24)
			judged += len(set)
			started.Store(false)
			stop.Store(false)
			work <- set
			for !started.Load() && len(set) > 0 {
				runtime.Gosched()
			}
			b.c.Set(b.cl)
			p := b.c.Update()
			if err := d.Apply(p); err != nil {
				t.Fatal(err)
			}
			if b.w.R.IntN(4) == 0 {
				d.Settle()
				b.c.Graced()
			}
			stop.Store(true)
			if bad := <-done; bad != "" {
				t.Fatalf("world %d, update %d %v: %s", seed, total, what, bad)
			}
			total++
		}
		d.Settle()
		b.c.Graced()
		b.clear(t)
	}
	t.Logf("%d updates, %d flows watched, judged %d times: no flap", total, judged, runs.Load())
}

func (b *bench) steady(before, after *objects.Cluster, n int) []steady {
	var out []steady
	for range n {
		p := b.w.Probe()
		x := reference.JudgePod(before, p.Dir, &before.Pods[p.Pod], p.Peer, p.Proto, p.Port)
		y := reference.JudgePod(after, p.Dir, &after.Pods[p.Pod], p.Peer, p.Proto, p.Port)
		if x.Allowed != y.Allowed || b.deferred(p) {
			continue
		}
		f := p.Flow()
		proto, icmp := protocolFor(p)
		s := steady{probe: p, hook: flows.ToPod, passes: x.Allowed, input: Input{
			Packet:  frame.Packet{Src: f.Src, Dst: f.Dst, Protocol: proto, ICMPType: icmp, SrcPort: 33333, DstPort: p.Port, TCP: frame.SYN}.Bytes(),
			Ifindex: b.ifs[p.Pod], IngressIfindex: 4242, Dry: proto != objects.UDP, // UDP's come to be known by conntrack
		}}
		if p.Dir == reference.Egress {
			s.hook = flows.FromPod
		}
		out = append(out, s)
	}
	return out
}

// connection is what a conntrack model knows: who may open it, and who did.
type step struct {
	out  bool // the pod sends it
	tcp  uint8
	want bool
}

// TestConntrack plays sequences of packets of one flow and looks at each verdict.
func TestConntrack(t *testing.T) {
	const syn, ack, fin, rst = frame.SYN, frame.ACK, frame.FIN, frame.RST
	mayOpen := func(in, out bool) *policy.Plan { // isolated both ways
		p := &policy.Plan{Classes: 64, Words: []policy.EndpointWord{{Endpoint: 1, Word: policy.Word{Active: true, Isolated: [2]bool{true, true}}}}}
		for dir, ok := range map[policy.Dir]bool{policy.In: in, policy.Out: out} {
			w := policy.RowWrite{Endpoint: 1, Dir: dir, Blank: true, Cells: []policy.Cell{{Class: policy.World, Profile: policy.ProfileDeny}}}
			if ok {
				w.Cells[0].Profile = policy.ProfileAllow
			}
			p.Prepare = append(p.Prepare, w)
		}
		return p
	}
	type change struct{ in, out bool }
	cases := []struct {
		name    string
		proto   uint8
		strict  bool
		keep    bool
		in, out bool
		steps   []any // step or change
	}{
		{"tcp out", 6, true, false, false, true, []any{step{true, syn, true}, step{false, syn | ack, true}, step{true, ack, true}, step{false, fin | ack, true}, step{true, ack, true}}},
		{"tcp in is denied", 6, true, false, false, true, []any{step{false, syn, false}, step{false, ack, false}}},
		{"tcp in", 6, true, false, true, false, []any{step{false, syn, true}, step{true, syn | ack, true}, step{false, ack, true}, step{true, rst, true}}},
		{"answer without question, strict", 6, true, false, false, true, []any{step{false, syn | ack, false}, step{false, ack, false}}},
		{"answer without question", 6, false, false, false, true, []any{step{false, syn | ack, true}, step{false, ack, true}, step{false, syn, false}}},
		{"answer to what may not be asked", 6, false, false, false, false, []any{step{false, syn | ack, false}, step{false, ack, false}}},
		{"revoked", 6, false, false, true, false, []any{step{false, syn, true}, step{true, syn | ack, true}, step{false, ack, true}, change{false, false}, step{false, ack, false}, step{true, ack, false}, change{true, false}, step{false, ack, true}}},
		{"revoked ingress, egress open", 6, false, false, true, true, []any{step{false, syn, true}, step{true, syn | ack, true}, change{false, true}, step{false, ack, false}}},
		{"kept", 6, false, true, true, false, []any{step{false, syn, true}, step{true, syn | ack, true}, change{false, false}, step{false, ack, true}, step{true, ack, true}, step{false, syn, false}}},
		{"udp out", 17, false, false, false, true, []any{step{false, 0, false}, step{true, 0, true}, step{false, 0, true}, change{false, false}, step{false, 0, false}, step{true, 0, false}}},
		{"udp, both may open, then ingress only", 17, false, false, true, true, []any{step{true, 0, true}, step{false, 0, true}, change{true, false}, step{true, 0, true}, change{false, false}, step{true, 0, false}}},
		{"udp in", 17, false, false, true, false, []any{step{true, 0, false}, step{false, 0, true}, step{true, 0, true}}},
		{"echo out", 1, false, false, false, true, []any{step{false, 0, false}, step{true, 8, true}, step{false, 0, true}}},
	}
	ifs := inNamespace(t, 1) // no t.Run: a subtest has another thread, and so another namespace
	own, peer := lab.PodIPs(0), lab.PodIPs(200)
	loaded := map[Config]*Datapath{}
	port := uint16(40000)
	for _, v6 := range []bool{false, true} {
		for _, c := range cases {
			cfg := Config{Conntrack: 1024, Strict: c.strict, KeepEstablished: c.keep, RowBlocks: 64}
			d := loaded[cfg]
			if d == nil {
				d = open(t, cfg)
				loaded[cfg] = d
				if err := d.Insert(1, int(ifs[0]), own); err != nil {
					t.Fatal(err)
				}
			}
			set := func(in, out bool) {
				if err := d.Apply(mayOpen(in, out)); err != nil {
					t.Fatal(err)
				}
			}
			set(c.in, c.out)
			a, b, k := own[0], peer[0], 0
			proto := c.proto
			if v6 {
				if a, b = own[1], peer[1]; proto == 1 {
					proto = 58
				}
			}
			port++ // a flow of its own
			pa, pb := port, uint16(443)
			if c.in && !c.out || c.name == "revoked ingress, egress open" {
				pa, pb = pb, pa
			}
			for _, s := range c.steps {
				k++
				if ch, ok := s.(change); ok {
					set(ch.in, ch.out)
					continue
				}
				st := s.(step)
				p := frame.Packet{Src: a, Dst: b, SrcPort: pa, DstPort: pb, Protocol: proto, TCP: st.tcp, ICMPType: st.tcp}
				hook := flows.FromPod
				if !st.out {
					p.Src, p.Dst, p.SrcPort, p.DstPort, hook = b, a, pb, pa, flows.ToPod
				}
				if c.proto == 1 {
					p.SrcPort = port
					if v6 {
						p.ICMPType = 128 + st.tcp/8
					}
				}
				got, err := d.Run(hook, Input{Packet: p.Bytes(), Ifindex: ifs[0], IngressIfindex: 4242})
				if err != nil {
					t.Fatal(err)
				}
				if got.Pass != st.want {
					t.Errorf("%s, v6 %v: step %d %+v: passes %v", c.name, v6, k, st, got.Pass)
				}
			}
		}
	}
}
