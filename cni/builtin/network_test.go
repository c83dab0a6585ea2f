package builtin

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/cni/lab"
	"github.com/nodeagent/nodeagent/cni/nat"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func sysctl(t *testing.T, path, key, value string) {
	t.Helper()
	lab.In(t, path, func() error { return os.WriteFile("/proc/sys/"+key, []byte(value), 0) })
}

// heldBy counts the address records of each sandbox.
func heldBy(t *testing.T, n *Network) map[string]int {
	t.Helper()
	recs, broken, err := n.pool.Held(n.cfg.Name)
	if err != nil || len(broken) > 0 {
		t.Fatal(err, broken)
	}
	got := map[string]int{}
	for _, r := range recs {
		got[r.Sandbox]++
	}
	return got
}

func TestBeforeUp(t *testing.T) {
	l := lab.New(t)
	var refuse error
	var seen []netip.Addr
	n := newNetwork(t, l, func(c *Config) {
		c.BeforeUp = func(_ context.Context, sandbox string, index int, ips []netip.Addr) error {
			seen = ips
			lab.In(t, l.Node, func() error {
				link, err := netlink.LinkByIndex(index)
				if err != nil {
					return err
				}
				if link.Attrs().Flags&net.FlagUp != 0 || !strings.HasPrefix(link.Attrs().Name, "na") {
					t.Errorf("link %s, flags %s", link.Attrs().Name, link.Attrs().Flags)
				}
				return nil
			})
			if sandbox == "" {
				t.Error("no sandbox")
			}
			return refuse
		}
	})
	a := newPod(t, l, n, "a")
	if !slices.Equal(seen, a.IPs) {
		t.Errorf("hook saw %v, pod has %v", seen, a.IPs)
	}
	refuse = errors.New("no policy")
	_, err := attachPorts(t, l, n, "b", nat.Port{HostPort: 80, ContainerPort: 80})
	if !errors.Is(err, refuse) {
		t.Errorf("error %v", err)
	}
	if got := len(l.Links("na")); got != 1 {
		t.Errorf("%d links", got)
	}
	if held := heldBy(t, n); len(held) != 1 {
		t.Errorf("held: %v", held)
	}
	if rules := ruleset(t, l); strings.Contains(rules, "tcp . 80") {
		t.Errorf("host port left: %s", rules)
	}
}

