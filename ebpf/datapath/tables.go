//go:build linux

package datapath

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	ciliumebpf "github.com/cilium/ebpf"

	"github.com/nodeagent/nodeagent/ebpf/policy"
)

// The flags of an endpoint's word; see bpf/policy.bpf.c.
const (
	wordActive   = 1 << 44
	wordIngress  = 1 << 45
	wordEgress   = 1 << 46
	wordAudit    = 1 << 47
	wordDegraded = 1 << 48
	classNode    = 1 << 31
)

// chunk is the place of an endpoint's two rows in the row table.
type chunk struct {
	base  uint32
	shift uint // each row has 1<<shift blocks
	ok    bool
}

// slab hands out chunks of a table, from the first gap that is large enough.
type slab struct{ gaps []gap } // sorted, no two touch

type gap struct{ base, blocks uint32 }

func (s *slab) alloc(shift uint) (chunk, bool) {
	n := uint32(2) << shift
	for i := range s.gaps {
		g := &s.gaps[i]
		if g.blocks < n {
			continue
		}
		c := chunk{g.base, shift, true}
		g.base, g.blocks = g.base+n, g.blocks-n
		if g.blocks == 0 {
			s.gaps = slices.Delete(s.gaps, i, i+1)
		}
		return c, true
	}
	return chunk{}, false
}

func (s *slab) release(c chunk) {
	if !c.ok {
		return
	}
	i, _ := slices.BinarySearchFunc(s.gaps, c.base, func(g gap, base uint32) int { return cmp.Compare(g.base, base) })
	s.gaps = slices.Insert(s.gaps, i, gap{c.base, 2 << c.shift})
	for _, k := range []int{i, i - 1} { // joins the next, then the one before
		if k >= 0 && k+1 < len(s.gaps) && s.gaps[k].base+s.gaps[k].blocks == s.gaps[k+1].base {
			s.gaps[k].blocks += s.gaps[k+1].blocks
			s.gaps = slices.Delete(s.gaps, k+1, k+2)
		}
	}
}

func (d *Datapath) word(id uint32) *uint64 {
	return (*uint64)(unsafe.Pointer(&d.endpoints[id*endpointSize]))
}

func (d *Datapath) field(id, offset uint32) *uint32 {
	return (*uint32)(unsafe.Pointer(&d.endpoints[id*endpointSize+offset]))
}

func (d *Datapath) row(c chunk, dir policy.Dir) []uint16 {
	first := c.base + uint32(dir)<<c.shift
	return unsafe.Slice((*uint16)(unsafe.Pointer(&d.rows[first*blockSize])), rowCells<<c.shift)
}

func (d *Datapath) publish(id uint32, e *endpoint) {
	w := e.word
	if e.row.ok {
		w |= uint64(e.row.base) | uint64(e.row.base+1<<e.row.shift)<<20 | uint64(e.row.shift)<<40
	}
	if e.degraded != nil {
		w |= wordDegraded | wordIngress | wordEgress | wordActive
	}
	atomic.StoreUint64(d.word(id), w)
}

// changed voids what conntrack knows of verdicts: each packet is judged once
// more. To be called when the tables have changed.
func (d *Datapath) changed() {
	atomic.AddUint32((*uint32)(unsafe.Pointer(&d.generation[0])), 1)
}

// Insert makes an endpoint known under a number below MaxEndpoints. Nothing
// passes its interface but what the host sends until a plan makes it active.
func (d *Datapath) Insert(id uint32, ifindex int, ips []netip.Addr) error {
	if id >= MaxEndpoints {
		return fmt.Errorf("endpoint %d: there is room for %d", id, MaxEndpoints)
	}
	defer d.changed()
	atomic.StoreUint64(d.word(id), 0)
	clear(d.endpoints[id*endpointSize+8 : (id+1)*endpointSize])
	*d.field(id, 20) = uint32(ifindex)
	*d.field(id, 8), *d.field(id, 12) = policy.World, policy.World
	e := &endpoint{ifindex: ifindex, ips: ips}
	d.eps[id] = e
	seen := [2]bool{}
	for _, ip := range ips {
		switch {
		case ip.Is4() && !seen[0]:
			b := ip.As4()
			seen[0] = true
			copy(d.endpoints[id*endpointSize+16:], b[:])
		case ip.Is6() && !seen[1]:
			b := ip.As16()
			seen[1] = true
			copy(d.endpoints[id*endpointSize+24:], b[:])
		}
		if err := d.put(d.objs.EpIp4, d.objs.EpIp6, ip, id); err != nil {
			return fmt.Errorf("note address %s: %w", ip, err)
		}
	}
	if ifindex < near {
		atomic.StoreUint32(d.nearby(ifindex), id+1)
		return nil
	}
	if err := d.objs.EpIf.Put(uint32(ifindex), id); err != nil {
		return fmt.Errorf("note interface %d: %w", ifindex, err)
	}
	return nil
}

