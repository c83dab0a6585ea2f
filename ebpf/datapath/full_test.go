//go:build linux

package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ciliumebpf "github.com/cilium/ebpf"

	"github.com/nodeagent/nodeagent/ebpf/flows"
	"github.com/nodeagent/nodeagent/ebpf/frame"
	"github.com/nodeagent/nodeagent/ebpf/lab"
	"github.com/nodeagent/nodeagent/ebpf/policy"
)

// bothWays lets an endpoint, isolated both ways, open and take what classes say.
func bothWays(id uint32, classes uint32, cells ...policy.Cell) *policy.Plan {
	p := &policy.Plan{Classes: classes, Words: []policy.EndpointWord{{Endpoint: id, Word: policy.Word{Active: true, Isolated: [2]bool{true, true}}}}}
	for dir := range policy.Dir(2) {
		p.Prepare = append(p.Prepare, policy.RowWrite{Endpoint: id, Dir: dir, Blank: true, Cells: cells})
	}
	return p
}

// TestOverfullConntrack: when conntrack has forgotten them, TCP connections go
// on: those a pod opened, those it took, those by way of a service and those
// with the node, in both directions and with the errors about them; nothing
// else does.
func TestOverfullConntrack(t *testing.T) {
	r := newRig(t)
	a, b := first, second
	type hop struct {
		what    string
		hook    flows.Hook
		pod     int
		ingress uint32
		p       frame.Packet
	}
	var established []hop
	for i := range 2 {
		node, svc, far := nodeIP, service, world
		if i == 1 {
			node, svc, far = netip.MustParseAddr("fd09::1"), netip.MustParseAddr("fd96::1"), netip.MustParseAddr("2001:db8::9")
			if err := r.d.Apply(&policy.Plan{Prefixes: []policy.Prefix{{Prefix: netip.MustParsePrefix("fd96::/16"), Class: rigService}},
				Exact: []policy.Address{{Addr: node, Class: rigNode, Node: true}}}); err != nil {
				t.Fatal(err)
			}
		}
		established = append(established,
			hop{"opened by the first", flows.FromPod, 0, r.ifs[0], tcp(a[i], b[i], 40000, 80, frame.SYN)},
			hop{"taken by the second", flows.ToPod, 1, r.ifs[0], tcp(a[i], b[i], 40000, 80, frame.SYN)},
			hop{"answered by the second", flows.FromPod, 1, r.ifs[1], tcp(b[i], a[i], 80, 40000, frame.SYN|frame.ACK)},
			hop{"answer to the first", flows.ToPod, 0, r.ifs[1], tcp(b[i], a[i], 80, 40000, frame.SYN|frame.ACK)},
			hop{"to the world", flows.FromPod, 0, r.ifs[0], tcp(a[i], far, 40001, 443, frame.SYN)},
			hop{"from the world", flows.ToPod, 0, outside, tcp(far, a[i], 443, 40001, frame.SYN|frame.ACK)},
			hop{"to a service", flows.FromPod, 0, r.ifs[0], tcp(a[i], svc, 40002, 80, frame.SYN)},
			hop{"from a service", flows.ToPod, 0, r.ifs[1], tcp(svc, a[i], 80, 40002, frame.SYN|frame.ACK)},
			hop{"from the node", flows.ToPod, 1, 0, tcp(node, b[i], 40003, 9, frame.SYN)},
			hop{"to the node", flows.FromPod, 1, r.ifs[1], tcp(b[i], node, 9, 40003, frame.SYN|frame.ACK)})
	}
	for _, h := range established {
		r.send(h.what, h.hook, h.pod, h.ingress, 0, h.p, true)
	}
	for i := range 2 {
		for port := range 20_000 { // many times what there is room for
			for _, flags := range []uint8{frame.SYN, frame.ACK} { // seen once, they would make room for each other
				r.send("a flood of flows", flows.FromPod, 0, r.ifs[0], 0, tcp(a[i], b[i], uint16(10_000+port), 80, flags), true)
			}
			if t.Failed() {
				return
			}
		}
	}
	var v ctValue
	if r.d.objs.Ct4.Lookup(ctKey4{r.ifs[0]<<8 | 6, a[0].As4(), world.As4(), 40001, 443}, &v) == nil {
		t.Fatal("conntrack still knows: the test shows nothing")
	}
	r.send("a UDP answer that nobody remembers", flows.ToPod, 0, r.ifs[1], 0, frame.Packet{Src: service, Dst: a[0], Protocol: 17, SrcPort: 80, DstPort: 40002}, false)
	for range 2 {
		for _, h := range established {
			for _, flags := range []uint8{frame.ACK, frame.ACK | frame.FIN, frame.RST} {
				h.p.TCP = flags
				r.send("overfull: "+h.what, h.hook, h.pod, h.ingress, 0, h.p, true)
			}
			h.p.TCP = frame.SYN
			if strings.HasPrefix(h.what, "answer") || strings.HasPrefix(h.what, "from the world") || h.what == "from a service" {
				r.send("overfull, opened: "+h.what, h.hook, h.pod, h.ingress, 0, h.p, false)
			}
		}
	}
	about := tcp(a[0], world, 40001, 443, 0)
	r.send("an error about it", flows.ToPod, 0, outside, 0, frame.Packet{Src: netip.MustParseAddr("198.51.100.1"), Dst: a[0], Protocol: 1, ICMPType: 3, Payload: about.Bytes()[14:42]}, true)
	r.send("of what may not be opened", flows.ToPod, 0, outside, 0, tcp(world, a[0], 444, 40001, frame.ACK), false)
}

