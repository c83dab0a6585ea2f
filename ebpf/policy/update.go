package policy

import (
	"cmp"
	"iter"
	"maps"
	"net/netip"
	"slices"
)

// Update brings the tables up to date with the objects and returns what to
// write. The next Update assumes that it was written.
func (c *Compiler) Update() *Plan {
	p := &Plan{}
	c.classes.full, c.profiles.full = false, false
	changed := c.selectPolicies(p)
	moves := c.moves(changed)
	leave := c.assign(moves)
	c.refreshAll()
	c.splitCrowded(moves, leave)
	c.refreshAll()
	c.rows(p, leave)
	c.move(p, moves)
	c.ownClasses(p)
	c.publishProfiles(p)
	c.finish(p, moves)
	return p
}

// Graced says that a grace period has passed since the last plan was written:
// numbers that it retired may be given again.
func (c *Compiler) Graced() {
	c.classes.graced()
	c.profiles.graced()
}

// Rewrite says that the datapath has an endpoint as if it were new: the next
// plan writes its rows and its word again.
func (c *Compiler) Rewrite(id uint32) {
	if e := c.endpoints[id]; e != nil {
		e.fresh, e.word, e.current = true, Word{}, [2][]uint16{}
	}
}

// selectPolicies finds each endpoint's policies, and takes the peers and names
// of those that came into use and lets go of the others'. It says whether
// prefixes have to be looked at again.
func (c *Compiler) selectPolicies(p *Plan) bool {
	if len(c.dirty.endpoints)+len(c.dirty.policies) == 0 {
		return c.dirty.cidrs
	}
	for id := range c.dirty.endpoints {
		if c.endpoints[id] == nil {
			p.Gone = append(p.Gone, id)
		}
	}
	slices.Sort(p.Gone)
	var again []*endpoint
	for _, e := range c.endpoints {
		if c.dirty.endpoints[e.id] || c.dirty.policies[e.pod.Namespace] {
			e.policies = c.selecting(e)
			again = append(again, e)
		}
	}
	now := map[*compiled]bool{}
	for _, e := range c.endpoints {
		for _, policy := range e.policies {
			now[policy] = true
		}
	}
	added, removed := map[string]*peer{}, map[string]*peer{}
	cidrs := c.dirty.cidrs
	for policy := range now {
		if !c.active[policy] {
			c.acquire(policy, added)
		}
	}
	for policy := range c.active {
		if !now[policy] {
			c.release(policy, removed)
		}
	}
	c.active = now
	for key, q := range added {
		if removed[key] == q {
			delete(removed, key)
			continue
		}
		cidrs = cidrs || q.spec.block.IsValid()
	}
	for _, q := range slices.SortedFunc(maps.Values(added), func(a, b *peer) int { return cmp.Compare(a.id, b.id) }) {
		c.join(q)
	}
	for _, q := range removed {
		cidrs = cidrs || q.spec.block.IsValid()
		c.part(q)
	}
	for _, e := range again {
		e.subject = c.subjectOf(c.pods[e.pod], e.policies)
	}
	return cidrs
}

func (c *Compiler) selecting(e *endpoint) []*compiled {
	pod := c.pods[e.pod]
	if pod == nil {
		return nil
	}
	var list []*compiled
	for _, policy := range c.policies[e.pod.Namespace] {
		if policy.selects(pod) {
			list = append(list, policy)
		}
	}
	slices.SortFunc(list, func(a, b *compiled) int { return cmp.Compare(a.serial, b.serial) })
	return list
}

func (c *Compiler) acquire(policy *compiled, added map[string]*peer) {
	for d := range policy.rules {
		for i := range policy.rules[d] {
			r := &policy.rules[d][i]
			r.peers = r.peers[:0]
			for _, spec := range r.specs {
				q := c.peers[spec.key]
				if q == nil {
					c.nextID++
					q = &peer{id: c.nextID, spec: spec}
					c.peers[spec.key] = q
					added[spec.key] = q
				}
				q.refs++
				r.peers = append(r.peers, q)
			}
			for _, n := range r.names {
				if Dir(d) == Out {
					c.acquireName(n)
				}
			}
		}
	}
}

func (c *Compiler) acquireName(n name) {
	use := c.names[n]
	if use == nil {
		c.nextID++
		use = &nameUse{id: c.nextID}
		c.names[n] = use
		c.touchNamed(n)
	}
	use.refs++
}