// TestCancelled ends the context in the hook, the last moment that counts.
func TestCancelled(t *testing.T) {
	l := lab.New(t)
	ctx, cancel := context.WithCancel(context.Background())
	n := newNetwork(t, l, func(c *Config) {
		c.BeforeUp = func(context.Context, string, int, []netip.Addr) error { cancel(); return nil }
	})
	path := l.Netns("a")
	if _, err := n.Attach(ctx, Attachment{SandboxID: "a", Netns: path, Key: path}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if got := l.Links("na"); len(got)+len(heldBy(t, n)) > 0 {
		t.Errorf("left: %v, %v", got, heldBy(t, n))
	}
}

func TestMTUAndNames(t *testing.T) {
	l := lab.New(t).WithOutside(1400)
	n := newNetwork(t, l, nil)
	a := newPod(t, l, n, "a")
	lab.In(t, a.Netns, func() error {
		link, err := netlink.LinkByName("eth0")
		if err == nil && link.Attrs().MTU != 1400 {
			t.Errorf("MTU %d", link.Attrs().MTU)
		}
		return err
	})
	lab.In(t, l.Node, func() error {
		link, err := netlink.LinkByName(a.HostInterface)
		if err != nil {
			return err
		}
		if alias := link.Attrs().Alias; !strings.Contains(alias, "instance=test") || !strings.Contains(alias, "sandbox=sandbox-a") {
			t.Errorf("alias %q", alias)
		}
		if len(a.HostInterface) > 15 || a.HostInterface != n.LinkName(a.Key) {
			t.Errorf("name %q", a.HostInterface)
		}
		return nil
	})
	other := newNetwork(t, l, func(c *Config) { c.Name = "other"; c.RootDir += "2" })
	if other.LinkName(a.Key) == n.LinkName(a.Key) || other.group == n.group {
		t.Error("two instances share marks")
	}
	if err := other.Reconcile(context.Background(), nil); err != nil {
		t.Error(err)
	}
	if err := n.Check(context.Background(), a.Attachment, a.IPs); err != nil {
		t.Errorf("another instance's reconciliation: %v", err)
	}
}

func TestNoIPv6(t *testing.T) {
	t.Run("host's new links", func(t *testing.T) {
		l := lab.New(t)
		sysctl(t, l.Node, "net/ipv6/conf/default/disable_ipv6", "1")
		if a := newPod(t, l, newNetwork(t, l, nil), "a"); len(a.IPs) != 1 {
			t.Errorf("addresses %v", a.IPs)
		}
	})
	t.Run("host", func(t *testing.T) {
		l := lab.New(t)
		sysctl(t, l.Node, "net/ipv6/conf/all/disable_ipv6", "1")
		sysctl(t, l.Node, "net/ipv6/conf/default/disable_ipv6", "1")
		n := newNetwork(t, l, nil)
		a, b := newPod(t, l, n, "a"), newPod(t, l, n, "b")
		if len(a.IPs) != 1 || !a.IPs[0].Is4() {
			t.Fatalf("addresses %v", a.IPs)
		}
		l.Echo(b.Netns, "tcp", b.at(0, 7))
		if _, err := lab.Ask(a.Netns, "tcp", b.at(0, 7)); err != nil {
			t.Error(err)
		}
		only6 := newNetwork(t, l, func(c *Config) {
			c.Name, c.RootDir, c.PodCIDRs = "six", c.RootDir+"6", []netip.Prefix{netip.MustParsePrefix("fd06::/64")}
		})
		if err := only6.Status(context.Background()); !errors.Is(err, errdefs.ErrFailedPrecondition) {
			t.Errorf("IPv6 ranges on a host without: %v", err)
		}
	})
	for _, when := range []string{"before", "after prewire"} {
		t.Run("pod "+when, func(t *testing.T) {
			l := lab.New(t)
			n := newNetwork(t, l, nil)
			path := l.Netns("a")
			if when != "before" {
				if err := n.Prewire(context.Background(), path); err != nil {
					t.Fatal(err)
				}
			}
			sysctl(t, path, "net/ipv6/conf/all/disable_ipv6", "1")
			sysctl(t, path, "net/ipv6/conf/default/disable_ipv6", "1")
			got, err := n.Attach(context.Background(), Attachment{SandboxID: "a", Netns: path, Key: path})
			if err != nil {
				t.Fatal(err)
			}
			if len(got.IPs) != 1 || heldBy(t, n)["a"] != 1 {
				t.Errorf("addresses %v, held %v", got.IPs, heldBy(t, n))
			}
			if err := lab.Ping(path, n.node.src[0]); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestHostKeepsRouterAdvertisements(t *testing.T) {
	l := lab.New(t).WithOutside(1500)
	sysctl(t, l.Node, "net/ipv6/conf/uplink/accept_ra", "1")
	n := newNetwork(t, l, nil)
	if err := n.Status(context.Background()); err != nil {
		t.Fatal(err)
	}
	if v := n.readSysctl("net/ipv6/conf/uplink/accept_ra"); v != "2" {
		t.Errorf("accept_ra %s: the host would lose its default route", v)
	}
	if n.readSysctl("net/ipv6/conf/all/forwarding") != "1" || n.readSysctl("net/ipv4/ip_forward") != "1" {
		t.Error("no forwarding")
	}
}

func TestOverlap(t *testing.T) {
	l := lab.New(t).WithOutside(1500)
	n := newNetwork(t, l, func(c *Config) { c.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("192.0.0.0/16")} })
	err := n.Status(context.Background())
	if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "192.0.2.1/24") {
		t.Errorf("error %v", err)
	}
}

func TestExhaustedAndSeveralRanges(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l, func(c *Config) {
		c.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.1.0.0/30"), netip.MustParsePrefix("10.2.0.0/30")}
		c.Quarantine = time.Hour
	})
	a, b := newPod(t, l, n, "a"), newPod(t, l, n, "b")
	if a.IPs[0] == b.IPs[0] {
		t.Error("same address twice")
	}
	l.Echo(b.Netns, "tcp", b.at(0, 7))
	if _, err := lab.Ask(a.Netns, "tcp", b.at(0, 7)); err != nil {
		t.Error(err)
	}
	_, err := attachPorts(t, l, n, "c")
	if !errors.Is(err, errdefs.ErrResourceExhausted) {
		t.Errorf("error %v", err)
	}
	t.Log(err)
	if got := len(l.Links("na")); got != 2 {
		t.Errorf("%d links", got)
	}
}

func TestSetPodCIDRs(t *testing.T) {
	l := lab.New(t).WithOutside(1500)
	ctx := context.Background()
	configured := []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}
	set := []netip.Prefix{netip.MustParsePrefix("10.2.0.0/24"), netip.MustParsePrefix("fd02::/64")}
	open := func() *Network { return newNetwork(t, l, func(c *Config) { c.PodCIDRs = configured }) }
	n := open()
	a := newPod(t, l, n, "a")
	for _, bad := range [][]netip.Prefix{nil, {netip.MustParsePrefix("10.2.0.1/24")}, {set[0], set[0]}, {netip.MustParsePrefix("224.0.0.0/8")}} {
		if err := n.SetPodCIDRs(ctx, bad); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%v: error %v", bad, err)
		}
	}
	if err := n.SetPodCIDRs(ctx, set); err != nil {
		t.Fatal(err)
	}
	b := newPod(t, l, n, "b")
	if len(b.IPs) != 2 || !set[0].Contains(b.IPs[0]) {
		t.Errorf("addresses %v", b.IPs)
	}
	l.Echo(l.Outside, "tcp", "192.0.2.2:7")
	l.Echo(b.Netns, "tcp", b.at(0, 7))
	if peer, err := lab.Ask(a.Netns, "tcp", b.at(0, 7)); err != nil || peer != a.IPs[0].String() {
		t.Errorf("between ranges: %q, %v", peer, err)
	}
	for _, p := range []pod{a, b} {
		if peer, err := lab.Ask(p.Netns, "tcp", "192.0.2.2:7"); err != nil || peer != "192.0.2.1" {
			t.Errorf("masquerade of %v: %q, %v", p.IPs, peer, err)
		}
	}
	// The ranges set outlive the process although others are configured.
	n.Close()
	n = open()
	if !slices.Equal(n.PodCIDRs(), set) {
		t.Errorf("after a restart: %v", n.PodCIDRs())
	}
	if err := n.Reconcile(ctx, []Live{{Attachment: a.Attachment, IPs: a.IPs}}); err != nil {
		t.Fatal(err)
	}
	if peer, err := lab.Ask(a.Netns, "tcp", "192.0.2.2:7"); err != nil || peer != "192.0.2.1" {
		t.Errorf("masquerade after a restart: %q, %v", peer, err)
	}
	if held := heldBy(t, n); len(held) != 1 || held["sandbox-a"] != 1 {
		t.Errorf("held %v", held)
	}
	// When nobody has an address of a former range, it is forgotten.
	if err := n.Reconcile(ctx, nil); err != nil {
		t.Fatal(err)
	}
	lab.In(t, l.Node, func() error {
		out, err := exec.Command("sh", "-c", "ip addr show dev lo; ip route").CombinedOutput()
		if strings.Contains(string(out), "10.1.0") {
			t.Errorf("former range left:\n%s", out)
		}
		return err
	})
	// What is configured anew counts again.
	n.Close()
	configured = []netip.Prefix{netip.MustParsePrefix("10.3.0.0/24")}
	if n = open(); !slices.Equal(n.PodCIDRs(), configured) {
		t.Errorf("configured anew: %v", n.PodCIDRs())
	}
}

