package nat

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Registers: 1 and 2 are 16 bytes wide; 8 and up are 4 bytes wide and lie over them, so that
// 8 is the start of 1 and 12 the start of 2.
const (
	reg1  = unix.NFT_REG_1
	reg2  = unix.NFT_REG_2
	reg32 = unix.NFT_REG32_00
)

// chain puts an empty chain into the transaction: it is made if missing and emptied if not.
func (t *Table) chain(c *nftables.Conn, ch nftables.Chain) *nftables.Chain {
	ch.Table = t.set.table
	out := c.AddChain(&ch)
	c.FlushChain(out)
	return out
}

func (t *Table) rule(c *nftables.Conn, ch *nftables.Chain, parts ...[]expr.Any) {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	c.AddRule(&nftables.Rule{Table: t.set.table, Chain: ch, Exprs: all})
}

// masqueradeChain: what comes from a pod's address and goes to none of inside gets the address of the link it leaves by.
func (t *Table) masqueradeChain(c *nftables.Conn) {
	ch := t.chain(c, nftables.Chain{Name: "masquerade", Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
	for _, f := range families {
		t.rule(c, ch, isFamily(f),
			load(reg1, f.src, f.size), lookup(t.set.pods[f.i], false),
			load(reg1, f.dst, f.size), lookup(t.set.inside[f.i], true),
			masquerade())
	}
}

// portChains: the first packet of a connection to an address of the host looks its port up, with the
// host address first and without it second.
func (t *Table) portChains(c *nftables.Conn) {
	ports := t.chain(c, nftables.Chain{Name: "ports"})
	for _, f := range families {
		t.rule(c, ports, isFamily(f),
			load(reg1, f.dst, f.size), proto(f.next), port(f.next, 1),
			translate(f, t.set.host[f.i]))
		t.rule(c, ports, isFamily(f),
			proto(reg1), port(reg1, 1),
			translate(f, t.set.any[f.i]))
	}
	for name, hook := range map[string]*nftables.ChainHook{"prerouting": nftables.ChainHookPrerouting, "output": nftables.ChainHookOutput} {
		ch := t.chain(c, nftables.Chain{Name: name, Type: nftables.ChainTypeNAT, Hooknum: hook, Priority: nftables.ChainPriorityNATDest})
		t.rule(c, ch, toLocal(), []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: "ports"}})
	}
	t.returnChain(c)
	t.guardChain(c)
}

// returnChain: a pod that reaches itself through a host port, and the host that reaches a pod from its
// loopback address, need a source that the pod answers through the host.
func (t *Table) returnChain(c *nftables.Conn) {
	ch := t.chain(c, nftables.Chain{Name: "return", Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityRef(*nftables.ChainPriorityNATSource - 1)})
	for _, f := range families {
		second := uint32(reg32 + 1)
		if !f.v4 {
			second = reg2
		}
		t.rule(c, ch, isFamily(f), load(reg1, f.src, f.size), load(second, f.dst, f.size),
			lookup(t.set.hairpin[f.i], false), masquerade())
		t.rule(c, ch, isFamily(f), load(reg1, f.src, f.size), within(f), load(reg1, f.dst, f.size),
			lookup(t.set.pods[f.i], false), masquerade())
	}
}

// guardChain: pods with host ports need route_localnet on their veth, which would let them send to the host's
// 127.0.0.0/8 (CVE-2020-8558). What comes in by a veth of ours from or to a loopback address is dropped,
// before connection tracking turns an answer's destination back into one.
func (t *Table) guardChain(c *nftables.Conn) {
	ch := t.chain(c, nftables.Chain{Name: "guard", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw})
	ours := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFGROUP, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: binaryutil.NativeEndian.PutUint32(t.cfg.Group)},
	}
	drop := []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
	f := families[0]
	t.rule(c, ch, ours, isFamily(f), load(reg1, f.dst, f.size), within(f), drop)
	t.rule(c, ch, ours, isFamily(f), load(reg1, f.src, f.size), within(f), drop)
}

func isFamily(f family) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{f.nfproto}},
	}
}

func load(reg, offset, size uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}}
}

func proto(reg uint32) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg}}
}

// port loads the destination port into the 4-byte register n behind reg.
func port(reg, n uint32) []expr.Any {
	switch reg {
	case reg1:
		reg = reg32
	case reg2:
		reg = reg32 + 4
	}
	return []expr.Any{&expr.Payload{DestRegister: reg + n, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}}
}

// within compares register 1 with the family's loopback range.
func within(f family) []expr.Any {
	a := f.loopback.Addr().AsSlice()
	if !f.v4 {
		return []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: a}}
	}
	return []expr.Any{
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: []byte{255, 0, 0, 0}, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: a},
	}
}

func lookup(s *nftables.Set, not bool) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: reg1, SetName: s.Name, SetID: s.ID, Invert: not}}
}

func toLocal() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: reg1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

// translate looks the key in register 1 up and sends the packet to the pod and port found.
func translate(f family, m *nftables.Set) []expr.Any {
	return []expr.Any{
		&expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: m.Name, SetID: m.ID},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.nfproto), RegAddrMin: reg1, RegProtoMin: f.next},
	}
}

func masquerade() []expr.Any {
	return []expr.Any{&expr.Masq{FullyRandom: true}}
}

// forgetUDP deletes the tracked connections to elems, all in one pass over the table for each family.
func (t *Table) forgetUDP(elems []element) error {
	filters := map[netlink.InetFamily][]netlink.CustomConntrackFilter{}
	for _, e := range elems {
		f := &netlink.ConntrackFilter{}
		_ = f.AddProtocol(unix.IPPROTO_UDP)
		_ = f.AddPort(netlink.ConntrackOrigDstPort, e.port)
		if e.host.IsValid() {
			_ = f.AddIP(netlink.ConntrackOrigDstIP, e.host.AsSlice())
		}
		family := netlink.InetFamily(unix.AF_INET)
		if e.pod.Is6() {
			family = unix.AF_INET6
		}
		filters[family] = append(filters[family], f)
	}
	if len(filters) == 0 {
		return nil
	}
	at := vnetns.None()
	if t.cfg.Host != nil {
		at = vnetns.NsHandle(t.cfg.Host.FD())
	}
	h, err := netlink.NewHandleAt(at, unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("open connection tracking: %w", err)
	}
	defer h.Close()
	for family, f := range filters {
		if _, err := h.ConntrackDeleteFilters(netlink.ConntrackTable, family, f...); err != nil {
			return fmt.Errorf("delete tracked connections of UDP host ports: %w", err)
		}
	}
	return nil
}
