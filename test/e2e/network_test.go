package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// echoServer answers one word per connection on a TCP port.
func echoServer(port int) containerOption {
	return script(fmt.Sprintf(`trap 'exit 0' TERM; echo up; while :; do echo hello-$HOSTNAME | nc -l -p %d; done`, port))
}

func dialEcho(addr string) (string, error) {
	c, err := net.DialTimeout("tcp", addr, 2*time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Second))
	b, err := io.ReadAll(c)
	if len(b) > 0 {
		err = nil
	}
	return strings.TrimSpace(string(b)), err
}

func (p *pod) ips(t testing.TB) (v4, v6 netip.Addr) {
	t.Helper()
	n := p.status(t).Network
	all := []string{n.GetIp()}
	for _, i := range n.GetAdditionalIps() {
		all = append(all, i.Ip)
	}
	for _, s := range all {
		a, err := netip.ParseAddr(s)
		if err != nil {
			t.Fatalf("pod IP %q: %v", s, err)
		}
		if a.Is4() {
			v4 = a
		} else {
			v6 = a
		}
	}
	return v4, v6
}

func TestNetwork(t *testing.T) {
	a := runPod(t, func(c *runtimeapi.PodSandboxConfig) { c.Hostname = "alpha" })
	b := runPod(t)
	a4, a6 := a.ips(t)
	if !a4.IsValid() || !a6.IsValid() {
		t.Fatalf("addresses %v, %v; want one of each family", a4, a6)
	}
	a.run(t, echoServer(8080))
	client := b.run(t)
	for _, ip := range []netip.Addr{a4, a6} {
		eventually(t, func() error {
			got, err := dialEcho(netip.AddrPortFrom(ip, 8080).String())
			if err == nil && got != "hello-alpha" {
				err = fmt.Errorf("got %q", got)
			}
			return err
		})
		eventually(t, func() error {
			r := client.execSync(t, "/bin/sh", "-c", fmt.Sprintf("echo | nc -w 2 %s 8080", ip))
			if got := strings.TrimSpace(string(r.Stdout)); got != "hello-alpha" {
				return fmt.Errorf("from the other pod to %s: %q %q", ip, got, r.Stderr)
			}
			return nil
		})
	}
	equal(t, "loopback", client.sh(t, "ip -o addr show lo | grep -c 127.0.0.1"), "1")
	contains(t, "default route", client.sh(t, "ip route"), "default")
	contains(t, "default route of v6", client.sh(t, "ip -6 route"), "default")
	contains(t, "hosts of the pod's name", a.run(t).sh(t, "hostname"), "alpha")
}

func TestPortMappings(t *testing.T) {
	free := func(network string) int32 {
		if network == "udp" {
			c, err := net.ListenPacket("udp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			return int32(c.LocalAddr().(*net.UDPAddr).Port)
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return int32(l.Addr().(*net.TCPAddr).Port)
	}
	any, local, six, udp := free("tcp"), free("tcp"), free("tcp"), free("udp")
	p := runPod(t, func(c *runtimeapi.PodSandboxConfig) {
		c.Hostname = "mapped"
		c.PortMappings = []*runtimeapi.PortMapping{
			{ContainerPort: 8080, HostPort: any},
			{ContainerPort: 8080, HostPort: local, HostIp: "127.0.0.1"},
			{ContainerPort: 8080, HostPort: six, HostIp: "::1"},
			{ContainerPort: 9000, HostPort: udp, Protocol: runtimeapi.Protocol_UDP},
			{ContainerPort: 7000}, // only informs
		}
	})
	p.run(t, echoServer(8080))
	for _, addr := range []string{fmt.Sprintf("127.0.0.1:%d", any), fmt.Sprintf("[::1]:%d", any), fmt.Sprintf("127.0.0.1:%d", local), fmt.Sprintf("[::1]:%d", six)} {
		eventually(t, func() error {
			got, err := dialEcho(addr)
			if err == nil && got != "hello-mapped" {
				err = fmt.Errorf("got %q", got)
			}
			if err != nil {
				err = fmt.Errorf("%s: %w", addr, err)
			}
			return err
		})
	}
	if got, err := dialEcho(fmt.Sprintf("127.0.0.1:%d", six)); err == nil {
		t.Errorf("a port mapped on ::1 answers %q on 127.0.0.1", got)
	}
	v4, _ := p.ips(t)
	if host := hostAddr(v4); host != "" {
		eventually(t, func() error { // nc takes one connection at a time
			got, err := dialEcho(fmt.Sprintf("%s:%d", host, any))
			if err == nil && got != "hello-mapped" {
				err = fmt.Errorf("got %q", got)
			}
			return err
		})
		if got, err := dialEcho(fmt.Sprintf("%s:%d", host, local)); err == nil {
			t.Errorf("a port mapped on 127.0.0.1 answers %q on %s", got, host)
		}
	}
	p.run(t, command("/bin/testtool", "serve", "-udp", ":9000"))
	eventually(t, func() error {
		c, err := net.Dial("udp", fmt.Sprintf("127.0.0.1:%d", udp))
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(300 * time.Millisecond))
		c.Write([]byte("datagram"))
		b := make([]byte, 100)
		n, err := c.Read(b)
		if err == nil && !bytes.Contains(b[:n], []byte("datagram")) {
			err = fmt.Errorf("UDP echo answers %q", b[:n])
		}
		return err
	})
	p.remove(t)
	if got, err := dialEcho(fmt.Sprintf("127.0.0.1:%d", any)); err == nil {
		t.Errorf("the port of a removed pod answers %q", got)
	}
}

// hostAddr is an address of this machine besides loopback and pods.
func hostAddr(pod netip.Addr) string {
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err == nil && p.Addr().Is4() && !p.Addr().IsLoopback() && !p.Contains(pod) && p.Bits() < 32 {
			return p.Addr().String()
		}
	}
	return ""
}

