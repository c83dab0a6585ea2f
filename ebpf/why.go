//go:build linux

package ebpf

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"

	"github.com/nodeagent/nodeagent/ebpf/datapath"
	"github.com/nodeagent/nodeagent/ebpf/flows"
	"github.com/nodeagent/nodeagent/ebpf/frame"
	"github.com/nodeagent/nodeagent/ebpf/objects"
	"github.com/nodeagent/nodeagent/ebpf/reference"
)

// Question is a flow to be explained. From and To are "namespace/pod" or an
// address; of a pod with both families the IPv4 address is asked about unless
// the other end is IPv6.
type Question struct {
	From, To string
	Protocol uint8
	Port     uint16
}

// Answer is what policy says of a flow at each pod of this node that it
// touches: by the reference, and by the loaded program on the live tables.
type Answer struct {
	Src, Dst netip.Addr
	Allowed  bool // by every verdict; what is only watched passes nevertheless
	Verdicts []Verdict
}

// Verdict is that of one pod's policies in one direction.
type Verdict struct {
	reference.Decision
	Loaded       bool         // what the loaded program said
	Reason       flows.Reason // and why
	Deferred     bool         // it said: behind the translation
	Audit        bool         // it lets pass what it denies: the namespace is only watched
	Disagreement bool         // reference and program differ: a defect
}

// Why explains.
func (e *Engine) Why(ctx context.Context, q Question) (Answer, error) {
	var out Answer
	err := e.call(ctx, false, func(s *state) error {
		if !s.ready {
			return fmt.Errorf("policy is not known yet: %w", errdefs.ErrUnavailable)
		}
		var err error
		out, err = s.why(q)
		return err
	})
	return out, err
}

func (s *state) why(q Question) (Answer, error) {
	c := s.cluster()
	from, err := addresses(c, q.From)
	if err != nil {
		return Answer{}, err
	}
	to, err := addresses(c, q.To)
	if err != nil {
		return Answer{}, err
	}
	out := Answer{Allowed: true}
	for _, a := range from {
		for _, b := range to {
			if a.Is4() == b.Is4() && (!out.Src.IsValid() || a.Is4() && !out.Src.Is4()) {
				out.Src, out.Dst = a, b
			}
		}
	}
	if !out.Src.IsValid() {
		return out, fmt.Errorf("%s and %s have no address family in common: %w", q.From, q.To, errdefs.ErrInvalidArgument)
	}
	for _, d := range []reference.Direction{reference.Egress, reference.Ingress} {
		v, ok, err := s.ask(c, d, out.Src, out.Dst, q)
		if err != nil {
			return out, err
		}
		if ok {
			out.Verdicts = append(out.Verdicts, v)
			out.Allowed = out.Allowed && v.Allowed && v.Loaded
		}
	}
	return out, nil
}

// ask has one side judged; false if that side is no pod of this node.
func (s *state) ask(c *objects.Cluster, d reference.Direction, src, dst netip.Addr, q Question) (Verdict, bool, error) {
	own, peer, hook := src, dst, flows.FromPod
	if d == reference.Ingress {
		own, peer, hook = dst, src, flows.ToPod
	}
	at := s.byAddr(own)
	if at == nil {
		return Verdict{}, false, nil
	}
	subject := reference.Owner(c, own)
	if subject == nil {
		return Verdict{}, false, nil
	}
	v := Verdict{Decision: reference.JudgePod(c, d, subject, peer, q.Protocol, q.Port)}
	p := frame.Packet{Src: src, Dst: dst, Protocol: q.Protocol, SrcPort: 61001, DstPort: q.Port, TCP: frame.SYN}
	if q.Protocol == 1 {
		p.ICMPType = 8
	} else if q.Protocol == 58 {
		p.ICMPType = 128
	}
	in := datapath.Input{Packet: p.Bytes(), Ifindex: uint32(at.Interface), Dry: true}
	if d == reference.Ingress {
		in.IngressIfindex = s.ingress(src)
		if in.IngressIfindex == 0 {
			v.Allowed, v.Why = true, append(v.Why, "this node itself may always reach its pods")
		}
	}
	got, err := s.d.Run(hook, in)
	if err != nil {
		return v, false, err
	}
	v.Loaded, v.Reason, v.Deferred = !got.Reason.Drops(), got.Reason, got.Reason == flows.Deferred
	v.Audit = s.cfg.audited(subject.Namespace)
	v.Disagreement = v.Loaded != v.Allowed && !v.Deferred || got.Pass != (v.Loaded || v.Audit)
	return v, true, nil
}

// ingress is the interface that a packet from ip comes in by; 0: from the node.
func (s *state) ingress(ip netip.Addr) uint32 {
	if p := s.byAddr(ip); p != nil {
		return uint32(p.Interface)
	}
	for _, a := range s.host.addrs {
		if a == ip {
			return 0
		}
	}
	for i := range s.uplinks {
		return uint32(i)
	}
	return 1
}

func (s *state) byAddr(ip netip.Addr) *local {
	var best *local
	for _, p := range s.pods {
		for _, a := range p.IPs {
			if a == ip && (best == nil || p.Created.After(best.Created)) {
				best = p
			}
		}
	}
	return best
}

// addresses resolves a pod's name or an address.
func addresses(c *objects.Cluster, text string) ([]netip.Addr, error) {
	if ip, err := netip.ParseAddr(text); err == nil {
		return []netip.Addr{ip.Unmap()}, nil
	}
	for i := range c.Pods {
		if p := &c.Pods[i]; p.String() == text {
			return p.IPs, nil
		}
	}
	return nil, fmt.Errorf("pod %q is not known, and it is no address: %w", text, errdefs.ErrNotFound)
}

// PolicyInfo is one policy and the pods of this node that it selects.
type PolicyInfo struct {
	Namespace, Name string
	Ingress, Egress bool
	Pods            []objects.PodKey
	Faults          []string
}

// Policies lists the policies.
func (e *Engine) Policies(ctx context.Context) ([]PolicyInfo, error) {
	var out []PolicyInfo
	err := e.call(ctx, false, func(s *state) error {
		for _, p := range s.compiler.Policies() {
			info := PolicyInfo{Namespace: p.Key.Namespace, Name: p.Key.Name, Ingress: p.Isolates[0], Egress: p.Isolates[1], Faults: p.Faults}
			for _, id := range p.Endpoints {
				for _, l := range s.pods {
					if l.id == id {
						info.Pods = append(info.Pods, l.PodKey)
					}
				}
			}
			out = append(out, info)
		}
		return nil
	})
	return out, err
}
