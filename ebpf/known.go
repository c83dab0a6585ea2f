//go:build linux

package ebpf

import (
	"maps"
	"slices"

	core "k8s.io/api/core/v1"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// known are the cluster's objects as the source has them.
type known struct {
	namespaces map[string]*objects.Namespace
	pods       map[objects.PodKey]*objects.Pod
	policies   map[objects.PodKey]*objects.Policy
}

// change notes what the source says and tells the compiler of what is touched.
func (s *state) change(c *objects.Change) {
	k := &s.known
	var spaces []string
	var pods, policies []objects.PodKey
	k.namespaces = c.Namespaces.Into(k.namespaces, func(name string) { spaces = append(spaces, name) })
	k.pods = c.Pods.Into(k.pods, func(key objects.PodKey) { pods = append(pods, key) })
	k.policies = c.Policies.Into(k.policies, func(key objects.PodKey) { policies = append(policies, key) })
	for _, name := range spaces {
		s.tellNamespace(name)
	}
	for _, key := range pods {
		s.tellPod(key)
	}
	for _, key := range policies {
		if p := k.policies[key]; p != nil {
			s.compiler.SetPolicy(p)
		} else {
			s.compiler.DeletePolicy(key.Namespace, key.Name)
		}
	}
	s.synced, s.dirty = true, true
}

// moved tells the compiler of a local pod that came or went.
func (s *state) moved(key objects.PodKey) {
	delete(s.here, key)
	for _, p := range s.pods {
		if q := s.here[key]; p.PodKey == key && (q == nil || p.Created.After(q.Created)) {
			s.here[key] = p
		}
	}
	s.tellNamespace(key.Namespace)
	s.tellPod(key)
	s.dirty = true
}

func (s *state) tellNamespace(name string) {
	if n := s.namespace(name); n != nil {
		s.compiler.SetNamespace(*n)
	} else {
		s.compiler.DeleteNamespace(name)
	}
}

func (s *state) tellPod(key objects.PodKey) {
	if p := s.pod(key); p != nil {
		s.compiler.SetPod(p)
	} else {
		s.compiler.DeletePod(key)
	}
}

// namespace is what the source says; of a namespace without an object, as
// without an API server, but with a pod here: its name's label.
func (s *state) namespace(name string) *objects.Namespace {
	if n := s.known.namespaces[name]; n != nil {
		return n
	}
	for key := range s.here {
		if key.Namespace == name {
			return &objects.Namespace{Name: name, Labels: map[string]string{core.LabelMetadataName: name}}
		}
	}
	return nil
}

// pod is what the source says; the addresses and the life of a pod of this
// node are the runtime's to know. Of another pod with that name, before or
// after the one that runs here, only the one that runs here counts.
func (s *state) pod(key objects.PodKey) *objects.Pod {
	o, p := s.known.pods[key], s.here[key]
	switch {
	case p == nil:
		return o
	case o != nil && (p.UID == o.UID || p.UID == "" || o.UID == ""):
		own := *o
		own.IPs, own.Created, own.HostNetwork, own.Finished = p.IPs, p.Created.UnixNano(), false, false
		return &own
	}
	return &objects.Pod{PodKey: key, UID: p.UID, Created: p.Created.UnixNano(), Labels: p.Labels, IPs: p.IPs}
}

// cluster is everything, for the reference to judge by.
func (s *state) cluster() *objects.Cluster {
	c := &objects.Cluster{Node: s.host.addrs, Services: s.cfg.Services, Policies: slices.Collect(maps.Values(s.known.policies))}
	for name := range s.known.namespaces {
		c.Namespaces = append(c.Namespaces, *s.namespace(name))
	}
	c.Pods = make([]objects.Pod, 0, len(s.known.pods)+len(s.here))
	for key := range s.known.pods {
		c.Pods = append(c.Pods, *s.pod(key))
	}
	implied := map[string]bool{}
	for key := range s.here {
		if s.known.pods[key] == nil {
			c.Pods = append(c.Pods, *s.pod(key))
		}
		if s.known.namespaces[key.Namespace] == nil && !implied[key.Namespace] {
			implied[key.Namespace] = true
			c.Namespaces = append(c.Namespaces, *s.namespace(key.Namespace))
		}
	}
	return c
}
