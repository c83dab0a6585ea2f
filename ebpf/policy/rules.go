package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// Dir is the direction that a row is about.
type Dir uint8

const (
	In  Dir = 0
	Out Dir = 1
)

// name is a port by name, to be resolved on the pod a connection goes to.
type name struct {
	proto uint8
	name  string
}

// peerSpec is what a peer of a rule says, before it has a number.
type peerSpec struct {
	key     string // equal peers have equal keys
	ns      string // pods of this namespace only, unless anyNS
	anyNS   bool
	nsSel   selector
	podSel  selector
	block   netip.Prefix // valid: an ipBlock
	excepts []netip.Prefix
}

type rule struct {
	everyone bool // no peers named: all match
	specs    []peerSpec
	peers    []*peer // beside specs, while the policy is in use
	anyPort  bool
	ranges   []Range
	names    []name
}

// compiled is one policy object.
type compiled struct {
	object   *objects.Policy
	key      objects.PodKey
	serial   uint64
	selector selector
	usable   bool
	isolates [2]bool
	rules    [2][]rule
	faults   []string
}

// compile never fails: what cannot be read matches nothing and is reported.
func compile(p *objects.Policy, serial uint64) *compiled {
	c := &compiled{key: objects.PodKey{Namespace: p.Namespace, Name: p.Name}, serial: serial, usable: true}
	var err error
	if c.selector, _, err = newSelector(&p.Spec.PodSelector); err != nil {
		c.usable = false
		c.fault("podSelector: %v", err)
	}
	if len(p.Spec.PolicyTypes) == 0 {
		c.isolates = [2]bool{In: true, Out: len(p.Spec.Egress) > 0}
	}
	for _, t := range p.Spec.PolicyTypes {
		switch t {
		case networking.PolicyTypeIngress:
			c.isolates[In] = true
		case networking.PolicyTypeEgress:
			c.isolates[Out] = true
		}
	}
	if c.isolates[In] {
		for _, r := range p.Spec.Ingress {
			c.rules[In] = append(c.rules[In], c.rule(r.From, r.Ports))
		}
	}
	if c.isolates[Out] {
		for _, r := range p.Spec.Egress {
			c.rules[Out] = append(c.rules[Out], c.rule(r.To, r.Ports))
		}
	}
	return c
}

func (c *compiled) fault(format string, args ...any) {
	c.faults = append(c.faults, fmt.Sprintf(format, args...))
}

func (c *compiled) rule(peers []networking.NetworkPolicyPeer, ports []networking.NetworkPolicyPort) rule {
	r := rule{everyone: len(peers) == 0, anyPort: len(ports) == 0}
	for _, p := range peers {
		spec, err := newPeerSpec(c.key.Namespace, p)
		if err != nil {
			c.fault("peer: %v", err)
			continue
		}
		r.specs = append(r.specs, spec)
	}
	for _, p := range ports {
		if err := r.port(p); err != nil {
			c.fault("port: %v", err)
		}
	}
	r.ranges = normal(r.ranges)
	return r
}

func (r *rule) port(p networking.NetworkPolicyPort) error {
	proto := uint8(0)
	if p.Protocol != nil {
		switch *p.Protocol {
		case core.ProtocolTCP:
		case core.ProtocolUDP:
			proto = 1
		case core.ProtocolSCTP:
			proto = 2
		default:
			return fmt.Errorf("unknown protocol %q", *p.Protocol)
		}
	}
	switch {
	case p.Port == nil:
		r.ranges = append(r.ranges, Range{proto, 0, 0xffff})
	case p.Port.Type == intstr.String:
		r.names = append(r.names, name{proto, p.Port.StrVal})
	default:
		first, last := p.Port.IntVal, p.Port.IntVal
		if p.EndPort != nil {
			last = *p.EndPort
		}
		if first < 0 || last > 0xffff || first > last {
			return fmt.Errorf("range %d to %d", first, last)
		}
		r.ranges = append(r.ranges, Range{proto, uint16(first), uint16(last)})
	}
	return nil
}

func newPeerSpec(ns string, p networking.NetworkPolicyPeer) (peerSpec, error) {
	if p.IPBlock != nil {
		return newBlock(p.IPBlock)
	}
	var s peerSpec
	var nsKey, podKey string
	var err error
	switch {
	case p.NamespaceSelector != nil:
		s.anyNS = true
		if s.nsSel, nsKey, err = newSelector(p.NamespaceSelector); err != nil {
			return s, fmt.Errorf("namespaceSelector: %w", err)
		}
	case p.PodSelector != nil:
		s.ns, nsKey = ns, "="+ns
	default:
		return s, fmt.Errorf("neither a selector nor an ipBlock")
	}
	if p.PodSelector != nil {
		if s.podSel, podKey, err = newSelector(p.PodSelector); err != nil {
			return s, fmt.Errorf("podSelector: %w", err)
		}
	}
	if podKey == "{}" {
		podKey = ""
	}
	s.key = nsKey + "/" + podKey
	return s, nil
}

func newBlock(b *networking.IPBlock) (peerSpec, error) {
	var s peerSpec
	cidr, err := netip.ParsePrefix(b.CIDR)
	if err != nil {
		return s, fmt.Errorf("ipBlock: %w", err)
	}
	s.block = cidr.Masked()
	var texts []string
	for _, text := range b.Except {
		e, err := netip.ParsePrefix(text)
		if err != nil {
			return s, fmt.Errorf("ipBlock except: %w", err)
		}
		e = e.Masked()
		if e.Bits() <= s.block.Bits() {
			if e.Contains(s.block.Addr()) { // all of it is excepted
				return s, fmt.Errorf("ipBlock %s is all excepted", cidr)
			}
			continue
		}
		if s.block.Contains(e.Addr()) {
			s.excepts = append(s.excepts, e)
			texts = append(texts, e.String())
		}
	}
	slices.Sort(texts)
	s.key = "#" + s.block.String() + "-" + strings.Join(slices.Compact(texts), ",")
	return s, nil
}

// selects says whether the policy's subject may be this pod.
func (c *compiled) selects(p *pod) bool {
	return c.usable && c.key.Namespace == p.obj.Namespace && !p.obj.HostNetwork && c.selector.matches(p.obj.Labels)
}

func (s *peerSpec) matches(p *pod, ns map[string]string) bool {
	if s.anyNS {
		if !s.nsSel.matches(ns) {
			return false
		}
	} else if p.obj.Namespace != s.ns {
		return false
	}
	return s.podSel.matches(p.obj.Labels)
}
