// Package lab makes random clusters and flows for tests: small worlds in which
// every kind of rule meets every kind of peer, with flows on the boundaries.
//
// Test support: nothing of the product imports it. No goroutines, no locks; all
// randomness comes from the source it is given.
package lab

import (
	"fmt"
	"math/rand/v2"
	"net/netip"

	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/nodeagent/nodeagent/ebpf/objects"
	"github.com/nodeagent/nodeagent/ebpf/reference"
)

// World makes random objects.
type World struct {
	R     *rand.Rand
	Space int // namespaces
	Pods  int // pods
	Most  int // policies, at most
	Local int // of the pods, the first so many are on this node
}

// New returns a world of a random small size.
func New(r *rand.Rand) *World {
	return &World{R: r, Space: 1 + r.IntN(3), Pods: 6 + r.IntN(18), Most: 1 + r.IntN(8), Local: 4}
}

func pick[T any](r *rand.Rand, list []T) T { return list[r.IntN(len(list))] }

func (w *World) labels() map[string]string {
	out := map[string]string{}
	for _, k := range []string{"app", "tier", "x"} {
		if w.R.IntN(3) > 0 {
			out[k] = pick(w.R, []string{"a", "b", "c"})
		}
	}
	return out
}

// Cluster makes a whole cluster.
func (w *World) Cluster() *objects.Cluster {
	c := &objects.Cluster{Node: []netip.Addr{netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("fd00:9::1")}}
	for i := range w.Space {
		c.Namespaces = append(c.Namespaces, w.Namespace(i))
	}
	for i := range w.Pods {
		c.Pods = append(c.Pods, w.Pod(i))
	}
	for i := range w.R.IntN(w.Most + 1) {
		c.Policies = append(c.Policies, w.Policy(i))
	}
	if w.R.IntN(2) == 0 {
		c.Services = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}
	}
	return c
}

// Namespace makes the i-th namespace.
func (w *World) Namespace(i int) objects.Namespace {
	l := w.labels()
	l["kubernetes.io/metadata.name"] = fmt.Sprintf("ns%d", i)
	return objects.Namespace{Name: fmt.Sprintf("ns%d", i), Labels: l}
}

// PodIPs are the addresses of the i-th pod.
func PodIPs(i int) []netip.Addr {
	return []netip.Addr{
		netip.AddrFrom4([4]byte{10, 0, byte(i / 8), byte(i%8 + 1)}),
		netip.AddrFrom16([16]byte{0xfd, 0, 14: byte(i / 8), 15: byte(i%8 + 1)}),
	}
}

// Pod makes the i-th pod. Local ones live.
func (w *World) Pod(i int) objects.Pod {
	p := objects.Pod{PodKey: objects.PodKey{Namespace: fmt.Sprintf("ns%d", i%w.Space), Name: fmt.Sprintf("p%d", i)}, UID: fmt.Sprint("uid", i), Created: int64(i), Labels: w.labels(), IPs: PodIPs(i)}
	for _, n := range []string{"http", "dns", "alt"} {
		if w.R.IntN(2) == 0 {
			p.Ports = append(p.Ports, objects.NamedPort{Name: n, Protocol: pick(w.R, []uint8{objects.TCP, objects.UDP}), Port: pick(w.R, ports)})
		}
	}
	if i < w.Local {
		return p
	}
	switch w.R.IntN(12) {
	case 0:
		p.Finished = true
	case 1:
		p.HostNetwork, p.IPs = true, []netip.Addr{netip.MustParseAddr("10.9.0.7")}
	case 2: // claims the address of another
		p.IPs = PodIPs(w.Local + w.R.IntN(max(1, w.Pods-w.Local)))
	}
	return p
}

var ports = []uint16{1, 53, 79, 80, 81, 443, 1023, 1024, 8080, 8081, 30000, 65534, 65535}

