package rtnl

import (
	"encoding/binary"
	"math"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Family is AF_INET or AF_INET6.
func Family(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// link appends an ifinfomsg.
func (b *Batch) link(index int, flags, change uint32) {
	p := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(p[4:], uint32(index))
	binary.NativeEndian.PutUint32(p[8:], flags)
	binary.NativeEndian.PutUint32(p[12:], change)
	b.Raw(p...)
}

// Veth describes a pair. The peer is made directly in the namespace of PeerNS.
type Veth struct {
	Name, Peer   string
	MAC, PeerMAC net.HardwareAddr
	MTU          int    // bytes, 0: the kernel's default
	Group        uint32 // of the host end
	PeerNS       int    // descriptor of the namespace
}

// AddVeth makes the pair, both ends down and without automatic IPv6 link-local addresses.
// One queue each: a veth uses one unless XDP is attached, and the kernel else allocates one for each CPU.
func (b *Batch) AddVeth(v Veth) {
	b.Begin(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, "create veth "+v.Name)
	b.link(0, 0, 0)
	b.Str(unix.IFLA_IFNAME, v.Name)
	b.veth(v.MAC, v.MTU)
	b.U32(unix.IFLA_GROUP, v.Group)
	info := b.Nest(unix.IFLA_LINKINFO)
	b.Attr(unix.IFLA_INFO_KIND, []byte("veth"))
	data := b.Nest(unix.IFLA_INFO_DATA)
	peer := b.Nest(1) // VETH_INFO_PEER
	b.link(0, 0, 0)
	b.Str(unix.IFLA_IFNAME, v.Peer)
	b.veth(v.PeerMAC, v.MTU)
	b.U32(unix.IFLA_NET_NS_FD, uint32(v.PeerNS))
	peer()
	data()
	info()
}

func (b *Batch) veth(mac net.HardwareAddr, mtu int) {
	b.Attr(unix.IFLA_ADDRESS, mac)
	b.U32(unix.IFLA_NUM_TX_QUEUES, 1)
	b.U32(unix.IFLA_NUM_RX_QUEUES, 1)
	if mtu > 0 {
		b.U32(unix.IFLA_MTU, uint32(mtu))
	}
}

// NoAutoAddr turns off automatic IPv6 link-local addresses of link index
// (IN6_ADDR_GEN_MODE_NONE, kernel 3.17). Without IPv6 the kernel answers EAFNOSUPPORT: success.
func (b *Batch) NoAutoAddr(index int) {
	b.Begin(unix.RTM_SETLINK, 0, "set IPv6 address mode", unix.EAFNOSUPPORT, unix.EOPNOTSUPP)
	b.link(index, 0, 0)
	spec := b.Nest(unix.IFLA_AF_SPEC)
	v6 := b.Nest(unix.AF_INET6)
	b.U8(unix.IFLA_INET6_ADDR_GEN_MODE, 1)
	v6()
	spec()
}

// LinkUp sets link index up.
func (b *Batch) LinkUp(index int, what string) {
	b.Begin(unix.RTM_NEWLINK, 0, what)
	b.link(index, unix.IFF_UP, unix.IFF_UP)
}

// Alias sets the ifalias of link index.
func (b *Batch) Alias(index int, alias string) {
	b.Begin(unix.RTM_SETLINK, 0, "set link alias")
	b.link(index, 0, 0)
	b.Attr(unix.IFLA_IFALIAS, []byte(alias))
}

// SetGroupByName moves the link called name into group; no such link is success.
func (b *Batch) SetGroupByName(name string, group uint32) {
	b.Begin(unix.RTM_SETLINK, 0, "set group of link "+name, unix.ENODEV)
	b.link(0, 0, 0)
	b.Str(unix.IFLA_IFNAME, name)
	b.U32(unix.IFLA_GROUP, group)
}

// DelGroup deletes all links of group at once: one grace period for all of them.
// An empty group is success. Group 0 holds every link nobody grouped and is refused by the kernel
// only if one of its links cannot be deleted, so callers must never pass it.
func (b *Batch) DelGroup(group uint32) {
	b.Begin(unix.RTM_DELLINK, 0, "delete links of a group", unix.ENODEV)
	b.link(0, 0, 0)
	b.U32(unix.IFLA_GROUP, group)
}

// DelLink deletes link index; no such link is success.
func (b *Batch) DelLink(index int) {
	b.Begin(unix.RTM_DELLINK, 0, "delete link", unix.ENODEV)
	b.link(index, 0, 0)
}

// Shape puts a token bucket on what leaves by link index: rate in bytes per second, burst and queue in bytes.
// Kernel 3.14 or newer with sch_tbf.
func (b *Batch) Shape(index int, rate, burst, queue uint64, what string) {
	const (
		tcaTBFParms, tcaTBFRate64, tcaTBFBurst = 1, 4, 6
		rootHandle                             = 0xffffffff
	)
	b.Begin(unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, what)
	h := make([]byte, 20) // struct tcmsg
	binary.NativeEndian.PutUint32(h[4:], uint32(index))
	binary.NativeEndian.PutUint32(h[8:], 0x00010000)
	binary.NativeEndian.PutUint32(h[12:], rootHandle)
	b.Raw(h...)
	b.Attr(unix.TCA_KIND, []byte("tbf\x00"))
	done := b.Nest(unix.TCA_OPTIONS)
	p := make([]byte, 36) // struct tc_tbf_qopt
	p[1] = 1              // rate.linklayer: Ethernet
	binary.NativeEndian.PutUint32(p[8:], uint32(min(rate, math.MaxUint32)))
	binary.NativeEndian.PutUint32(p[24:], uint32(min(queue, math.MaxUint32)))
	b.Attr(tcaTBFParms, p)
	b.U32(tcaTBFBurst, uint32(min(burst, math.MaxUint32)))
	if rate > math.MaxUint32 {
		b.Attr(tcaTBFRate64, binary.NativeEndian.AppendUint64(nil, rate))
	}
	done()
}

// AddAddr puts addr on link index, at once usable (no duplicate address detection).
// One that is there already is an error unless ok lists EEXIST.
func (b *Batch) AddAddr(index int, p netip.Prefix, what string, ok ...unix.Errno) {
	b.Begin(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, what, ok...)
	b.addr(index, p)
	if p.Addr().Is6() {
		b.U32(unix.IFA_FLAGS, unix.IFA_F_NODAD)
	}
}

// DelAddr removes addr from link index; not there is success.
func (b *Batch) DelAddr(index int, p netip.Prefix, what string) {
	b.Begin(unix.RTM_DELADDR, 0, what, unix.EADDRNOTAVAIL, unix.ENODEV)
	b.addr(index, p)
}

func (b *Batch) addr(index int, p netip.Prefix) {
	h := make([]byte, unix.SizeofIfAddrmsg)
	h[0] = Family(p.Addr())
	h[1] = uint8(p.Bits())
	if p.Addr().IsLinkLocalUnicast() {
		h[3] = unix.RT_SCOPE_LINK
	}
	binary.NativeEndian.PutUint32(h[4:], uint32(index))
	b.Raw(h...)
	b.Addr(unix.IFA_LOCAL, p.Addr())
	b.Addr(unix.IFA_ADDRESS, p.Addr())
}

// AddNeigh adds a permanent neighbour entry.
func (b *Batch) AddNeigh(index int, ip netip.Addr, mac net.HardwareAddr, what string) {
	b.Begin(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, what)
	h := make([]byte, unix.SizeofNdMsg)
	h[0] = Family(ip)
	binary.NativeEndian.PutUint32(h[4:], uint32(index))
	binary.NativeEndian.PutUint16(h[8:], unix.NUD_PERMANENT)
	b.Raw(h...)
	b.Addr(unix.NDA_DST, ip)
	b.Attr(unix.NDA_LLADDR, mac)
}

// Route is one route.
type Route struct {
	Dst      netip.Prefix
	Gateway  netip.Addr // zero: on link
	Src      netip.Addr // preferred source, zero: the kernel chooses
	Link     int        // 0 for unreachable
	Protocol uint8      // who made it (RTPROT_*)
	Type     uint8      // 0: RTN_UNICAST
	Table    uint8      // 0: RT_TABLE_MAIN
	Metric   uint32
}

func (b *Batch) route(r Route) {
	h := make([]byte, unix.SizeofRtMsg)
	h[0] = Family(r.Dst.Addr())
	h[1] = uint8(r.Dst.Bits())
	h[4] = unix.RT_TABLE_MAIN
	h[5] = r.Protocol
	h[6] = unix.RT_SCOPE_UNIVERSE
	if !r.Gateway.IsValid() && r.Dst.Addr().Is4() && r.Link != 0 {
		h[6] = unix.RT_SCOPE_LINK
	}
	h[7] = unix.RTN_UNICAST
	if r.Table != 0 {
		h[4] = r.Table
	}
	if r.Type != 0 {
		h[7] = r.Type
	}
	b.Raw(h...)
	if r.Dst.Bits() > 0 {
		b.Addr(unix.RTA_DST, r.Dst.Addr())
	}
	if r.Gateway.IsValid() {
		b.Addr(unix.RTA_GATEWAY, r.Gateway)
	}
	if r.Src.IsValid() {
		b.Addr(unix.RTA_PREFSRC, r.Src)
	}
	if r.Link != 0 {
		b.U32(unix.RTA_OIF, uint32(r.Link))
	}
	if r.Metric != 0 {
		b.U32(unix.RTA_PRIORITY, r.Metric)
	}
}

// AddRoute adds r, or replaces the one with the same destination and metric.
func (b *Batch) AddRoute(r Route, what string, ok ...unix.Errno) {
	b.Begin(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, what, ok...)
	b.route(r)
}

// DelRoute deletes the first route that matches dst and protocol; none is success.
func (b *Batch) DelRoute(dst netip.Prefix, protocol uint8, what string) {
	b.Begin(unix.RTM_DELROUTE, 0, what, unix.ESRCH, unix.ENETUNREACH)
	h := make([]byte, unix.SizeofRtMsg)
	h[0] = Family(dst.Addr())
	h[1] = uint8(dst.Bits())
	h[4] = unix.RT_TABLE_MAIN
	h[5] = protocol
	h[6] = unix.RT_SCOPE_NOWHERE
	b.Raw(h...)
	b.Addr(unix.RTA_DST, dst.Addr())
}

// Link is what the kernel says of a link.
type Link struct {
	Index  int
	Peer   int // index of the other end of a veth, in its own namespace
	Name   string
	Alias  string
	Kind   string
	Group  uint32
	MTU    int
	Flags  uint32 // IFF_*
	Oper   uint8  // IF_OPER_*, 6 is up
	MAC    net.HardwareAddr
	PeerNS int // id of the peer's namespace as seen from here, -1: the same or gone
}

func decodeLink(body []byte) (Link, bool) {
	if len(body) < unix.SizeofIfInfomsg {
		return Link{}, false
	}
	l := Link{Index: int(int32(binary.NativeEndian.Uint32(body[4:]))), Flags: binary.NativeEndian.Uint32(body[8:]), PeerNS: -1}
	Attrs(body[unix.SizeofIfInfomsg:], func(typ uint16, data []byte) {
		u32 := func() uint32 {
			if len(data) < 4 {
				return 0
			}
			return binary.NativeEndian.Uint32(data)
		}
		switch typ {
		case unix.IFLA_IFNAME:
			l.Name = cstring(data)
		case unix.IFLA_IFALIAS:
			l.Alias = cstring(data)
		case unix.IFLA_LINK:
			l.Peer = int(u32())
		case unix.IFLA_GROUP:
			l.Group = u32()
		case unix.IFLA_MTU:
			l.MTU = int(u32())
		case unix.IFLA_OPERSTATE:
			if len(data) > 0 {
				l.Oper = data[0]
			}
		case unix.IFLA_ADDRESS:
			l.MAC = append(net.HardwareAddr(nil), data...)
		case unix.IFLA_LINK_NETNSID:
			l.PeerNS = int(int32(u32()))
		case unix.IFLA_LINKINFO:
			Attrs(data, func(typ uint16, data []byte) {
				if typ == unix.IFLA_INFO_KIND {
					l.Kind = cstring(data)
				}
			})
		}
	})
	return l, true
}

// LinkByName looks one link up. Errors: an *Error with ENODEV if there is none.
func (c *Conn) LinkByName(name string) (Link, error) {
	return c.linkOf(0, name, "look up link "+name)
}

// LinkByIndex looks one link up. Errors: an *Error with ENODEV if there is none.
func (c *Conn) LinkByIndex(index int) (Link, error) {
	return c.linkOf(index, "", "look up link")
}

func (c *Conn) linkOf(index int, name, what string) (Link, error) {
	var b Batch
	b.Begin(unix.RTM_GETLINK, 0, what)
	b.link(index, 0, 0)
	if name != "" {
		b.Str(unix.IFLA_IFNAME, name)
	}
	b.U32(unix.IFLA_EXT_MASK, 1<<3) // RTEXT_FILTER_SKIP_STATS
	var found Link
	err := c.query(&b, false, func(typ uint16, body []byte) {
		if typ == unix.RTM_NEWLINK {
			found, _ = decodeLink(body)
		}
	})
	return found, err
}

// Links lists all links of the namespace; kind limits the list to one kind ("veth") if not empty.
func (c *Conn) Links(kind string) ([]Link, error) {
	var b Batch
	b.Begin(unix.RTM_GETLINK, 0, "list links")
	b.link(0, 0, 0)
	b.U32(unix.IFLA_EXT_MASK, 1<<3)
	if kind != "" {
		info := b.Nest(unix.IFLA_LINKINFO)
		b.Attr(unix.IFLA_INFO_KIND, []byte(kind))
		info()
	}
	var all []Link
	err := c.query(&b, true, func(typ uint16, body []byte) {
		if l, ok := decodeLink(body); ok && typ == unix.RTM_NEWLINK && (kind == "" || l.Kind == kind) {
			all = append(all, l)
		}
	})
	return all, err
}

// DefaultRouteLinks are the indices of the links that IPv4 and IPv6 default routes of the main table use.
func (c *Conn) DefaultRouteLinks() ([]int, error) {
	seen := map[int]bool{}
	var all []int
	err := c.routes(func(r Route) {
		if r.Dst.Bits() == 0 && r.Link != 0 && !seen[r.Link] {
			seen[r.Link] = true
			all = append(all, r.Link)
		}
	})
	return all, err
}

// Routes lists the main table's routes of both families.
func (c *Conn) Routes() ([]Route, error) {
	var all []Route
	err := c.routes(func(r Route) { all = append(all, r) })
	return all, err
}

func (c *Conn) routes(f func(Route)) error {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		var b Batch
		b.Begin(unix.RTM_GETROUTE, 0, "list routes")
		h := make([]byte, unix.SizeofRtMsg)
		h[0] = family
		b.Raw(h...)
		if err := c.query(&b, true, func(typ uint16, body []byte) {
			if r, ok := decodeRoute(body); ok && typ == unix.RTM_NEWROUTE {
				f(r)
			}
		}); err != nil {
			return err
		}
	}
	return nil
}

// decodeRoute decodes a route of the main table; multipath next hops are left out.
func decodeRoute(body []byte) (Route, bool) {
	if len(body) < unix.SizeofRtMsg || body[4] != unix.RT_TABLE_MAIN {
		return Route{}, false
	}
	zero := netip.IPv4Unspecified()
	if body[0] == unix.AF_INET6 {
		zero = netip.IPv6Unspecified()
	}
	r := Route{Dst: netip.PrefixFrom(zero, int(body[1])), Protocol: body[5], Type: body[7]}
	Attrs(body[unix.SizeofRtMsg:], func(typ uint16, data []byte) {
		addr, _ := netip.AddrFromSlice(data)
		switch {
		case typ == unix.RTA_DST:
			r.Dst = netip.PrefixFrom(addr, int(body[1]))
		case typ == unix.RTA_GATEWAY:
			r.Gateway = addr
		case typ == unix.RTA_PREFSRC:
			r.Src = addr
		case typ == unix.RTA_OIF && len(data) >= 4:
			r.Link = int(binary.NativeEndian.Uint32(data))
		case typ == unix.RTA_PRIORITY && len(data) >= 4:
			r.Metric = binary.NativeEndian.Uint32(data)
		}
	})
	return r, r.Dst.IsValid()
}

// Addr is an address of a link.
type Addr struct {
	Link   int
	Prefix netip.Prefix
}

// Addrs lists all addresses of the namespace.
func (c *Conn) Addrs() ([]Addr, error) {
	var all []Addr
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		var b Batch
		b.Begin(unix.RTM_GETADDR, 0, "list addresses")
		h := make([]byte, unix.SizeofIfAddrmsg)
		h[0] = family
		b.Raw(h...)
		if err := c.query(&b, true, func(typ uint16, body []byte) {
			if typ != unix.RTM_NEWADDR || len(body) < unix.SizeofIfAddrmsg {
				return
			}
			a := Addr{Link: int(binary.NativeEndian.Uint32(body[4:]))}
			var local, other netip.Addr
			Attrs(body[unix.SizeofIfAddrmsg:], func(typ uint16, data []byte) {
				switch typ {
				case unix.IFA_LOCAL:
					local, _ = netip.AddrFromSlice(data)
				case unix.IFA_ADDRESS:
					other, _ = netip.AddrFromSlice(data)
				}
			})
			if !local.IsValid() {
				local = other
			}
			a.Prefix = netip.PrefixFrom(local, int(body[1]))
			all = append(all, a)
		}); err != nil {
			return nil, err
		}
	}
	return all, nil
}
