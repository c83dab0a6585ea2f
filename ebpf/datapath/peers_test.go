//go:build linux

package datapath

import (
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"testing"

	"github.com/nodeagent/nodeagent/ebpf/flows"
	"github.com/nodeagent/nodeagent/ebpf/frame"
	"github.com/nodeagent/nodeagent/ebpf/policy"
)

// TestPeers: whatever came and went, the program finds the class of each address
// and range, of those as well whose bucket is full.
func TestPeers(t *testing.T) {
	ifs := inNamespace(t, 1)
	const peers, classes = 256, 64
	d := open(t, Config{Conntrack: 1024, RowBlocks: 64, Peers: peers})
	if err := d.Insert(1, int(ifs[0]), first); err != nil {
		t.Fatal(err)
	}
	if err := d.Apply(bothWays(1, classes)); err != nil {
		t.Fatal(err)
	}
	addr := func(i int, six bool) netip.Addr {
		if six {
			return netip.AddrFrom16([16]byte{0xfd, 7, 14: byte(i >> 8), 15: byte(i)})
		}
		return netip.AddrFrom4([4]byte{10, 7, byte(i >> 8), byte(i)})
	}
	r := rand.New(rand.NewPCG(1, 2))
	exact, hosts := map[netip.Addr]uint32{}, map[netip.Addr]uint32{}
	most := 0
	for round := range 60 {
		p := &policy.Plan{Classes: classes}
		for range 60 {
			ip, class := addr(r.IntN(peers), r.IntN(2) == 0), 2+r.Uint32N(classes-2)
			switch r.IntN(5) {
			case 0:
				delete(exact, ip)
				p.DeleteExact = append(p.DeleteExact, ip)
			case 1:
				if r.IntN(2) == 0 && hosts[ip] != 0 {
					delete(hosts, ip)
					p.DeletePrefixes = append(p.DeletePrefixes, host(ip))
					break
				}
				hosts[ip] = class
				p.Prefixes = append(p.Prefixes, policy.Prefix{Prefix: host(ip), Class: class})
			default:
				exact[ip] = class
				p.Exact = append(p.Exact, policy.Address{Addr: ip, Class: class})
			}
			if err := d.Apply(p); err != nil {
				t.Fatal(err)
			}
			p = &policy.Plan{Classes: classes}
		}
		if round%3 == 0 {
			d.Settle()
		}
		most = max(most, len(d.peers.spilled))
		known := [2]int{}
		for i := range peers {
			for _, six := range []bool{false, true} {
				ip := addr(i, six)
				want, why := exact[ip], "an address"
				if want != 0 {
					known[family(ip)]++
				} else if want, why = hosts[ip], "a range"; want == 0 {
					want, why = policy.World, "unknown"
				}
				own := first[family(ip)]
				out, err := d.Run(flows.ToPod, Input{Packet: tcp(ip, own, 1, 80, frame.SYN).Bytes(), Ifindex: ifs[0], IngressIfindex: outside, Dry: true})
				if err != nil {
					t.Fatal(err)
				}
				if out.Class != want {
					t.Fatalf("round %d: %s, %s, has class %d, want %d", round, ip, why, out.Class, want)
				}
			}
		}
		if known != d.peers.known {
			t.Fatalf("round %d: %v addresses are counted, want %v", round, d.peers.known, known)
		}
	}
	if most == 0 {
		t.Error("no bucket was full: the test shows little")
	}
	t.Logf("at most %d addresses in the trie", most)
}

// packets is how many passed, of whatever hook and reason.
func packets(t *testing.T, d *Datapath) (n uint64) {
	t.Helper()
	list, err := d.Counters()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list {
		if !c.Reason.Drops() {
			n += c.Packets
		}
	}
	return n
}

