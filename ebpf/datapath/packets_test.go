//go:build linux

package datapath

import (
	"net/netip"
	"testing"

	"github.com/nodeagent/nodeagent/ebpf/flows"
	"github.com/nodeagent/nodeagent/ebpf/frame"
	"github.com/nodeagent/nodeagent/ebpf/lab"
	"github.com/nodeagent/nodeagent/ebpf/policy"
)

// rig has two pods, isolated both ways: the first may open TCP port 80 to the
// second and 443 to the world, and takes nothing; the second takes TCP and UDP
// port 80 from the first. 10.96.0.0/16 is of services.
type rig struct {
	t   *testing.T
	d   *Datapath
	ifs []uint32
}

const (
	rigService = 50
	rigFirst   = 51
	rigSecond  = 52
	rigNode    = 53
)

var (
	first, second = lab.PodIPs(0), lab.PodIPs(1)
	world         = netip.MustParseAddr("203.0.113.9")
	service       = netip.MustParseAddr("10.96.0.1")
	nodeIP        = netip.MustParseAddr("10.9.0.1")
)

func newRig(t *testing.T) *rig {
	r := &rig{t: t, ifs: inNamespace(t, 2)}
	r.d = open(t, Config{Conntrack: 1024, RowBlocks: 64})
	for i, ips := range [][]netip.Addr{first, second} {
		if err := r.d.Insert(uint32(i+1), int(r.ifs[i]), ips); err != nil {
			t.Fatal(err)
		}
	}
	bank := &policy.Bank{Classes: 4, Intervals: []policy.Interval{
		{Range: policy.Range{Proto: 0, First: 0, Last: 65535}, Class: 1}, {Range: policy.Range{Proto: 1, First: 0, Last: 65535}, Class: 1},
		{Range: policy.Range{Proto: 2, First: 0, Last: 65535}, Class: 1},
		{Range: policy.Range{Proto: 0, First: 80, Last: 80}, Class: 2}, {Range: policy.Range{Proto: 1, First: 80, Last: 80}, Class: 2},
		{Range: policy.Range{Proto: 0, First: 443, Last: 443}, Class: 3},
	}}
	plan := &policy.Plan{Classes: 64, Bank: bank,
		Profiles: map[uint16][policy.BitmapSize]byte{3: {0: 1 << 2}, 4: {0: 1 << 3}},
		Prepare: []policy.RowWrite{
			{Endpoint: 1, Dir: policy.Out, Blank: true, Cells: []policy.Cell{{Class: policy.World, Profile: 4}, {Class: rigSecond, Profile: 3}, {Class: rigService, Profile: policy.ProfileDefer}, {Class: rigNode, Profile: policy.ProfileDefer}}},
			{Endpoint: 1, Dir: policy.In, Blank: true, Cells: []policy.Cell{{Class: policy.World, Profile: 0}}},
			{Endpoint: 2, Dir: policy.In, Blank: true, Cells: []policy.Cell{{Class: rigFirst, Profile: 3}}},
			{Endpoint: 2, Dir: policy.Out, Blank: true, Cells: []policy.Cell{{Class: rigNode, Profile: policy.ProfileDefer}}},
		},
		Prefixes: []policy.Prefix{{Prefix: netip.MustParsePrefix("10.96.0.0/16"), Class: rigService}},
	}
	for i, ips := range [][]netip.Addr{first, second} {
		plan.Words = append(plan.Words, policy.EndpointWord{Endpoint: uint32(i + 1), Word: policy.Word{Active: true, Isolated: [2]bool{true, true}}})
		for _, ip := range ips {
			plan.Exact = append(plan.Exact, policy.Address{Addr: ip, Class: uint32(rigFirst + i)})
			plan.Own = append(plan.Own, policy.OwnClass{Endpoint: uint32(i + 1), Addr: ip, Class: uint32(rigFirst + i)})
		}
	}
	plan.Exact = append(plan.Exact, policy.Address{Addr: nodeIP, Class: rigNode, Node: true})
	if err := r.d.Apply(plan); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) send(what string, h flows.Hook, pod int, ingress uint32, mark uint32, p frame.Packet, want bool) Output {
	r.t.Helper()
	return r.bytes(what, h, pod, ingress, mark, p.Bytes(), want)
}

func (r *rig) bytes(what string, h flows.Hook, pod int, ingress uint32, mark uint32, packet []byte, want bool) Output {
	r.t.Helper()
	in := Input{Packet: packet, IngressIfindex: ingress, Mark: mark, Ifindex: 1}
	if pod >= 0 {
		in.Ifindex = r.ifs[pod]
	}
	out, err := r.d.Run(h, in)
	if err != nil {
		r.t.Fatal(err)
	}
	if out.Pass != want {
		in.Dry = true
		again, _ := r.d.Run(h, in)
		r.t.Errorf("%s: passes %v (%s)", what, out.Pass, again.Reason)
	}
	return out
}