// TestNoRoomForRows: a pod for whose rows there is no room is denied what is
// new, with an error; what it had goes on; pods that have their rows do not
// notice. When others go it recovers.
func TestNoRoomForRows(t *testing.T) {
	ifs := inNamespace(t, 3)
	d := open(t, Config{Conntrack: 1024, RowBlocks: 4}) // two pods with one block a row
	r := &rig{t: t, d: d, ifs: ifs}
	allow := policy.Cell{Class: policy.World, Profile: policy.ProfileAllow}
	try := func(what string, pod int, want bool) {
		t.Helper()
		ip := lab.PodIPs(pod)[0]
		r.send(what+": in", flows.ToPod, pod, outside, 0, tcp(world, ip, 1000, 80, frame.SYN), want)
		r.send(what+": out", flows.FromPod, pod, ifs[pod], 0, tcp(ip, world, 1001, 80, frame.SYN), want)
	}
	for i := range 3 {
		if err := d.Insert(uint32(i+1), int(ifs[i]), lab.PodIPs(i)); err != nil {
			t.Fatal(err)
		}
		err := d.Apply(bothWays(uint32(i+1), 64, allow))
		if (err != nil) != (i == 2) {
			t.Fatalf("pod %d: %v", i, err)
		}
	}
	try("has rows", 0, true)
	try("has rows", 1, true)
	try("has none", 2, false)
	if err := d.Apply(&policy.Plan{}); err == nil {
		t.Error("that there is no room is told once only")
	}
	// Nobody's rows are cut for the sake of more classes.
	if err := d.Apply(bothWays(2, 200, policy.Cell{Class: 150, Profile: policy.ProfileAllow})); err == nil {
		t.Error("rows that are too large are no error")
	}
	r.send("established before", flows.FromPod, 0, ifs[0], 0, tcp(lab.PodIPs(0)[0], world, 80, 1000, frame.ACK), true)
	r.send("established before", flows.ToPod, 1, outside, 0, tcp(world, lab.PodIPs(1)[0], 80, 1001, frame.ACK), true)
	r.send("new", flows.ToPod, 1, outside, 0, tcp(world, lab.PodIPs(1)[0], 2000, 80, frame.SYN), false)
	if got := d.Recover(); got != nil {
		t.Errorf("%v recovered without room", got)
	}
}

// TestRecovers: a pod gets its rows when another's have gone.
func TestRecovers(t *testing.T) {
	ifs := inNamespace(t, 2)
	d := open(t, Config{Conntrack: 1024, RowBlocks: 2})
	r := &rig{t: t, d: d, ifs: ifs}
	allow := policy.Cell{Class: policy.World, Profile: policy.ProfileAllow}
	for i := range 2 {
		if err := d.Insert(uint32(i+1), int(ifs[i]), lab.PodIPs(i)); err != nil {
			t.Fatal(err)
		}
		if err := d.Apply(bothWays(uint32(i+1), 64, allow)); (err != nil) != (i == 1) {
			t.Fatal(err)
		}
	}
	ip := lab.PodIPs(1)[0]
	r.send("no room", flows.ToPod, 1, outside, 0, tcp(world, ip, 1, 80, frame.SYN), false)
	if err := d.Apply(&policy.Plan{Gone: []uint32{1}}); err == nil {
		t.Error("there is room before others have let go of it")
	}
	d.Settle()
	if got := d.Recover(); !slices.Equal(got, []uint32{2}) {
		t.Fatalf("%v recovers, want endpoint 2", got)
	}
	r.send("recovered, not written", flows.ToPod, 1, outside, 0, tcp(world, ip, 1, 80, frame.SYN), false)
	if err := d.Apply(bothWays(2, 64, allow)); err != nil {
		t.Fatal(err)
	}
	r.send("recovered", flows.ToPod, 1, outside, 0, tcp(world, ip, 1, 80, frame.SYN), true)
}

