// Package reference judges connections by NetworkPolicy the slow and obvious
// way, straight from the semantics of networking.k8s.io/v1, and says why.
//
// It is the oracle of the datapath's tests and the explanation behind
// `nodeagent policy why`. It must share no logic with ebpf/policy: selectors
// are apimachinery's, addresses are compared one by one, nothing is cached. No
// goroutines, no locks; a Cluster is only read.
package reference

import (
	"fmt"
	"net/netip"
	"slices"

	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// Direction is the subject's point of view.
type Direction string

const (
	Ingress Direction = "ingress"
	Egress  Direction = "egress"
)

// Flow is the first packet of a connection, after service translation.
type Flow struct {
	Src, Dst netip.Addr
	Protocol uint8  // IP protocol number
	Port     uint16 // destination port; unused unless TCP, UDP or SCTP
}

// Decision is what one pod's policies say of a flow in one direction.
type Decision struct {
	Direction Direction
	Subject   objects.PodKey
	Allowed   bool
	Isolated  bool
	// Selecting names the policies that isolate the subject.
	Selecting []string
	// Why is one line per rule looked at: what it lacked, or that it matched.
	Why []string
}

// Owner finds the live pod that owns an address; nil if none does.
func Owner(c *objects.Cluster, ip netip.Addr) *objects.Pod {
	var owner *objects.Pod
	for i := range c.Pods {
		p := &c.Pods[i]
		if !p.Live() {
			continue
		}
		for _, own := range p.IPs {
			if own.Unmap() == ip.Unmap() && (owner == nil || p.Newer(owner)) {
				owner = p
			}
		}
	}
	return owner
}

// Judge decides f in the given direction for the pod that owns its source
// (Egress) or destination (Ingress). Who owns no pod's address is not judged.
// A flow from or to the node's own addresses is the caller's to exempt: only
// it knows where a packet came from. Egress to the node is exempt here.
func Judge(c *objects.Cluster, d Direction, f Flow) Decision {
	subjectIP, peerIP := f.Dst, f.Src
	if d == Egress {
		subjectIP, peerIP = f.Src, f.Dst
	}
	subject := Owner(c, subjectIP)
	if subject == nil {
		return Decision{Direction: d, Allowed: true, Why: []string{subjectIP.String() + " is no pod's address"}}
	}
	return JudgePod(c, d, subject, peerIP, f.Protocol, f.Port)
}

// JudgePod decides a flow between subject and an address; port is the
// connection's destination port in either direction.
func JudgePod(c *objects.Cluster, d Direction, subject *objects.Pod, peer netip.Addr, proto uint8, port uint16) Decision {
	out := Decision{Direction: d, Subject: subject.PodKey}
	if subject.HostNetwork {
		out.Allowed, out.Why = true, []string{"the pod is on the host's network"}
		return out
	}
	if d == Egress {
		for _, ip := range c.Node {
			if ip == peer {
				out.Allowed, out.Why = true, []string{"a pod may always reach its own node"}
			}
		}
	}
	for _, policy := range c.Policies {
		if !selects(policy, subject) || !affects(policy, d) {
			continue
		}
		out.Isolated = true
		name := policy.Namespace + "/" + policy.Name
		out.Selecting = append(out.Selecting, name)
		for i, rule := range rulesOf(policy, d) {
			matches, why := judgeRule(c, policy.Namespace, rule, d, subject, peer, proto, port)
			out.Allowed = out.Allowed || matches
			out.Why = append(out.Why, fmt.Sprintf("%s %s[%d]: %s", name, d, i, why))
		}
	}
	if !out.Isolated {
		out.Allowed = true
		out.Why = append(out.Why, fmt.Sprintf("no policy isolates %s for %s", subject.PodKey, d))
	}
	return out
}

func selects(policy *objects.Policy, pod *objects.Pod) bool {
	return policy.Namespace == pod.Namespace && matches(&policy.Spec.PodSelector, pod.Labels)
}

// affects says whether the policy isolates in direction d. Without
// policyTypes it is ingress, and egress if there are egress rules.
func affects(policy *objects.Policy, d Direction) bool {
	if len(policy.Spec.PolicyTypes) == 0 {
		return d == Ingress || len(policy.Spec.Egress) > 0
	}
	for _, t := range policy.Spec.PolicyTypes {
		if t == networking.PolicyTypeIngress && d == Ingress || t == networking.PolicyTypeEgress && d == Egress {
			return true
		}
	}
	return false
}

type rule struct {
	peers []networking.NetworkPolicyPeer
	ports []networking.NetworkPolicyPort
}

func rulesOf(policy *objects.Policy, d Direction) []rule {
	var rules []rule
	if d == Ingress {
		for _, r := range policy.Spec.Ingress {
			rules = append(rules, rule{r.From, r.Ports})
		}
		return rules
	}
	for _, r := range policy.Spec.Egress {
		rules = append(rules, rule{r.To, r.Ports})
	}
	return rules
}

// judgeRule says whether the rule matches, and which of its peers and ports
// did, or what of it did not.
func judgeRule(c *objects.Cluster, ns string, r rule, d Direction, subject *objects.Pod, peer netip.Addr, proto uint8, port uint16) (bool, string) {
	owner := Owner(c, peer)
	who := "anyone may be the peer"
	if len(r.peers) > 0 {
		i := slices.IndexFunc(r.peers, func(p networking.NetworkPolicyPeer) bool { return peerMatches(c, ns, p, owner, peer) })
		if i < 0 {
			return false, fmt.Sprintf("no peer of the rule is %s", describe(owner, peer))
		}
		who = fmt.Sprintf("peer %d is %s", i, describe(owner, peer))
	}
	if len(r.ports) == 0 {
		return true, "matches: " + who + ", on any port"
	}
	named := owner
	if d == Ingress {
		named = subject
	}
	i := slices.IndexFunc(r.ports, func(p networking.NetworkPolicyPort) bool { return portMatches(p, named, proto, port) })
	if i < 0 {
		return false, fmt.Sprintf("%s, but no port of the rule is %d of protocol %d", who, port, proto)
	}
	return true, fmt.Sprintf("matches: %s, port %d is %d of protocol %d", who, i, port, proto)
}

func describe(owner *objects.Pod, ip netip.Addr) string {
	if owner == nil {
		return ip.String()
	}
	return fmt.Sprintf("%s (pod %s)", ip, owner.PodKey)
}

func peerMatches(c *objects.Cluster, ns string, p networking.NetworkPolicyPeer, owner *objects.Pod, ip netip.Addr) bool {
	if p.IPBlock != nil {
		return inBlock(p.IPBlock, ip)
	}
	if owner == nil {
		return false
	}
	switch {
	case p.NamespaceSelector != nil:
		return matches(p.NamespaceSelector, namespaceLabels(c, owner.Namespace)) &&
			(p.PodSelector == nil || matches(p.PodSelector, owner.Labels))
	case p.PodSelector != nil:
		return owner.Namespace == ns && matches(p.PodSelector, owner.Labels)
	}
	return false
}

func namespaceLabels(c *objects.Cluster, name string) map[string]string {
	for _, ns := range c.Namespaces {
		if ns.Name == name {
			return ns.Labels
		}
	}
	return nil
}

func inBlock(b *networking.IPBlock, ip netip.Addr) bool {
	block, err := netip.ParsePrefix(b.CIDR)
	if err != nil || !block.Contains(ip) {
		return false
	}
	for _, e := range b.Except {
		except, err := netip.ParsePrefix(e)
		if err != nil || except.Contains(ip) {
			return false
		}
	}
	return true
}

// portMatches takes names from the pod that the connection goes to; nil means
// that it goes to no pod.
func portMatches(p networking.NetworkPolicyPort, named *objects.Pod, proto uint8, port uint16) bool {
	want := objects.TCP
	if p.Protocol != nil {
		switch *p.Protocol {
		case core.ProtocolTCP:
		case core.ProtocolUDP:
			want = objects.UDP
		case core.ProtocolSCTP:
			want = objects.SCTP
		default:
			return false
		}
	}
	if proto != want {
		return false
	}
	if p.Port == nil {
		return true
	}
	if p.Port.Type == intstr.String {
		if named == nil {
			return false
		}
		for _, n := range named.Ports {
			if n.Name == p.Port.StrVal && n.Protocol == want {
				return n.Port == port
			}
		}
		return false
	}
	last := int(p.Port.IntVal)
	if p.EndPort != nil {
		last = int(*p.EndPort)
	}
	return int(p.Port.IntVal) <= int(port) && int(port) <= last
}

// matches reads nil as nothing and an unusable selector as nothing.
func matches(s *meta.LabelSelector, set map[string]string) bool {
	selector, err := meta.LabelSelectorAsSelector(s)
	return err == nil && selector.Matches(labels.Set(set))
}
