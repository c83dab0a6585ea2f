//go:build linux

package ebpf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
	networking "k8s.io/api/networking/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// alone runs the calling test again in a process with network and mounts of
// its own. It returns true there.
func alone(t *testing.T) bool {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	if os.Getenv("NODEAGENT_TEST_ALONE") != "" {
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), "NODEAGENT_TEST_ALONE=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	} else {
		t.Logf("%s", out)
	}
	return false
}

// site is a "node" with pods and an outside world, all namespaces of ours.
type site struct {
	t       *testing.T
	home    netns.NsHandle
	pods    map[string]*place
	fs      string
	engine  *Engine
	stop    func()
	objects objects.Lists
}

// place is a network namespace with servers in it.
type place struct {
	name  string
	ns    netns.NsHandle
	v4    netip.Addr
	v6    netip.Addr
	iface int // the host's end
	hits  atomic.Int64
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// within runs f on a thread in ns.
func within(ns netns.NsHandle, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

func newSite(t *testing.T) *site {
	s := &site{t: t, pods: map[string]*place{}, fs: filepath.Join(t.TempDir(), "bpf")}
	must(t, syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""))
	var err error
	s.home, err = netns.Get()
	must(t, err)
	sysctl(t, "net/ipv4/ip_forward", "1")
	sysctl(t, "net/ipv6/conf/all/forwarding", "1")
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	must(t, netlink.LinkSetUp(lo))
	for i, name := range []string{"a", "b", "c"} {
		s.pod(name, i+1)
		s.up(s.pods[name])
	}
	s.outside()
	for i := 0; ; i++ { // until addresses are usable
		c, err := s.dial("a", "tcp", s.pods["x"].v6, 80)
		if err == nil {
			c.Close()
			break
		}
		if i > 20 {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if s.stop != nil {
			s.stop()
		}
		_ = syscall.Unmount(s.fs, 0)
	})
	return s
}

func sysctl(t *testing.T, name, value string) {
	t.Helper()
	must(t, os.WriteFile("/proc/sys/"+name, []byte(value), 0))
}

func addr(t *testing.T, l netlink.Link, text string) {
	t.Helper()
	a, err := netlink.ParseAddr(text)
	must(t, err)
	a.Flags = 2 // nodad
	if a.IP.To4() != nil {
		a.Flags = 0
	}
	must(t, netlink.AddrAdd(l, a))
}

func route(t *testing.T, l netlink.Link, dst, via string) {
	t.Helper()
	r := &netlink.Route{LinkIndex: l.Attrs().Index}
	if dst != "" {
		_, n, err := net.ParseCIDR(dst)
		must(t, err)
		r.Dst = n
	}
	if via != "" {
		r.Gw = net.ParseIP(via)
		r.Flags = int(netlink.FLAG_ONLINK)
	} else {
		r.Scope = netlink.SCOPE_LINK
	}
	if err := netlink.RouteAdd(r); err != nil {
		t.Fatalf("route %s via %s: %v", dst, via, err)
	}
}

// wire makes a place joined to the host by a veth, down on the host's side.
func (s *site) wire(name, host string) (*place, netlink.Link) {
	t := s.t
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: host}, PeerName: "eth0"}))
	p := &place{name: name}
	must(t, within(s.home, func() (err error) { p.ns, err = netns.New(); return err }))
	peer, err := netlink.LinkByName("eth0")
	must(t, err)
	must(t, netlink.LinkSetNsFd(peer, int(p.ns)))
	l, err := netlink.LinkByName(host)
	must(t, err)
	p.iface = l.Attrs().Index
	s.pods[name] = p
	return p, l
}

func (s *site) pod(name string, n int) {
	t := s.t
	p, _ := s.wire(name, "h"+name)
	p.v4, p.v6 = netip.AddrFrom4([4]byte{10, 77, 0, byte(n)}), netip.AddrFrom16([16]byte{0xfd, 0x77, 15: byte(n)})
	must(t, within(p.ns, func() error {
		l, err := netlink.LinkByName("eth0")
		must(t, err)
		must(t, netlink.LinkSetUp(l))
		lo, err := netlink.LinkByName("lo")
		must(t, err)
		must(t, netlink.LinkSetUp(lo))
		addr(t, l, p.v4.String()+"/32")
		addr(t, l, p.v6.String()+"/128")
		return nil
	}))
}