func TestRepair(t *testing.T) {
	l := lab.New(t).WithOutside(1500)
	n := newNetwork(t, l, nil)
	srv, err := attachPorts(t, l, n, "server", nat.Port{HostPort: 8080, ContainerPort: 80})
	if err != nil {
		t.Fatal(err)
	}
	before := ruleset(t, l)
	lab.In(t, l.Node, func() error { return exec.Command("nft", "flush", "ruleset").Run() })
	n.care()
	// nft lists chains in the order of their handles' hash: any.
	if after := ruleset(t, l); !slices.Equal(slices.Sorted(strings.Lines(after)), slices.Sorted(strings.Lines(before))) {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	// Without waiting for the next look: adding a port repairs too.
	lab.In(t, l.Node, func() error { return exec.Command("nft", "flush", "ruleset").Run() })
	if _, err := attachPorts(t, l, n, "second", nat.Port{HostPort: 8081, ContainerPort: 80}); err != nil {
		t.Error(err)
	}
	l.Echo(srv.Netns, "tcp", srv.at(0, 80))
	if _, err := lab.Ask(l.Outside, "tcp", "192.0.2.1:8080"); err != nil {
		t.Error(err)
	}
	// A fresh process restores what it is told is live.
	lab.In(t, l.Node, func() error { return exec.Command("nft", "flush", "ruleset").Run() })
	again := newNetwork(t, l, nil)
	if err := again.Reconcile(context.Background(), []Live{{Attachment: srv.Attachment, IPs: srv.IPs}}); err != nil {
		t.Error(err)
	}
	if _, err := lab.Ask(l.Outside, "tcp", "192.0.2.1:8080"); err != nil {
		t.Error(err)
	}
}

// TestStrictReversePath: the strictest setting of the host changes nothing for honest pods, and a pod cannot send
// from another's address.
func TestStrictReversePath(t *testing.T) {
	l := lab.New(t).WithOutside(1500)
	sysctl(t, l.Node, "net/ipv4/conf/all/rp_filter", "1")
	n := newNetwork(t, l, nil)
	client := newPod(t, l, n, "client")
	srv, err := attachPorts(t, l, n, "server", nat.Port{HostPort: 8080, ContainerPort: 80}, nat.Port{Protocol: "udp", HostPort: 8080, ContainerPort: 80})
	if err != nil {
		t.Fatal(err)
	}
	l.Echo(srv.Netns, "tcp", srv.at(0, 80))
	l.Echo(srv.Netns, "udp", srv.at(0, 80))
	for _, c := range []struct{ from, to string }{
		{client.Netns, srv.at(0, 80)}, {l.Node, "127.0.0.1:8080"}, {srv.Netns, "192.0.2.1:8080"}, {l.Outside, "192.0.2.1:8080"},
	} {
		if _, err := lab.Ask(c.from, "tcp", c.to); err != nil {
			t.Errorf("%s to %s: %v", filepath.Base(c.from), c.to, err)
		}
	}
	sysctl(t, l.Node, "net/ipv4/conf/all/rp_filter", "0")
	lab.In(t, client.Netns, func() error { return exec.Command("ip", "addr", "add", "10.213.99.99/32", "dev", "eth0").Run() })
	lab.In(t, srv.Netns, func() error {
		return exec.Command("ip", "route", "add", "10.213.99.99", "via", "169.254.1.1", "onlink", "dev", "eth0").Run()
	})
	var pc net.PacketConn
	lab.In(t, srv.Netns, func() (err error) {
		pc, err = net.ListenPacket("udp", srv.at(0, 81))
		return err
	})
	defer pc.Close()
	_, _ = lab.AskFrom(client.Netns, "udp", "10.213.99.99:5555", srv.at(0, 81))
	_ = pc.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, from, err := pc.ReadFrom(make([]byte, 99)); err == nil {
		t.Errorf("%d bytes with the forged source %s arrived", n, from)
	}
}

func TestWarm(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l, nil)
	ctx := context.Background()
	first := newPod(t, l, n, "first") // opens what stays open
	if err := n.Detach(ctx, first.Attachment, first.IPs); err != nil {
		t.Fatal(err)
	}
	fds := openFDs(t)
	var paths []string
	for i := range 4 {
		paths = append(paths, l.Netns(fmt.Sprint("warm", i)))
		for range 2 { // once more is no fault
			if err := n.Prewire(ctx, paths[i]); err != nil {
				t.Fatal(err)
			}
		}
	}
	// A reconciliation in between leaves warm namespaces of this process alone.
	if err := n.Reconcile(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if got := len(l.Links("na")); got != 4 {
		t.Fatalf("%d links", got)
	}
	got, err := n.Attach(ctx, Attachment{SandboxID: "a", Netns: paths[0], Key: paths[0]})
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.Ping(l.Node, got.IPs[1]); err != nil {
		t.Error(err)
	}
	if _, err := n.Attach(ctx, Attachment{SandboxID: "b", Netns: paths[0], Key: paths[0]}); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("second attachment of a namespace: %v", err)
	}
	if err := lab.Ping(l.Node, got.IPs[0]); err != nil {
		t.Errorf("the second attachment broke the first: %v", err)
	}
	if err := n.Unwire(ctx, paths[1]); err != nil {
		t.Error(err)
	}
	if err := n.Unwire(ctx, paths[1]); err != nil {
		t.Error(err)
	}
	lab.Unpin(paths[2])
	if err := n.Unwire(ctx, paths[2]); err != nil {
		t.Error(err)
	}
	// A fresh process knows of no warm namespace: their links go.
	again := newNetwork(t, l, nil)
	if err := again.Reconcile(ctx, []Live{{Attachment: Attachment{SandboxID: "a", Netns: paths[0], Key: paths[0]}, IPs: got.IPs}}); err != nil {
		t.Error(err)
	}
	if got := l.Links("na"); len(got) != 1 {
		t.Errorf("links %v", got)
	}
	again.Close()
	_ = n.Unwire(ctx, paths[3])
	if now := openFDs(t); now > fds {
		t.Errorf("%d descriptors, %d before", now, fds)
	}
	if err := n.Prewire(ctx, filepath.Join(l.Dir, "none")); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("no namespace: %v", err)
	}
}

