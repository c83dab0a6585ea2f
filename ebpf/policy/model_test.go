package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/nodeagent/nodeagent/ebpf/lab"
	"github.com/nodeagent/nodeagent/ebpf/objects"
	"github.com/nodeagent/nodeagent/ebpf/reference"
)

// model is the datapath's tables and the reading of them, in Go. It applies
// plans write by write.
type model struct {
	bank     *Bank
	profiles map[uint16][BitmapSize]byte
	rows     map[string]map[uint32]uint16
	words    map[uint32]Word
	exact    map[netip.Addr]uint32
	prefixes map[netip.Prefix]uint32
	own      map[uint32]map[netip.Addr]uint32
	after    func(what string) // called after each write
}

func newModel() *model {
	return &model{profiles: map[uint16][BitmapSize]byte{}, rows: map[string]map[uint32]uint16{}, words: map[uint32]Word{},
		exact: map[netip.Addr]uint32{}, prefixes: map[netip.Prefix]uint32{}, own: map[uint32]map[netip.Addr]uint32{}, after: func(string) {}}
}

func rowKey(ep uint32, d Dir) string { return fmt.Sprint(ep, "/", d) }

func (m *model) apply(p *Plan) {
	if p.Bank != nil {
		m.bank = p.Bank
		clear(m.profiles)
	}
	for id, bits := range p.Profiles {
		m.profiles[id] = bits
	}
	m.after("profiles")
	for _, id := range p.Gone {
		delete(m.words, id)
		delete(m.rows, rowKey(id, In))
		delete(m.rows, rowKey(id, Out))
	}
	write := func(what string, list []RowWrite) {
		for _, w := range list {
			key := rowKey(w.Endpoint, w.Dir)
			if w.Blank || m.rows[key] == nil {
				m.rows[key] = map[uint32]uint16{}
			}
			for _, c := range w.Cells {
				m.rows[key][c.Class] = c.Profile
				m.after(what)
			}
		}
	}
	write("prepare", p.Prepare)
	for _, w := range p.Words {
		m.words[w.Endpoint] = w.Word
		m.after("words")
	}
	write("early", p.Early)
	for _, a := range p.Exact {
		m.exact[a.Addr] = a.Class
		m.after("exact")
	}
	for _, a := range p.Prefixes {
		m.prefixes[a.Prefix] = a.Class
		m.after("prefixes")
	}
	for _, o := range p.Own {
		if m.own[o.Endpoint] == nil {
			m.own[o.Endpoint] = map[netip.Addr]uint32{}
		}
		m.own[o.Endpoint][o.Addr] = o.Class
	}
	write("late", p.Late)
	for _, a := range p.DeleteExact {
		delete(m.exact, a)
		m.after("delete exact")
	}
	for _, a := range p.DeletePrefixes {
		delete(m.prefixes, a)
		m.after("delete prefix")
	}
}

func (m *model) class(ip netip.Addr) uint32 {
	if id, ok := m.exact[ip]; ok {
		return id
	}
	for bits := ip.BitLen(); bits >= 0; bits-- {
		p, _ := ip.Prefix(bits)
		if id, ok := m.prefixes[p]; ok {
			return id
		}
	}
	return World
}

// verdict returns the profile's word on a flow: 0 deny, 1 allow, 2 defer.
func (m *model) verdict(ep uint32, d Dir, peer netip.Addr, proto uint8, port uint16) int {
	w, ok := m.words[ep]
	if !ok || !w.Active {
		return 0
	}
	if !w.Isolated[d] {
		return 1
	}
	switch id := m.rows[rowKey(ep, d)][m.class(peer)]; id {
	case ProfileDeny:
		return 0
	case ProfileAllow:
		return 1
	case ProfileDefer:
		return 2
	default:
		k := slices.Index(protocols[:], proto)
		if k < 0 {
			return 0
		}
		bits := m.profiles[id]
		for _, iv := range m.bank.Intervals {
			if iv.Proto == uint8(k) && iv.First <= port && port <= iv.Last && bits[iv.Class/8]&(1<<(iv.Class%8)) != 0 {
				return 1
			}
		}
		return 0
	}
}

func (m *model) probe(p lab.Probe) int {
	d := In
	if p.Dir == reference.Egress {
		d = Out
	}
	return m.verdict(uint32(p.Pod), d, p.Peer, p.Proto, p.Port)
}

