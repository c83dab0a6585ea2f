package nat

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// element is one host port in the kernel, or (port 0) a pod's hairpin entry: the pod may reach
// itself through a host port, and then needs another source address than its own.
type element struct {
	host  netip.Addr // zero: every address of the pod's family
	proto uint8
	port  uint16
	pod   netip.Addr
	to    uint16
}

func (e element) less(o element) bool {
	if c := e.pod.Compare(o.pod); c != 0 {
		return c < 0
	}
	if e.proto != o.proto {
		return e.proto < o.proto
	}
	return e.port < o.port
}

func (e element) String() string {
	host := "*"
	if e.host.IsValid() {
		host = e.host.String()
	}
	return fmt.Sprintf("%s %s:%d", protoName(e.proto), host, e.port)
}

func protoName(p uint8) string {
	switch p {
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_SCTP:
		return "sctp"
	}
	return fmt.Sprint(p)
}

func protoNumber(name string) (uint8, bool) {
	switch strings.ToLower(name) {
	case "tcp", "":
		return unix.IPPROTO_TCP, true
	case "udp":
		return unix.IPPROTO_UDP, true
	case "sctp":
		return unix.IPPROTO_SCTP, true
	}
	return 0, false
}

func text(ports []Port) string {
	var s []string
	for _, p := range ports {
		e := element{host: p.HostIP, port: p.HostPort}
		e.proto, _ = protoNumber(p.Protocol)
		s = append(s, e.String())
	}
	return strings.Join(s, ", ")
}

// elements is what ports of a pod with ips become. Each element once.
func elements(ports []Port, ips []netip.Addr) ([]element, error) {
	var all []element
	seen := map[element]bool{}
	put := func(e element) {
		if !seen[e] {
			seen[e] = true
			all = append(all, e)
		}
	}
	for _, p := range ports {
		proto, ok := protoNumber(p.Protocol)
		if !ok {
			return nil, fmt.Errorf("host port %d: protocol %q, known are tcp, udp and sctp: %w", p.HostPort, p.Protocol, errdefs.ErrInvalidArgument)
		}
		if p.HostPort == 0 || p.ContainerPort == 0 {
			return nil, fmt.Errorf("host port %d to container port %d: both must be 1 to 65535: %w", p.HostPort, p.ContainerPort, errdefs.ErrInvalidArgument)
		}
		host := p.HostIP.Unmap().WithZone("")
		used := false
		for _, ip := range ips {
			if host.IsValid() && host.Is4() != ip.Is4() {
				continue
			}
			used = true
			e := element{host: host, proto: proto, port: p.HostPort, pod: ip, to: p.ContainerPort}
			if host.IsValid() && host.IsUnspecified() {
				e.host = netip.Addr{}
			}
			put(e)
			put(element{pod: ip})
		}
		if !used {
			return nil, fmt.Errorf("host port %s %s:%d: the pod has no address of that family: %w", p.Protocol, host, p.HostPort, errdefs.ErrInvalidArgument)
		}
	}
	// The same port twice in one pod, to different container ports.
	for i, e := range all {
		if e.port == 0 {
			continue
		}
		for _, o := range all[:i] {
			if clash(e, o) && o.to != e.to {
				return nil, fmt.Errorf("host port %s is given twice: %w", e, errdefs.ErrInvalidArgument)
			}
		}
	}
	return all, nil
}

// clash says whether both claim the same packets.
func clash(a, b element) bool {
	return a.port != 0 && a.port == b.port && a.proto == b.proto && a.pod.Is4() == b.pod.Is4() &&
		(a.host == b.host || !a.host.IsValid() || !b.host.IsValid())
}

// conflict reports the first wanted element that another pod has already.
func conflict(want, have []element) error {
	type key struct {
		proto uint8
		port  uint16
	}
	by := map[key][]element{}
	for _, h := range have {
		if h.port != 0 {
			by[key{h.proto, h.port}] = append(by[key{h.proto, h.port}], h)
		}
	}
	for _, w := range want {
		for _, h := range by[key{w.proto, w.port}] {
			if clash(w, h) && h.pod != w.pod {
				return fmt.Errorf("host port %s: already leads to pod address %s as %s: %w", w, h.pod, h, errdefs.ErrAlreadyExists)
			}
		}
	}
	return nil
}

// family is what differs between IPv4 and IPv6.
type family struct {
	i         int
	v4        bool
	nfproto   byte
	size      uint32 // of an address
	src, dst  uint32 // offsets in the network header
	loopback  netip.Prefix
	multicast netip.Prefix
	next      uint32 // register behind an address that was loaded into register 1
}

// families is constant.
var families = [2]family{
	{i: 0, v4: true, nfproto: unix.NFPROTO_IPV4, size: 4, src: 12, dst: 16, next: 9,
		loopback: netip.MustParsePrefix("127.0.0.0/8"), multicast: netip.MustParsePrefix("224.0.0.0/4")},
	{i: 1, nfproto: unix.NFPROTO_IPV6, size: 16, src: 8, dst: 24, next: 2,
		loopback: netip.MustParsePrefix("::1/128"), multicast: netip.MustParsePrefix("ff00::/8")},
}

