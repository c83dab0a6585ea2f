//go:build linux

package datapath

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	ciliumebpf "github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/nodeagent/nodeagent/ebpf/flows"
	"github.com/nodeagent/nodeagent/ebpf/frame"
	"github.com/nodeagent/nodeagent/ebpf/lab"
	"github.com/nodeagent/nodeagent/ebpf/objects"
	"github.com/nodeagent/nodeagent/ebpf/policy"
	"github.com/nodeagent/nodeagent/ebpf/reference"
)

// inNamespace runs the test in a network namespace of its own with n veth
// interfaces and returns their numbers.
func inNamespace(t testing.TB, n int) []uint32 {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	own, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = netns.Set(home)
		own.Close()
		home.Close()
		runtime.UnlockOSThread()
	})
	var out []uint32
	for i := range n {
		l := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprint("d", i)}, PeerName: fmt.Sprint("e", i)}
		if err := netlink.LinkAdd(l); err != nil {
			t.Fatal(err)
		}
		made, err := netlink.LinkByName(l.Name)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, uint32(made.Attrs().Index))
	}
	return out
}

func open(t testing.TB, cfg Config) *Datapath {
	t.Helper()
	d, err := Open(cfg)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

const xdpPass = 2

type bench struct {
	d   *Datapath
	c   *policy.Compiler
	w   *lab.World
	cl  *objects.Cluster
	ifs []uint32
}

func (b *bench) update(t testing.TB) {
	t.Helper()
	b.c.Set(b.cl)
	p := b.c.Update()
	if err := b.d.Apply(p); err != nil {
		t.Fatal(err)
	}
	if p.Retired {
		b.d.Settle()
		b.c.Graced()
	}
}

// newBench puts a random world into the datapath. Numbers of endpoints are
// base and following.
func newBench(t testing.TB, d *Datapath, seed uint64, base uint32, ifs []uint32) *bench {
	t.Helper()
	w := lab.New(rand.New(rand.NewPCG(seed, 3)))
	b := &bench{d: d, c: policy.New(policy.Limits{}), w: w, cl: w.Cluster(), ifs: ifs}
	for i := range w.Local {
		if err := d.Insert(uint32(i), int(ifs[i]), lab.PodIPs(i)); err != nil {
			t.Fatal(err)
		}
		b.c.SetEndpoint(uint32(i), b.cl.Pods[i].PodKey, lab.PodIPs(i), false)
	}
	b.update(t)
	return b
}

func (b *bench) clear(t testing.TB) {
	for i := range b.w.Local {
		b.c.DeleteEndpoint(uint32(i))
	}
	b.cl = &objects.Cluster{}
	b.update(t)
}

func protocolFor(p lab.Probe) (proto, icmp uint8) {
	if p.Proto == 1 {
		if p.Peer.Is6() {
			return 58, 128
		}
		return 1, 8
	}
	return p.Proto, 0
}

// shapes are packets that must all get the probe's verdict.
func shapes(r *rand.Rand, p lab.Probe) [4]frame.Packet {
	f := p.Flow()
	proto, icmp := protocolFor(p)
	base := frame.Packet{Src: f.Src, Dst: f.Dst, Protocol: proto, ICMPType: icmp, SrcPort: uint16(1024 + r.IntN(60000)), DstPort: p.Port, TCP: frame.SYN}
	out := [4]frame.Packet{base, base, base, base}
	out[1].Options = 1 + r.IntN(5)
	out[2].Payload = make([]byte, r.IntN(1200))
	out[2].TCP |= 0xc0 // ECN
	out[3].SrcPort = uint16(r.IntN(1 << 16))
	return out
}

func (b *bench) run(t testing.TB, p lab.Probe, packet []byte) Output {
	t.Helper()
	in := Input{Packet: packet, Ifindex: b.ifs[p.Pod], IngressIfindex: 4242, Dry: true}
	hook := flows.ToPod
	if p.Dir == reference.Egress {
		hook = flows.FromPod
	} else if owner := reference.Owner(b.cl, p.Peer); owner != nil {
		for i := range b.w.Local {
			if b.cl.Pods[i].PodKey == owner.PodKey {
				in.IngressIfindex = b.ifs[i]
			}
		}
	}
	out, err := b.d.Run(hook, in)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (b *bench) deferred(p lab.Probe) bool {
	return p.Dir == reference.Egress && slices.ContainsFunc(b.cl.Services, func(s netip.Prefix) bool { return s.Contains(p.Peer) })
}

// judge compares the loaded program with the reference; it returns how many
// verdicts were compared.
func (b *bench) judge(t testing.TB, p lab.Probe) (n int, bad string) {
	want := reference.JudgePod(b.cl, p.Dir, &b.cl.Pods[p.Pod], p.Peer, p.Proto, p.Port)
	for _, s := range shapes(b.w.R, p) {
		got := b.run(t, p, s.Bytes())
		if b.deferred(p) && got.Reason == flows.Deferred {
			n++
			continue
		}
		if got.Pass != want.Allowed {
			return n, fmt.Sprintf("%+v as %+v: the program says %v (%s, class %d, profile %d), the reference %v\n%q",
				p, s, got.Pass, got.Reason, got.Class, got.Profile, want.Allowed, want.Why)
		}
		n++
	}
	if p.Dir == reference.Ingress && p.Proto == objects.TCP { // the NIC drops early, and only what is denied
		f := p.Flow()
		packet := frame.Packet{Src: f.Src, Dst: f.Dst, Protocol: p.Proto, SrcPort: 999, DstPort: p.Port, TCP: frame.SYN}
		got, err := b.d.Run(flows.UplinkIn, Input{Packet: packet.Bytes(), Ifindex: 1, IngressIfindex: 1, Dry: true})
		if err != nil {
			t.Fatal(err)
		}
		n++
		if !got.Pass && want.Allowed {
			return n, fmt.Sprintf("%+v: dropped at the NIC, the reference allows it: %q", p, want.Why)
		}
		xdp, err := b.d.objs.NaXdp.Run(&ciliumebpf.RunOptions{Data: packet.Bytes()})
		if err != nil {
			t.Fatal(err)
		}
		n++
		if (xdp == xdpPass) != got.Pass {
			return n, fmt.Sprintf("%+v: XDP says %d, the program behind it %v", p, xdp, got.Pass)
		}
	}
	return n, ""
}

// shrink makes a fixture of the smallest cluster on which the probe still fails.
func (b *bench) shrink(t testing.TB, p lab.Probe) string {
	bad := ""
	small := lab.Shrink(b.cl, b.w.Local, func(cl *objects.Cluster) bool {
		b.cl = cl
		b.update(t)
		_, bad = b.judge(t, p)
		return bad != ""
	})
	b.cl = small
	b.update(t)
	_, bad = b.judge(t, p)
	path, err := lab.Case{
		Why: bad, Cluster: *small, Local: b.w.Local, Probe: p, Allowed: reference.JudgePod(small, p.Dir, &small.Pods[p.Pod], p.Peer, p.Proto, p.Port).Allowed,
	}.Write("../lab/testdata")
	return fmt.Sprintf("%s\n%s %v", bad, path, err)
}

// TestFixtures: what was judged wrongly once is judged rightly by the loaded
// programs.
func TestFixtures(t *testing.T) {
	ifs := inNamespace(t, 4)
	d := open(t, Config{Conntrack: 1024})
	cases, err := lab.Cases("../lab/testdata")
	if err != nil || len(cases) == 0 {
		t.Fatalf("%d fixtures: %v", len(cases), err)
	}
	for name, c := range cases {
		b := &bench{d: d, c: policy.New(policy.Limits{}), w: &lab.World{R: rand.New(rand.NewPCG(1, 1)), Local: c.Local}, cl: &c.Cluster, ifs: ifs}
		for i := range c.Local {
			if err := d.Insert(uint32(i), int(ifs[i]), lab.PodIPs(i)); err != nil {
				t.Fatal(err)
			}
			b.c.SetEndpoint(uint32(i), c.Cluster.Pods[i].PodKey, lab.PodIPs(i), false)
		}
		b.update(t)
		if _, bad := b.judge(t, c.Probe); bad != "" {
			t.Errorf("%s (%s): %s", name, c.Why, bad)
		}
		b.clear(t)
	}
}

// TestDifferential judges random worlds, as they change, by the loaded
// programs and by the reference: a million verdicts unless -short.
func TestDifferential(t *testing.T) {
	want, limit := 1_000_000, time.Now().Add(10*time.Minute)
	if testing.Short() {
		want = 20_000
	}
	ifs := inNamespace(t, 4)
	d := open(t, Config{Conntrack: 1024})
	total := 0
	seed := uint64(0)
	for ; total < want && time.Now().Before(limit); seed++ {
		b := newBench(t, d, seed, 0, ifs)
		for round := range 8 {
			if round > 0 {
				b.w.Mutate(b.cl)
				b.update(t)
			}
			for range 400 {
				p := b.w.Probe()
				n, bad := b.judge(t, p)
				total += n
				if bad != "" {
					t.Fatalf("world %d, round %d: %s\nsmallest: %s", seed, round, bad, b.shrink(t, p))
				}
			}
		}
		b.clear(t)
	}
	t.Logf("%d verdicts on %d worlds", total, seed)
	if total < want {
		t.Errorf("only %d verdicts in the time; wanted %d", total, want)
	}
}
