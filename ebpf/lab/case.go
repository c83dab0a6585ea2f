package lab

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	networking "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// Case is a question about a cluster and its answer: a failure that was found
// once, small enough to be understood, kept so that it does not come back.
type Case struct {
	Why     string // what went wrong
	Cluster objects.Cluster
	Local   int // the first so many pods are on this node
	Probe   Probe
	Allowed bool // by the specification
}

// Cases reads the fixtures of a folder, by file name.
func Cases(dir string) (map[string]Case, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		return nil, err
	}
	out := map[string]Case{}
	for _, path := range files {
		raw, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		var c Case
		if err := yaml.UnmarshalStrict(raw, &c); err != nil {
			return nil, fmt.Errorf("read case %s: %w", path, err)
		}
		out[filepath.Base(path)] = c
	}
	return out, nil
}

// Write makes a fixture of the case and returns its path.
func (c Case) Write(dir string) (string, error) {
	raw, err := yaml.Marshal(c)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(raw)
	path := filepath.Join(dir, hex.EncodeToString(sum[:6])+".yaml")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	return path, os.WriteFile(path, raw, 0o644)
}

// Shrink drops what it can of a cluster for as long as fails says so: policies,
// rules, peers, ports, exceptions, labels, then pods other than the first local ones. fails must
// not keep what it is given.
func Shrink(c *objects.Cluster, local int, fails func(*objects.Cluster) bool) *objects.Cluster {
	now := copyOf(c)
	for again := true; again; {
		again = false
		// Numbers of steps grow smaller as things go, so each is looked up anew.
		for i := 0; ; i++ {
			next := copyOf(now)
			if !drop(next, local, i) {
				break
			}
			if fails(copyOf(next)) {
				now, again = next, true
				i--
			}
		}
	}
	return now
}

func copyOf(c *objects.Cluster) *objects.Cluster {
	out := *c
	out.Namespaces, out.Pods = slices.Clone(c.Namespaces), slices.Clone(c.Pods)
	out.Policies = make([]*objects.Policy, len(c.Policies))
	for i, p := range c.Policies {
		out.Policies[i] = p.DeepCopy()
	}
	return &out
}

// drop takes the n-th part of c away; false: it has not so many.
func drop(c *objects.Cluster, local, n int) bool {
	d := &dropper{left: n}
	c.Policies = cut(d, c.Policies)
	for _, p := range c.Policies {
		p.Spec.Ingress, p.Spec.Egress = cut(d, p.Spec.Ingress), cut(d, p.Spec.Egress)
		for i := range p.Spec.Ingress {
			r := &p.Spec.Ingress[i]
			d.rule(&r.From, &r.Ports)
		}
		for i := range p.Spec.Egress {
			r := &p.Spec.Egress[i]
			d.rule(&r.To, &r.Ports)
		}
	}
	rest := c.Pods[min(local, len(c.Pods)):]
	c.Pods = append(c.Pods[:len(c.Pods)-len(rest)], cut(d, rest)...)
	for i := range c.Pods {
		c.Pods[i].Ports = cut(d, c.Pods[i].Ports)
		if len(c.Pods[i].Labels) > 0 && d.hit() {
			c.Pods[i].Labels = nil
		}
	}
	c.Services = cut(d, c.Services)
	return d.done
}

type dropper struct {
	left int
	done bool
}

// hit says whether this part is the one to go.
func (d *dropper) hit() bool {
	d.left--
	if d.left == -1 {
		d.done = true
		return true
	}
	return false
}

func (d *dropper) rule(peers *[]networking.NetworkPolicyPeer, ports *[]networking.NetworkPolicyPort) {
	*peers, *ports = cut(d, *peers), cut(d, *ports)
	for i := range *peers {
		if b := (*peers)[i].IPBlock; b != nil {
			b.Except = cut(d, b.Except)
		}
	}
}

func cut[T any](d *dropper, list []T) []T {
	for i := range list {
		if d.hit() {
			return slices.Delete(slices.Clone(list), i, i+1)
		}
	}
	return list
}