// TestNoRoomForPeers: a pod that finds no place among the peers is not known:
// nothing new with it, an error; other peers do not notice; it gets the first
// place that becomes free.
func TestNoRoomForPeers(t *testing.T) {
	ifs := inNamespace(t, 1)
	d := open(t, Config{Conntrack: 1024, RowBlocks: 64, Peers: 8})
	r := &rig{t: t, d: d, ifs: ifs}
	if err := d.Insert(1, int(ifs[0]), first); err != nil {
		t.Fatal(err)
	}
	peer := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 5, 0, byte(i)}) }
	plan := bothWays(1, 64, policy.Cell{Class: 7, Profile: policy.ProfileAllow})
	for i := range 8 {
		plan.Exact = append(plan.Exact, policy.Address{Addr: peer(i), Class: 7})
	}
	if err := d.Apply(plan); err != nil {
		t.Fatal(err)
	}
	err := d.Apply(&policy.Plan{Exact: []policy.Address{{Addr: peer(8), Class: 7}}})
	if err == nil || !strings.Contains(err.Error(), "no room for 1 addresses") {
		t.Errorf("a ninth peer: %v", err)
	}
	try := func(i int, want bool) {
		t.Helper()
		r.send(fmt.Sprint("peer ", i), flows.ToPod, 0, outside, 0, tcp(peer(i), first[0], 1, 80, frame.SYN), want)
	}
	try(0, true)
	try(7, true)
	try(8, false)
	if err := d.Apply(&policy.Plan{DeleteExact: []netip.Addr{peer(3)}}); err != nil {
		t.Errorf("there is room now: %v", err)
	}
	try(8, true)
	try(3, false)
}

// TestNoRoomForRanges: an except that finds no place must not let through what
// it excepts: pods that allow what is around it are denied what is new, others
// do not notice.
func TestNoRoomForRanges(t *testing.T) {
	ifs := inNamespace(t, 2)
	d := open(t, Config{Conntrack: 1024, RowBlocks: 64, Peers: 1})
	r := &rig{t: t, d: d, ifs: ifs}
	const wide, narrow, other = 10, 11, 12
	in, excepted := netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("198.51.100.200")
	for i, cell := range []policy.Cell{{Class: wide, Profile: policy.ProfileAllow}, {Class: other, Profile: policy.ProfileAllow}} {
		if err := d.Insert(uint32(i+1), int(ifs[i]), lab.PodIPs(i)); err != nil {
			t.Fatal(err)
		}
		plan := bothWays(uint32(i+1), 64, cell)
		plan.Exact = []policy.Address{{Addr: world, Class: other}}
		plan.Prefixes = []policy.Prefix{{Prefix: netip.MustParsePrefix("198.51.100.0/24"), Class: wide}}
		if err := d.Apply(plan); err != nil {
			t.Fatal(err)
		}
	}
	r.send("in the range", flows.ToPod, 0, outside, 0, tcp(in, lab.PodIPs(0)[0], 1, 80, frame.SYN), true)
	r.send("another's peer", flows.ToPod, 1, outside, 0, tcp(world, lab.PodIPs(1)[0], 1, 80, frame.SYN), true)
	except := policy.Prefix{Prefix: netip.MustParsePrefix("198.51.100.128/25"), Class: narrow}
	if err := d.Apply(&policy.Plan{Classes: 64, Prefixes: []policy.Prefix{except}}); err == nil {
		t.Error("an except without a place is no error")
	}
	r.send("excepted", flows.ToPod, 0, outside, 0, tcp(excepted, lab.PodIPs(0)[0], 1, 80, frame.SYN), false)
	r.send("in the range, new", flows.ToPod, 0, outside, 0, tcp(in, lab.PodIPs(0)[0], 2, 80, frame.SYN), false)
	r.send("in the range, established", flows.FromPod, 0, ifs[0], 0, tcp(lab.PodIPs(0)[0], in, 80, 1, frame.ACK), true)
	r.send("another's peer, new", flows.ToPod, 1, outside, 0, tcp(world, lab.PodIPs(1)[0], 2, 80, frame.SYN), true)
	if err := d.Apply(&policy.Plan{Classes: 64, DeletePrefixes: []netip.Prefix{except.Prefix}}); err == nil {
		t.Error("a degraded pod is no error")
	}
	if got := d.Recover(); !slices.Equal(got, []uint32{1}) {
		t.Errorf("%v recovers, want endpoint 1", got)
	}
}