// sets are the table's sets and maps, one of each for each family.
type sets struct {
	table        *nftables.Table
	pods, inside [2]*nftables.Set // intervals
	any          [2]*nftables.Set // protocol . port -> pod . port
	host         [2]*nftables.Set // host address . protocol . port -> pod . port
	hairpin      [2]*nftables.Set // pod . pod
}

func newSets(table *nftables.Table) sets {
	s := sets{table: table}
	for _, f := range families {
		addr, n := nftables.TypeIPAddr, "4"
		if !f.v4 {
			addr, n = nftables.TypeIP6Addr, "6"
		}
		dest := nftables.MustConcatSetType(addr, nftables.TypeInetService)
		s.pods[f.i] = &nftables.Set{Table: table, Name: "pods" + n, KeyType: addr, Interval: true}
		s.inside[f.i] = &nftables.Set{Table: table, Name: "inside" + n, KeyType: addr, Interval: true}
		s.any[f.i] = &nftables.Set{Table: table, Name: "ports" + n, IsMap: true, Concatenation: true, DataType: dest,
			KeyType: nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)}
		s.host[f.i] = &nftables.Set{Table: table, Name: "hostports" + n, IsMap: true, Concatenation: true, DataType: dest,
			KeyType: nftables.MustConcatSetType(addr, nftables.TypeInetProto, nftables.TypeInetService)}
		s.hairpin[f.i] = &nftables.Set{Table: table, Name: "hairpin" + n, Concatenation: true,
			KeyType: nftables.MustConcatSetType(addr, addr)}
	}
	return s
}

// ports are the sets that hold elements.
func (s sets) ports() []*nftables.Set {
	var all []*nftables.Set
	for i := range families {
		all = append(all, s.any[i], s.host[i], s.hairpin[i])
	}
	return all
}

func (s sets) all() []*nftables.Set {
	return append([]*nftables.Set{s.pods[0], s.pods[1], s.inside[0], s.inside[1]}, s.ports()...)
}

// encode is the set e belongs to, and e in its form.
func (s sets) encode(e element) (*nftables.Set, nftables.SetElement) {
	i := 0
	if e.pod.Is6() {
		i = 1
	}
	if e.port == 0 {
		return s.hairpin[i], nftables.SetElement{Key: append(e.pod.AsSlice(), e.pod.AsSlice()...)}
	}
	key := []byte{e.proto, 0, 0, 0}
	key = append(binary.BigEndian.AppendUint16(key, e.port), 0, 0)
	val := append(binary.BigEndian.AppendUint16(e.pod.AsSlice(), e.to), 0, 0)
	if !e.host.IsValid() {
		return s.any[i], nftables.SetElement{Key: key, Val: val}
	}
	return s.host[i], nftables.SetElement{Key: append(e.host.AsSlice(), key...), Val: val}
}

// decode is the inverse of encode; false for what this program did not write.
func (s sets) decode(set *nftables.Set, el nftables.SetElement) (element, bool) {
	for _, f := range families {
		n := int(f.size)
		switch set {
		case s.hairpin[f.i]:
			if len(el.Key) != 2*n {
				return element{}, false
			}
			pod, _ := netip.AddrFromSlice(el.Key[:n])
			return element{pod: pod}, true
		case s.any[f.i], s.host[f.i]:
			var e element
			key := el.Key
			if set == s.host[f.i] {
				if len(key) != n+8 {
					return element{}, false
				}
				e.host, _ = netip.AddrFromSlice(key[:n])
				key = key[n:]
			}
			if len(key) != 8 || len(el.Val) < n+2 {
				return element{}, false
			}
			e.proto, e.port = key[0], binary.BigEndian.Uint16(key[4:])
			e.pod, _ = netip.AddrFromSlice(el.Val[:n])
			e.to = binary.BigEndian.Uint16(el.Val[n:])
			return e, true
		}
	}
	return element{}, false
}

// intervals are the elements of an interval set that cover the prefixes of one family.
// Prefixes inside another are left out.
func intervals(prefixes []netip.Prefix, v4 bool) []nftables.SetElement {
	var elems []nftables.SetElement
	for i, p := range prefixes {
		if p.Addr().Is4() != v4 || covered(p, i, prefixes) {
			continue
		}
		elems = append(elems, nftables.SetElement{Key: p.Masked().Addr().AsSlice()})
		if end, ok := after(p); ok {
			elems = append(elems, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	return elems
}

func covered(p netip.Prefix, i int, all []netip.Prefix) bool {
	for j, q := range all {
		if j == i || !q.Overlaps(p) {
			continue
		}
		if q.Bits() < p.Bits() || q.Bits() == p.Bits() && j < i {
			return true
		}
	}
	return false
}

// after is the first address behind p; false if p reaches the end of the address space.
func after(p netip.Prefix) (netip.Addr, bool) {
	b := p.Masked().Addr().AsSlice()
	bits := p.Bits()
	for i := range b {
		switch {
		case bits >= 8*(i+1):
		case bits <= 8*i:
			b[i] = 0xff
		default:
			b[i] |= 0xff >> (bits - 8*i)
		}
	}
	last, _ := netip.AddrFromSlice(b)
	end := last.Next()
	return end, end.IsValid()
}
