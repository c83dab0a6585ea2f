// Package frame builds Ethernet frames for the programs to judge: the packets of
// `nodeagent policy why`, of the self-check and of tests. Pure; no goroutines, no
// locks.
package frame

import (
	"encoding/binary"
	"net/netip"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// Packet is an Ethernet frame to be built. Checksums are zero: programs do not
// look at them.
type Packet struct {
	Src, Dst         netip.Addr
	Protocol         uint8
	SrcPort, DstPort uint16
	TCP              uint8  // flags
	Options          int    // IPv4: bytes of options (times 4); IPv6: extension headers
	FragmentOffset   uint16 // in units of 8 bytes
	More             bool
	ID               uint16
	ICMPType         uint8
	Payload          []byte
}

// TCP flags.
const (
	FIN = 1
	SYN = 2
	RST = 4
	ACK = 16
)

// Bytes builds the frame.
func (p Packet) Bytes() []byte {
	var l4 []byte
	switch {
	case p.FragmentOffset > 0:
	case p.Protocol == objects.TCP:
		l4 = make([]byte, 20)
		l4[12], l4[13] = 5<<4, p.TCP
	case p.Protocol == objects.UDP:
		l4 = make([]byte, 8)
	case p.Protocol == objects.SCTP:
		l4 = make([]byte, 12)
	case p.Protocol == 1 || p.Protocol == 58:
		l4 = make([]byte, 8)
		l4[0] = p.ICMPType
		binary.BigEndian.PutUint16(l4[4:], p.SrcPort)
	default:
		l4 = make([]byte, 8)
	}
	if len(l4) > 0 && (p.Protocol == objects.TCP || p.Protocol == objects.UDP || p.Protocol == objects.SCTP) {
		binary.BigEndian.PutUint16(l4, p.SrcPort)
		binary.BigEndian.PutUint16(l4[2:], p.DstPort)
	}
	body := append(l4, p.Payload...)
	frame := []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2}
	if p.Src.Is4() {
		return append(append(frame, 8, 0), p.v4(body)...)
	}
	return append(append(frame, 0x86, 0xdd), p.v6(body)...)
}

func (p Packet) v4(body []byte) []byte {
	h := make([]byte, 20+4*p.Options)
	for i := 20; i < len(h); i++ {
		h[i] = 1 // no operation
	}
	h[0] = byte(4<<4 | len(h)/4)
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(body)))
	binary.BigEndian.PutUint16(h[4:], p.ID)
	frag := p.FragmentOffset
	if p.More {
		frag |= 0x2000
	}
	binary.BigEndian.PutUint16(h[6:], frag)
	h[8], h[9] = 64, p.Protocol
	copy(h[12:], p.Src.AsSlice())
	copy(h[16:], p.Dst.AsSlice())
	return append(h, body...)
}

func (p Packet) v6(body []byte) []byte {
	kinds := []byte{0, 60, 43, 51, 60}
	next := p.Protocol
	if p.FragmentOffset > 0 || p.More {
		f := make([]byte, 8)
		f[0] = next
		binary.BigEndian.PutUint16(f[2:], p.FragmentOffset<<3)
		if p.More {
			f[3] |= 1
		}
		binary.BigEndian.PutUint16(f[6:], p.ID)
		body, next = append(f, body...), 44
	}
	for i := p.Options - 1; i >= 0; i-- {
		kind := kinds[i%len(kinds)]
		e := make([]byte, 8*(1+i%2))
		e[0], e[1] = next, byte(i%2)
		if kind == 51 {
			e = make([]byte, 16)
			e[0], e[1] = next, 2
		}
		body, next = append(e, body...), kind
	}
	h := make([]byte, 40)
	h[0], h[6], h[7] = 6<<4, next, 64
	binary.BigEndian.PutUint16(h[4:], uint16(len(body)))
	copy(h[8:], p.Src.AsSlice())
	copy(h[24:], p.Dst.AsSlice())
	return append(h, body...)
}