// nearby is an interface's endpoint + 1. Array elements are 8 bytes apart at least.
func (d *Datapath) nearby(ifindex int) *uint32 {
	return (*uint32)(unsafe.Pointer(&d.near[8*ifindex]))
}

// Remove forgets an endpoint: nothing passes its interface any more.
func (d *Datapath) Remove(id uint32) error {
	e := d.eps[id]
	if e == nil {
		return nil
	}
	defer d.changed()
	var err error
	if e.ifindex >= near {
		err = d.objs.EpIf.Delete(uint32(e.ifindex))
	} else if *d.nearby(e.ifindex) == id+1 {
		atomic.StoreUint32(d.nearby(e.ifindex), 0)
	}
	atomic.StoreUint64(d.word(id), 0)
	for _, ip := range e.ips {
		var owner uint32
		m, key := d.objs.EpIp4, addrKey(ip)
		if ip.Is6() {
			m = d.objs.EpIp6
		}
		if m.Lookup(key, &owner) == nil && owner == id {
			err = errors.Join(err, m.Delete(key))
		}
	}
	delete(d.eps, id)
	d.old = append(d.old, e.row)
	if errors.Is(err, ciliumebpf.ErrKeyNotExist) {
		err = nil
	}
	return err
}

func addrKey(ip netip.Addr) []byte { return ip.AsSlice() }

func (d *Datapath) put(m4, m6 *ciliumebpf.Map, ip netip.Addr, value uint32) error {
	if ip.Is4() {
		return m4.Put(addrKey(ip), value)
	}
	return m6.Put(addrKey(ip), value)
}

// Apply writes a plan. An error says for what there was no room, also in
// earlier plans: all that could be written is. Where a row or an except lacks
// room the endpoint is degraded: what it was allowed to keep open goes on,
// nothing new is allowed. A peer that lacks room is not known, so that nothing
// new is allowed with it. Others are not touched.
func (d *Datapath) Apply(p *policy.Plan) error {
	if !p.Empty() || len(d.peers.missing)+len(d.lost) > 0 {
		defer d.changed()
	}
	var errs []error
	d.profilesOf(p)
	d.grow(p)
	for _, id := range p.Gone {
		if err := d.Remove(id); err != nil {
			errs = append(errs, fmt.Errorf("remove endpoint %d: %w", id, err))
		}
	}
	d.write(p.Prepare)
	d.words(p.Words)
	d.write(p.Early)
	for _, a := range p.Exact {
		d.address(a)
	}
	for _, q := range p.Prefixes {
		d.prefix(q)
	}
	d.own(p.Own)
	if p.Grace {
		Grace()
	}
	d.write(p.Late)
	for _, ip := range p.DeleteExact {
		errs = append(errs, d.deleteAddress(ip))
	}
	for _, q := range p.DeletePrefixes {
		errs = append(errs, d.deletePrefix(q))
	}
	d.retry()
	return errors.Join(append(errs, d.full()...)...)
}

// Settle waits for a grace period and frees what plans have let go of.
func (d *Datapath) Settle() {
	Grace()
	d.flip = time.Time{}
	for _, c := range d.old {
		d.slab.release(c)
	}
	d.old = nil
	d.rested()
}

