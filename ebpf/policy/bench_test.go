package policy

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	networking "k8s.io/api/networking/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// bigCluster has 1000 namespaces, 100,000 pods and 10,000 policies.
func bigCluster() *objects.Cluster {
	c := &objects.Cluster{}
	for i := range 1000 {
		name := fmt.Sprint("ns", i)
		c.Namespaces = append(c.Namespaces, objects.Namespace{Name: name, Labels: map[string]string{"kubernetes.io/metadata.name": name, "team": fmt.Sprint("t", i%50)}})
	}
	for i := range 100_000 {
		c.Pods = append(c.Pods, *bigPod(i, i%7))
	}
	for i := range 10_000 {
		p := &objects.Policy{}
		p.Namespace, p.Name = fmt.Sprint("ns", i%1000), fmt.Sprint("np", i/1000)
		p.Spec = bigSpec(i)
		c.Policies = append(c.Policies, p)
	}
	return c
}

func bigPod(i, app int) *objects.Pod {
	return &objects.Pod{
		PodKey: objects.PodKey{Namespace: fmt.Sprint("ns", i%1000), Name: fmt.Sprint("p", i)}, Created: int64(i),
		Labels: map[string]string{"app": fmt.Sprint("a", app), "pod-template-hash": fmt.Sprint(i)},
		IPs:    []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})},
	}
}

func bigSpec(i int) networking.NetworkPolicySpec {
	port, to := intstr.FromInt32(int32(1000+i%100)), &meta.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint("a", (i/1000+1)%7)}}
	s := networking.NetworkPolicySpec{PodSelector: meta.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint("a", i/1000%7)}}}
	s.Ingress = []networking.NetworkPolicyIngressRule{{
		From: []networking.NetworkPolicyPeer{
			{PodSelector: to},
			{NamespaceSelector: &meta.LabelSelector{MatchLabels: map[string]string{"team": fmt.Sprint("t", i%50)}}, PodSelector: to},
			{IPBlock: &networking.IPBlock{CIDR: fmt.Sprintf("172.%d.0.0/16", i%256), Except: []string{fmt.Sprintf("172.%d.%d.0/24", i%256, i/1000)}}},
		},
		Ports: []networking.NetworkPolicyPort{{Port: &port}},
	}}
	return s
}

// TestScale measures 10,000 policies and 100,000 pods with 110 of them here:
// all at once, then one change each.
func TestScale(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds and half a gigabyte")
	}
	cl := bigCluster()
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
	measure("a remote pod's label", 200, func(i int) { c.SetPod(bigPod(5000+i, (i+3)%7)) })
	measure("a remote pod comes", 200, func(i int) { c.SetPod(bigPod(200_000+i, i%7)) })
	measure("a policy elsewhere", 100, func(i int) {
		q := *cl.Policies[900+i%90]
		q.Spec = bigSpec(i + 7)
		c.SetPolicy(&q)
	})
	measure("a policy of a local pod", 100, func(i int) {
		q := *cl.Policies[(i%110)*37%1000]
		q.Spec = bigSpec(i*1000 + i + 13)
		c.SetPolicy(&q)
	})
	measure("a namespace's label", 50, func(i int) {
		ns := cl.Namespaces[i]
		ns.Labels = map[string]string{"team": fmt.Sprint("t", (i+1)%50)}
		c.SetNamespace(ns)
	})
	measure("a local pod", 100, func(i int) { c.SetEndpoint(1, cl.Pods[i*41].PodKey, cl.Pods[i*41].IPs, false) })
}