func (w *World) selector() *meta.LabelSelector {
	s := &meta.LabelSelector{}
	for range w.R.IntN(2) {
		s.MatchLabels = map[string]string{pick(w.R, []string{"app", "tier", "x"}): pick(w.R, []string{"a", "b", "c"})}
	}
	if w.R.IntN(3) == 0 {
		e := meta.LabelSelectorRequirement{Key: pick(w.R, []string{"app", "tier", "x"})}
		switch w.R.IntN(4) {
		case 0:
			e.Operator, e.Values = meta.LabelSelectorOpIn, []string{"a", "b"}
		case 1:
			e.Operator, e.Values = meta.LabelSelectorOpNotIn, []string{pick(w.R, []string{"a", "b"})}
		case 2:
			e.Operator = meta.LabelSelectorOpExists
		case 3:
			e.Operator = meta.LabelSelectorOpDoesNotExist
		}
		s.MatchExpressions = append(s.MatchExpressions, e)
	}
	return s
}

var blocks = []struct {
	cidr    string
	excepts []string
}{
	{"0.0.0.0/0", []string{"10.0.0.0/8", "10.0.0.0/16", "10.0.1.0/24", "192.168.0.0/17", "10.0.0.3/32"}},
	{"10.0.0.0/8", []string{"10.0.0.0/16", "10.0.0.0/29", "10.0.0.4/30", "10.0.1.0/24", "10.9.0.1/32"}},
	{"10.0.0.0/24", []string{"10.0.0.0/25", "10.0.0.2/32", "10.0.0.4/30"}},
	{"10.0.0.0/29", []string{"10.0.0.1/32", "10.0.0.2/31"}},
	{"10.0.0.2/32", nil},
	{"192.168.0.0/16", []string{"192.168.0.0/24", "192.168.128.0/17"}},
	{"192.168.0.0/25", []string{"192.168.0.64/26"}},
	{"128.0.0.0/1", nil},
	{"10.96.0.0/12", []string{"10.96.0.0/24"}},
	{"::/0", []string{"fd00::/16", "fd00::/120", "2001:db8::/33"}},
	{"fd00::/8", []string{"fd00::/64", "fd00::4/126", "fd00::1/128"}},
	{"fd00::/120", []string{"fd00::2/127"}},
	{"2001:db8::/32", []string{"2001:db8:1::/48"}},
}

func (w *World) peer() networking.NetworkPolicyPeer {
	switch w.R.IntN(5) {
	case 0:
		return networking.NetworkPolicyPeer{PodSelector: w.selector()}
	case 1:
		return networking.NetworkPolicyPeer{NamespaceSelector: w.selector()}
	case 2:
		return networking.NetworkPolicyPeer{PodSelector: w.selector(), NamespaceSelector: w.selector()}
	}
	b := pick(w.R, blocks)
	out := &networking.IPBlock{CIDR: b.cidr}
	for _, e := range b.excepts {
		if w.R.IntN(3) == 0 {
			out.Except = append(out.Except, e)
		}
	}
	return networking.NetworkPolicyPeer{IPBlock: out}
}

func (w *World) port() networking.NetworkPolicyPort {
	var out networking.NetworkPolicyPort
	if w.R.IntN(4) > 0 {
		proto := pick(w.R, []core.Protocol{core.ProtocolTCP, core.ProtocolTCP, core.ProtocolUDP, core.ProtocolSCTP})
		out.Protocol = &proto
	}
	switch w.R.IntN(8) {
	case 0:
	case 1, 2:
		n := intstr.FromString(pick(w.R, []string{"http", "dns", "alt", "none"}))
		out.Port = &n
	case 3, 4:
		a, b := pick(w.R, ports), pick(w.R, ports)
		n, end := intstr.FromInt32(int32(min(a, b))), int32(max(a, b))
		out.Port, out.EndPort = &n, &end
	default:
		n := intstr.FromInt32(int32(pick(w.R, ports)))
		out.Port = &n
	}
	return out
}

func some[T any](r *rand.Rand, most int, f func() T) []T {
	var out []T
	for range r.IntN(most + 1) {
		out = append(out, f())
	}
	return out
}