func openFDs(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func TestRunDeletesLinks(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l, nil)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = n.Run(ctx) }()
	for !n.running.Load() {
		time.Sleep(time.Millisecond)
	}
	var pods []pod
	for i := range 8 {
		pods = append(pods, newPod(t, l, n, fmt.Sprint("p", i)))
	}
	for _, p := range pods[:4] {
		if err := n.Detach(ctx, p.Attachment, p.IPs); err != nil {
			t.Error(err)
		}
	}
	for deadline := time.Now().Add(5 * time.Second); len(l.Links("na")) > 4 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	if got := len(l.Links("na")); got != 4 {
		t.Errorf("%d links", got)
	}
	for _, p := range pods[4:] {
		if err := n.Detach(ctx, p.Attachment, p.IPs); err != nil {
			t.Error(err)
		}
	}
	cancel()
	<-done
	if got := l.Links("na"); len(got) > 0 {
		t.Errorf("links left at the end of Run: %v", got)
	}
}

func TestConfigFaultsAreReportedTogether(t *testing.T) {
	_, err := New(Config{MTU: 7, StateDir: "x", RootDir: "/y", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/31"), netip.MustParsePrefix("127.0.0.0/8")}})
	if !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Fatal(err)
	}
	for _, want := range []string{"name", "StateDir", "MTU 7", "10.0.0.0/31", "127.0.0.0/8"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing in: %v", want, err)
		}
	}
}