func tcp(src, dst netip.Addr, sport, dport uint16, flags uint8) frame.Packet {
	return frame.Packet{Src: src, Dst: dst, Protocol: 6, SrcPort: sport, DstPort: dport, TCP: flags}
}

const outside = 4242

func TestServices(t *testing.T) {
	r := newRig(t)
	mark := uint32(1 << 20)
	a, b := first[0], second[0]
	out := r.send("to a service", flows.FromPod, 0, r.ifs[0], 0, tcp(a, service, 40000, 80, frame.SYN), true)
	if out.Mark&mark == 0 {
		t.Error("a flow to a service is not marked")
	}
	out = r.send("translated to the second pod", flows.ToPod, 1, r.ifs[0], mark, tcp(a, b, 40000, 80, frame.SYN), true)
	if out.Mark&mark != 0 {
		t.Error("the mark stays")
	}
	r.send("translated to a port that ingress allows and egress does not", flows.ToPod, 1, r.ifs[0], mark, frame.Packet{Src: a, Dst: b, Protocol: 17, SrcPort: 4, DstPort: 443}, false)
	r.send("answer of the second pod", flows.FromPod, 1, r.ifs[1], 0, tcp(b, a, 80, 40000, frame.SYN|frame.ACK), true)
	r.send("answer by way of the service", flows.ToPod, 0, r.ifs[1], 0, tcp(service, a, 80, 40000, frame.SYN|frame.ACK), true)
	r.send("an opening from a service's address", flows.ToPod, 0, r.ifs[1], 0, tcp(service, a, 80, 40001, frame.SYN), false)
	r.send("UDP from a service that was not asked", flows.ToPod, 0, r.ifs[1], 0, frame.Packet{Src: service, Dst: a, Protocol: 17, SrcPort: 80, DstPort: 40001}, false)
	r.send("translated to the world, allowed", flows.UplinkOut, -1, r.ifs[0], mark, tcp(a, world, 40000, 443, frame.SYN), true)
	r.send("translated to the world, masqueraded, denied", flows.UplinkOut, -1, r.ifs[0], mark, tcp(nodeIP, world, 40000, 80, frame.SYN), false)
	r.send("of others", flows.UplinkOut, -1, r.ifs[0], 0, tcp(nodeIP, world, 40000, 80, frame.SYN), true)
	r.send("masqueraded on the way to the second pod", flows.ToPod, 1, r.ifs[0], mark, tcp(nodeIP, b, 40005, 80, frame.SYN), true)
	r.send("answer to the masqueraded", flows.FromPod, 1, r.ifs[1], 0, tcp(b, nodeIP, 80, 40005, frame.SYN|frame.ACK), true)
	r.send("the node's address from outside is not the node", flows.ToPod, 1, outside, 0, tcp(nodeIP, b, 40006, 80, frame.SYN), false)
	r.send("the node itself", flows.ToPod, 1, 0, 0, tcp(nodeIP, b, 40007, 9, frame.SYN), true)
	r.send("answer to the node", flows.FromPod, 1, r.ifs[1], 0, tcp(b, nodeIP, 9, 40007, frame.SYN|frame.ACK), true)
	r.send("to itself by way of a service", flows.ToPod, 0, r.ifs[0], 0, tcp(nodeIP, a, 40008, 9, frame.SYN), true)
}

func TestSpoofing(t *testing.T) {
	r := newRig(t)
	r.send("another's address", flows.FromPod, 0, r.ifs[0], 0, tcp(second[0], world, 1, 443, frame.SYN), false)
	r.send("another's IPv6 address", flows.FromPod, 0, r.ifs[0], 0, tcp(second[1], netip.MustParseAddr("2001:db8::1"), 1, 443, frame.SYN), false)
	r.send("its own", flows.FromPod, 0, r.ifs[0], 0, tcp(first[0], world, 1, 443, frame.SYN), true)
	r.send("link-local to the world", flows.FromPod, 0, r.ifs[0], 0, tcp(netip.MustParseAddr("fe80::5"), netip.MustParseAddr("2001:db8::1"), 1, 443, frame.SYN), false)
	nd := frame.Packet{Src: netip.MustParseAddr("fe80::5"), Dst: netip.MustParseAddr("ff02::1:ff00:1"), Protocol: 58, ICMPType: 135}
	r.send("neighbour solicitation", flows.FromPod, 0, r.ifs[0], 0, nd, true)
	arp := append([]byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 6}, make([]byte, 28)...)
	r.bytes("ARP", flows.FromPod, 0, r.ifs[0], 0, arp, true)
	arp[13] = 0x99
	r.bytes("neither IP nor ARP", flows.FromPod, 0, r.ifs[0], 0, arp, false)
	r.bytes("too short", flows.FromPod, 0, r.ifs[0], 0, tcp(first[0], world, 1, 443, frame.SYN).Bytes()[:40], false)
}

