package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/cni/lab"
)

type fixture struct {
	*lab.Lab
	t       testing.TB
	conf    string // directory of configurations
	bin     string // directory of our plugin's executable
	m       *Manager
	change  func(*Config)
	counter int
}

func newFixture(t testing.TB, change func(*Config)) *fixture {
	t.Helper()
	f := &fixture{Lab: lab.New(t), t: t, change: change}
	f.conf, f.bin = filepath.Join(f.Dir, "net.d"), filepath.Join(f.Dir, "bin")
	for _, d := range []string{f.conf, f.bin} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	f.m = f.manager()
	return f
}

func (f *fixture) manager() *Manager {
	f.t.Helper()
	cfg := Config{
		Name: "testnode", ConfDir: f.conf, BinDirs: []string{f.bin, "/usr/lib/cni"}, HostNetns: f.Node, Masquerade: true,
		StateDir: filepath.Join(f.Dir, "state"), RootDir: filepath.Join(f.Dir, "root"),
		Log: slog.New(slog.NewTextHandler(f.t.Output(), nil)),
	}
	if f.change != nil {
		f.change(&cfg)
	}
	m, err := New(cfg)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { m.Close() })
	return m
}

func (f *fixture) write(name, content string) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.conf, name), []byte(content), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) request() Request {
	f.t.Helper()
	f.counter++
	name := fmt.Sprint("pod", f.counter)
	return Request{
		SandboxID: "sandbox" + name, PodNamespace: "default", PodName: name, PodUID: "uid-" + name, Netns: f.Netns(name),
	}
}

func (f *fixture) setup(req Request) Result {
	f.t.Helper()
	res, err := f.m.Setup(context.Background(), req)
	if err != nil {
		f.t.Fatal(err)
	}
	return res
}

// talk checks that a reaches b by TCP at each address of b.
func (f *fixture) talk(a, b Request, bIPs []netip.Addr) {
	f.t.Helper()
	for _, ip := range bIPs {
		at := net.JoinHostPort(ip.String(), "7")
		f.Echo(b.Netns, "tcp", at)
		if _, err := lab.Ask(a.Netns, "tcp", at); err != nil {
			f.t.Errorf("%s to %s: %v", a.PodName, at, err)
		}
	}
}

func TestBuiltinThroughManager(t *testing.T) {
	f := newFixture(t, nil)
	ctx := context.Background()
	if err := f.m.Status(ctx); err != nil {
		t.Fatal(err)
	}
	a, b := f.request(), f.request()
	if err := f.m.Prewire(ctx, a.Netns); err != nil {
		t.Fatal(err)
	}
	ra, rb := f.setup(a), f.setup(b)
	if ra.Conf != Builtin || len(ra.IPs) != 2 || ra.HostInterface == "" || !json.Valid(ra.CNIResult) {
		t.Errorf("result %+v", ra)
	}
	f.talk(a, b, rb.IPs)
	f.talk(b, a, ra.IPs)
	for _, p := range []struct {
		req Request
		res Result
	}{{a, ra}, {b, rb}} {
		if err := f.m.Check(ctx, p.req, p.res); err != nil {
			t.Error(err)
		}
	}
	// Twice, and once without its namespace.
	lab.Unpin(b.Netns)
	for range 2 {
		if err := f.m.Teardown(ctx, a, ra); err != nil {
			t.Error(err)
		}
		if err := f.m.Teardown(ctx, b, rb); err != nil {
			t.Error(err)
		}
	}
	if err := f.m.Check(ctx, a, ra); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("check after teardown: %v", err)
	}
	if err := f.m.Remove(ctx); err != nil {
		t.Error(err)
	}
	f.empty()
}

// TestBandwidth sends more than the burst through limits of 8 Mbit/s each way.
func TestBandwidth(t *testing.T) {
	f := newFixture(t, nil)
	req, other := f.request(), f.request()
	req.Annotations = map[string]string{ingressBandwidth: "8M", egressBandwidth: "8M"}
	res, ores := f.setup(req), f.setup(other)
	const size = 500_000 // bytes: 128 KiB at once, the rest in 0.37 s
	for _, c := range []struct {
		what     string
		from, to Request
		at       netip.Addr
	}{{"ingress", other, req, res.IPs[0]}, {"egress", req, other, ores.IPs[0]}} {
		took := f.transfer(c.from.Netns, c.to.Netns, netip.AddrPortFrom(c.at, 7), size)
		if took < 250*time.Millisecond || took > 5*time.Second {
			t.Errorf("%s: %d bytes took %s", c.what, size, took)
		}
	}
	bad := f.request()
	bad.Annotations = map[string]string{ingressBandwidth: "fast"}
	if _, err := f.m.Setup(context.Background(), bad); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), ingressBandwidth) {
		t.Errorf("error %v", err)
	}
}

