package policy

import (
	"fmt"
	"math/rand/v2"
	"testing"

	networking "k8s.io/api/networking/v1"

	"github.com/nodeagent/nodeagent/ebpf/lab"
	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// compiledModel is the tables of a cluster, compiled from scratch.
func compiledModel(cl *objects.Cluster, local int) *model {
	c, m := New(Limits{}), newModel()
	for i := range local {
		c.SetEndpoint(uint32(i), cl.Pods[i].PodKey, lab.PodIPs(i), false)
	}
	c.Set(cl)
	m.apply(c.Update())
	return m
}

func wrong(m *model, cl *objects.Cluster, p lab.Probe) bool {
	got := m.probe(p)
	return !(deferred(cl, p) && got == 2) && expect(cl, p) != (got > 0)
}

// TestFixtures: what was judged wrongly once is judged rightly.
func TestFixtures(t *testing.T) {
	cases, err := lab.Cases("../lab/testdata")
	if err != nil {
		t.Fatal(err)
	}
	if len(cases) == 0 {
		t.Fatal("there are no fixtures")
	}
	for name, c := range cases {
		if got := expect(&c.Cluster, c.Probe); got != c.Allowed {
			t.Errorf("%s (%s): the reference says %v", name, c.Why, got)
		}
		if wrong(compiledModel(&c.Cluster, c.Local), &c.Cluster, c.Probe) {
			t.Errorf("%s (%s): the tables are wrong", name, c.Why)
		}
	}
}

// withoutExcepts is a compiler's fault: exceptions are forgotten.
func withoutExcepts(cl *objects.Cluster) *objects.Cluster {
	out := *cl
	out.Policies = nil
	forget := func(list []networking.NetworkPolicyPeer) {
		for i := range list {
			if list[i].IPBlock != nil {
				list[i].IPBlock.Except = nil
			}
		}
	}
	for _, p := range cl.Policies {
		p = p.DeepCopy()
		for i := range p.Spec.Ingress {
			forget(p.Spec.Ingress[i].From)
		}
		for i := range p.Spec.Egress {
			forget(p.Spec.Egress[i].To)
		}
		out.Policies = append(out.Policies, p)
	}
	return &out
}

// TestShrink: a fault in what is compiled is found and brought down to one rule
// with one exception, and what is written is read again.
func TestShrink(t *testing.T) {
	faults := map[string]struct {
		inject  func(*objects.Cluster) *objects.Cluster
		excepts int
	}{
		"exceptions forgotten": {withoutExcepts, 1},
		"last policy forgotten": {func(cl *objects.Cluster) *objects.Cluster {
			out := *cl
			out.Policies = out.Policies[:max(0, len(out.Policies)-1)]
			return &out
		}, 0},
	}
	for name, f := range faults {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(1000) {
				w := lab.New(rand.New(rand.NewPCG(seed, 7)))
				cl := w.Cluster()
				m := compiledModel(f.inject(cl), w.Local)
				for range 50 {
					p := w.Probe()
					if len(cl.Policies) < 3 || !wrong(m, cl, p) {
						continue
					}
					checkShrunk(t, cl, w.Local, p, f.inject, f.excepts)
					return
				}
			}
			t.Fatal("the fault was never found")
		})
	}
}

func checkShrunk(t *testing.T, cl *objects.Cluster, local int, p lab.Probe, inject func(*objects.Cluster) *objects.Cluster, excepts int) {
	t.Helper()
	small := lab.Shrink(cl, local, func(c *objects.Cluster) bool { return wrong(compiledModel(inject(c), local), c, p) })
	if !wrong(compiledModel(inject(small), local), small, p) {
		t.Fatal("what is left does not fail")
	}
	peers, found := 0, 0
	for _, np := range small.Policies {
		for _, r := range np.Spec.Ingress {
			peers += len(r.From)
			for _, q := range r.From {
				if q.IPBlock != nil {
					found += len(q.IPBlock.Except)
				}
			}
		}
		for _, r := range np.Spec.Egress {
			peers += len(r.To)
			for _, q := range r.To {
				if q.IPBlock != nil {
					found += len(q.IPBlock.Except)
				}
			}
		}
	}
	if len(small.Policies) != 1 || peers > 1 || found != excepts || len(small.Pods) > local+1 {
		t.Errorf("from %d policies and %d pods to %d and %d, %d peers, %d exceptions", len(cl.Policies), len(cl.Pods), len(small.Policies), len(small.Pods), peers, found)
	}
	c := lab.Case{Why: fmt.Sprint("test ", t.Name()), Cluster: *small, Local: local, Probe: p, Allowed: expect(small, p)}
	dir := t.TempDir()
	path, err := c.Write(dir)
	if err != nil {
		t.Fatal(err)
	}
	back, err := lab.Cases(dir)
	if err != nil || len(back) != 1 {
		t.Fatalf("%s: %d cases, %v", path, len(back), err)
	}
	for _, b := range back {
		if !wrong(compiledModel(inject(&b.Cluster), local), &b.Cluster, b.Probe) || b.Allowed != c.Allowed || b.Probe != c.Probe {
			t.Errorf("the fixture is another case: %+v", b)
		}
	}
	t.Logf("%s", path)
}