func TestFragments(t *testing.T) {
	r := newRig(t)
	for i := range 2 {
		a, b := first[i], second[i]
		p := frame.Packet{Src: a, Dst: b, Protocol: 17, SrcPort: 5, DstPort: 80, ID: 7, More: true, Payload: make([]byte, 64)}
		later := p
		later.FragmentOffset, later.More = 9, false
		r.send("later without the first", flows.ToPod, 1, r.ifs[0], 0, later, false)
		r.send("the first", flows.ToPod, 1, r.ifs[0], 0, p, true)
		r.send("later", flows.ToPod, 1, r.ifs[0], 0, later, true)
		p.DstPort, p.ID, later.ID = 81, 8, 8
		r.send("the first of what is denied", flows.ToPod, 1, r.ifs[0], 0, p, false)
		r.send("later of what is denied", flows.ToPod, 1, r.ifs[0], 0, later, false)
		over := tcp(a, b, 5, 80, 0)
		over.FragmentOffset, over.Payload = 1, make([]byte, 16)
		r.send("a fragment over the flags", flows.ToPod, 1, r.ifs[0], 0, over, false)
	}
}

// TestErrors: an ICMP error about a known flow passes, about another it does not.
func TestErrors(t *testing.T) {
	r := newRig(t)
	a := first[0]
	about := func(inner frame.Packet) frame.Packet {
		return frame.Packet{Src: netip.MustParseAddr("198.51.100.1"), Dst: a, Protocol: 1, ICMPType: 3, Payload: inner.Bytes()[14:42]}
	}
	flow := tcp(a, world, 40000, 443, frame.SYN)
	r.send("about nothing", flows.ToPod, 0, outside, 0, about(frame.Packet{Src: a, Dst: world, Protocol: 17, SrcPort: 9, DstPort: 9}), false)
	r.send("the flow", flows.FromPod, 0, r.ifs[0], 0, flow, true)
	r.send("about the flow", flows.ToPod, 0, outside, 0, about(flow), true)
	other := flow
	other.DstPort = 444
	r.send("about another", flows.ToPod, 0, outside, 0, about(other), false)
	r.send("echo", flows.ToPod, 0, outside, 0, frame.Packet{Src: world, Dst: a, Protocol: 1, ICMPType: 8}, false)
	six, far := first[1], netip.MustParseAddr("2001:db8::9")
	tooBig := func(port uint16) frame.Packet {
		inner := tcp(six, far, 40000, port, 0)
		return frame.Packet{Src: netip.MustParseAddr("2001:db8::fe"), Dst: six, Protocol: 58, ICMPType: 2, Payload: inner.Bytes()[14:]}
	}
	r.send("the flow, IPv6", flows.FromPod, 0, r.ifs[0], 0, tcp(six, far, 40000, 443, frame.SYN), true)
	r.send("packet too big", flows.ToPod, 0, outside, 0, tooBig(443), true)
	r.send("packet too big, of another", flows.ToPod, 0, outside, 0, tooBig(444), false)
}

// TestNotReady: until its word is active an endpoint's interface passes nothing
// but neighbour discovery, what the node sends and the answers to that.
func TestNotReady(t *testing.T) {
	ifs := inNamespace(t, 1)
	d := open(t, Config{Conntrack: 1024, RowBlocks: 64})
	r := &rig{t: t, d: d, ifs: ifs}
	a := first[0]
	r.send("not inserted, out", flows.FromPod, 0, ifs[0], 0, tcp(a, world, 1, 443, frame.SYN), false)
	r.send("not inserted, in", flows.ToPod, 0, outside, 0, tcp(world, a, 1, 443, frame.SYN), false)
	if err := d.Insert(1, int(ifs[0]), first); err != nil {
		t.Fatal(err)
	}
	r.send("out", flows.FromPod, 0, ifs[0], 0, tcp(a, world, 1, 443, frame.SYN), false)
	r.send("in", flows.ToPod, 0, outside, 0, tcp(world, a, 1, 443, frame.SYN), false)
	r.send("answer from the world", flows.ToPod, 0, outside, 0, tcp(world, a, 443, 1, frame.ACK), false)
	r.send("from the node", flows.ToPod, 0, 0, 0, tcp(nodeIP, a, 50000, 80, frame.SYN), true)
	r.send("answer to the node", flows.FromPod, 0, ifs[0], 0, tcp(a, nodeIP, 80, 50000, frame.SYN|frame.ACK), true)
	if err := d.Apply(&policy.Plan{Words: []policy.EndpointWord{{Endpoint: 1, Word: policy.Word{Active: true}}}}); err != nil {
		t.Fatal(err)
	}
	r.send("active", flows.FromPod, 0, ifs[0], 0, tcp(a, world, 1, 443, frame.SYN), true)
	if err := d.Remove(1); err != nil {
		t.Fatal(err)
	}
	r.send("removed", flows.FromPod, 0, ifs[0], 0, tcp(a, world, 2, 443, frame.SYN), false)
}
