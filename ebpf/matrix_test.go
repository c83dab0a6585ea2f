//go:build linux

package ebpf

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// nft replaces the tables of the node called svc.
func (s *site) nft(rules string) {
	s.t.Helper()
	for _, f := range []string{"ip", "ip6"} {
		text := fmt.Sprintf("table %s svc {}\ndelete table %s svc\ntable %s svc {\n%s\n}\n", f, f, f, s.family(rules, f))
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(text)
		if out, err := cmd.CombinedOutput(); err != nil {
			s.t.Fatalf("nft: %v\n%s\n%s", err, out, text)
		}
	}
}

// family writes rules for a family: $vip:N the N-th service address, $b the
// address of pod b, $node and $outside those of the node and of x.
func (s *site) family(rules, family string) string {
	pick := func(v4, v6 string) string {
		if family == "ip" {
			return v4
		}
		return v6
	}
	for name, p := range s.pods {
		rules = strings.ReplaceAll(rules, "$"+name+":", pick(p.v4.String()+":", "["+p.v6.String()+"]:"))
	}
	return strings.NewReplacer("FAMILY", family, "$vip1", pick("10.96.0.1", "fd96::1"), "$vip2", pick("10.96.0.2", "fd96::2"), "$node", pick("192.0.2.1", "2001:db8::1")).Replace(rules)
}