// TestCNIConflist runs pods on Debian's bridge and host-local plugins.
func TestCNIConflist(t *testing.T) {
	if _, err := os.Stat("/usr/lib/cni/bridge"); err != nil {
		t.Skip("install containernetworking-plugins")
	}
	dir := filepath.Join(workDir, "cnitest")
	conf := filepath.Join(dir, "cni.d")
	if err := os.MkdirAll(conf, 0o755); err != nil {
		t.Fatal(err)
	}
	bridge := nodeName("br")
	writeFile(t, filepath.Join(conf, "10-test.conflist"), fmt.Sprintf(`{"cniVersion":"1.0.0","name":"%s","plugins":[
 {"type":"bridge","bridge":"%s","isGateway":true,"ipam":{"type":"host-local","dataDir":"%s","ranges":[[{"subnet":"10.199.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
 {"type":"portmap","capabilities":{"portMappings":true}}]}`, bridge, bridge, filepath.Join(dir, "ipam")))
	n := ownNode(t, func(c *node.Config) { c.CNIConfDir = conf })
	defer deleteLink(bridge)
	before := n.Settled()
	p := runPodOn(t, n, podConfig(t))
	v4, _ := p.ips(t)
	if !netip.MustParsePrefix("10.199.0.0/24").Contains(v4) {
		t.Errorf("pod IP %v is not from the conflist's range", v4)
	}
	p.run(t, echoServer(8080))
	eventually(t, func() error { _, err := dialEcho(netip.AddrPortFrom(v4, 8080).String()); return err })
	leases := func() []string {
		f, _ := filepath.Glob(filepath.Join(dir, "ipam", bridge, "10.*"))
		return f
	}
	equal(t, "addresses in use", len(leases()), 1)
	p.remove(t)
	equal(t, "addresses in use after removal", len(leases()), 0)
	if l := n.WaitNoLeaks(before); l != "" {
		t.Errorf("left behind:\n%s", l)
	}
	s, err := n.Runtime().Status(callCtx(t), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range s.Status.Conditions {
		if !c.Status {
			t.Errorf("condition %s is false: %s %s", c.Type, c.Reason, c.Message)
		}
	}
}

// TestUpdateRuntimeConfig: the kubelet's pod CIDR counts at once and after a
// restart.
func TestUpdateRuntimeConfig(t *testing.T) {
	n := ownNode(t, nil)
	set := func(cidr string) error {
		_, err := n.Runtime().UpdateRuntimeConfig(callCtx(t), &runtimeapi.UpdateRuntimeConfigRequest{
			RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: cidr}},
		})
		return err
	}
	for _, bad := range []string{"nonsense", "10.0.0.0/33", "10.231.7.0/24,"} {
		wantCode(t, bad, set(bad), codes.InvalidArgument)
	}
	if err := set("10.231.7.0/24"); err != nil {
		t.Fatal(err)
	}
	for _, when := range []string{"at once", "after a restart"} {
		p := runPodOn(t, n, podConfig(t))
		if v4, _ := p.ips(t); !netip.MustParsePrefix("10.231.7.0/24").Contains(v4) {
			t.Errorf("%s: pod IP %v", when, v4)
		}
		p.remove(t)
		if err := n.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := n.Up(callCtx(t)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNetworkFails: a pod that cannot be connected is refused with the plugin's
// own words, and leaves nothing.
func TestNetworkFails(t *testing.T) {
	dir := hostDir(t, "cnifails")
	bin := filepath.Join(dir, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "10-fails.conflist"), `{"cniVersion":"1.0.0","name":"fails","plugins":[{"type":"refuser"}]}`)
	writeFile(t, filepath.Join(bin, "refuser"), `#!/bin/sh
case $CNI_COMMAND in
ADD) echo '{"cniVersion":"1.0.0","code":11,"msg":"the switch is on fire"}'; exit 1;;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}';;
esac
`)
	if err := os.Chmod(filepath.Join(bin, "refuser"), 0o755); err != nil {
		t.Fatal(err)
	}
	n := ownNode(t, func(c *node.Config) {
		c.CNIConfDir = dir
		c.Extra = fmt.Sprintf("  cniBinDirs: [%q]", bin)
	})
	before := n.Settled()
	_, err := n.Runtime().RunPodSandbox(callCtx(t), &runtimeapi.RunPodSandboxRequest{Config: podConfig(t)})
	wantCode(t, "a network that fails", err, codes.Unavailable)
	contains(t, "error", fmt.Sprint(err), "the switch is on fire")
	if l := n.WaitNoLeaks(before); l != "" {
		t.Errorf("left behind:\n%s", l)
	}
}