// TestJudgedOnce: a flow's packets are judged once in a generation of the tables,
// then known by conntrack; a change has them judged again; those whose verdict
// depends on more than the flow are never known.
func TestJudgedOnce(t *testing.T) {
	ifs := inNamespace(t, 2)
	d := open(t, Config{Conntrack: 1024, RowBlocks: 64})
	r := &rig{t: t, d: d, ifs: ifs}
	node := netip.MustParseAddr("10.9.0.1")
	if err := d.Insert(1, int(ifs[0]), first); err != nil {
		t.Fatal(err)
	}
	allow := bothWays(1, 64, policy.Cell{Class: policy.World, Profile: policy.ProfileAllow}, policy.Cell{Class: 5, Profile: policy.ProfileAllow})
	allow.Exact = []policy.Address{{Addr: node, Class: 5, Node: true}}
	if err := d.Apply(allow); err != nil {
		t.Fatal(err)
	}
	// cut denies everything behind the back of the generation.
	cut := func(profile uint16) {
		for dir := range policy.Dir(2) {
			row := d.row(d.eps[1].row, dir)
			row[policy.World], row[5] = profile, profile
		}
	}
	type packet struct {
		hook    flows.Hook
		ingress uint32
		mark    uint32
		p       frame.Packet
	}
	for i, far := range []netip.Addr{world, netip.MustParseAddr("2001:db8::9")} {
		own := first[i]
		out := packet{flows.FromPod, ifs[0], 0, tcp(own, far, 40000, 443, frame.ACK)}
		in := packet{flows.ToPod, outside, 0, tcp(far, own, 443, 40000, frame.ACK)}
		asked := packet{flows.FromPod, ifs[0], 0, frame.Packet{Src: own, Dst: far, Protocol: 17, SrcPort: 40000, DstPort: 53}}
		answer := packet{flows.ToPod, outside, 0, frame.Packet{Src: far, Dst: own, Protocol: 17, SrcPort: 53, DstPort: 40000}}
		send := func(what string, p packet, want bool) {
			t.Helper()
			r.send(what, p.hook, 0, p.ingress, p.mark, p.p, want)
		}
		opened := out
		opened.p.TCP = frame.SYN
		both := []packet{out, in, asked, answer}
		for _, p := range append([]packet{opened}, both...) {
			send("judged", p, true)
		}
		cut(policy.ProfileDeny)
		before := packets(t, d)
		for range 2 { // by conntrack, then by what is known of it
			for _, p := range both {
				send("known", p, true)
			}
		}
		if n := packets(t, d) - before; n != 8 {
			t.Errorf("%d packets of known flows were counted, want 8", n)
		}
		send("an opening", opened, false)
		marked, hairpin := in, in
		marked.mark, hairpin.ingress = d.cfg.Mark, ifs[0]
		send("its egress is to be judged here", marked, false)
		send("to itself", hairpin, true)
		fragment := out
		fragment.p.More = true
		if i == 0 {
			send("a fragment", fragment, false)
		}
		d.changed()
		for _, p := range both {
			send("judged again", p, false)
		}
		cut(policy.ProfileAllow)
		for _, p := range both {
			send("allowed again", p, true)
			send("known again", p, true)
		}
		if err := d.Insert(2, int(ifs[1]), nil); err != nil {
			t.Fatal(err)
		}
		cut(policy.ProfileDeny)
		for _, p := range both {
			send("after an endpoint came", p, false)
		}
		cut(policy.ProfileAllow)
		for _, p := range both {
			send("allowed again", p, true)
		}
		if err := d.Remove(2); err != nil {
			t.Fatal(err)
		}
		cut(policy.ProfileDeny)
		for _, p := range both {
			send("after an endpoint went", p, false)
		}
		cut(policy.ProfileAllow)
	}
	behind := func(want bool) {
		t.Helper()
		r.send("behind the node's address", flows.ToPod, 0, outside, 0, tcp(node, first[0], 50000, 80, frame.ACK), want)
	}
	behind(true)
	cut(policy.ProfileDeny)
	behind(false)
	if g := atomic.LoadUint32(d.nearby(int(ifs[1]))); g != 0 {
		t.Errorf("the removed interface is endpoint %d", g-1)
	}
}
