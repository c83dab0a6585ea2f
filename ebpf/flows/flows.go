// Package flows holds what the datapath tells of packets: hooks, reasons and
// events, as bpf/policy.bpf.c numbers them, and the reading of event records.
//
// Plain data; no goroutines, no locks.
package flows

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"
)

// Hook is where a packet was judged.
type Hook uint8

const (
	FromPod   Hook = iota // the pod sent it
	ToPod                 // the pod is to get it
	UplinkIn              // it came in by a NIC
	UplinkOut             // it is to leave by a NIC
	XDP                   // it came in by a NIC, before the kernel's stack
)

func (h Hook) String() string {
	switch h {
	case FromPod:
		return "from-pod"
	case ToPod:
		return "to-pod"
	case UplinkIn:
		return "uplink-in"
	case UplinkOut:
		return "uplink-out"
	case XDP:
		return "xdp"
	}
	return fmt.Sprintf("hook-%d", uint8(h))
}

// Hooks are all of them.
func Hooks() []Hook { return []Hook{FromPod, ToPod, UplinkIn, UplinkOut, XDP} }

// Reason is why a packet passed or did not. The numbers are stable.
type Reason uint8

const (
	Policy    Reason = iota // a policy allows it
	Open                    // the pod is not isolated in this direction
	Reply                   // it answers a flow that is allowed
	Inferred                // TCP that answers a flow that would be allowed; conntrack does not know it
	Related                 // an ICMP error about a known flow
	Host                    // this node sent it, or it answers this node
	Hairpin                 // the pod reached itself by way of a service
	Neighbour               // ARP, neighbour discovery, multicast listeners
	Deferred                // to be judged after translation
	Pass                    // not ours to judge
)

const (
	NotReady    Reason = 16 + iota // the pod's rows are not live yet
	Spoof                          // not an address of the pod
	DeniedIn                       // no ingress rule matches
	DeniedOut                      // no egress rule matches
	Fragment                       // the first fragment is not known
	Malformed                      // headers cannot be read
	NotIP                          // neither IP nor ARP
	DeniedAfter                    // no egress rule matches the destination after translation
	Early                          // dropped at the NIC: no ingress rule matches
	Degraded                       // the pod's tables could not be written
	Revoked                        // of a flow that is no longer allowed
)

var names = map[Reason]string{
	Policy: "policy", Open: "open", Reply: "reply", Inferred: "inferred", Related: "related", Host: "host", Hairpin: "hairpin",
	Neighbour: "neighbour", Deferred: "deferred", Pass: "pass",
	NotReady: "not-ready", Spoof: "spoof", DeniedIn: "ingress-denied", DeniedOut: "egress-denied", Fragment: "fragment",
	Malformed: "malformed", NotIP: "not-ip", DeniedAfter: "egress-denied-after-translation", Early: "ingress-denied-early",
	Degraded: "degraded", Revoked: "revoked",
}

func (r Reason) String() string {
	if n := names[r]; n != "" {
		return n
	}
	return fmt.Sprintf("reason-%d", uint8(r))
}

// Drops says whether packets of this reason are dropped (unless in audit mode).
func (r Reason) Drops() bool { return r >= NotReady }

// Event is one packet: dropped, or the first of its flow.
type Event struct {
	Time             time.Duration // since boot, the monotonic clock
	Endpoint         uint32
	Ifindex, Ingress uint32
	Class            uint32 // of the peer
	Profile          uint16
	Src, Dst         netip.Addr
	SrcPort, DstPort uint16
	Length           uint16
	Hook             Hook
	Reason           Reason
	Protocol, TCP    uint8 // TCP: its flags
	Audit, Dropped   bool
}

// Size is that of an event record in bytes.
const Size = 72

// Parse reads a record.
func Parse(b []byte) (Event, error) {
	if len(b) < Size {
		return Event{}, fmt.Errorf("event record of %d bytes: want %d", len(b), Size)
	}
	n := binary.NativeEndian
	e := Event{
		Time: time.Duration(n.Uint64(b)), Endpoint: n.Uint32(b[8:]), Ifindex: n.Uint32(b[12:]), Ingress: n.Uint32(b[16:]), Class: n.Uint32(b[20:]),
		SrcPort: n.Uint16(b[56:]), DstPort: n.Uint16(b[58:]), Profile: n.Uint16(b[60:]), Length: n.Uint16(b[62:]),
		Hook: Hook(b[64]), Reason: Reason(b[65]), Protocol: b[66], TCP: b[68], Audit: b[67]&2 != 0, Dropped: b[67]&4 != 0,
	}
	if b[67]&1 != 0 {
		e.Src, e.Dst = netip.AddrFrom16([16]byte(b[24:40])), netip.AddrFrom16([16]byte(b[40:56]))
	} else {
		e.Src, e.Dst = netip.AddrFrom4([4]byte(b[24:28])), netip.AddrFrom4([4]byte(b[40:44]))
	}
	return e, nil
}