// transfer sends size bytes over TCP and returns the time until the last one was read.
func (f *fixture) transfer(from, to string, at netip.AddrPort, size int64) time.Duration {
	f.t.Helper()
	var ln net.Listener
	f.In(to, func() (err error) {
		ln, err = net.Listen("tcp", at.String())
		return err
	})
	defer ln.Close()
	done := make(chan int64, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			done <- -1
			return
		}
		defer c.Close()
		n, _ := io.Copy(io.Discard, c)
		done <- n
	}()
	var c net.Conn
	f.In(from, func() (err error) {
		c, err = net.DialTimeout("tcp", at.String(), time.Second)
		return err
	})
	start := time.Now()
	if _, err := c.Write(make([]byte, size)); err != nil {
		f.t.Error(err)
	}
	c.Close()
	if n := <-done; n != size {
		f.t.Errorf("%d bytes arrived", n)
	}
	return time.Since(start)
}

// empty checks that nothing is left on the node but its loopback.
func (f *fixture) empty() {
	f.t.Helper()
	f.In(f.Node, func() error {
		for _, c := range [][]string{{"ip", "-o", "link"}, {"ip", "-o", "addr", "show", "dev", "lo"}, {"ip", "route"}, {"ip", "-6", "route"}, {"nft", "list", "ruleset"}} {
			out, err := exec.Command(c[0], c[1:]...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%v: %w: %s", c, err, out)
			}
			for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
				if line == "" || strings.HasPrefix(line, "1: lo") && (strings.Contains(line, "127.0.0.1") || strings.Contains(line, "::1/128 ") || c[2] == "link") {
					continue
				}
				f.t.Errorf("%v: left: %s", c, line)
			}
		}
		return nil
	})
	for _, pattern := range []string{"root/ipam/10.*", "root/ipam/fd*", "root/ipam/.tmp*", "root/cni/attachments/*", "root/cni/results/*"} {
		names, err := filepath.Glob(filepath.Join(f.Dir, pattern))
		if err != nil {
			f.t.Error(err)
		}
		for _, n := range names {
			if !strings.HasSuffix(n, ".free") {
				f.t.Errorf("left: %s", n)
			}
		}
	}
}

func debianPlugins(t testing.TB, names ...string) {
	for _, n := range names {
		if _, err := os.Stat(filepath.Join("/usr/lib/cni", n)); err != nil {
			t.Skip("needs Debian's containernetworking-plugins: ", err)
		}
	}
}

const bridgeConf = `{
  "cniVersion": "%s", "name": "%s",
  "plugins": [
    {"type": "bridge", "bridge": "cnitest0", "isGateway": true,
     "ipam": {"type": "host-local", "dataDir": "%s", "ranges": [[{"subnet": "10.44.0.0/24"}], [{"subnet": "fd44::/64"}]],
              "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}}
  ]
}`

func TestBridgeAndHostLocal(t *testing.T) {
	debianPlugins(t, "bridge", "host-local")
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0"} {
		t.Run(version, func(t *testing.T) {
			f := newFixture(t, nil)
			ctx := context.Background()
			store := filepath.Join(f.Dir, "hostlocal")
			f.write("10-bridge.conflist", fmt.Sprintf(bridgeConf, version, "bridged", store))
			if err := f.m.Status(ctx); err != nil {
				t.Fatal(err)
			}
			a, b := f.request(), f.request()
			ra, rb := f.setup(a), f.setup(b)
			if ra.Conf != "bridged" || len(ra.IPs) != 2 || !strings.HasPrefix(ra.HostInterface, "veth") {
				t.Errorf("result %+v", ra)
			}
			f.talk(a, b, rb.IPs)
			if err := f.m.Check(ctx, a, ra); err != nil {
				t.Error(err)
			}
			// The loopback is up.
			f.Echo(a.Netns, "tcp", "127.0.0.1:9")
			if _, err := lab.Ask(a.Netns, "tcp", "127.0.0.1:9"); err != nil {
				t.Error(err)
			}
			// The configuration changes before one goes, and the other loses its namespace and its result.
			f.write("10-bridge.conflist", fmt.Sprintf(bridgeConf, version, "renamed", store+"2"))
			if err := f.m.Teardown(ctx, a, ra); err != nil {
				t.Error(err)
			}
			lab.Unpin(b.Netns)
			if err := f.m.Teardown(ctx, b, Result{}); err != nil {
				t.Error(err)
			}
			if err := f.m.Teardown(ctx, b, rb); err != nil {
				t.Error(err)
			}
			f.noneHeld(store)
		})
	}
}