// Policy makes the i-th policy.
func (w *World) Policy(i int) *objects.Policy {
	p := &objects.Policy{}
	p.Namespace, p.Name = fmt.Sprintf("ns%d", i%w.Space), fmt.Sprintf("np%d", i)
	p.Spec.PodSelector = *w.selector()
	if w.R.IntN(2) == 0 {
		p.Spec.PodSelector = meta.LabelSelector{}
	}
	switch w.R.IntN(4) {
	case 0:
		p.Spec.PolicyTypes = []networking.PolicyType{networking.PolicyTypeIngress}
	case 1:
		p.Spec.PolicyTypes = []networking.PolicyType{networking.PolicyTypeEgress}
	case 2:
		p.Spec.PolicyTypes = []networking.PolicyType{networking.PolicyTypeIngress, networking.PolicyTypeEgress}
	}
	p.Spec.Ingress = some(w.R, 3, func() networking.NetworkPolicyIngressRule {
		return networking.NetworkPolicyIngressRule{From: some(w.R, 3, w.peer), Ports: some(w.R, 3, w.port)}
	})
	p.Spec.Egress = some(w.R, 3, func() networking.NetworkPolicyEgressRule {
		return networking.NetworkPolicyEgressRule{To: some(w.R, 3, w.peer), Ports: some(w.R, 3, w.port)}
	})
	return p
}

// Probe is a question: may the pod open this flow, or be sent it?
type Probe struct {
	Pod   int // a local one
	Dir   reference.Direction
	Peer  netip.Addr
	Proto uint8
	Port  uint16
}

// Flow is the probe's flow with the pod's address of the peer's family.
func (p Probe) Flow() reference.Flow {
	own := PodIPs(p.Pod)[0]
	if p.Peer.Is6() {
		own = PodIPs(p.Pod)[1]
	}
	if p.Dir == reference.Egress {
		return reference.Flow{Src: own, Dst: p.Peer, Protocol: p.Proto, Port: p.Port}
	}
	return reference.Flow{Src: p.Peer, Dst: own, Protocol: p.Proto, Port: p.Port}
}

var edges = func() []netip.Addr {
	var out []netip.Addr
	add := func(text string) {
		p := netip.MustParsePrefix(text)
		first := p.Masked().Addr()
		last := lastOf(p)
		out = append(out, first, last)
		if q := first.Prev(); q.IsValid() {
			out = append(out, q)
		}
		if q := last.Next(); q.IsValid() {
			out = append(out, q)
		}
	}
	for _, b := range blocks {
		add(b.cidr)
		for _, e := range b.excepts {
			add(e)
		}
	}
	return out
}()

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Probe makes a question, favouring edges.
func (w *World) Probe() Probe {
	p := Probe{Pod: w.R.IntN(w.Local), Dir: pick(w.R, []reference.Direction{reference.Ingress, reference.Egress})}
	for {
		switch w.R.IntN(3) {
		case 0:
			p.Peer = pick(w.R, edges)
		default:
			p.Peer = pick(w.R, PodIPs(w.R.IntN(w.Pods)))
		}
		own := PodIPs(p.Pod)
		if p.Peer != own[0] && p.Peer != own[1] {
			break
		}
	}
	p.Proto = pick(w.R, []uint8{objects.TCP, objects.TCP, objects.TCP, objects.UDP, objects.UDP, objects.SCTP, 1, 47})
	p.Port = uint16(int(pick(w.R, ports)) + w.R.IntN(3) - 1)
	return p
}

// Mutate changes one object of the cluster and says what.
func (w *World) Mutate(c *objects.Cluster) string {
	switch w.R.IntN(8) {
	case 0:
		i := w.R.IntN(len(c.Namespaces))
		c.Namespaces[i] = w.Namespace(i)
		return "namespace " + c.Namespaces[i].Name
	case 1, 2:
		i := w.R.IntN(len(c.Pods))
		c.Pods[i] = w.Pod(i)
		return "pod " + c.Pods[i].Name
	case 3:
		if len(c.Policies) > 0 {
			i := w.R.IntN(len(c.Policies))
			c.Policies = append(c.Policies[:i:i], c.Policies[i+1:]...)
			return "policy deleted"
		}
	}
	i := w.R.IntN(w.Most + 1)
	n := w.Policy(i)
	for k, p := range c.Policies {
		if p.Name == n.Name && p.Namespace == n.Namespace {
			c.Policies = append([]*objects.Policy(nil), c.Policies...)
			c.Policies[k] = n
			return "policy changed " + n.Name
		}
	}
	c.Policies = append(c.Policies[:len(c.Policies):len(c.Policies)], n)
	return "policy added " + n.Name
}
