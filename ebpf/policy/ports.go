package policy

import (
	"encoding/binary"
	"slices"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// Profiles with fixed numbers.
const (
	ProfileDeny  uint16 = 0 // nothing
	ProfileAllow uint16 = 1 // every protocol and port
	ProfileDefer uint16 = 2 // egress to an address that will be translated: judged behind the translation
	firstProfile uint16 = 3
)

// protocols that have ports, in the order of the port table.
var protocols = [3]uint8{objects.TCP, objects.UDP, objects.SCTP}

func protocolIndex(proto uint8) int { return slices.Index(protocols[:], proto) }

// Range is inclusive. Proto is an index: 0 TCP, 1 UDP, 2 SCTP.
type Range struct {
	Proto       uint8
	First, Last uint16
}

// PortSet is a canonical set of protocols and ports.
type PortSet struct {
	Any    bool    // every protocol, also those without ports
	Ranges []Range // sorted, disjoint, not touching; empty if Any
}

// normal sorts and merges ranges.
func normal(ranges []Range) []Range {
	slices.SortFunc(ranges, func(a, b Range) int {
		if a.Proto != b.Proto {
			return int(a.Proto) - int(b.Proto)
		}
		return int(a.First) - int(b.First)
	})
	out := ranges[:0]
	for _, r := range ranges {
		if n := len(out); n > 0 && out[n-1].Proto == r.Proto && int(r.First) <= int(out[n-1].Last)+1 {
			out[n-1].Last = max(out[n-1].Last, r.Last)
			continue
		}
		out = append(out, r)
	}
	return out
}

func (s PortSet) key() string {
	if s.Any {
		return "*"
	}
	b := make([]byte, 0, 5*len(s.Ranges))
	for _, r := range s.Ranges {
		b = append(b, r.Proto)
		b = binary.BigEndian.AppendUint16(b, r.First)
		b = binary.BigEndian.AppendUint16(b, r.Last)
	}
	return string(b)
}

// Bank is a whole port table: a port class for each port of each protocol.
// Class 0 is no port's.
type Bank struct {
	Intervals []Interval // in order, covering 0..65535 of each protocol
	Classes   int        // classes in use, the zeroth included
}

// Interval gives a class to a range.
type Interval struct {
	Range
	Class uint16
}

// newBank makes the coarsest port classes that tell all sets apart.
func newBank(sets []PortSet) *Bank {
	b := &Bank{Classes: 1}
	ids := map[string]uint16{}
	for proto := range uint8(len(protocols)) {
		// changes[port] lists the sets that begin or stop containing ports there.
		changes := map[int][]int{0: nil}
		for i, s := range sets {
			for _, r := range s.Ranges {
				if r.Proto == proto {
					changes[int(r.First)] = append(changes[int(r.First)], i)
					changes[int(r.Last)+1] = append(changes[int(r.Last)+1], i)
				}
			}
		}
		points := make([]int, 0, len(changes))
		for p := range changes {
			if p <= 0xffff {
				points = append(points, p)
			}
		}
		slices.Sort(points)
		signature := make([]byte, (len(sets)+7)/8)
		for i, p := range points {
			for _, s := range changes[p] {
				signature[s/8] ^= 1 << (s % 8)
			}
			last := 0xffff
			if i+1 < len(points) {
				last = points[i+1] - 1
			}
			// Protocols may share a class: the sets cannot tell them apart.
			id, ok := ids[string(signature)]
			if !ok {
				id = uint16(b.Classes)
				ids[string(signature)] = id
				b.Classes++
			}
			b.Intervals = append(b.Intervals, Interval{Range{proto, uint16(p), uint16(last)}, id})
		}
	}
	return b
}

// bits is the bitmap of s over the bank's classes; false if a class is partly
// inside s, so that the bank cannot express it.
func (b *Bank) bits(s PortSet) ([BitmapSize]byte, bool) {
	var out [BitmapSize]byte
	var inside, outside [BitmapSize]byte
	k := 0
	for _, iv := range b.Intervals {
		for k < len(s.Ranges) && (s.Ranges[k].Proto < iv.Proto || s.Ranges[k].Proto == iv.Proto && s.Ranges[k].Last < iv.First) {
			k++
		}
		byteAt, bit := iv.Class/8, byte(1)<<(iv.Class%8)
		switch {
		case k == len(s.Ranges) || s.Ranges[k].Proto != iv.Proto || s.Ranges[k].First > iv.Last:
			outside[byteAt] |= bit
		case s.Ranges[k].First <= iv.First && iv.Last <= s.Ranges[k].Last:
			inside[byteAt] |= bit
		default:
			return out, false
		}
	}
	for i := range inside {
		if inside[i]&outside[i] != 0 {
			return out, false
		}
	}
	return inside, true
}

// BitmapSize is the size of a profile in bytes; MaxPortClasses what it holds.
const (
	BitmapSize     = 128
	MaxPortClasses = BitmapSize * 8
)