// TestFirstPacket: what is sent to the pod, and what it answers, right after Attach is not lost. TCP would hide a loss
// behind a second's wait.
func TestFirstPacket(t *testing.T) {
	l := lab.New(t).WithOutside(1500)
	n := newNetwork(t, l, nil)
	for i := range 20 {
		p, err := attachPorts(t, l, n, fmt.Sprint("p", i), nat.Port{HostPort: 8080, ContainerPort: 7})
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range []string{p.at(1, 7), p.at(0, 7), "[::1]:8080", "127.0.0.1:8080", "[2001:db8::1]:8080", "192.0.2.1:8080"} {
			var ln net.Listener
			lab.In(t, p.Netns, func() (err error) {
				ln, err = net.Listen("tcp", ":7")
				return err
			})
			lab.In(t, l.Node, func() error {
				c, err := net.DialTimeout("tcp", at, 800*time.Millisecond)
				if err != nil {
					t.Errorf("pod %d: %v", i, err)
					return nil
				}
				return c.Close()
			})
			ln.Close()
		}
		if err := n.Detach(context.Background(), p.Attachment, p.IPs); err != nil {
			t.Fatal(err)
		}
	}
}

// TestLateSecondDetach: a pod is removed a second time after another got its address and its host port.
func TestLateSecondDetach(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l, func(c *Config) {
		c.PodCIDRs, c.Quarantine = []netip.Prefix{netip.MustParsePrefix("10.1.0.0/30")}, time.Nanosecond
	})
	ctx := context.Background()
	port := nat.Port{HostPort: 8080, ContainerPort: 80}
	a, err := attachPorts(t, l, n, "a", port)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Detach(ctx, a.Attachment, a.IPs); err != nil {
		t.Fatal(err)
	}
	b, err := attachPorts(t, l, n, "b", port)
	if err != nil {
		t.Fatal(err)
	}
	for _, ips := range [][]netip.Addr{a.IPs, nil} {
		if err := n.Detach(ctx, a.Attachment, ips); err != nil {
			t.Error(err)
		}
	}
	l.Echo(b.Netns, "tcp", b.at(0, 80))
	for _, at := range []string{b.at(0, 80), "127.0.0.1:8080"} {
		if _, err := lab.Ask(l.Node, "tcp", at); err != nil {
			t.Errorf("%s: %v", at, err)
		}
	}
}