// up brings a pod's interface up, as the network does after PodStarting.
func (s *site) up(p *place) {
	t := s.t
	l, err := netlink.LinkByIndex(p.iface)
	must(t, err)
	must(t, netlink.LinkSetUp(l))
	addr(t, l, "169.254.1.1/32")
	addr(t, l, "fe80::1/64")
	route(t, l, p.v4.String()+"/32", "")
	route(t, l, p.v6.String()+"/128", "")
	must(t, within(p.ns, func() error {
		e, err := netlink.LinkByName("eth0")
		must(t, err)
		route(t, e, "169.254.1.1/32", "")
		route(t, e, "0.0.0.0/0", "169.254.1.1")
		route(t, e, "::/0", "fe80::1")
		s.serve(p)
		return nil
	}))
}

func (s *site) outside() {
	t := s.t
	p, l := s.wire("x", "nic0")
	p.v4, p.v6 = netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")
	must(t, netlink.LinkSetUp(l))
	addr(t, l, "192.0.2.1/24")
	addr(t, l, "2001:db8::1/64")
	must(t, within(p.ns, func() error {
		e, err := netlink.LinkByName("eth0")
		must(t, err)
		must(t, netlink.LinkSetUp(e))
		addr(t, e, "192.0.2.2/24")
		addr(t, e, "2001:db8::2/64")
		route(t, e, "0.0.0.0/0", "192.0.2.1")
		route(t, e, "::/0", "2001:db8::1")
		s.serve(p)
		return nil
	}))
	route(t, l, "0.0.0.0/0", "192.0.2.2")
	route(t, l, "::/0", "2001:db8::2")
}

// serve echoes on TCP and UDP ports 80 and 81.
func (s *site) serve(p *place) {
	for _, port := range []int{80, 81} {
		ln, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		must(s.t, err)
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				p.hits.Add(1)
				go func() { _, _ = io.Copy(c, c); c.Close() }()
			}
		}()
		for _, network := range []string{"udp4", "udp6"} {
			u, err := net.ListenPacket(network, fmt.Sprintf(":%d", port))
			must(s.t, err)
			go p.echo(u.(*net.UDPConn), network == "udp6")
		}
	}
}

// echo answers datagrams from the address that was asked.
func (p *place) echo(u *net.UDPConn, six bool) {
	b, oob := make([]byte, 65536), make([]byte, 256)
	if six {
		_ = ipv6.NewPacketConn(u).SetControlMessage(ipv6.FlagDst, true)
	} else {
		_ = ipv4.NewPacketConn(u).SetControlMessage(ipv4.FlagDst, true)
	}
	for {
		n, on, _, from, err := u.ReadMsgUDP(b, oob)
		if err != nil {
			return
		}
		p.hits.Add(1)
		var src []byte
		if six {
			var cm ipv6.ControlMessage
			if cm.Parse(oob[:on]) == nil {
				src = (&ipv6.ControlMessage{Src: cm.Dst}).Marshal()
			}
		} else {
			var cm ipv4.ControlMessage
			if cm.Parse(oob[:on]) == nil {
				src = (&ipv4.ControlMessage{Src: cm.Dst}).Marshal()
			}
		}
		_, _, _ = u.WriteMsgUDP(b[:n], src, from)
	}
}

// dial opens a connection from a place ("" is the node) and sends a byte.
func (s *site) dial(from, network string, to netip.Addr, port uint16) (net.Conn, error) {
	return s.dialFor(from, network, to, port, 400*time.Millisecond)
}