func (c *Compiler) touchNamed(n name) {
	for _, p := range c.pods {
		if _, ok := p.resolve(n); ok {
			c.touch(p)
		}
	}
}

func (c *Compiler) release(policy *compiled, removed map[string]*peer) {
	for d := range policy.rules {
		for i := range policy.rules[d] {
			r := &policy.rules[d][i]
			for _, q := range r.peers {
				if q.refs--; q.refs == 0 {
					delete(c.peers, q.spec.key)
					removed[q.spec.key] = q
				}
			}
			for _, n := range r.names {
				if Dir(d) != Out {
					continue
				}
				if use := c.names[n]; use != nil {
					if use.refs--; use.refs == 0 {
						delete(c.names, n)
						c.touchNamed(n)
					}
				}
			}
		}
	}
}

// candidates calls f with the pods that a selector peer matches.
func (c *Compiler) candidates(q *peer, f func(*pod)) {
	if q.spec.block.IsValid() {
		return
	}
	each := func(ns *namespace) {
		if q.spec.anyNS && !q.spec.nsSel.matches(ns.labels) {
			return
		}
		for _, p := range ns.pods {
			if q.spec.podSel.matches(p.obj.Labels) {
				f(p)
			}
		}
	}
	if q.spec.anyNS {
		for _, ns := range c.namespaces {
			each(ns)
		}
	} else if ns := c.namespaces[q.spec.ns]; ns != nil {
		each(ns)
	}
}

func (c *Compiler) join(q *peer) {
	c.candidates(q, func(p *pod) {
		if i, found := slices.BinarySearch(p.peers, q.id); !found {
			p.peers = slices.Insert(p.peers, i, q.id)
			c.touch(p)
		}
	})
}

func (c *Compiler) part(q *peer) {
	c.candidates(q, func(p *pod) {
		if i, found := slices.BinarySearch(p.peers, q.id); found {
			p.peers = slices.Delete(p.peers, i, i+1)
			c.touch(p)
		}
	})
}

// move takes an address or a prefix from a class to another.
type move struct {
	prefix netip.Prefix // of an address: all its bits
	exact  bool
	from   *class
	want   content
	to     *class
	gone   bool // to be deleted when it has moved
	stays  bool // it is there and in the right class: delete only
}

// moves finds what has to change its class. Nothing is changed yet but the
// desired contents of prefixes.
func (c *Compiler) moves(cidrs bool) []*move {
	var out []*move
	lengths, contents := c.cidrs.lengths, map[netip.Prefix]content(nil)
	if cidrs {
		var blocks []*peer
		for _, q := range c.peers {
			if q.spec.block.IsValid() {
				blocks = append(blocks, q)
			}
		}
		contents, lengths = contentsOf(blocks, c.services)
		out = c.prefixMoves(contents, lengths)
		c.touchInside(out)
	}
	wanted := func(p netip.Prefix) (content, bool) {
		if cidrs {
			k, ok := contents[p]
			return k, ok
		}
		if m := c.cidrs.members[p]; m != nil {
			return m.want, true
		}
		return content{}, false
	}
	for ip := range c.dirty.addrs {
		base := baseContent(lengths, ip, 129, wanted)
		want, needed := c.wantAddr(ip, base)
		old := c.exact[ip]
		m := &move{prefix: netip.PrefixFrom(ip, ip.BitLen()), exact: true, want: want}
		if !needed {
			m.gone, m.want = true, base
		}
		if old != nil {
			m.from = old.class
			m.stays = old.class.key == m.want.key() && old.class != c.classes.none
			if m.stays && !m.gone {
				continue
			}
		} else {
			if m.gone {
				continue
			}
			m.from = c.effective(ip, 129)
		}
		out = append(out, m)
	}
	if cidrs {
		c.cidrs.lengths = mergeLengths(c.cidrs.lengths, lengths)
	}
	return out
}

// touchInside notes the addresses whose blocks may have changed with prefixes.
func (c *Compiler) touchInside(changed []*move) {
	const few = 64
	for ip := range c.exact {
		inside := len(changed) > few
		for i := 0; i < len(changed) && !inside; i++ {
			inside = changed[i].prefix.Contains(ip)
		}
		if inside {
			c.dirty.addrs[ip] = true
		}
	}
}

// effective is the class that the prefixes in the datapath give an address.
func (c *Compiler) effective(ip netip.Addr, below int) *class {
	if m := longest(c.cidrs.lengths, ip, below, func(p netip.Prefix) *member { return c.cidrs.members[p] }); m != nil {
		return m.class
	}
	return c.classes.byKey[""]
}