func (d *Datapath) profilesOf(p *policy.Plan) {
	bank := d.bank
	if p.Bank != nil {
		bank ^= 1
		if !d.flip.IsZero() {
			Grace() // a packet may still read the bank that is to be overwritten
		}
		d.ports2(bank, p.Bank)
	}
	for id, bitmap := range p.Profiles {
		copy(d.profiles[(bank*maxProfiles+uint32(id))*policy.BitmapSize:], bitmap[:])
	}
	if p.Bank != nil {
		atomic.StoreUint32((*uint32)(unsafe.Pointer(&d.state[0])), bank)
		d.bank, d.flip = bank, time.Now()
	}
}

func (d *Datapath) ports2(bank uint32, b *policy.Bank) {
	table := unsafe.Slice((*uint16)(unsafe.Pointer(&d.ports[bank*portBlocks*blockSize])), portBlocks*rowCells)
	for _, iv := range b.Intervals {
		part := table[int(iv.Proto)<<16+int(iv.First) : int(iv.Proto)<<16+int(iv.Last)+1]
		for i := range part {
			part[i] = iv.Class
		}
	}
}

// grow gives every endpoint rows that are large enough. A row moves by copy
// and one store; its verdicts do not change.
func (d *Datapath) grow(p *policy.Plan) {
	need := uint(0)
	if blocks := (p.Classes + rowCells - 1) / rowCells; blocks > 1 {
		need = uint(bits.Len32(blocks - 1))
	}
	d.shift = max(d.shift, need)
	for id, e := range d.eps {
		if e.row.ok && e.row.shift >= d.shift || e.degraded != nil {
			continue
		}
		c, ok := d.slab.alloc(d.shift)
		if !ok {
			d.degrade(id, e, fmt.Errorf("endpoint %d: no room for %d classes: nothing new is allowed", id, p.Classes))
			continue
		}
		for dir := range policy.Dir(2) {
			row := d.row(c, dir)
			n := 0
			if e.row.ok {
				n = copy(row, d.row(e.row, dir))
			}
			clear(row[n:])
		}
		d.old = append(d.old, e.row)
		e.row = c
		if e.word != 0 {
			d.publish(id, e)
		}
	}
}

func (d *Datapath) write(list []policy.RowWrite) {
	for _, w := range list {
		e := d.eps[w.Endpoint]
		if e == nil || e.degraded != nil {
			continue
		}
		row := d.row(e.row, w.Dir)
		if w.Blank {
			clear(row)
		}
		for _, c := range w.Cells {
			row[c.Class] = c.Profile
		}
	}
}

func (d *Datapath) words(list []policy.EndpointWord) {
	for _, w := range list {
		e := d.eps[w.Endpoint]
		if e == nil {
			continue
		}
		e.word = 0
		for bit, on := range map[uint64]bool{
			wordActive: w.Word.Active, wordIngress: w.Word.Isolated[policy.In], wordEgress: w.Word.Isolated[policy.Out], wordAudit: w.Word.Audit,
		} {
			if on {
				e.word |= bit
			}
		}
		d.publish(w.Endpoint, e)
	}
}

func (d *Datapath) degrade(id uint32, e *endpoint, why error) {
	e.degraded = why
	d.publish(id, e)
}

// Recover gives rows to degraded endpoints for which there is room by now. They
// stay degraded until a plan has written them as if they were new.
func (d *Datapath) Recover() (again []uint32) {
	for id, e := range d.eps {
		if e.degraded == nil || len(d.lost) > 0 {
			continue
		}
		c, ok := d.slab.alloc(d.shift)
		if !ok {
			continue
		}
		d.old = append(d.old, e.row)
		e.row, e.degraded = c, nil
		for dir := range policy.Dir(2) {
			clear(d.row(c, dir))
		}
		again = append(again, id)
	}
	return again
}

func (d *Datapath) full() (errs []error) {
	for _, e := range d.eps {
		if e.degraded != nil {
			errs = append(errs, e.degraded)
		}
	}
	if n := len(d.peers.missing); n > 0 {
		errs = append(errs, fmt.Errorf("no room for %d addresses of pods beside %d: nothing new is allowed with them", n, d.cfg.Peers))
	}
	if n := len(d.lost); n > 0 {
		errs = append(errs, fmt.Errorf("no room for %d address ranges beside %d", n, d.cfg.Peers))
	}
	return errs
}

