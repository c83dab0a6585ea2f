//go:build linux

package datapath

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/ebpf/policy"
)

// peers is what is known of the hash tables of addresses, peers4 and peers6 of
// bpf/policy.bpf.c: mapped memory, a bucket a cache line, so that a packet of a
// peer that was not seen lately costs one miss. An address without a place in
// its bucket is in the trie, as a range of one.
//
// A slot changes by one store. In peers6, where an entry is wider than that, the
// class is written last and removed first, and the slot rests with its old
// address until a grace period has passed.
type peers struct {
	shift uint32 // of a hash; what is left is the bucket's number
	seed  uint64
	known [2]int // addresses in tables and trie, by family
	limit int

	spilled map[netip.Addr]uint32 // classes of addresses in the trie
	hosts   map[netip.Addr]uint32 // classes of ranges of one; under a spilled address they are not in the trie
	resting []*slot6
	missing map[netip.Addr]policy.Address // no room
}

const (
	bucketSize   = 64
	perBucket4   = 8
	perBucket6   = 3
	addrOffset6  = 16
	bucketsBelow = 4 // an IPv4 bucket is half full of as many as there may be
)

// slot6 is where peers6 has an entry.
type slot6 struct {
	class *uint32
	addr  *[16]byte
}

// buckets of each table that is to hold n addresses, a power of 2.
func buckets(n uint32) uint32 { return 1 << max(1, bits.Len32((n-1)/bucketsBelow)) }

func newPeers(limit uint32) peers {
	return peers{
		shift: uint32(65 - bits.Len32(buckets(limit))), seed: rand.Uint64() | 1, limit: int(limit),
		spilled: map[netip.Addr]uint32{}, hosts: map[netip.Addr]uint32{}, missing: map[netip.Addr]policy.Address{},
	}
}

func (p *peers) bucket4(addr uint32) uint64 { return uint64(addr) * p.seed >> p.shift }

func (p *peers) bucket6(addr [16]byte) uint64 {
	high, low := binary.NativeEndian.Uint64(addr[:8]), binary.NativeEndian.Uint64(addr[8:])
	return (high*p.seed>>32 ^ low) * p.seed >> p.shift
}

// slots4 are those of the bucket of an address.
func (d *Datapath) slots4(addr uint32) *[perBucket4]uint64 {
	return (*[perBucket4]uint64)(unsafe.Pointer(&d.peers4[d.peers.bucket4(addr)*bucketSize]))
}

func (d *Datapath) slots6(addr [16]byte) (out [perBucket6]slot6) {
	at := d.peers.bucket6(addr) * bucketSize
	for i := range out {
		out[i] = slot6{(*uint32)(unsafe.Pointer(&d.peers6[at+4*uint64(i)])), (*[16]byte)(d.peers6[at+addrOffset6+16*uint64(i):])}
	}
	return out
}

// find returns a setter of the class of an address in its table, at its place or,
// if it has none, at a free one; nil: there is none.
func (d *Datapath) find(ip netip.Addr) (set func(class uint32), known bool) {
	if ip.Is4() {
		b := ip.As4()
		return d.find4(binary.NativeEndian.Uint32(b[:]))
	}
	return d.find6(ip.As16())
}

func (d *Datapath) find4(addr uint32) (set func(uint32), known bool) {
	slots := d.slots4(addr)
	var free *uint64
	for i := range slots {
		s := &slots[i]
		if *s>>32 == 0 {
			free = s
		} else if uint32(*s) == addr {
			free, known = s, true
			break
		}
	}
	if free == nil {
		return nil, false
	}
	return func(class uint32) {
		if class == 0 {
			atomic.StoreUint64(free, 0)
			return
		}
		atomic.StoreUint64(free, uint64(class)<<32|uint64(addr))
	}, known
}

func (d *Datapath) find6(addr [16]byte) (set func(uint32), known bool) {
	var free *slot6
	for _, s := range d.slots6(addr) {
		if *s.addr == addr { // resting or not
			free, known = &s, *s.class != 0
			break
		}
		if *s.class == 0 && *s.addr == [16]byte{} {
			free = &s
		}
	}
	if free == nil {
		return nil, false
	}
	return func(class uint32) {
		*free.addr = addr
		atomic.StoreUint32(free.class, class)
		if class == 0 {
			d.peers.resting = append(d.peers.resting, free)
		}
	}, known
}

// rested frees slots after a grace period.
func (d *Datapath) rested() {
	for _, s := range d.peers.resting {
		if *s.class == 0 {
			*s.addr = [16]byte{}
		}
	}
	d.peers.resting = nil
}

// address writes an address. One that has no place is not known at all, which
// allows less: a class holds all ranges that its address is in.
func (d *Datapath) address(a policy.Address) {
	class := a.Class
	if a.Node {
		class |= classNode
	}
	delete(d.peers.missing, a.Addr)
	if d.putAddress(a.Addr, class) != nil {
		_ = d.deleteAddress(a.Addr) // not with a class that it no longer has
		d.peers.missing[a.Addr] = a
	}
}

func (d *Datapath) putAddress(ip netip.Addr, class uint32) error {
	p := &d.peers
	set, known := d.find(ip)
	_, spilled := p.spilled[ip]
	if !known && !spilled {
		if p.known[family(ip)] >= p.limit {
			return unix.ENOSPC
		}
	}
	if spilled || set == nil {
		if err := d.putTrie(host(ip), class); err != nil {
			return err
		}
		p.spilled[ip] = class
		known = spilled
	} else {
		set(class)
	}
	if !known {
		p.known[family(ip)]++
	}
	return nil
}

func host(ip netip.Addr) netip.Prefix { return netip.PrefixFrom(ip, ip.BitLen()) }

func (d *Datapath) deleteAddress(ip netip.Addr) error {
	p := &d.peers
	delete(p.missing, ip)
	if _, ok := p.spilled[ip]; ok {
		delete(p.spilled, ip)
		p.known[family(ip)]--
		var err error
		if class, ok := p.hosts[ip]; ok {
			err = d.putTrie(host(ip), class)
		} else {
			err = d.dropTrie(host(ip))
		}
		if err != nil {
			return fmt.Errorf("remove address %s: %w", ip, err)
		}
		return nil
	}
	if set, known := d.find(ip); known {
		set(0)
		p.known[family(ip)]--
	}
	return nil
}

func (d *Datapath) putPrefix(q policy.Prefix) error {
	ip := q.Prefix.Addr()
	if q.Prefix.IsSingleIP() {
		d.peers.hosts[ip] = q.Class
		if _, ok := d.peers.spilled[ip]; ok {
			return nil
		}
	}
	return d.putTrie(q.Prefix, q.Class)
}

func (d *Datapath) dropPrefix(q netip.Prefix) error {
	if q.IsSingleIP() {
		delete(d.peers.hosts, q.Addr())
		if _, ok := d.peers.spilled[q.Addr()]; ok {
			return nil
		}
	}
	return d.dropTrie(q)
}