// TestSlab: what is let go of joins its neighbours.
func TestSlab(t *testing.T) {
	s := slab{[]gap{{0, 64}}}
	var all []chunk
	for range 8 {
		c, ok := s.alloc(2)
		if !ok {
			t.Fatal("no room")
		}
		all = append(all, c)
	}
	if _, ok := s.alloc(0); ok {
		t.Error("more than there is")
	}
	for _, i := range []int{1, 3, 2, 0, 6, 7, 5, 4} {
		s.release(all[i])
	}
	if want := []gap{{0, 64}}; !slices.Equal(s.gaps, want) {
		t.Errorf("%v, want %v", s.gaps, want)
	}
}

// TestCollect: dead flows and those of pods that are gone leave conntrack, live
// ones stay.
func TestCollect(t *testing.T) {
	r := newRig(t)
	a := first[0]
	r.send("lives", flows.FromPod, 0, r.ifs[0], 0, tcp(a, world, 40000, 443, frame.SYN), true)
	r.send("lives", flows.FromPod, 0, r.ifs[0], 0, tcp(first[1], netip.MustParseAddr("2001:db8::9"), 40000, 443, frame.SYN), true)
	r.send("of the second", flows.ToPod, 1, 0, 0, tcp(nodeIP, second[0], 40000, 80, frame.SYN), true)
	now, err := r.d.jiffies()
	if err != nil {
		t.Fatal(err)
	}
	const dead = 300
	for i := range uint16(dead) {
		age := uint32(61)
		if i%2 == 1 {
			age = 100_000
		}
		v := ctValue{Last: now - age*r.d.hz, Flags: ctOut}
		if err := r.d.objs.Ct4.Put(ctKey4{r.ifs[0]<<8 | 6, a.As4(), world.As4(), 1000 + i, 443}, v); err != nil {
			t.Fatal(err)
		}
		if err := r.d.objs.Ct6.Put(ctKey6{r.ifs[0]<<8 | 6, first[1].As16(), second[1].As16(), 1000 + i, 443}, v); err != nil {
			t.Fatal(err)
		}
	}
	walk := func(flows int, collected uint64) {
		t.Helper()
		for range 2 {
			if err := r.d.Collect(); err != nil {
				t.Fatal(err)
			}
		}
		if got := r.d.Conntrack(); got.Flows != flows || got.Collected != collected {
			t.Errorf("%+v, want %d flows and %d collected", got, flows, collected)
		}
	}
	walk(3, 2*dead)
	r.send("still known", flows.ToPod, 0, outside, 0, tcp(world, a, 443, 40000, frame.ACK), true)
	if err := r.d.Remove(2); err != nil {
		t.Fatal(err)
	}
	walk(2, 2*dead+1)
	if err := r.d.drop(encode([]ctKey4{{r.ifs[0]<<8 | 6, a.As4(), world.As4(), 40000, 443}}), 1, 0); err != nil {
		t.Fatal(err)
	}
	walk(2, 2*dead+1) // one that has come to life since it was read is not deleted
}