// retry writes what had no room before.
func (d *Datapath) retry() {
	for _, a := range d.peers.missing {
		if d.address(a); len(d.peers.missing) > 0 && d.peers.missing[a.Addr] == a {
			break // still full
		}
	}
	for _, q := range d.lost {
		d.prefix(q)
	}
}

func prefixKey(p netip.Prefix) []byte {
	return append(binary.NativeEndian.AppendUint32(nil, uint32(p.Bits())), p.Addr().AsSlice()...)
}

// prefix writes a range. One that has no place falls to the wider range that it
// is in: endpoints that allow more there than here (an except) are degraded.
func (d *Datapath) prefix(q policy.Prefix) {
	if err := d.putPrefix(q); err == nil {
		delete(d.lost, q.Prefix)
		return
	}
	d.lost[q.Prefix] = q
	wider := d.around(q.Prefix)
	for id, e := range d.eps {
		if e.degraded == nil && d.differs(e, q.Class, wider) {
			d.degrade(id, e, fmt.Errorf("endpoint %d: no room for range %s: nothing new is allowed", id, q.Prefix))
		}
	}
	_ = d.dropPrefix(q.Prefix) // not with a class that it no longer has
}

// trie is the map of an address' family.
func (d *Datapath) trie(ip netip.Addr) *ciliumebpf.Map {
	if ip.Is6() {
		return d.objs.Cidr6
	}
	return d.objs.Cidr4
}

func (d *Datapath) putTrie(p netip.Prefix, class uint32) error {
	// The flag is only ever set: an empty trie is only slower.
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&d.state[4+4*family(p.Addr())])), 1)
	return d.trie(p.Addr()).Put(prefixKey(p), class)
}

func (d *Datapath) dropTrie(p netip.Prefix) error {
	if err := d.trie(p.Addr()).Delete(prefixKey(p)); err != nil && !errors.Is(err, ciliumebpf.ErrKeyNotExist) {
		return fmt.Errorf("remove %s: %w", p, err)
	}
	return nil
}

func family(ip netip.Addr) int {
	if ip.Is6() {
		return 1
	}
	return 0
}

// around is the class of the smallest range in the table that a range lies in.
func (d *Datapath) around(p netip.Prefix) uint32 {
	var class uint32
	if p.Bits() > 0 && d.trie(p.Addr()).Lookup(prefixKey(netip.PrefixFrom(p.Addr(), p.Bits()-1)), &class) == nil { // matches at most so many bits
		return class
	}
	return policy.World
}

// differs says whether an endpoint allows something with a class that it may
// not allow with another.
func (d *Datapath) differs(e *endpoint, narrow, wide uint32) bool {
	for dir := range policy.Dir(2) {
		if e.word&(wordIngress<<dir) == 0 || !e.row.ok {
			continue
		}
		row := d.row(e.row, dir)
		if int(max(narrow, wide)) >= len(row) || row[wide] != policy.ProfileDeny && row[wide] != row[narrow] {
			return true
		}
	}
	return false
}

func (d *Datapath) deletePrefix(q netip.Prefix) error {
	delete(d.lost, q)
	return d.dropPrefix(q)
}

func (d *Datapath) own(list []policy.OwnClass) {
	for _, o := range list {
		e := d.eps[o.Endpoint]
		if e == nil {
			continue
		}
		for i, offset := range []uint32{8, 12} {
			first := firstOf(e.ips, i == 1)
			if first == o.Addr {
				atomic.StoreUint32(d.field(o.Endpoint, offset), o.Class)
			}
		}
	}
}

func firstOf(ips []netip.Addr, six bool) netip.Addr {
	for _, ip := range ips {
		if ip.Is6() == six {
			return ip
		}
	}
	return netip.Addr{}
}

// Room is how much of a table is in use, in entries.
type Room struct{ Used, Limit int }

// Rows tells the blocks of the row table. It belongs to who calls Apply.
func (d *Datapath) Rows() Room {
	free := uint32(0)
	for _, g := range d.slab.gaps {
		free += g.blocks
	}
	return Room{int(d.cfg.RowBlocks - free), int(d.cfg.RowBlocks)}
}