func baseContent(lengths [2][]int, ip netip.Addr, below int, wanted func(netip.Prefix) (content, bool)) content {
	for _, bits := range lengths[family(ip)] {
		if bits >= below {
			continue
		}
		if p, err := ip.Prefix(bits); err == nil {
			if k, ok := wanted(p); ok {
				return k
			}
		}
	}
	return content{}
}

// wantAddr is what an address of a pod or of the node should be; false if the
// prefixes say it all.
func (c *Compiler) wantAddr(ip netip.Addr, base content) (content, bool) {
	if c.node[ip] {
		return content{flags: base.flags | flagNode, peers: base.peers}, true
	}
	p := c.owner(ip)
	if p == nil {
		return base, c.local[ip]
	}
	named := c.named(p)
	if len(p.peers) == 0 && len(named) == 0 && !c.local[ip] {
		return content{}, false
	}
	k := content{flags: base.flags, peers: p.peers, named: named}
	if len(base.peers) > 0 {
		k.peers = slices.Concat(p.peers, base.peers)
		slices.Sort(k.peers)
	}
	return k, true
}

func (c *Compiler) named(p *pod) []resolved {
	var out []resolved
	if len(c.names) == 0 {
		return nil
	}
	for i, port := range p.obj.Ports {
		proto := protocolIndex(port.Protocol)
		if proto < 0 {
			continue
		}
		n := name{uint8(proto), port.Name}
		use := c.names[n]
		if use == nil {
			continue
		}
		first := !slices.ContainsFunc(out, func(r resolved) bool { return r.id == use.id })
		if first {
			out = append(out, resolved{use.id, p.obj.Ports[i].Port})
		}
	}
	slices.SortFunc(out, func(a, b resolved) int { return cmp.Compare(a.id, b.id) })
	return out
}

func (c *Compiler) prefixMoves(contents map[netip.Prefix]content, lengths [2][]int) []*move {
	var out []*move
	for p, want := range contents {
		m := &move{prefix: p, want: want}
		if old := c.cidrs.members[p]; old != nil {
			m.from = old.class
			old.want = want
			if old.class.key == want.key() && old.class != c.classes.none {
				continue
			}
		} else {
			m.from = c.effective(p.Addr(), p.Bits())
		}
		out = append(out, m)
	}
	for p, old := range c.cidrs.members {
		if _, ok := contents[p]; ok {
			continue
		}
		m := &move{prefix: p, from: old.class, gone: true}
		m.want = baseContent(lengths, p.Addr(), p.Bits(), func(q netip.Prefix) (content, bool) {
			k, ok := contents[q]
			return k, ok
		})
		m.stays = old.class.key == m.want.key() && old.class != c.classes.none
		out = append(out, m)
	}
	return out
}

func mergeLengths(a, b [2][]int) [2][]int {
	var out [2][]int
	for f := range out {
		out[f] = slices.Concat(a[f], b[f])
		slices.Sort(out[f])
		out[f] = slices.Compact(out[f])
		slices.Reverse(out[f])
	}
	return out
}

// assign gives each move its class and returns the classes that are left.
func (c *Compiler) assign(moves []*move) map[*class]bool {
	leave := map[*class]bool{}
	for _, m := range moves {
		if m.stays {
			m.to = m.from
			continue
		}
		m.to = c.classes.get(m.want)
		if m.to != m.from {
			leave[m.from] = true
		}
	}
	return leave
}

func (c *Compiler) refreshAll() {
	for _, e := range c.endpoints {
		c.refresh(e.subject)
	}
}

// splitCrowded gives those that join a class which others leave, and whose
// verdict changes, a class apart: no order of writes would be right for both.
func (c *Compiler) splitCrowded(moves []*move, leave map[*class]bool) {
	apart := map[*class]*class{}
	for _, m := range moves {
		if m.stays || m.to == m.from || !leave[m.to] || m.to.fresh || m.to == c.classes.none {
			continue
		}
		k, seen := apart[m.to]
		if !seen {
			if c.changes(m.to) {
				k = c.classes.alloc(m.to.key, m.to.content)
				if k != c.classes.none && m.to.id != World {
					c.classes.byKey[k.key] = k
				}
			}
			apart[m.to] = k
		}
		if k != nil {
			m.to = k
		}
	}
}

