package policy

import (
	"cmp"
	"net/netip"
	"reflect"
	"slices"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// Limits are the sizes of the tables. Zero fields take the defaults.
type Limits struct {
	Classes  uint32 // 16384
	Profiles uint16 // 4096
}

// Compiler holds the objects and the tables that follow from them. Setters
// only note; Update works.
type Compiler struct {
	limits Limits
	serial uint64 // of policies

	namespaces map[string]*namespace
	pods       map[objects.PodKey]*pod
	owners     map[netip.Addr][]*pod // pods that claim an address
	policies   map[string]map[string]*compiled
	endpoints  map[uint32]*endpoint
	node       map[netip.Addr]bool
	services   []netip.Prefix

	active map[*compiled]bool // policies that select an endpoint
	peers  map[string]*peer
	nextID uint32
	names  map[name]*nameUse

	cidrs    cidrTree
	exact    map[netip.Addr]*member
	classes  classTable
	profiles profileTable
	subjects map[string]*subject

	dirty struct {
		addrs     map[netip.Addr]bool
		policies  map[string]bool // namespaces whose policies changed
		endpoints map[uint32]bool
		cidrs     bool
	}
	local map[netip.Addr]bool // endpoints' addresses: always in the table, so that their class is one entry
}

type namespace struct {
	labels map[string]string
	pods   map[objects.PodKey]*pod // also of a namespace object not seen yet
}

// pod is a pod and the selector peers in use that match it.
type pod struct {
	obj   *objects.Pod
	peers []uint32 // sorted
}

type peer struct {
	id   uint32
	refs int
	spec peerSpec
}

type nameUse struct {
	id   uint32
	refs int
}

type endpoint struct {
	id       uint32
	pod      objects.PodKey
	ips      []netip.Addr
	policies []*compiled
	subject  *subject
	written  *subject // that current is of
	audit    bool
	fresh    bool // the datapath knows nothing of it yet
	class    map[netip.Addr]uint32
	current  [2][]uint16 // profile by class; nil while not isolated
	word     Word
}

// New returns an empty Compiler: no endpoint, no object.
func New(l Limits) *Compiler {
	l.Classes = cmp.Or(l.Classes, 16384)
	l.Profiles = cmp.Or(l.Profiles, 4096)
	c := &Compiler{
		limits: l, namespaces: map[string]*namespace{}, pods: map[objects.PodKey]*pod{},
		owners: map[netip.Addr][]*pod{}, policies: map[string]map[string]*compiled{},
		endpoints: map[uint32]*endpoint{}, node: map[netip.Addr]bool{},
		active: map[*compiled]bool{}, peers: map[string]*peer{}, names: map[name]*nameUse{},
		local: map[netip.Addr]bool{}, exact: map[netip.Addr]*member{}, subjects: map[string]*subject{},
	}
	c.classes.init(l.Classes)
	c.profiles.init(l.Profiles)
	c.cidrs.init()
	c.dirty.addrs, c.dirty.policies, c.dirty.endpoints = map[netip.Addr]bool{}, map[string]bool{}, map[uint32]bool{}
	return c
}

// Set replaces everything but the endpoints by the cluster's state.
func (c *Compiler) Set(cl *objects.Cluster) {
	keep := map[objects.PodKey]bool{}
	for i := range cl.Pods {
		keep[cl.Pods[i].PodKey] = true
	}
	for key := range c.pods {
		if !keep[key] {
			c.DeletePod(key)
		}
	}
	spaces := map[string]bool{}
	for _, ns := range cl.Namespaces {
		spaces[ns.Name] = true
		c.SetNamespace(ns)
	}
	for name := range c.namespaces {
		if !spaces[name] {
			c.DeleteNamespace(name)
		}
	}
	for i := range cl.Pods {
		if old := c.pods[cl.Pods[i].PodKey]; old == nil || !samePod(old.obj, &cl.Pods[i]) {
			p := cl.Pods[i]
			c.SetPod(&p)
		}
	}
	kept := map[objects.PodKey]bool{}
	for _, p := range cl.Policies {
		kept[objects.PodKey{Namespace: p.Namespace, Name: p.Name}] = true
		c.SetPolicy(p)
	}
	for ns, list := range c.policies {
		for name := range list {
			if !kept[objects.PodKey{Namespace: ns, Name: name}] {
				c.DeletePolicy(ns, name)
			}
		}
	}
	c.SetNode(cl.Node)
	c.SetServices(cl.Services)
}

func (c *Compiler) space(name string) *namespace {
	ns := c.namespaces[name]
	if ns == nil {
		ns = &namespace{pods: map[objects.PodKey]*pod{}}
		c.namespaces[name] = ns
	}
	return ns
}

// SetNamespace adds a namespace or changes its labels.
func (c *Compiler) SetNamespace(n objects.Namespace) {
	ns := c.space(n.Name)
	if sameLabels(ns.labels, n.Labels) {
		return
	}
	ns.labels = n.Labels
	for _, p := range ns.pods {
		c.rematch(p)
	}
}

// DeleteNamespace forgets a namespace's labels; its pods are deleted on their own.
func (c *Compiler) DeleteNamespace(name string) {
	ns := c.namespaces[name]
	if ns == nil {
		return
	}
	ns.labels = nil
	for _, p := range ns.pods {
		c.rematch(p)
	}
	if len(ns.pods) == 0 {
		delete(c.namespaces, name)
	}
}

// SetPod adds or replaces a pod, which must not change afterwards.
func (c *Compiler) SetPod(o *objects.Pod) {
	old := c.pods[o.PodKey]
	if old != nil && (old.obj == o || samePod(old.obj, o)) {
		return
	}
	if old != nil {
		c.disown(old)
	}
	p := old
	if p == nil {
		p = &pod{}
		c.pods[o.PodKey] = p
		c.space(o.Namespace).pods[o.PodKey] = p
	}
	p.obj = o
	if o.Live() {
		for _, ip := range o.IPs {
			ip = ip.Unmap()
			c.owners[ip] = append(c.owners[ip], p)
			c.dirty.addrs[ip] = true
		}
	}
	c.rematch(p)
	c.touchEndpoints(o.PodKey)
}

// DeletePod forgets a pod; its addresses go to whoever else claims them.
func (c *Compiler) DeletePod(key objects.PodKey) {
	p := c.pods[key]
	if p == nil {
		return
	}
	c.disown(p)
	delete(c.pods, key)
	delete(c.space(key.Namespace).pods, key)
	c.touchEndpoints(key)
}

func (c *Compiler) touchEndpoints(key objects.PodKey) {
	for id, e := range c.endpoints {
		if e.pod == key {
			c.dirty.endpoints[id] = true
		}
	}
}

func (c *Compiler) disown(p *pod) {
	for _, ip := range p.obj.IPs {
		ip = ip.Unmap()
		list := slices.DeleteFunc(c.owners[ip], func(q *pod) bool { return q == p })
		if len(list) == 0 {
			delete(c.owners, ip)
		} else {
			c.owners[ip] = list
		}
		c.dirty.addrs[ip] = true
	}
}

// owner is the pod that an address belongs to, or nil.
func (c *Compiler) owner(ip netip.Addr) *pod {
	var best *pod
	for _, p := range c.owners[ip] {
		if best == nil || p.obj.Newer(best.obj) {
			best = p
		}
	}
	return best
}

// rematch finds anew the peers in use that match p.
func (c *Compiler) rematch(p *pod) {
	labels := c.space(p.obj.Namespace).labels
	var peers []uint32
	for _, q := range c.peers {
		if !q.spec.block.IsValid() && q.spec.matches(p, labels) {
			peers = append(peers, q.id)
		}
	}
	slices.Sort(peers)
	if !slices.Equal(peers, p.peers) {
		p.peers = peers
		c.touch(p)
	}
}

func (c *Compiler) touch(p *pod) {
	for _, ip := range p.obj.IPs {
		c.dirty.addrs[ip.Unmap()] = true
	}
}

// SetPolicy adds or replaces a policy, which must not change afterwards, and
// returns what of it cannot be used.
func (c *Compiler) SetPolicy(p *objects.Policy) []string {
	list := c.policies[p.Namespace]
	if list == nil {
		list = map[string]*compiled{}
		c.policies[p.Namespace] = list
	}
	if old := list[p.Name]; old != nil && (old.object == p || reflect.DeepEqual(&old.object.Spec, &p.Spec)) {
		return old.faults
	}
	c.serial++
	n := compile(p, c.serial)
	n.object = p
	list[p.Name] = n
	c.dirty.policies[p.Namespace] = true
	return n.faults
}

// DeletePolicy forgets a policy.
func (c *Compiler) DeletePolicy(ns, name string) {
	if _, ok := c.policies[ns][name]; !ok {
		return
	}
	delete(c.policies[ns], name)
	if len(c.policies[ns]) == 0 {
		delete(c.policies, ns)
	}
	c.dirty.policies[ns] = true
}

// SetNode names this node's own addresses.
func (c *Compiler) SetNode(ips []netip.Addr) {
	now := map[netip.Addr]bool{}
	for _, ip := range ips {
		ip = ip.Unmap().WithZone("")
		now[ip] = true
		if !c.node[ip] {
			c.dirty.addrs[ip] = true
		}
	}
	for ip := range c.node {
		if !now[ip] {
			c.dirty.addrs[ip] = true
		}
	}
	c.node = now
}

// SetServices names the ranges that service addresses are taken from.
func (c *Compiler) SetServices(list []netip.Prefix) {
	masked := make([]netip.Prefix, len(list))
	for i, p := range list {
		masked[i] = p.Masked()
	}
	if !slices.Equal(masked, c.services) {
		c.services = masked
		c.dirty.cidrs = true
	}
}

// SetEndpoint adds a local pod's interface under a number that the caller
// chose. Until the pod's object is known it may talk to no one.
func (c *Compiler) SetEndpoint(id uint32, key objects.PodKey, ips []netip.Addr, audit bool) {
	if e := c.endpoints[id]; e != nil && e.pod == key && slices.Equal(e.ips, ips) {
		if e.audit != audit {
			e.audit = audit
			c.dirty.endpoints[id] = true
		}
		return
	}
	c.DeleteEndpoint(id)
	c.endpoints[id] = &endpoint{id: id, pod: key, ips: slices.Clone(ips), audit: audit, fresh: true, class: map[netip.Addr]uint32{}}
	for _, ip := range ips {
		c.local[ip], c.dirty.addrs[ip] = true, true
	}
	c.dirty.endpoints[id] = true
}

// DeleteEndpoint forgets an endpoint; what the datapath knows of it is the
// caller's to remove.
func (c *Compiler) DeleteEndpoint(id uint32) {
	e := c.endpoints[id]
	if e == nil {
		return
	}
	delete(c.endpoints, id)
	c.dirty.endpoints[id] = true
	for _, ip := range e.ips {
		delete(c.local, ip)
		c.dirty.addrs[ip] = true
	}
	for _, other := range c.endpoints { // an address that a newer endpoint has taken over
		for _, ip := range other.ips {
			c.local[ip] = true
		}
	}
}

// Isolated tells in which directions an endpoint is isolated, as of the last Update.
func (c *Compiler) Isolated(id uint32) [2]bool {
	if e := c.endpoints[id]; e != nil {
		return e.word.Isolated
	}
	return [2]bool{}
}

// Class is the class of an address as of the last Update.
func (c *Compiler) Class(ip netip.Addr) uint32 {
	if m := c.exact[ip]; m != nil {
		return m.class.id
	}
	if m := c.cidrs.longest(ip); m != nil {
		return m.class.id
	}
	return World
}

// Limits are the sizes that hold.
func (c *Compiler) Limits() Limits { return c.limits }

// Stats are sizes, for metrics.
type Stats struct {
	Pods, Policies, Active, Peers, Classes, Profiles, Exact, Prefixes, Endpoints, PortClasses int
}

// Stats counts.
func (c *Compiler) Stats() Stats {
	n := 0
	for _, l := range c.policies {
		n += len(l)
	}
	s := Stats{Pods: len(c.pods), Policies: n, Active: len(c.active), Peers: len(c.peers), Classes: len(c.classes.byID),
		Profiles: len(c.profiles.byKey), Exact: len(c.exact), Prefixes: len(c.cidrs.members), Endpoints: len(c.endpoints)}
	if c.profiles.bank != nil {
		s.PortClasses = c.profiles.bank.Classes
	}
	return s
}

// Faults lists what is wrong with policies, by policy.
func (c *Compiler) Faults() map[objects.PodKey][]string {
	out := map[objects.PodKey][]string{}
	for _, l := range c.policies {
		for _, p := range l {
			if len(p.faults) > 0 {
				out[p.key] = p.faults
			}
		}
	}
	return out
}

func sameLabels(a, b map[string]string) bool {
	if len(a) != len(b) || (a == nil) != (b == nil) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || v != w {
			return false
		}
	}
	return true
}