// TestReadOnlySysctls: where the host's settings cannot be written, the error says which one is needed, and one
// that is set already is no fault.
func TestReadOnlySysctls(t *testing.T) {
	l := lab.New(t)
	sysctl(t, l.Node, "net/ipv4/ip_forward", "0")
	n := newNetwork(t, l, nil)
	readOnly := func() error {
		errs := make(chan error)
		go func() {
			runtime.LockOSThread() // the thread ends with its mount namespace
			err := unix.Unshare(unix.CLONE_NEWNS)
			if err == nil {
				err = unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, "")
			}
			if err == nil {
				err = unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND, "")
			}
			if err == nil {
				err = unix.Mount("", "/proc/sys", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
			}
			if err != nil {
				errs <- fmt.Errorf("prepare: %w", err)
				return
			}
			errs <- n.Status(context.Background())
		}()
		return <-errs
	}
	if err := readOnly(); !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "net.ipv4.ip_forward=1") {
		t.Errorf("error %v", err)
	}
	sysctl(t, l.Node, "net/ipv4/ip_forward", "1")
	sysctl(t, l.Node, "net/ipv6/conf/all/forwarding", "1")
	if err := readOnly(); err != nil {
		t.Errorf("all is set: %v", err)
	}
}

// TestUDPClientsFollow: a client that sends from one port all the time reaches whoever has the host port now.
func TestUDPClientsFollow(t *testing.T) {
	l := lab.New(t).WithOutside(1500)
	n := newNetwork(t, l, nil)
	ask := func() (string, error) { return lab.AskFrom(l.Outside, "udp", "192.0.2.2:4444", "192.0.2.1:8053") }
	if _, err := ask(); err == nil {
		t.Fatal("somebody answers")
	}
	for _, name := range []string{"a", "b"} {
		p, err := attachPorts(t, l, n, name, nat.Port{Protocol: "udp", HostPort: 8053, ContainerPort: 53})
		if err != nil {
			t.Fatal(err)
		}
		l.Echo(p.Netns, "udp", p.at(0, 53))
		if _, err := ask(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := n.Detach(context.Background(), p.Attachment, p.IPs); err != nil {
			t.Error(err)
		}
	}
}

// TestSCTP sends the first packet of an association: the kernel here may have no SCTP sockets, but translates it.
func TestSCTP(t *testing.T) {
	l := lab.New(t).WithOutside(1500)
	n := newNetwork(t, l, nil)
	p, err := attachPorts(t, l, n, "a", nat.Port{Protocol: "SCTP", HostPort: 3868, ContainerPort: 1000})
	if err != nil {
		t.Fatal(err)
	}
	var in, out net.PacketConn
	lab.In(t, p.Netns, func() (err error) { in, err = net.ListenPacket("ip4:132", "0.0.0.0"); return err })
	defer in.Close()
	lab.In(t, l.Outside, func() (err error) { out, err = net.ListenPacket("ip4:132", "0.0.0.0"); return err })
	defer out.Close()
	// Ports 5000 and 3868, tag 0, checksum; an INIT chunk of 20 bytes.
	init := append([]byte{5000 >> 8, 5000 & 0xff, 3868 >> 8, 3868 & 0xff, 0, 0, 0, 0, 0, 0, 0, 0},
		1, 0, 0, 20, 0, 0, 0, 9, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1)
	binary.LittleEndian.PutUint32(init[8:], crc32.Checksum(init, crc32.MakeTable(crc32.Castagnoli)))
	if _, err := out.WriteTo(init, &net.IPAddr{IP: lab.NodeIP4.AsSlice()}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	_ = in.SetReadDeadline(time.Now().Add(30 * time.Second))
	got, _, err := in.ReadFrom(buf)
	if err != nil || got != len(init) || binary.BigEndian.Uint16(buf[2:]) != 1000 {
		t.Errorf("%d bytes % x, %v", got, buf[:got], err)
	}
}

// TestRouterAdvertisementsOfPods: a pod says it is the host's router, and is not believed even where new links accept
// advertisements.
func TestRouterAdvertisementsOfPods(t *testing.T) {
	l := lab.New(t)
	sysctl(t, l.Node, "net/ipv6/conf/default/accept_ra", "2")
	n := newNetwork(t, l, nil)
	p := newPod(t, l, n, "a")
	var c net.PacketConn
	index := 0
	lab.In(t, p.Netns, func() error {
		link, err := netlink.LinkByName("eth0")
		if err == nil {
			index = link.Attrs().Index
			c, err = net.ListenPacket("ip6:ipv6-icmp", "::")
		}
		return err
	})
	defer c.Close()
	raw, err := c.(*net.IPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) {
		for option, value := range map[int]int{unix.IPV6_MULTICAST_HOPS: 255, unix.IPV6_MULTICAST_IF: index} {
			if err := unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, option, value); err != nil {
				t.Error(err)
			}
		}
	})
	// Type 134, hop limit 64, router lifetime 1800 s.
	ra := []byte{134, 0, 0, 0, 64, 0, 1800 >> 8, 1800 & 0xff, 0, 0, 0, 0, 0, 0, 0, 0}
	for range 3 {
		if _, err := c.WriteTo(ra, &net.IPAddr{IP: net.ParseIP("ff02::1")}); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(50 * time.Millisecond)
	lab.In(t, l.Node, func() error {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Protocol: unix.RTPROT_RA}, netlink.RT_FILTER_PROTOCOL)
		if len(routes) > 0 {
			t.Errorf("the host has %v", routes)
		}
		return err
	})
}