func (s *site) dialFor(from, network string, to netip.Addr, port uint16, limit time.Duration) (net.Conn, error) {
	ns := s.home
	if from != "" {
		ns = s.pods[from].ns
	}
	var c net.Conn
	err := within(ns, func() (err error) {
		c, err = net.DialTimeout(network, netip.AddrPortFrom(to, port).String(), limit)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := talkFor(c, []byte("x"), limit); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func talk(c net.Conn, b []byte) error { return talkFor(c, b, 400*time.Millisecond) }

func talkFor(c net.Conn, b []byte, limit time.Duration) error {
	_ = c.SetDeadline(time.Now().Add(limit))
	if _, err := c.Write(b); err != nil {
		return err
	}
	got := make([]byte, len(b))
	_, err := io.ReadFull(c, got)
	return err
}

// table checks, for TCP and UDP and both families, who reaches whom: lines
// "from to:port yes|no".
func (s *site) table(what, lines string) {
	s.t.Helper()
	for _, line := range strings.Split(strings.TrimSpace(lines), "\n") {
		f := strings.Fields(line)
		from := strings.Replace(f[0], "node", "", 1)
		name, port, _ := strings.Cut(f[1], ":")
		n := uint16(80)
		if port == "81" {
			n = 81
		}
		protos := []string{"tcp", "udp"}
		if len(f) > 3 {
			protos = f[3:]
		}
		for _, proto := range protos {
			for _, to := range []netip.Addr{s.pods[name].v4, s.pods[name].v6} {
				limit := 400 * time.Millisecond // what passes has all the time that a slow machine needs
				if f[2] == "yes" {
					limit = 20 * time.Second
				}
				c, err := s.dialFor(from, proto, to, n, limit)
				if (err == nil) != (f[2] == "yes") {
					s.t.Errorf("%s: %s by %s to %s: %v", what, line, proto, to, err)
				}
				if err == nil {
					c.Close()
				}
			}
		}
	}
}

func (s *site) start(cfg Config) {
	s.t.Helper()
	cfg.BPFFS, cfg.Log = s.fs, slog.New(slog.NewTextHandler(os.Stderr, nil))
	e, err := New(cfg)
	must(s.t, err)
	ctx, cancel := context.WithCancel(s.t.Context())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	s.engine = e
	s.stop = func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Error(err)
		}
		s.stop = nil
	}
}

func (s *site) local(name string) Pod {
	p := s.pods[name]
	return Pod{SandboxID: "sb-" + name, PodKey: objects.PodKey{Namespace: "ns", Name: name}, Created: time.Now(),
		Labels: map[string]string{"app": name}, Interface: p.iface, IPs: []netip.Addr{p.v4, p.v6}}
}

func (s *site) ready(names ...string) {
	s.t.Helper()
	must(s.t, s.engine.Change(s.t.Context(), s.objects.Whole()))
	var live []Pod
	for _, n := range names {
		live = append(live, s.local(n))
	}
	must(s.t, s.engine.Reconcile(s.t.Context(), live))
	st, err := s.engine.Status(s.t.Context())
	must(s.t, err)
	if !st.Ready {
		s.t.Fatalf("not ready: %+v", st)
	}
}

func policies(t *testing.T, text string) []*objects.Policy {
	t.Helper()
	var out []*objects.Policy
	for i, doc := range strings.Split(text, "---") {
		if strings.TrimSpace(doc) == "" {
			continue
		}
		p := &objects.Policy{ObjectMeta: meta.ObjectMeta{Namespace: "ns", Name: fmt.Sprint("p", i)}}
		var spec networking.NetworkPolicySpec
		must(t, yaml.UnmarshalStrict([]byte(doc), &spec))
		p.Spec = spec
		out = append(out, p)
	}
	return out
}

func (s *site) set(text string) {
	s.t.Helper()
	s.objects = objects.Lists{Namespaces: []objects.Namespace{{Name: "ns"}}, Policies: policies(s.t, text)}
	must(s.t, s.engine.Change(s.t.Context(), s.objects.Whole()))
}

const everything = `
a b yes
b a yes
c b yes
a x yes
x b yes
node b yes`

func TestMatrix(t *testing.T) {
	if !alone(t) {
		return
	}
	s := newSite(t)
	s.table("before", everything)
	s.start(Config{})
	s.ready("a", "b", "c")
	s.table("no policy", everything)

	s.set(`podSelector: {matchLabels: {app: b}}`)
	s.table("ingress of b denied", `
a b no
x b no
node b yes
b a yes
b x yes
a c yes`)

	s.set(`
podSelector: {matchLabels: {app: b}}
ingress:
- from: [{podSelector: {matchLabels: {app: a}}}]
  ports: [{port: 80}, {port: 81, protocol: UDP}]`)
	s.table("b takes a on some ports", `
a b yes tcp
a b:81 yes udp
a b no udp
a b:81 no tcp
c b no
x b no
b c yes`)

	s.set(`
podSelector: {matchLabels: {app: a}}
policyTypes: [Egress]
egress:
- to: [{podSelector: {matchLabels: {app: b}}}]
- to: [{ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.128/25]}}, {ipBlock: {cidr: "2001:db8::/32"}}]
  ports: [{port: 81}]`)
	s.table("a reaches b, and x on one port", `
a b yes
a b:81 yes
a c no
a x no
a x:81 yes tcp
a x:81 no udp
b a yes
c a yes
x a yes
node a yes`)

	s.set(`
podSelector: {}
policyTypes: [Ingress, Egress]`)
	s.table("all denied", `
a b no
b c no
x a no
a x no
node a yes`)
	st, err := s.engine.Status(t.Context())
	must(t, err)
	if len(st.Uplinks) != 1 || st.Uplinks[0] != "nic0" {
		t.Errorf("uplinks are %v", st.Uplinks)
	}
	t.Logf("%+v", st.Counters)

	// Other patterns, as a reload gives them: programs go off the NIC and come back.
	if err := s.engine.SetUplinks(t.Context(), []string{"["}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad pattern: %v", err)
	}
	must(t, s.engine.SetUplinks(t.Context(), []string{"none*"}))
	st, err = s.engine.Status(t.Context())
	must(t, err)
	if len(st.Uplinks) != 0 {
		t.Errorf("uplinks are %v", st.Uplinks)
	}
	must(t, s.engine.SetUplinks(t.Context(), []string{"ni?0"}))
	st, err = s.engine.Status(t.Context())
	must(t, err)
	if len(st.Uplinks) != 1 {
		t.Errorf("uplinks are %v", st.Uplinks)
	}
	s.table("denied still", `
x a no
a x no`)
}

// TestRevocation: a connection that was allowed ends when it is no longer, in
// both directions; one that still is goes on, also over a restart.
func TestRevocation(t *testing.T) {
	if !alone(t) {
		return
	}
	s := newSite(t)
	s.start(Config{})
	s.ready("a", "b", "c")
	only := func(from string) string {
		return "podSelector: {matchLabels: {app: b}}\ningress:\n- from: [{podSelector: {matchLabels: {app: " + from + "}}}]"
	}
	s.set(only("a"))
	for _, to := range []netip.Addr{s.pods["b"].v4, s.pods["b"].v6} {
		s.set(only("a"))
		conn, err := s.dial("a", "tcp", to, 80)
		must(t, err)
		out, err := s.dial("b", "tcp", s.pods["c"].v4, 80)
		must(t, err)
		s.set(only("c"))
		if talk(conn, []byte("y")) == nil {
			t.Error("a revoked connection goes on")
		}
		if err := talk(out, []byte("y")); err != nil {
			t.Errorf("a connection that nothing forbids broke: %v", err)
		}
		s.set(only("a"))
		must(t, talk(out, []byte("z")))
		conn.Close()
		out.Close()
	}
}

// TestRestart: with the engine gone policy goes on, and when a new one takes
// over nothing that is allowed breaks and nothing that is not passes.
func TestRestart(t *testing.T) {
	if !alone(t) {
		return
	}
	s := newSite(t)
	s.start(Config{})
	s.objects = objects.Lists{Namespaces: []objects.Namespace{{Name: "ns"}}, Policies: policies(t, `
podSelector: {matchLabels: {app: b}}
ingress:
- from: [{podSelector: {matchLabels: {app: a}}}]
---
podSelector: {matchLabels: {app: a}}
ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]`)}
	s.ready("a", "b", "c")
	conn, err := s.dial("a", "tcp", s.pods["b"].v4, 80)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	flaps := make(chan error, 1)
	go func() { // speaks without a pause
		var n int
		for ctx.Err() == nil {
			if err := talkFor(conn, []byte("x"), 10*time.Second); err != nil {
				flaps <- fmt.Errorf("after %d: %w", n, err)
				return
			}
			n++
		}
		flaps <- nil
	}()
	leaks := make(chan error, 1)
	go func() { // knocks without a pause
		for ctx.Err() == nil {
			var c net.Conn
			err := within(s.pods["c"].ns, func() (err error) {
				c, err = net.DialTimeout("tcp", netip.AddrPortFrom(s.pods["b"].v4, 80).String(), 20*time.Millisecond)
				return err
			})
			if err == nil {
				c.Close()
				leaks <- errors.New("c reached b")
				return
			}
		}
		leaks <- nil
	}()
	for range 4 {
		s.stop()
		s.table("engine gone", "a b yes\nc b no")
		s.start(Config{})
		s.ready("a", "b", "c")
		s.table("engine back", "a b yes\nc b no")
	}
	cancel()
	defer func() {
		s.stop()
		must(t, Clear(s.fs, ""))
		time.Sleep(500 * time.Millisecond) // the kernel lets go of links in its own time
		s.table("cleared", "c b yes")
	}()
	if err := <-flaps; err != nil {
		t.Error(err)
	}
	raw, err := conn.(*net.TCPConn).SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		must(t, err)
		if info.Total_retrans > info.Dsack_dups { // else only late, on a slow machine
			t.Errorf("%d segments were sent again, %d of them in vain: packets were dropped", info.Total_retrans, info.Dsack_dups)
		}
	}))
	if err := <-leaks; err != nil {
		t.Error(err)
	}
}