func samePod(a, b *objects.Pod) bool {
	return a.UID == b.UID && a.Created == b.Created && a.HostNetwork == b.HostNetwork && a.Finished == b.Finished &&
		sameLabels(a.Labels, b.Labels) && slices.Equal(a.IPs, b.IPs) && slices.Equal(a.Ports, b.Ports)
}

// PolicyInfo is one policy and the endpoints that it selects.
type PolicyInfo struct {
	Key       objects.PodKey
	Isolates  [2]bool // by Dir
	Endpoints []uint32
	Faults    []string
}

// Policies lists all, by name.
func (c *Compiler) Policies() []PolicyInfo {
	at := map[*compiled]*PolicyInfo{}
	var out []*PolicyInfo
	for _, l := range c.policies {
		for _, p := range l {
			at[p] = &PolicyInfo{Key: p.key, Isolates: p.isolates, Faults: p.faults}
			out = append(out, at[p])
		}
	}
	for id, e := range c.endpoints {
		for _, p := range e.policies {
			if i := at[p]; i != nil {
				i.Endpoints = append(i.Endpoints, id)
			}
		}
	}
	slices.SortFunc(out, func(a, b *PolicyInfo) int { return cmp.Compare(a.Key.String(), b.Key.String()) })
	infos := make([]PolicyInfo, len(out))
	for i, p := range out {
		slices.Sort(p.Endpoints)
		infos[i] = *p
	}
	return infos
}
