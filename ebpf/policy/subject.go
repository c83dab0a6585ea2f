package policy

import (
	"encoding/binary"
	"slices"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// subject is what endpoints have in common that the same policies select and
// that give ports the same names: their rows are equal.
type subject struct {
	isolates [2]bool
	rules    [2]ruleIndex
	cells    [2][]uint16 // profile by class number
	known    []*class    // the class that cells are of, by number
	complete bool        // cells are those of all classes but the fresh ones
}

// ruleIndex finds the rules that a class's peers match.
type ruleIndex struct {
	rules    []*rule
	ranges   [][]Range // of each rule, names resolved on the subject for ingress
	everyone []uint32
	byPeer   map[uint32][]uint32
	cache    map[string]uint16 // rules (and named ports) to profile
}

// subjectOf is the subject of a pod with its policies; nil pod: not known yet,
// denied everything.
func (c *Compiler) subjectOf(p *pod, policies []*compiled) *subject {
	if p == nil {
		return &subject{isolates: [2]bool{true, true}}
	}
	key := subjectKey(p, policies)
	if s := c.subjects[key]; s != nil {
		return s
	}
	s := &subject{}
	for d := range s.rules {
		x := &s.rules[d]
		x.byPeer, x.cache = map[uint32][]uint32{}, map[string]uint16{}
		for _, policy := range policies {
			s.isolates[d] = s.isolates[d] || policy.isolates[d]
			for i := range policy.rules[d] {
				x.add(&policy.rules[d][i], Dir(d), p)
			}
		}
	}
	c.subjects[key] = s
	return s
}

func subjectKey(p *pod, policies []*compiled) string {
	var b []byte
	for _, policy := range policies {
		b = binary.AppendUvarint(b, policy.serial)
		for _, r := range policy.rules[In] {
			for _, n := range r.names {
				port, ok := p.resolve(n)
				if !ok {
					b = append(b, 0)
					continue
				}
				b = binary.BigEndian.AppendUint16(append(b, 1), port)
			}
		}
	}
	return string(b)
}

func (p *pod) resolve(n name) (uint16, bool) {
	i := slices.IndexFunc(p.obj.Ports, func(q objects.NamedPort) bool {
		return q.Name == n.name && q.Protocol == protocols[n.proto]
	})
	if i < 0 {
		return 0, false
	}
	return p.obj.Ports[i].Port, true
}

func (x *ruleIndex) add(r *rule, d Dir, p *pod) {
	i := uint32(len(x.rules))
	ranges := r.ranges
	if d == In && len(r.names) > 0 {
		ranges = slices.Clone(ranges)
		for _, n := range r.names {
			if port, ok := p.resolve(n); ok {
				ranges = append(ranges, Range{n.proto, port, port})
			}
		}
	}
	x.rules, x.ranges = append(x.rules, r), append(x.ranges, ranges)
	if r.everyone {
		x.everyone = append(x.everyone, i)
	}
	for _, q := range r.peers {
		if list := x.byPeer[q.id]; len(list) == 0 || list[len(list)-1] != i {
			x.byPeer[q.id] = append(list, i)
		}
	}
}

// refresh computes the cells of classes that are new.
func (c *Compiler) refresh(s *subject) {
	n := int(c.classes.next)
	if len(s.known) < n {
		s.known = append(s.known, make([]*class, n-len(s.known))...)
		for d := range s.cells {
			s.cells[d] = append(s.cells[d], make([]uint16, n-len(s.cells[d]))...)
		}
	}
	if s.complete {
		for _, k := range c.classes.fresh {
			c.cellsOf(s, k)
		}
		return
	}
	for _, k := range c.classes.byID {
		c.cellsOf(s, k)
	}
	s.complete = true
}

func (c *Compiler) cellsOf(s *subject, k *class) {
	if s.known[k.id] == k {
		return
	}
	s.known[k.id] = k
	for d := range s.cells {
		s.cells[d][k.id] = c.profile(s, Dir(d), k)
	}
}

func (c *Compiler) profile(s *subject, d Dir, k *class) uint16 {
	if !s.isolates[d] {
		return ProfileAllow
	}
	id := c.ports(&s.rules[d], d, k)
	if d == Out && id != ProfileAllow && k.content.flags != 0 {
		return ProfileDefer
	}
	return id
}

// ports unites the ports of the rules that the class matches.
func (c *Compiler) ports(x *ruleIndex, d Dir, k *class) uint16 {
	hits := slices.Clone(x.everyone)
	for _, p := range k.content.peers {
		hits = append(hits, x.byPeer[p]...)
	}
	if len(hits) == 0 {
		return ProfileDeny
	}
	slices.Sort(hits)
	hits = slices.Compact(hits)
	key := make([]byte, 0, 2*len(hits)+8)
	for _, h := range hits {
		if x.rules[h].anyPort {
			return ProfileAllow
		}
		key = binary.AppendUvarint(key, uint64(h))
	}
	if d == Out {
		for _, n := range k.content.named {
			key = binary.BigEndian.AppendUint16(binary.AppendUvarint(append(key, 0xff, 0xff), uint64(n.id)), n.port)
		}
	}
	if id, ok := x.cache[string(key)]; ok {
		return id
	}
	var set PortSet
	for _, h := range hits {
		set.Ranges = append(set.Ranges, x.ranges[h]...)
		if d == Out {
			set.Ranges = append(set.Ranges, c.namedRanges(x.rules[h], k)...)
		}
	}
	set.Ranges = normal(set.Ranges)
	id := c.profiles.get(set)
	x.cache[string(key)] = id
	return id
}

// namedRanges resolves a rule's names on the pods of a class.
func (c *Compiler) namedRanges(r *rule, k *class) []Range {
	var out []Range
	for _, n := range r.names {
		use := c.names[n]
		if use == nil {
			continue
		}
		for _, q := range k.content.named {
			if q.id == use.id {
				out = append(out, Range{n.proto, q.port, q.port})
			}
		}
	}
	return out
}
