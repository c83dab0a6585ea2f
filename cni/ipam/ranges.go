package ipam

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"

	"github.com/containerd/errdefs"
)

// Range is a prefix whose addresses are given out. The first address is the network's, the
// second is the host's, and the last of an IPv4 range is the broadcast address: none is given out.
type Range struct {
	prefix      netip.Prefix
	first, last uint64 // offsets given out, both inclusive
}

// maxOffset bounds the part of a range that is used: 2^62 addresses.
const maxOffset = uint64(1)<<62 - 1

// NewRange checks p: masked, unicast and with room for at least one pod.
func NewRange(p netip.Prefix) (Range, error) {
	switch a := p.Addr(); {
	case !p.IsValid():
		return Range{}, fmt.Errorf("pod range %q: not a prefix: %w", p.String(), errdefs.ErrInvalidArgument)
	case a.Is4In6():
		return Range{}, fmt.Errorf("pod range %s: write it as an IPv4 prefix: %w", p, errdefs.ErrInvalidArgument)
	case p.Masked() != p:
		return Range{}, fmt.Errorf("pod range %s: has host bits, meant is %s: %w", p, p.Masked(), errdefs.ErrInvalidArgument)
	case a.IsMulticast(), a.IsLoopback(), a.IsLinkLocalUnicast(), a.Is4() && a.As4()[0] >= 224, p.Bits() == 0:
		return Range{}, fmt.Errorf("pod range %s: not a unicast range: %w", p, errdefs.ErrInvalidArgument)
	}
	r := Range{prefix: p, first: 2, last: maxOffset}
	if bits := p.Addr().BitLen() - p.Bits(); bits < 62 {
		r.last = uint64(1)<<bits - 1
	}
	if p.Addr().Is4() {
		if p.Bits() > 30 {
			r.last = 0
		} else {
			r.last--
		}
	}
	if r.last < r.first {
		return Range{}, fmt.Errorf("pod range %s: no room for a pod beside the network's and the host's address: %w", p, errdefs.ErrInvalidArgument)
	}
	return r, nil
}

// NewRanges checks all prefixes and that no two overlap, and reports all faults at once.
func NewRanges(prefixes []netip.Prefix) ([]Range, error) {
	var ranges []Range
	var errs []error
	for i, p := range prefixes {
		r, err := NewRange(p)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, q := range prefixes[:i] {
			if p.Overlaps(q) {
				errs = append(errs, fmt.Errorf("pod ranges %s and %s overlap: %w", q, p, errdefs.ErrInvalidArgument))
			}
		}
		ranges = append(ranges, r)
	}
	return ranges, errors.Join(errs...)
}

// Prefix is the range as it was given.
func (r Range) Prefix() netip.Prefix { return r.prefix }

// Host is the address of the range that the host itself uses.
func (r Range) Host() netip.Addr { return r.at(1) }

// Size is how many pods fit.
func (r Range) Size() uint64 { return r.last - r.first + 1 }

// Gives says whether a may be given to a pod.
func (r Range) Gives(a netip.Addr) bool {
	if !r.prefix.Contains(a) {
		return false
	}
	off, ok := r.offset(a)
	return ok && off >= r.first && off <= r.last
}

// at is the address at offset off.
func (r Range) at(off uint64) netip.Addr {
	if r.prefix.Addr().Is4() {
		b := r.prefix.Addr().As4()
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(off))
		return netip.AddrFrom4(b)
	}
	b := r.prefix.Addr().As16()
	low := binary.BigEndian.Uint64(b[8:])
	sum := low + off
	if sum < low {
		binary.BigEndian.PutUint64(b[:], binary.BigEndian.Uint64(b[:])+1)
	}
	binary.BigEndian.PutUint64(b[8:], sum)
	return netip.AddrFrom16(b)
}

// offset is the inverse of at for addresses of the prefix; false when it is out of what is used.
func (r Range) offset(a netip.Addr) (uint64, bool) {
	if a.Is4() {
		x, y := a.As4(), r.prefix.Addr().As4()
		return uint64(binary.BigEndian.Uint32(x[:]) - binary.BigEndian.Uint32(y[:])), true
	}
	x, y := a.As16(), r.prefix.Addr().As16()
	hi := binary.BigEndian.Uint64(x[:]) - binary.BigEndian.Uint64(y[:])
	lo := binary.BigEndian.Uint64(x[8:]) - binary.BigEndian.Uint64(y[8:])
	if hi != 0 || lo > math.MaxInt64 {
		return 0, false
	}
	return lo, true
}
