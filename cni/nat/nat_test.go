package nat

import (
	"errors"
	"net/netip"
	"reflect"
	"testing"

	"github.com/containerd/errdefs"
)

var (
	pod4  = netip.MustParseAddr("10.0.0.2")
	pod6  = netip.MustParseAddr("fd00::2")
	other = netip.MustParseAddr("10.0.0.3")
	host4 = netip.MustParseAddr("192.0.2.1")
)

func TestElements(t *testing.T) {
	both := []netip.Addr{pod4, pod6}
	for _, c := range []struct {
		what  string
		ports []Port
		ips   []netip.Addr
		want  []element
	}{
		{"both families", []Port{{HostPort: 80, ContainerPort: 8080}}, both,
			[]element{{proto: 6, port: 80, pod: pod4, to: 8080}, {pod: pod4}, {proto: 6, port: 80, pod: pod6, to: 8080}, {pod: pod6}}},
		{"one host address", []Port{{Protocol: "UDP", HostPort: 53, ContainerPort: 53, HostIP: host4}}, both,
			[]element{{host: host4, proto: 17, port: 53, pod: pod4, to: 53}, {pod: pod4}}},
		{"all IPv4 addresses", []Port{{Protocol: "sctp", HostPort: 1, ContainerPort: 2, HostIP: netip.IPv4Unspecified()}}, both,
			[]element{{proto: 132, port: 1, pod: pod4, to: 2}, {pod: pod4}}},
		{"mapped IPv4 address", []Port{{HostPort: 1, ContainerPort: 2, HostIP: netip.MustParseAddr("::ffff:192.0.2.1")}}, both,
			[]element{{host: host4, proto: 6, port: 1, pod: pod4, to: 2}, {pod: pod4}}},
		{"given twice alike", []Port{{HostPort: 1, ContainerPort: 2}, {HostPort: 1, ContainerPort: 2}}, []netip.Addr{pod4},
			[]element{{proto: 6, port: 1, pod: pod4, to: 2}, {pod: pod4}}},
	} {
		got, err := elements(c.ports, c.ips)
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, %v, want %+v", c.what, got, err, c.want)
		}
	}
	for what, ports := range map[string][]Port{
		"protocol": {{Protocol: "icmp", HostPort: 1, ContainerPort: 1}}, "no container port": {{HostPort: 1}},
		"family": {{HostPort: 1, ContainerPort: 1, HostIP: netip.IPv6Loopback()}},
		"twice":  {{HostPort: 1, ContainerPort: 1}, {HostPort: 1, ContainerPort: 2, HostIP: host4}},
	} {
		if got, err := elements(ports, []netip.Addr{pod4}); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v, %v", what, got, err)
		}
	}
}

func TestConflict(t *testing.T) {
	any80 := element{proto: 6, port: 80, pod: pod4, to: 1}
	host80 := element{host: host4, proto: 6, port: 80, pod: pod4, to: 1}
	by := func(e element, pod netip.Addr) element { e.pod = pod; return e }
	for _, c := range []struct {
		what       string
		want, have element
		clash      bool
	}{
		{"same", by(any80, other), any80, true},
		{"own", any80, any80, false},
		{"one address after all", by(host80, other), any80, true},
		{"all after one address", by(any80, other), host80, true},
		{"other protocol", by(element{proto: 17, port: 80, to: 1}, other), any80, false},
		{"other family", by(any80, pod6), any80, false},
		{"other host address", by(element{host: netip.MustParseAddr("192.0.2.9"), proto: 6, port: 80}, other), host80, false},
		{"hairpin entries", element{pod: other}, element{pod: pod4}, false},
	} {
		err := conflict([]element{c.want}, []element{c.have})
		if (err != nil) != c.clash || c.clash && !errors.Is(err, errdefs.ErrAlreadyExists) {
			t.Errorf("%s: %v", c.what, err)
		}
	}
}

func TestEncodeDecode(t *testing.T) {
	s := newSets(nil)
	for _, e := range []element{
		{proto: 6, port: 80, pod: pod4, to: 8080}, {host: host4, proto: 17, port: 53, pod: pod4, to: 53}, {pod: pod4},
		{proto: 132, port: 65535, pod: pod6, to: 1}, {host: netip.IPv6Loopback(), proto: 6, port: 1, pod: pod6, to: 2}, {pod: pod6},
	} {
		set, el := s.encode(e)
		if got, ok := s.decode(set, el); !ok || got != e {
			t.Errorf("%+v became %+v", e, got)
		}
		el.Key = el.Key[:len(el.Key)-1]
		if got, ok := s.decode(set, el); ok {
			t.Errorf("cut off: %+v", got)
		}
	}
}

func TestIntervals(t *testing.T) {
	var ps []netip.Prefix
	for _, s := range []string{"10.0.0.0/8", "10.1.0.0/16", "10.0.0.0/8", "240.0.0.0/4", "fd00::/8", "192.0.2.128/25"} {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	var got []string
	for _, e := range intervals(ps, true) {
		a, _ := netip.AddrFromSlice(e.Key)
		s := a.String()
		if e.IntervalEnd {
			s = "-" + s
		}
		got = append(got, s)
	}
	if want := []string{"10.0.0.0", "-11.0.0.0", "240.0.0.0", "192.0.2.128", "-192.0.3.0"}; !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