func TestWarnsOfFirewall(t *testing.T) {
	l := lab.New(t)
	lab.In(t, l.Node, func() error {
		return exec.Command("nft", "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; chain INPUT { type filter hook input priority 0; policy drop; }; }").Run()
	})
	var log strings.Builder
	n := newNetwork(t, l, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	if err := n.Status(context.Background()); err != nil {
		t.Fatal(err)
	}
	if s := log.String(); !strings.Contains(s, "[ip filter FORWARD]") && !strings.Contains(s, `"[ip filter FORWARD]"`) || strings.Contains(s, "INPUT") {
		t.Errorf("log %q", s)
	}
}

// TestUserNamespace: the pod's network namespace belongs to a user namespace of its own.
func TestUserNamespace(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l, nil)
	cmd := exec.Command("sleep", "60")
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET, UidMappings: ids, GidMappings: ids, Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread() // the death signal is that of this thread
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		t.Skip("needs user namespaces: ", err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	path := fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid)
	if err := n.Prewire(context.Background(), path); err != nil {
		t.Fatal(err)
	}
	got, err := n.Attach(context.Background(), Attachment{SandboxID: "a", Netns: path, Key: path, Ingress: 1e9, Egress: 1e9})
	if err != nil {
		t.Fatal(err)
	}
	for _, ip := range got.IPs {
		if err := lab.Ping(l.Node, ip); err != nil {
			t.Error(err)
		}
	}
}