// TestFlowsOfEarlierLayouts: whatever keys and values they have, flows are taken
// over as they are, but judged anew.
func TestFlowsOfEarlierLayouts(t *testing.T) {
	inNamespace(t, 1)
	dir := filepath.Join(bpffs(t), "na")
	own, far := first, []netip.Addr{world, netip.MustParseAddr("2001:db8::9")}
	old := oldValue{Last: 77, Flags: ctOut | ctReplied}
	for name, keys := range map[string][2]any{
		"v1": {oldKey4{5, own[0].As4(), far[0].As4(), 1, 443, 6}, oldKey6{5, own[1].As16(), far[1].As16(), 1, 443, 6}},
		"v2": {ctKey4{5<<8 | 6, own[0].As4(), far[0].As4(), 2, 443}, ctKey6{5<<8 | 6, own[1].As16(), far[1].As16(), 2, 443}},
		"v9": {ctKey4{5<<8 | 6, own[0].As4(), far[0].As4(), 9, 443}, ctKey6{5<<8 | 6, own[1].As16(), far[1].As16(), 9, 443}},
	} {
		var value any = old
		if name == "v9" {
			value = ctValue{Last: old.Last, Flags: old.Flags, Passed: [2]uint32{8, 9}}
		}
		for i, key := range keys {
			m, err := ciliumebpf.NewMap(&ciliumebpf.MapSpec{Type: ciliumebpf.LRUHash, KeySize: uint32(binary.Size(key)), ValueSize: uint32(binary.Size(value)), MaxEntries: 64})
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			ct := filepath.Join(dir, name, "ct")
			if err := errors.Join(m.Put(key, value), os.MkdirAll(ct, 0o700), m.Pin(filepath.Join(ct, []string{"ct4", "ct6"}[i]))); err != nil {
				t.Fatal(err)
			}
		}
	}
	d := open(t, Config{Dir: dir, Conntrack: 1024, RowBlocks: 64})
	if err := d.inherit(); err != nil {
		t.Fatal(err)
	}
	for _, port := range []uint16{1, 2, 9} {
		var four, six ctValue
		err := errors.Join(d.objs.Ct4.Lookup(ctKey4{5<<8 | 6, own[0].As4(), far[0].As4(), port, 443}, &four),
			d.objs.Ct6.Lookup(ctKey6{5<<8 | 6, own[1].As16(), far[1].As16(), port, 443}, &six))
		if want := (ctValue{Last: old.Last, Flags: old.Flags}); err != nil || four != want || six != want {
			t.Errorf("the flow of port %d is %+v and %+v, want %+v: %v", port, four, six, want, err)
		}
	}
}

// TestSeed: flows from before are judged by who opened them, though their ports
// would say otherwise; what is known already stays.
func TestSeed(t *testing.T) {
	ifs := inNamespace(t, 1)
	d := open(t, Config{Conntrack: 1024, RowBlocks: 64, Strict: true})
	r := &rig{t: t, d: d, ifs: ifs}
	if err := d.Insert(1, int(ifs[0]), first); err != nil {
		t.Fatal(err)
	}
	plan := bothWays(1, 64, policy.Cell{Class: policy.World, Profile: policy.ProfileAllow})
	plan.Prepare = plan.Prepare[policy.Out : policy.Out+1] // opens, takes nothing
	if err := d.Apply(plan); err != nil {
		t.Fatal(err)
	}
	for i, far := range []netip.Addr{world, netip.MustParseAddr("2001:db8::9")} {
		own := first[i]
		opened := Flow{6, netip.AddrPortFrom(own, 30000), netip.AddrPortFrom(far, 50000), true}
		taken := Flow{6, netip.AddrPortFrom(own, 50001), netip.AddrPortFrom(far, 30001), false}
		asked := Flow{17, netip.AddrPortFrom(own, 50002), netip.AddrPortFrom(far, 53), true}
		r.send("before: opened", flows.ToPod, 0, outside, 0, tcp(far, own, 50000, 30000, frame.ACK), false)
		if err := d.Seed(int(ifs[0]), []Flow{opened, taken, asked}); err != nil {
			t.Fatal(err)
		}
		r.send("opened by the pod", flows.ToPod, 0, outside, 0, tcp(far, own, 50000, 30000, frame.ACK), true)
		r.send("opened by the peer", flows.ToPod, 0, outside, 0, tcp(far, own, 30001, 50001, frame.ACK), false)
		r.send("asked by the pod", flows.ToPod, 0, outside, 0, frame.Packet{Src: far, Dst: own, Protocol: 17, SrcPort: 53, DstPort: 50002}, true)
		opened.Opened = false
		if err := d.Seed(int(ifs[0]), []Flow{opened}); err != nil {
			t.Fatal(err)
		}
		r.send("known better", flows.ToPod, 0, outside, 0, tcp(far, own, 50000, 30000, frame.ACK), true)
	}
}
