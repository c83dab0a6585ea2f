// Package objects holds the plain data that network policy is decided from:
// pods and namespaces, slimmed to what selectors and ports need, beside the
// NetworkPolicy type of networking.k8s.io/v1 itself.
//
// It decides nothing. The compiler (ebpf/policy) and the reference evaluator
// (ebpf/reference) share these types and no logic. No goroutines, no locks.
package objects

import (
	"net/netip"

	networking "k8s.io/api/networking/v1"
)

// IP protocol numbers that NetworkPolicy can name.
const (
	TCP  uint8 = 6
	UDP  uint8 = 17
	SCTP uint8 = 132
)

// Namespace is a name and its labels.
type Namespace struct {
	Name   string
	Labels map[string]string
}

// NamedPort is a containerPort that has a name.
type NamedPort struct {
	Name     string
	Protocol uint8 // TCP, UDP or SCTP
	Port     uint16
}

// PodKey names a pod.
type PodKey struct{ Namespace, Name string }

func (k PodKey) String() string { return k.Namespace + "/" + k.Name }

// Pod is what policy knows of a pod. Ports are in the order of its containers;
// of two with the same name and protocol the first counts.
type Pod struct {
	PodKey
	UID         string
	Created     int64 // Unix nanoseconds; of two live pods with one address the later owns it
	Labels      map[string]string
	IPs         []netip.Addr
	Ports       []NamedPort
	HostNetwork bool // never a subject, and a peer by ipBlock only
	Finished    bool // Succeeded or Failed: its addresses are no longer its own
}

// Live says whether the pod owns its addresses: it runs, in a network of its own.
func (p *Pod) Live() bool { return !p.HostNetwork && !p.Finished }

// Newer says whether p wins an address that both claim.
func (p *Pod) Newer(q *Pod) bool {
	if p.Created != q.Created {
		return p.Created > q.Created
	}
	if p.UID != q.UID {
		return p.UID > q.UID
	}
	return p.String() > q.String()
}

// Policy is the API's own type.
type Policy = networking.NetworkPolicy

// Cluster is a whole state.
type Cluster struct {
	Namespaces []Namespace
	Pods       []Pod
	Policies   []*Policy
	// Node holds the addresses of this node: a pod may always reach its own
	// node, and is always reached by it.
	Node []netip.Addr
	// Services holds the ranges of service addresses: egress to them is
	// judged after translation.
	Services []netip.Prefix
}