// TestDescriptorsExhausted attaches with ever more descriptors left: it works or leaves nothing, at every number.
func TestDescriptorsExhausted(t *testing.T) {
	l := lab.New(t)
	n := newNetwork(t, l, nil)
	if err := n.Status(context.Background()); err != nil {
		t.Fatal(err)
	}
	path := l.Netns("a")
	a := Attachment{SandboxID: "a", Netns: path, Key: path, Ports: []nat.Port{{HostPort: 80, ContainerPort: 80}}}
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	failed, worked := 0, 0
	for left := range 40 {
		tight := old
		tight.Cur = uint64(left)
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &tight); err != nil {
			t.Fatal(err)
		}
		got, err := n.Attach(context.Background(), a)
		if serr := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); serr != nil {
			t.Fatal(serr)
		}
		if err != nil {
			failed++
			if !errors.Is(err, unix.EMFILE) {
				t.Errorf("%d descriptors: %v", left, err)
			}
		} else {
			worked++
			if err := n.Detach(context.Background(), a, got.IPs); err != nil {
				t.Error(err)
			}
		}
		if links, held := l.Links("na"), heldBy(t, n); len(links)+len(held) > 0 {
			t.Fatalf("%d descriptors: left %v, %v after %v", left, links, held, err)
		}
		if rules := ruleset(t, l); strings.Contains(rules, "tcp . 80") {
			t.Fatalf("%d descriptors: host port left", left)
		}
	}
	if failed == 0 || worked == 0 {
		t.Errorf("%d failed, %d worked: the test does not test", failed, worked)
	}
}

// TestDiskFull attaches when no address record can be written.
func TestDiskFull(t *testing.T) {
	l := lab.New(t)
	root := filepath.Join(l.Dir, "root")
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	n := newNetwork(t, l, nil)
	a := newPod(t, l, n, "a")
	_ = os.WriteFile(filepath.Join(root, "fill"), make([]byte, 64<<10), 0o600)
	_, err := attachPorts(t, l, n, "b")
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("error %v", err)
	}
	if links, held := l.Links("na"), heldBy(t, n); len(links) != 1 || len(held) != 1 {
		t.Errorf("links %v, held %v", links, held)
	}
	// Removal needs no space.
	if err := n.Detach(context.Background(), a.Attachment, a.IPs); err != nil {
		t.Error(err)
	}
	if held := heldBy(t, n); len(held) != 0 {
		t.Errorf("held %v", held)
	}
}
