package policy

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/nodeagent/nodeagent/ebpf/lab"
)

// TestScale measures 10,000 policies and 100,000 pods with 110 of them here:
// all at once, then one change each.
func TestScale(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds and half a gigabyte")
	}
	cl := lab.Big()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	began := time.Now()
	c := New(Limits{})
	for i := range 110 {
		c.SetEndpoint(uint32(i+1), cl.Pods[i*37].PodKey, cl.Pods[i*37].IPs, false)
	}
	c.Set(cl)
	set := time.Since(began)
	p := c.Update()
	full := time.Since(began)
	runtime.GC()
	runtime.ReadMemStats(&after)
	t.Logf("all at once: %v to take, %v in all; %d addresses, %d prefixes written; compiler holds %d MB; %+v",
		set, full, len(p.Exact), len(p.Prefixes), (after.HeapAlloc-before.HeapAlloc)>>20, c.Stats())
	if len(p.Problems) > 0 {
		t.Errorf("%v", p.Problems)
	}
	measure := func(what string, n int, change func(i int)) {
		var worst, sum time.Duration
		for i := range n {
			began := time.Now()
			change(i)
			c.Update()
			c.Graced()
			d := time.Since(began)
			worst, sum = max(worst, d), sum+d
		}
		t.Logf("%s: mean %v, worst of %d %v", what, sum/time.Duration(n), n, worst)
	}
	measure("a remote pod's label", 200, func(i int) { c.SetPod(lab.BigPod(5000+i, (i+3)%7)) })
	measure("a remote pod comes", 200, func(i int) { c.SetPod(lab.BigPod(200_000+i, i%7)) })
	measure("a policy elsewhere", 100, func(i int) {
		q := *cl.Policies[900+i%90]
		q.Spec = lab.BigSpec(i + 7)
		c.SetPolicy(&q)
	})
	measure("a policy of a local pod", 100, func(i int) {
		q := *cl.Policies[(i%110)*37%1000]
		q.Spec = lab.BigSpec(i*1000 + i + 13)
		c.SetPolicy(&q)
	})
	measure("a namespace's label", 50, func(i int) {
		ns := cl.Namespaces[i]
		ns.Labels = map[string]string{"team": fmt.Sprint("t", (i+1)%50)}
		c.SetNamespace(ns)
	})
	measure("a local pod", 100, func(i int) { c.SetEndpoint(1, cl.Pods[i*41].PodKey, cl.Pods[i*41].IPs, false) })
}
