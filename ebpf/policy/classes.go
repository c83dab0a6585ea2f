package policy

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// Classes with fixed numbers.
const (
	NoClass uint32 = 0 // never given to an address: everything is denied
	World   uint32 = 1 // addresses that match nothing
)

const (
	flagNode    = 1 << iota // this node's address
	flagService             // to be translated
)

// content is what the members of a class have in common.
type content struct {
	flags uint8
	peers []uint32   // sorted
	named []resolved // sorted
}

// resolved is a port name in use for egress, and the port that the pod gives it.
type resolved struct {
	id   uint32
	port uint16
}

func (c content) empty() bool { return c.flags == 0 && len(c.peers) == 0 && len(c.named) == 0 }

func (c content) key() string {
	if c.empty() {
		return ""
	}
	b := make([]byte, 0, 8+4*len(c.peers)+6*len(c.named))
	b = append(b, c.flags)
	b = binary.AppendUvarint(b, uint64(len(c.peers)))
	for _, p := range c.peers {
		b = binary.AppendUvarint(b, uint64(p))
	}
	for _, n := range c.named {
		b = binary.AppendUvarint(b, uint64(n.id))
		b = binary.BigEndian.AppendUint16(b, n.port)
	}
	return string(b)
}

type class struct {
	id      uint32
	key     string
	content content
	members int
	fresh   bool // no packet can have seen it: its cells may be written freely
}

// member is an address or a prefix in the datapath's tables.
type member struct {
	class *class
	want  content // for prefixes: as of the last rebuild
}

// classTable gives numbers to classes.
type classTable struct {
	numbers[uint32]
	byKey map[string]*class // where joiners go
	byID  map[uint32]*class
	none  *class
	fresh []*class // made in this update
}

func (t *classTable) init(limit uint32) {
	world := &class{id: World, members: 1}
	t.none = &class{id: NoClass, members: 1}
	t.byKey, t.byID = map[string]*class{"": world}, map[uint32]*class{World: world}
	t.numbers = numbers[uint32]{next: World + 1, limit: limit}
}

// get is the class of that content, made if need be. When numbers are used up
// it is the class that everything is denied.
func (t *classTable) get(c content) *class {
	key := c.key()
	if k := t.byKey[key]; k != nil {
		return k
	}
	k := t.alloc(key, c)
	if k != t.none {
		t.byKey[key] = k
	}
	return k
}

func (t *classTable) alloc(key string, c content) *class {
	id, ok := t.take()
	if !ok {
		return t.none
	}
	k := &class{id: id, key: key, content: c, fresh: true}
	t.byID[id] = k
	t.fresh = append(t.fresh, k)
	return k
}

// retire drops classes that nothing is a member of.
func (t *classTable) retire(list map[*class]bool) {
	for k := range list {
		if k.members > 0 || k.id <= World || t.byID[k.id] != k {
			continue
		}
		delete(t.byID, k.id)
		if t.byKey[k.key] == k {
			delete(t.byKey, k.key)
		}
		t.drop(k.id)
	}
}

// cidrTree holds the prefixes in use and finds the longest that contains an
// address, by one map lookup per prefix length in use.
type cidrTree struct {
	members map[netip.Prefix]*member
	lengths [2][]int // v4, v6; longest first
}

func (t *cidrTree) init() { t.members = map[netip.Prefix]*member{} }

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

func (t *cidrTree) longest(ip netip.Addr) *member {
	return longest(t.lengths, ip, 129, func(p netip.Prefix) *member { return t.members[p] })
}

// longest asks get for the prefixes of ip that are shorter than below bits,
// longest first, and returns the first that is not nil.
func longest(lengths [2][]int, ip netip.Addr, below int, get func(netip.Prefix) *member) *member {
	for _, bits := range lengths[family(ip)] {
		if bits >= below {
			continue
		}
		p, err := ip.Prefix(bits)
		if err != nil {
			continue
		}
		if m := get(p); m != nil {
			return m
		}
	}
	return nil
}

// contentsOf computes, for all prefixes that blocks and services name, which
// blocks an address has matched whose longest prefix that is.
func contentsOf(blocks []*peer, services []netip.Prefix) (map[netip.Prefix]content, [2][]int) {
	type edit struct {
		add, remove []uint32
		service     bool
	}
	edits := map[netip.Prefix]*edit{}
	at := func(p netip.Prefix) *edit {
		e := edits[p]
		if e == nil {
			e = &edit{}
			edits[p] = e
		}
		return e
	}
	for _, b := range blocks {
		e := at(b.spec.block)
		e.add = append(e.add, b.id)
		for _, x := range b.spec.excepts {
			e := at(x)
			e.remove = append(e.remove, b.id)
		}
	}
	for _, s := range services {
		at(s).service = true
	}
	var seen [2][129]bool
	order := make([]netip.Prefix, 0, len(edits))
	for p := range edits {
		order = append(order, p)
		seen[family(p.Addr())][p.Bits()] = true
	}
	slices.SortFunc(order, func(a, b netip.Prefix) int { return a.Bits() - b.Bits() })
	var lengths [2][]int
	for f := range seen {
		for bits := 128; bits >= 0; bits-- {
			if seen[f][bits] {
				lengths[f] = append(lengths[f], bits)
			}
		}
	}
	found := make(map[netip.Prefix]*member, len(edits))
	out := make(map[netip.Prefix]content, len(edits))
	for _, p := range order { // shortest first: the parent is there
		var c content
		if m := longest(lengths, p.Addr(), p.Bits(), func(q netip.Prefix) *member { return found[q] }); m != nil {
			c.flags, c.peers = m.want.flags, slices.Clone(m.want.peers)
		}
		e := edits[p]
		if e.service {
			c.flags |= flagService
		}
		c.peers = slices.DeleteFunc(c.peers, func(id uint32) bool { return slices.Contains(e.remove, id) })
		c.peers = append(c.peers, e.add...)
		slices.Sort(c.peers)
		c.peers = slices.Compact(c.peers)
		found[p] = &member{want: c}
		out[p] = c
	}
	return out, lengths
}

// Within the class table a profile is the number of a set of ports.
type profileTable struct {
	numbers[uint16]
	byKey map[string]uint16
	sets  map[uint16]PortSet
	bank  *Bank
	dirty bool // a set was added that bank cannot express
	added []uint16
	kept  int // sets that the last sweep left
}

func (t *profileTable) init(limit uint16) {
	t.byKey, t.sets = map[string]uint16{"*": ProfileAllow, "": ProfileDeny}, map[uint16]PortSet{}
	t.numbers = numbers[uint16]{next: firstProfile, limit: limit}
	t.bank = newBank(nil)
	t.dirty = true
}

// get is the number of a set, ProfileDeny when numbers are used up.
func (t *profileTable) get(s PortSet) uint16 {
	key := s.key()
	if id, ok := t.byKey[key]; ok {
		return id
	}
	id, ok := t.take()
	if !ok {
		return ProfileDeny
	}
	t.byKey[key], t.sets[id] = id, s
	t.added = append(t.added, id)
	if _, ok := t.bank.bits(s); !ok {
		t.dirty = true
	}
	return id
}