// changes says whether a class's verdict changes for any endpoint.
func (c *Compiler) changes(k *class) bool {
	for _, e := range c.endpoints {
		for d := range 2 {
			if e.subject.isolates[d] && e.old(Dir(d), k.id) != e.subject.cells[d][k.id] {
				return true
			}
		}
	}
	return false
}

// old is the profile that the datapath has, ProfileAllow where it does not isolate.
func (e *endpoint) old(d Dir, class uint32) uint16 {
	switch {
	case !e.word.Isolated[d]:
		return ProfileAllow
	case int(class) < len(e.current[d]):
		return e.current[d][class]
	}
	return ProfileDeny
}

// rows plans the cells.
func (c *Compiler) rows(p *Plan, leave map[*class]bool) {
	p.Classes = c.classes.next
	for _, e := range c.endpoints {
		word := Word{Active: true, Isolated: e.subject.isolates, Audit: e.audit}
		for d := range Dir(2) {
			if !word.Isolated[d] {
				e.current[d] = nil
				continue
			}
			blank := !e.word.Isolated[d] // the datapath does not read the row yet
			prepare, early, late := c.cells(e, d, blank, leave)
			p.Prepare = appendRow(p.Prepare, RowWrite{e.id, d, blank, prepare})
			p.Early = appendRow(p.Early, RowWrite{e.id, d, false, early})
			p.Late = appendRow(p.Late, RowWrite{e.id, d, false, late})
		}
		if e.fresh || word != e.word {
			p.Words = append(p.Words, EndpointWord{e.id, word})
		}
		e.word, e.fresh, e.written = word, false, e.subject
	}
	p.Grace = len(p.Late) > 0
}

func appendRow(list []RowWrite, w RowWrite) []RowWrite {
	if len(w.Cells) == 0 {
		return list
	}
	return append(list, w)
}

// cells compares an endpoint's row with what it should be.
func (c *Compiler) cells(e *endpoint, d Dir, blank bool, leave map[*class]bool) (prepare, early, late []Cell) {
	want := e.subject.cells[d]
	if blank {
		e.current[d] = make([]uint16, c.classes.next)
	} else if n := int(c.classes.next) - len(e.current[d]); n > 0 {
		e.current[d] = append(e.current[d], make([]uint16, n)...)
	}
	row := e.current[d]
	for k := range c.stale(e, blank) {
		id := k.id
		cell := Cell{id, want[id]}
		switch {
		case blank && (e.fresh || k.fresh || !leave[k]):
			prepare = append(prepare, cell)
		case blank:
			prepare = append(prepare, Cell{id, ProfileAllow})
			if cell.Profile != ProfileAllow {
				late = append(late, cell)
			}
		case row[id] == cell.Profile:
		case k.fresh:
			prepare = append(prepare, cell)
		case leave[k]:
			late = append(late, cell)
		default:
			early = append(early, cell)
		}
		row[id] = cell.Profile
	}
	return prepare, early, late
}

// stale yields the classes whose cells may not be what an endpoint's subject
// wants: the fresh ones, or all when the subject is another.
func (c *Compiler) stale(e *endpoint, blank bool) iter.Seq[*class] {
	if blank || e.written != e.subject {
		return maps.Values(c.classes.byID)
	}
	return slices.Values(c.classes.fresh)
}

// move plans the entries of addresses and prefixes and notes them as done.
func (c *Compiler) move(p *Plan, moves []*move) {
	for _, m := range moves {
		if m.exact {
			c.moveExact(p, m)
		} else {
			c.movePrefix(p, m)
		}
	}
	slices.SortFunc(p.Prefixes, func(a, b Prefix) int { return b.Prefix.Bits() - a.Prefix.Bits() })
	slices.SortFunc(p.DeletePrefixes, func(a, b netip.Prefix) int { return a.Bits() - b.Bits() })
}

func (c *Compiler) moveExact(p *Plan, m *move) {
	ip := m.prefix.Addr()
	if !m.stays {
		p.Exact = append(p.Exact, Address{ip, m.to.id, c.node[ip]})
	}
	old := c.exact[ip]
	if old != nil {
		old.class.members--
	}
	if m.gone {
		p.DeleteExact = append(p.DeleteExact, ip)
		delete(c.exact, ip)
		return
	}
	m.to.members++
	c.exact[ip] = &member{class: m.to}
}

