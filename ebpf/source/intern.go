package source

import (
	"slices"
	"strings"

	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// interner lets pods with equal labels share one map, and equal strings: the
// pods of a Deployment differ in name and address only. It belongs to one
// goroutine.
type interner struct {
	texts  map[string]string
	labels map[string]map[string]string
}

// most bounds what an interner remembers; it begins anew then.
const most = 1 << 14

func newInterner() *interner {
	return &interner{texts: map[string]string{}, labels: map[string]map[string]string{}}
}

func (n *interner) text(s string) string {
	if t, ok := n.texts[s]; ok {
		return t
	}
	if len(n.texts) >= most {
		clear(n.texts)
	}
	s = strings.Clone(s) // not the message that it is a part of
	n.texts[s] = s
	return s
}

func (n *interner) set(labels map[string]string) map[string]string {
	if len(labels) == 0 {
		return nil
	}
	list := make([]string, 0, len(labels))
	for k, v := range labels {
		list = append(list, k+"\x00"+v)
	}
	slices.Sort(list)
	key := strings.Join(list, "\x00")
	if m, ok := n.labels[key]; ok {
		return m
	}
	if len(n.labels) >= most {
		clear(n.labels)
	}
	m := make(map[string]string, len(labels))
	for k, v := range labels {
		m[n.text(k)] = n.text(v)
	}
	n.labels[key] = m
	return m
}

func (n *interner) pod(p *core.Pod) *objects.Pod {
	out := Pod(p)
	out.Namespace, out.Name, out.UID = n.text(out.Namespace), strings.Clone(out.Name), strings.Clone(out.UID)
	out.Labels = n.set(out.Labels)
	for i := range out.Ports {
		out.Ports[i].Name = n.text(out.Ports[i].Name)
	}
	out.Ports = slices.Clip(out.Ports)
	return &out
}

// bare is a policy without what only its owner needs.
func bare(p *networking.NetworkPolicy) *objects.Policy {
	return &objects.Policy{ObjectMeta: meta.ObjectMeta{Namespace: p.Namespace, Name: p.Name}, Spec: p.Spec}
}