// reach checks one flow on TCP and UDP.
func (s *site) reach(what, from string, to []netip.Addr, port uint16, want bool) {
	s.t.Helper()
	for _, ip := range to {
		for _, network := range []string{"tcp", "udp"} {
			c, err := s.dial(from, network, ip, port)
			if (err == nil) != want {
				s.t.Errorf("%s: %s by %s to %s port %d: %v", what, from, network, ip, port, err)
			}
			if err == nil {
				c.Close()
			}
		}
	}
}

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range list {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

const (
	services = `
chain pre { type nat hook prerouting priority -100;
 FAMILY daddr $vip1 meta l4proto {tcp, udp} th dport 80 dnat to $b:80
 FAMILY daddr $vip2 meta l4proto {tcp, udp} th dport 80 dnat to $c:80
 FAMILY daddr $node meta l4proto {tcp, udp} th dport 8080 dnat to $b:80
}
chain out { type nat hook output priority -100;
 FAMILY daddr $vip1 meta l4proto {tcp, udp} th dport 80 dnat to $b:80
}`
	masquerade = `
chain post { type nat hook postrouting priority 100;
 ct status dnat masquerade
}`
	onlyA = `
podSelector: {matchLabels: {app: b}}
ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]`
)

// TestServices: pods are judged by who they are and by where the connection
// ends, whatever nftables makes of addresses in between.
func TestServices(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("install nftables")
	}
	if !alone(t) {
		return
	}
	s := newSite(t)
	s.start(Config{Services: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd96::/112")}})
	s.ready("a", "b", "c")
	vip1, vip2, node := addrs("10.96.0.1", "fd96::1"), addrs("10.96.0.2", "fd96::2"), addrs("192.0.2.1", "2001:db8::1")
	for _, masq := range []string{"", masquerade} {
		what := map[bool]string{true: "translated", false: "translated and masqueraded"}[masq == ""]
		s.nft(services + masq)
		s.set("")
		s.reach(what+", no policy", "a", vip1, 80, true)
		s.reach(what+", no policy", "x", node, 8080, true)

		s.set(onlyA)
		s.reach(what+", ingress", "a", vip1, 80, true)
		s.reach(what+", ingress", "c", vip1, 80, false)
		s.reach(what+", ingress, the node itself", "", vip1, 80, true)
		s.reach(what+", ingress, host port", "x", node, 8080, false)
		if masq != "" {
			s.reach(what+", hairpin", "b", vip1, 80, true)
		}

		s.set(`
podSelector: {matchLabels: {app: a}}
policyTypes: [Egress]
egress: [{to: [{podSelector: {matchLabels: {app: b}}}], ports: [{port: 80}, {port: 80, protocol: UDP}]}]`)
		s.reach(what+", egress", "a", vip1, 80, true)
		s.reach(what+", egress", "a", vip2, 80, false)
		s.reach(what+", egress", "c", vip2, 80, masq != "") // hairpin needs masquerade
	}
	s.nft(services)
	s.set(`
podSelector: {matchLabels: {app: b}}
ingress: [{from: [{ipBlock: {cidr: 192.0.2.2/32}}, {ipBlock: {cidr: "2001:db8::2/128"}}]}]`)
	s.reach("host port, the client's address", "x", node, 8080, true)
	s.reach("host port, the client's address", "a", vip1, 80, false)
}

// remote makes x a second host with a pod on it, reached through the NIC.
func (s *site) remote() []netip.Addr {
	t, x := s.t, s.pods["x"]
	must(t, within(x.ns, func() error {
		lo, err := netlink.LinkByName("lo")
		must(t, err)
		must(t, netlink.LinkSetUp(lo))
		addr(t, lo, "10.88.0.5/32")
		addr(t, lo, "fd88::5/128")
		return nil
	}))
	nic, err := netlink.LinkByName("nic0")
	must(t, err)
	route(t, nic, "10.88.0.0/24", "192.0.2.2")
	route(t, nic, "fd88::/64", "2001:db8::2")
	return addrs("10.88.0.5", "fd88::5")
}

// from checks TCP and UDP from one of x's addresses to b.
func (s *site) from(what string, src []netip.Addr, want bool) {
	s.t.Helper()
	for i, to := range []netip.Addr{s.pods["b"].v4, s.pods["b"].v6} {
		for _, network := range []string{"tcp", "udp"} {
			var local net.Addr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(src[i], 0))
			if network == "udp" {
				local = net.UDPAddrFromAddrPort(netip.AddrPortFrom(src[i], 0))
			}
			d := net.Dialer{LocalAddr: local, Timeout: 400 * time.Millisecond}
			var c net.Conn
			err := within(s.pods["x"].ns, func() (err error) {
				c, err = d.Dial(network, netip.AddrPortFrom(to, 80).String())
				return err
			})
			if err == nil {
				err = talk(c, []byte("x"))
				c.Close()
			}
			if (err == nil) != want {
				s.t.Errorf("%s: by %s from %s: %v", what, network, src[i], err)
			}
		}
	}
}

// change tells the engine of pods elsewhere.
func (s *site) change(c objects.Change) {
	s.t.Helper()
	must(s.t, s.engine.Change(s.t.Context(), c))
}

func (s *site) elsewhere(name string, created int64, app string, ips []netip.Addr, more func(*objects.Pod)) {
	s.t.Helper()
	p := &objects.Pod{PodKey: objects.PodKey{Namespace: "ns", Name: name}, UID: name, Created: created, Labels: map[string]string{"app": app}, IPs: ips}
	if more != nil {
		more(p)
	}
	var c objects.Change
	c.Pods.Set(p.PodKey, p)
	s.change(c)
}

// TestRemoteHost: pods of another host are peers by their labels for as long
// as they live and own their address; those on its own network are not.
func TestRemoteHost(t *testing.T) {
	if !alone(t) {
		return
	}
	s := newSite(t)
	there, host := s.remote(), addrs("192.0.2.2", "2001:db8::2")
	s.start(Config{})
	s.ready("a", "b", "c")
	s.set(`
podSelector: {matchLabels: {app: b}}
ingress: [{from: [{podSelector: {matchLabels: {app: r}}}]}]
---
podSelector: {matchLabels: {app: a}}
policyTypes: [Egress]
egress: [{to: [{podSelector: {matchLabels: {app: r}}}]}]`)
	check := func(what string, want bool) {
		t.Helper()
		s.from(what, there, want)
		s.reach(what, "a", there, 80, want)
	}
	check("nobody's address", false)
	s.elsewhere("r", 1, "r", there, nil)
	check("a pod's address", true)
	s.from("its host's address", host, false)
	s.reach("its host's address", "a", host, 80, false)
	s.elsewhere("r", 1, "other", there, nil)
	check("other labels", false)
	s.elsewhere("r", 1, "r", there, nil)
	check("labels again", true)
	s.elsewhere("r", 1, "r", there, func(p *objects.Pod) { p.Finished = true })
	check("finished", false)
	s.elsewhere("new", 2, "r", there, nil)
	check("a new pod with its address", true)
	s.elsewhere("r", 1, "other", there, nil) // says it again, long after
	check("the younger owns it", true)
	var gone objects.Change
	gone.Pods.Delete(objects.PodKey{Namespace: "ns", Name: "r"})
	s.change(gone)
	check("the older is deleted", true)
	s.elsewhere("onhost", 3, "r", host, func(p *objects.Pod) { p.HostNetwork = true })
	s.from("a pod on the host's network", host, false)
	s.reach("a pod on the host's network", "a", host, 80, false)
}

// TestOwnNode: a pod that may not send anywhere reaches its own node, and is
// reached by it.
func TestOwnNode(t *testing.T) {
	if !alone(t) {
		return
	}
	s := newSite(t)
	s.serve(&place{name: "node"})
	s.start(Config{})
	s.ready("a", "b", "c")
	s.set("podSelector: {}\npolicyTypes: [Ingress, Egress]")
	s.reach("its own node", "a", addrs("192.0.2.1", "2001:db8::1", "169.254.1.1"), 80, true)
	s.reach("another host", "a", addrs("192.0.2.2", "2001:db8::2"), 80, false)
	s.table("from its node", "node a yes\nnode b yes\na b no")
}

// TestLargePackets: fragments of allowed datagrams pass, of others none does,
// and a path that is narrower than the pod's interface is found.
func TestLargePackets(t *testing.T) {
	if !alone(t) {
		return
	}
	s := newSite(t)
	s.start(Config{})
	s.ready("a", "b", "c")
	s.set(onlyA + `
---
podSelector: {matchLabels: {app: a}}
policyTypes: [Ingress, Egress]
egress: [{to: [{podSelector: {matchLabels: {app: b}}}, {ipBlock: {cidr: 192.0.2.0/24}}, {ipBlock: {cidr: "2001:db8::/32"}}]}]`)
	big := bytes.Repeat([]byte("fragment"), 1000) // six packets
	for _, to := range []netip.Addr{s.pods["b"].v4, s.pods["b"].v6} {
		for from, want := range map[string]bool{"a": true, "c": false} {
			var c net.Conn
			must(t, within(s.pods[from].ns, func() (err error) {
				c, err = net.Dial("udp", netip.AddrPortFrom(to, 80).String())
				return err
			}))
			err := talkFor(c, big, time.Duration(map[bool]int{true: 20000, false: 400}[want])*time.Millisecond)
			if (err == nil) != want {
				t.Errorf("a large datagram from %s to %s: %v", from, to, err)
			}
			c.Close()
		}
	}
	var conns []net.Conn
	for _, to := range []netip.Addr{s.pods["x"].v4, s.pods["x"].v6} {
		c, err := s.dial("a", "tcp", to, 80)
		must(t, err)
		defer c.Close()
		conns = append(conns, c)
	}
	// Both ends: a veth drops what is longer than its peer takes, without a word.
	// Now: openings over a narrow link would agree on small segments.
	narrow := func(name string) func() error {
		return func() error {
			l, err := netlink.LinkByName(name)
			must(t, err)
			return netlink.LinkSetMTU(l, 1300)
		}
	}
	must(t, within(s.home, narrow("nic0")))
	must(t, within(s.pods["x"].ns, narrow("eth0")))
	for _, c := range conns {
		if err := talkFor(c, bytes.Repeat([]byte("much"), 20000), 30*time.Second); err != nil {
			t.Errorf("much to %s over a narrow path: %v", c.RemoteAddr(), err)
		}
	}
}

// TestSelfCheck: flows are judged again, and when the tables are not what the
// objects say that is counted and logged.
func TestSelfCheck(t *testing.T) {
	if !alone(t) {
		return
	}
	s := newSite(t)
	s.start(Config{})
	s.ready("a", "b", "c")
	s.set(onlyA)
	until := func(what string, ok func(Status) bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; {
			if c, err := s.dial("a", "tcp", s.pods["b"].v4, 80); err == nil {
				c.Close()
			}
			st, err := s.engine.Status(t.Context())
			must(t, err)
			if ok(st) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s: %d checked, %d drift", what, st.Checked, st.Drift)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	until("checked", func(st Status) bool { return st.Checked > 2 && st.Drift == 0 })
	// What is known changes behind the compiler's back: from now on the tables are wrong.
	must(t, s.engine.call(t.Context(), false, func(st *state) error {
		st.known.policies = map[objects.PodKey]*objects.Policy{}
		for _, p := range policies(t, "podSelector: {matchLabels: {app: b}}") {
			st.known.policies[objects.PodKey{Namespace: p.Namespace, Name: p.Name}] = p
		}
		return nil
	}))
	until("drift", func(st Status) bool { return st.Drift > 0 })
	ans, err := s.engine.Why(context.Background(), Question{From: "ns/a", To: "ns/b", Protocol: 6, Port: 80})
	must(t, err)
	if len(ans.Verdicts) != 2 || !ans.Verdicts[1].Disagreement {
		t.Errorf("why does not see it: %+v", ans)
	}
}