func (f *fixture) noneHeld(store string) {
	f.t.Helper()
	held, _ := filepath.Glob(filepath.Join(store, "*", "*[.:]*"))
	for _, h := range held {
		if b := filepath.Base(h); !strings.HasPrefix(b, "last_reserved") {
			f.t.Errorf("host-local still holds %s", h)
		}
	}
	for _, p := range []string{"root/cni/attachments/*", "root/cni/results/*"} {
		if left, _ := filepath.Glob(filepath.Join(f.Dir, p)); len(left) > 0 {
			f.t.Errorf("left: %v", left)
		}
	}
}

// TestOwnPluginInAChain: our plugin named in a configuration runs in this process (there is no executable), and others
// follow it.
func TestOwnPluginInAChain(t *testing.T) {
	debianPlugins(t, "tuning")
	f := newFixture(t, nil)
	ctx := context.Background()
	f.write("10-chain.conflist", fmt.Sprintf(`{"cniVersion":"1.0.0","name":"chain","plugins":[
		{"type":"nodeagent-cni","dataDir":%q,"podCIDRs":["10.7.0.0/24","fd07::/64"],"capabilities":{"portMappings":true}},
		{"type":"tuning","sysctl":{"net.ipv4.conf.eth0.log_martians":"1"}}]}`, filepath.Join(f.Dir, "root")))
	if err := f.m.Status(ctx); err != nil {
		t.Fatal(err)
	}
	a, b := f.request(), f.request()
	a.PortMappings = []PortMapping{{Protocol: "tcp", HostPort: 8080, ContainerPort: 7}}
	ra, rb := f.setup(a), f.setup(b)
	f.talk(a, b, rb.IPs)
	f.talk(b, a, ra.IPs)
	if _, err := lab.Ask(f.Node, "tcp", "127.0.0.1:8080"); err != nil {
		t.Error(err)
	}
	f.In(a.Netns, func() error {
		p, err := os.ReadFile("/proc/sys/net/ipv4/conf/eth0/log_martians")
		if string(p) != "1\n" {
			t.Errorf("tuning did not run: %q", p)
		}
		return err
	})
	if err := f.m.Check(ctx, a, ra); err != nil {
		t.Error(err)
	}
	taken := f.request()
	taken.PortMappings = a.PortMappings
	if _, err := f.m.Setup(ctx, taken); err == nil || !strings.Contains(err.Error(), "8080") {
		t.Errorf("host port twice: %v", err)
	}
	for _, p := range []struct {
		req Request
		res Result
	}{{a, ra}, {b, rb}} {
		if err := f.m.Teardown(ctx, p.req, p.res); err != nil {
			t.Error(err)
		}
	}
	if links := f.Links("na"); len(links) > 0 {
		t.Errorf("left: %v", links)
	}
	f.noneHeld(filepath.Join(f.Dir, "none"))
}

// TestPrewiredBeforeConfiguration: a namespace was wired for the built-in network, then a configuration appeared.
func TestPrewiredBeforeConfiguration(t *testing.T) {
	debianPlugins(t, "bridge", "host-local")
	f := newFixture(t, nil)
	ctx := context.Background()
	req, late := f.request(), f.request()
	if err := f.m.Prewire(ctx, req.Netns); err != nil {
		t.Fatal(err)
	}
	f.write("10.conflist", fmt.Sprintf(bridgeConf, "1.0.0", "bridged", filepath.Join(f.Dir, "hostlocal")))
	if err := f.m.Prewire(ctx, late.Netns); err != nil {
		t.Fatal(err)
	}
	if res := f.setup(req); res.Conf != "bridged" {
		t.Errorf("result %+v", res)
	}
	f.setup(late)
	if links := f.Links("na"); len(links) > 0 {
		t.Errorf("left: %v", links)
	}
}