func (c *Compiler) movePrefix(p *Plan, m *move) {
	if !m.stays {
		p.Prefixes = append(p.Prefixes, Prefix{m.prefix, m.to.id})
	}
	if old := c.cidrs.members[m.prefix]; old != nil {
		old.class.members--
	}
	if m.gone {
		p.DeletePrefixes = append(p.DeletePrefixes, m.prefix)
		delete(c.cidrs.members, m.prefix)
		return
	}
	m.to.members++
	c.cidrs.members[m.prefix] = &member{class: m.to, want: m.want}
}

func (c *Compiler) ownClasses(p *Plan) {
	for _, e := range c.endpoints {
		for _, ip := range e.ips {
			if id := c.Class(ip); e.class[ip] != id {
				e.class[ip] = id
				p.Own = append(p.Own, OwnClass{e.id, ip, id})
			}
		}
	}
}

// publishProfiles encodes the sets of ports that are new, in a new bank if the
// present one cannot tell their ports apart.
func (c *Compiler) publishProfiles(p *Plan) {
	t := &c.profiles
	p.Profiles = map[uint16][BitmapSize]byte{}
	if t.dirty {
		sets := slices.Collect(maps.Values(t.sets))
		b := newBank(sets)
		if b.Classes <= MaxPortClasses {
			t.bank, t.dirty, p.Bank = b, false, b
			t.added = slices.Collect(maps.Keys(t.sets))
		} else {
			p.Problems = append(p.Problems, "too many distinct ports: new port rules are denied")
		}
	}
	for _, id := range t.added {
		bits, _ := t.bank.bits(t.sets[id]) // nothing if it cannot be expressed: denied
		p.Profiles[id] = bits
	}
	t.added = nil
}

// finish retires what nothing uses any more.
func (c *Compiler) finish(p *Plan, moves []*move) {
	left := map[*class]bool{}
	for _, m := range moves {
		left[m.from], left[m.to] = true, true
	}
	for _, k := range c.classes.fresh {
		k.fresh = false
		left[k] = true
	}
	c.classes.fresh = c.classes.fresh[:0]
	c.classes.retire(left)
	if c.dirty.cidrs || len(p.DeletePrefixes) > 0 {
		c.cidrs.lengths = lengthsOf(c.cidrs.members)
	}
	c.sweepSubjects()
	c.sweepProfiles()
	p.Retired = len(c.classes.limbo)+len(c.profiles.limbo) > 0
	if c.classes.full {
		p.Problems = append(p.Problems, "too many classes of peers: new ones are denied")
	}
	if c.profiles.full {
		p.Problems = append(p.Problems, "too many sets of ports: new ones are denied")
	}
	clear(c.dirty.addrs)
	clear(c.dirty.policies)
	clear(c.dirty.endpoints)
	c.dirty.cidrs = false
}

func lengthsOf(members map[netip.Prefix]*member) [2][]int {
	var out [2][]int
	for p := range members {
		f := family(p.Addr())
		if !slices.Contains(out[f], p.Bits()) {
			out[f] = append(out[f], p.Bits())
		}
	}
	for f := range out {
		slices.Sort(out[f])
		slices.Reverse(out[f])
	}
	return out
}

func (c *Compiler) sweepSubjects() {
	if len(c.dirty.endpoints)+len(c.dirty.policies) == 0 {
		return
	}
	used := map[*subject]bool{}
	for _, e := range c.endpoints {
		used[e.subject] = true
	}
	maps.DeleteFunc(c.subjects, func(_ string, s *subject) bool { return !used[s] })
}

func (c *Compiler) sweepProfiles() {
	t := &c.profiles
	used := map[uint16]bool{}
	if roomy := int(t.next) < int(t.limit)/2 || len(t.free) > 64; roomy && len(t.sets) <= max(64, 2*t.kept) {
		return
	}
	for _, e := range c.endpoints {
		for d := range e.current {
			for _, id := range e.current[d] {
				used[id] = true
			}
		}
	}
	t.kept = len(used)
	if len(t.sets) <= 2*len(used) && len(t.sets) < int(t.limit)/2 {
		return
	}
	for id, s := range t.sets {
		if !used[id] {
			delete(t.sets, id)
			delete(t.byKey, s.key())
			t.drop(id)
		}
	}
	for _, s := range c.subjects {
		for d := range s.rules {
			maps.DeleteFunc(s.rules[d].cache, func(_ string, id uint16) bool { return id >= firstProfile && !used[id] })
		}
	}
}
