package lab

import (
	"fmt"
	"net/netip"

	networking "k8s.io/api/networking/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// Big is a cluster of 1000 namespaces, 100,000 pods and 10,000 policies.
func Big() *objects.Cluster {
	c := &objects.Cluster{}
	for i := range 1000 {
		name := fmt.Sprint("ns", i)
		c.Namespaces = append(c.Namespaces, objects.Namespace{Name: name, Labels: map[string]string{"kubernetes.io/metadata.name": name, "team": fmt.Sprint("t", i%50)}})
	}
	for i := range 100_000 {
		c.Pods = append(c.Pods, *BigPod(i, i%7))
	}
	for i := range 10_000 {
		p := &objects.Policy{}
		p.Namespace, p.Name = fmt.Sprint("ns", i%1000), fmt.Sprint("np", i/1000)
		p.Spec = BigSpec(i)
		c.Policies = append(c.Policies, p)
	}
	return c
}

// BigPod is the i-th pod of Big, of some application.
func BigPod(i, app int) *objects.Pod {
	return &objects.Pod{
		PodKey: objects.PodKey{Namespace: fmt.Sprint("ns", i%1000), Name: fmt.Sprint("p", i)}, Created: int64(i),
		Labels: map[string]string{"app": fmt.Sprint("a", app), "pod-template-hash": fmt.Sprint(i)},
		IPs:    []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})},
	}
}

// BigSpec is what the i-th policy of Big says.
func BigSpec(i int) networking.NetworkPolicySpec {
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