// TestFirstPacket: a pod whose policy forbids it never gets a packet out or in,
// from the moment its interface is up; and a start without an engine that is
// ready fails, closed.
func TestFirstPacket(t *testing.T) {
	if !alone(t) {
		return
	}
	s := newSite(t)
	s.start(Config{StartWait: 300 * time.Millisecond})
	s.objects = objects.Lists{Namespaces: []objects.Namespace{{Name: "ns"}}, Policies: policies(t, `
podSelector: {matchLabels: {app: d}}
policyTypes: [Ingress, Egress]`)}
	s.pod("d", 9)
	if err := s.engine.PodStarting(t.Context(), s.local("d")); err == nil {
		t.Error("a pod starts though the engine knows nothing yet")
	}
	s.ready("a", "b", "c")
	must(t, s.engine.PodStarting(t.Context(), s.local("d")))
	d := s.pods["d"]
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { // packets in both directions before, while and after it goes up
		defer close(done)
		for ctx.Err() == nil {
			_ = within(d.ns, func() error {
				if c, err := net.Dial("udp", netip.AddrPortFrom(s.pods["a"].v4, 80).String()); err == nil {
					_, _ = c.Write([]byte("out"))
					c.Close()
				}
				return nil
			})
			_ = within(s.pods["x"].ns, func() error {
				if c, err := net.Dial("udp", netip.AddrPortFrom(d.v4, 80).String()); err == nil {
					_, _ = c.Write([]byte("in"))
					c.Close()
				}
				return nil
			})
		}
	}()
	time.Sleep(50 * time.Millisecond)
	s.up(d)
	time.Sleep(300 * time.Millisecond)
	cancel()
	<-done
	if n := s.pods["a"].hits.Load() + d.hits.Load(); n != 0 {
		t.Errorf("%d packets came through", n)
	}
	s.table("d isolated", "d a no\na d no\nnode d yes\na b yes")
	must(t, s.engine.PodGone(t.Context(), "sb-d"))
	s.table("d gone", "a b yes")
}