func TestRemoveSparesPods(t *testing.T) {
	f := newFixture(t, nil)
	req := f.request()
	res := f.setup(req)
	if err := f.m.Remove(context.Background()); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("error %v", err)
	}
	if err := f.m.Check(context.Background(), req, res); err != nil {
		t.Error(err)
	}
}

func TestReconcileForeign(t *testing.T) {
	debianPlugins(t, "bridge", "host-local")
	f := newFixture(t, nil)
	ctx := context.Background()
	store := filepath.Join(f.Dir, "hostlocal")
	f.write("10-bridge.conflist", fmt.Sprintf(bridgeConf, "1.0.0", "bridged", store))
	a, b := f.request(), f.request()
	ra, _ := f.setup(a), f.setup(b)
	// A new process that knows only of a.
	f.m = f.manager()
	if err := f.m.Reconcile(ctx, []Request{a}, map[string]Result{a.SandboxID: ra}); err != nil {
		t.Error(err)
	}
	if held, _ := filepath.Glob(filepath.Join(store, "bridged", "10.*")); len(held) != 1 {
		t.Errorf("held: %v", held)
	}
	if err := f.m.Teardown(ctx, a, ra); err != nil {
		t.Error(err)
	}
	f.noneHeld(store)
}

func TestFailedAddIsUndone(t *testing.T) {
	debianPlugins(t, "bridge", "host-local")
	f := newFixture(t, nil)
	store := filepath.Join(f.Dir, "hostlocal")
	conf := strings.Replace(fmt.Sprintf(bridgeConf, "1.0.0", "bridged", store), "]\n}", `, {"type": "failing"}]
}`, 1)
	f.write("10.conflist", conf)
	script := "#!/bin/sh\ncat >/dev/null\nif [ \"$CNI_COMMAND\" = ADD ]; then echo '{\"cniVersion\":\"1.0.0\",\"code\":11,\"msg\":\"later\"}'; exit 1; fi\n"
	if err := os.WriteFile(filepath.Join(f.bin, "failing"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := f.m.Setup(context.Background(), f.request())
	if !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "later") {
		t.Errorf("error %v", err)
	}
	f.noneHeld(store)
	if links := f.Links("veth"); len(links) > 0 {
		t.Errorf("left: %v", links)
	}
}

// TestRemovalWaitsForPlugins: the caller gives up while a plugin's child still works. The removal that follows comes after it.
func TestRemovalWaitsForPlugins(t *testing.T) {
	f := newFixture(t, nil)
	script := `#!/bin/sh
cat >/dev/null
case $CNI_COMMAND in
ADD) sh -c 'sleep 0.5; echo made > "` + f.Dir + `/made"' & wait;;
DEL) [ -e "` + f.Dir + `/made" ] && echo yes > "` + f.Dir + `/removed-after";;
esac
exit 0
`
	if err := os.WriteFile(filepath.Join(f.bin, "slow"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	f.write("10.conflist", `{"cniVersion":"1.0.0","name":"slow","plugins":[{"type":"slow"}]}`)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if _, err := f.m.Setup(ctx, f.request()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(filepath.Join(f.Dir, "removed-after")); err != nil {
		t.Error("the removal did not wait:", err)
	}
}

// TestCapabilities records what a plugin is handed.
func TestCapabilities(t *testing.T) {
	f := newFixture(t, func(c *Config) {
		c.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24"), netip.MustParsePrefix("fd09::/64")}
	})
	script := `#!/bin/sh
cat > "` + f.Dir + `/stdin.$CNI_COMMAND"; echo "$CNI_ARGS" > "` + f.Dir + `/args.$CNI_COMMAND"
[ "$CNI_COMMAND" = ADD ] && echo '{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[{"interface":0,"address":"10.9.0.7/24"}]}'
exit 0
`
	if err := os.WriteFile(filepath.Join(f.bin, "recorder"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	f.write("05.conf", `{"cniVersion":"1.1.0","name":"rec","type":"recorder","capabilities":
		{"portMappings":true,"bandwidth":true,"dns":true,"ipRanges":true,"cgroupPath":true}}`)
	f.write("10.conflist", `not even JSON: it is not the first`)
	req := f.request()
	req.PortMappings = []PortMapping{{Protocol: "UDP", HostPort: 53, ContainerPort: 5353, HostIP: netip.MustParseAddr("10.0.0.1")}, {ContainerPort: 1}}
	req.Annotations = map[string]string{ingressBandwidth: "10M", egressBandwidth: "1.5Mi"}
	req.CgroupParent = "/kubepods/pod1"
	req.DNS = DNS{Servers: []string{"10.0.0.10"}, Searches: []string{"svc"}, Options: []string{"ndots:5"}}
	res := f.setup(req)
	if err := f.m.Check(context.Background(), req, res); err != nil {
		t.Error(err)
	}
	if err := f.m.Reconcile(context.Background(), []Request{req}, map[string]Result{req.SandboxID: res}); err != nil {
		t.Error(err)
	}
	if err := f.m.Teardown(context.Background(), req, res); err != nil {
		t.Error(err)
	}
	if err := f.m.Status(context.Background()); err != nil {
		t.Error(err)
	}
	const want = `{"bandwidth":{"egressBurst":4294967295,"egressRate":1572864,"ingressBurst":4294967295,"ingressRate":10000000},` +
		`"cgroupPath":"/kubepods/pod1","dns":{"options":["ndots:5"],"searches":["svc"],"servers":["10.0.0.10"]},` +
		`"ipRanges":[[{"subnet":"10.9.0.0/24"}],[{"subnet":"fd09::/64"}]],` +
		`"portMappings":[{"containerPort":5353,"hostIP":"10.0.0.1","hostPort":53,"protocol":"udp"}]}`
	for _, cmd := range []string{"ADD", "CHECK", "DEL"} {
		var got struct {
			RuntimeConfig map[string]any `json:"runtimeConfig"`
			PrevResult    any            `json:"prevResult"`
		}
		p, err := os.ReadFile(filepath.Join(f.Dir, "stdin."+cmd))
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(p, &got); err != nil {
			t.Fatal(err)
		}
		rc, _ := json.Marshal(got.RuntimeConfig)
		if string(rc) != want {
			t.Errorf("%s: runtimeConfig\n%s, want\n%s", cmd, rc, want)
		}
		if (got.PrevResult != nil) != (cmd != "ADD") {
			t.Errorf("%s: prevResult %v", cmd, got.PrevResult)
		}
		args, _ := os.ReadFile(filepath.Join(f.Dir, "args."+cmd))
		if s := strings.TrimSpace(string(args)); s != "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod1;K8S_POD_INFRA_CONTAINER_ID=sandboxpod1;K8S_POD_UID=uid-pod1" {
			t.Errorf("%s: CNI_ARGS %q", cmd, s)
		}
	}
	gc, err := os.ReadFile(filepath.Join(f.Dir, "stdin.GC"))
	if err != nil || !strings.Contains(string(gc), `"containerID":"sandboxpod1"`) {
		t.Errorf("GC: %s, %v", gc, err)
	}
	if _, err := os.Stat(filepath.Join(f.Dir, "stdin.STATUS")); err != nil {
		t.Error(err)
	}
}

func TestBadConfigurations(t *testing.T) {
	f := newFixture(t, nil)
	for name, content := range map[string]string{
		"00.conflist": `{`, "00.conf": `{"name":"x"}`, "00.json": `[]`,
	} {
		f.write(name, content)
		if err := f.m.Status(context.Background()); !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: error %v", name, err)
		}
		if err := os.Remove(filepath.Join(f.conf, name)); err != nil {
			t.Fatal(err)
		}
	}
	f.write("00.conflist", `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"nowhere"}]}`)
	if err := f.m.Status(context.Background()); !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "nowhere") {
		t.Errorf("missing plugin: error %v", err)
	}
}

func TestQuantity(t *testing.T) {
	for s, want := range map[string]uint64{
		"10M": 10e6, "1.5Ki": 1536, "500": 500, "2e6": 2e6, "1E": 1e18, "1500m": 2, "1k": 1000, "0": 0, ".5k": 500, "2E3": 2000,
	} {
		if got, err := quantity(s); err != nil || got != want {
			t.Errorf("%q: %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "M", "-1", "1MB", "0x10", "1/2", "1_000", "1e999999999", "1e5M", "nan", "99E99", strings.Repeat("1", 70)} {
		if got, err := quantity(s); err == nil {
			t.Errorf("%q: %d, want an error", s, got)
		}
	}
}