func expect(c *objects.Cluster, p lab.Probe) bool {
	subject := &c.Pods[p.Pod]
	return reference.JudgePod(c, p.Dir, subject, p.Peer, p.Proto, p.Port).Allowed
}

func deferred(c *objects.Cluster, p lab.Probe) bool {
	return p.Dir == reference.Egress && slices.ContainsFunc(c.Services, func(s netip.Prefix) bool { return s.Contains(p.Peer) })
}

func addEndpoints(c *Compiler, w *lab.World, cl *objects.Cluster) {
	for i := range w.Local {
		c.SetEndpoint(uint32(i), cl.Pods[i].PodKey, lab.PodIPs(i), false)
	}
}

func check(t *testing.T, m *model, cl *objects.Cluster, p lab.Probe) {
	t.Helper()
	got := m.probe(p)
	if deferred(cl, p) && got == 2 {
		return
	}
	if want := expect(cl, p); want != (got > 0) {
		d := reference.JudgePod(cl, p.Dir, &cl.Pods[p.Pod], p.Peer, p.Proto, p.Port)
		t.Fatalf("%+v: tables say %d, the reference %v\n%q", p, got, want, d.Why)
	}
}

// TestDifferential: tables compiled from scratch and tables after many changes
// both say what the reference says.
func TestDifferential(t *testing.T) {
	for seed := range uint64(300) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w := lab.New(rand.New(rand.NewPCG(seed, 1)))
			cl := w.Cluster()
			c, m := New(Limits{}), newModel()
			addEndpoints(c, w, cl)
			for round := range 6 {
				if round > 0 {
					w.Mutate(cl)
				}
				c.Set(cl)
				m.apply(c.Update())
				if round%2 == 0 {
					c.Graced()
				}
				for range 150 {
					check(t, m, cl, w.Probe())
				}
				if p := c.Update(); !p.Empty() {
					t.Fatalf("a second update is not empty: %+v", p)
				}
			}
			fresh, n := New(Limits{}), newModel()
			addEndpoints(fresh, w, cl)
			fresh.Set(cl)
			n.apply(fresh.Update())
			for range 100 {
				check(t, n, cl, w.Probe())
			}
			if a, b := c.Stats(), fresh.Stats(); a.Exact != b.Exact || a.Prefixes != b.Prefixes || a.Peers != b.Peers {
				t.Errorf("after changes %+v, from scratch %+v", a, b)
			}
		})
	}
}

// TestNoFlap: after each single write of each plan, each flow has its verdict
// of before or of after, and once it has the new one it keeps it.
func TestNoFlap(t *testing.T) {
	for seed := range uint64(150) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w := lab.New(rand.New(rand.NewPCG(seed, 2)))
			cl := w.Cluster()
			c, m := New(Limits{}), newModel()
			addEndpoints(c, w, cl)
			c.Set(cl)
			m.apply(c.Update())
			for range 12 {
				c.Graced()
				var what []string
				for range 1 + w.R.IntN(3) { // several changes at once
					what = append(what, w.Mutate(cl))
				}
				c.Set(cl)
				plan := c.Update()
				probes := make([]lab.Probe, 40)
				before, now := make([]int, 40), make([]int, 40)
				for i := range probes {
					probes[i] = w.Probe()
					before[i] = m.probe(probes[i])
				}
				trace := make([][]string, 40)
				m.after = func(step string) {
					for i, p := range probes {
						now[i] = m.probe(p)
						if n := len(trace[i]); n == 0 || trace[i][n-1] != fmt.Sprint(step, now[i]) {
							trace[i] = append(trace[i], fmt.Sprint(step, now[i]))
						}
					}
				}
				seen := make([][]int, 40)
				old := m.after
				m.after = func(step string) {
					old(step)
					for i := range probes {
						if k := len(seen[i]); k == 0 || seen[i][k-1] != now[i] {
							seen[i] = append(seen[i], now[i])
						}
					}
				}
				m.apply(plan)
				m.after = func(string) {}
				for i, p := range probes {
					after := m.probe(p)
					turns := 0
					for k, v := range seen[i] {
						if v != before[i] && v != after {
							t.Fatalf("%v: %+v was %d, becomes %d, was %d for a while\n%v", what, p, before[i], after, v, trace[i])
						}
						if k > 0 {
							turns++
						}
					}
					if turns > 1 || turns == 1 && before[i] == after {
						t.Fatalf("%v: %+v flaps %v from %d to %d\n%v", what, p, seen[i], before[i], after, trace[i])
					}
				}
			}
		})
	}
}
