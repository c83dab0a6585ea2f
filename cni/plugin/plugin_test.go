package plugin_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/nodeagent/nodeagent/cni/lab"
	"github.com/nodeagent/nodeagent/cni/plugin"
)

// inProcess and inNode are the two ways the plugin is called: without a fork, and as an executable
// whose process is in the node's namespace. Both implement invoke.Exec.
type inProcess struct {
	version.PluginDecoder
	p plugin.Plugin
}

func (e *inProcess) FindInPath(string, []string) (string, error) { return plugin.Type, nil }
func (e *inProcess) ExecPlugin(ctx context.Context, _ string, stdin []byte, environ []string) ([]byte, error) {
	return e.p.Exec(ctx, environ, stdin)
}

type inNode struct {
	invoke.DefaultExec
	node string
}

func (e *inNode) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) (out []byte, err error) {
	derr := lab.Do(e.node, func() error {
		out, err = e.DefaultExec.ExecPlugin(ctx, path, stdin, environ)
		return nil
	})
	if err == nil {
		err = derr
	}
	return out, err
}

func build(t *testing.T, dir string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-o", filepath.Join(dir, plugin.Type), "github.com/nodeagent/nodeagent/cmd/nodeagent-cni")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
}

func TestThroughLibcni(t *testing.T) {
	bin := t.TempDir()
	build(t, bin)
	for _, v := range version.All.SupportedVersions() {
		if v == "" {
			continue
		}
		for _, how := range []string{"in process", "executable"} {
			t.Run(v+" "+how, func(t *testing.T) {
				l := lab.New(t).WithOutside(1500)
				var ex invoke.Exec = &inProcess{p: plugin.Plugin{HostNetns: l.Node, StateDir: filepath.Join(l.Dir, "state")}}
				if how == "executable" {
					ex = &inNode{node: l.Node, DefaultExec: invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: t.Output()}}}
				}
				testLibcni(t, l, v, libcni.NewCNIConfigWithCacheDir([]string{bin}, filepath.Join(l.Dir, "cache"), ex))
			})
		}
	}
}

func conf(l *lab.Lab, v, name, more string) string {
	return fmt.Sprintf(`{"cniVersion":%q,"name":%q,"plugins":[{"type":%q,"capabilities":{"portMappings":true,"ipRanges":true},"dataDir":%q%s}]}`,
		v, name, plugin.Type, filepath.Join(l.Dir, "data"), more)
}

func testLibcni(t *testing.T, l *lab.Lab, v string, c *libcni.CNIConfig) {
	ctx := context.Background()
	list, err := libcni.NetworkConfFromBytes([]byte(conf(l, v, "first", "")))
	if err != nil {
		t.Fatal(err)
	}
	other, err := libcni.NetworkConfFromBytes([]byte(conf(l, v, "second", "")))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.ValidateNetworkList(ctx, list); err != nil {
		t.Fatal(err)
	}
	if err := c.GetStatusNetworkList(ctx, list); err != nil {
		t.Fatal(err)
	}
	add := func(list *libcni.NetworkConfigList, name string, caps map[string]any) (*libcni.RuntimeConf, []string) {
		rt := &libcni.RuntimeConf{ContainerID: name, NetNS: l.Netns(name), IfName: "net0", CapabilityArgs: caps}
		raw, err := c.AddNetworkList(ctx, list, rt)
		if err != nil {
			t.Fatal(err)
		}
		res, err := types100.NewResultFromResult(raw)
		if err != nil {
			t.Fatal(err)
		}
		var ips []string
		for _, ip := range res.IPs {
			ips = append(ips, ip.Address.IP.String())
		}
		return rt, ips
	}
	a, _ := add(list, "a", nil)
	b, ips := add(list, "b", map[string]any{"portMappings": []plugin.PortMapping{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}}})
	o, oIPs := add(other, "o", nil)
	for _, ip := range ips {
		l.Echo(b.NetNS, "tcp", net.JoinHostPort(ip, "80"))
		if _, err := lab.Ask(a.NetNS, "tcp", net.JoinHostPort(ip, "80")); err != nil {
			t.Error(err)
		}
		for _, oIP := range oIPs {
			if ip == oIP {
				t.Errorf("two networks with one directory gave out %s twice", ip)
			}
		}
	}
	l.Echo(l.Outside, "tcp", "192.0.2.2:7")
	if peer, err := lab.Ask(a.NetNS, "tcp", "192.0.2.2:7"); err != nil || peer != "192.0.2.1" {
		t.Errorf("outside sees %q, %v", peer, err)
	}
	if _, err := lab.Ask(l.Outside, "tcp", "192.0.2.1:8080"); err != nil {
		t.Error("host port:", err)
	}
	if ok, _ := version.GreaterThanOrEqualTo(v, "0.4.0"); ok {
		if err := c.CheckNetworkList(ctx, list, b); err != nil {
			t.Error(err)
		}
		l.In(a.NetNS, func() error { return exec.Command("ip", "route", "del", "default").Run() })
		if err := c.CheckNetworkList(ctx, list, a); err == nil || !strings.Contains(err.Error(), "default route") {
			t.Errorf("check without default route: %v", err)
		}
	}
	// A container that the runtime forgot: only GC removes it, or DEL without its namespace.
	forgotten, _ := add(list, "forgotten", nil)
	if ok, _ := version.GreaterThanOrEqualTo(v, "1.1.0"); ok {
		if err := os.RemoveAll(filepath.Join(l.Dir, "cache")); err != nil {
			t.Fatal(err)
		}
		if err := c.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: []cnitypes.GCAttachment{{ContainerID: "a", IfName: "net0"}, {ContainerID: "b", IfName: "net0"}}}); err != nil {
			t.Error(err)
		}
	} else {
		lab.Unpin(forgotten.NetNS)
		forgotten.NetNS = ""
		if err := c.DelNetworkList(ctx, list, forgotten); err != nil {
			t.Error(err)
		}
	}
	if got := held(l); got != "a a b b o o" {
		t.Errorf("held by %q", got)
	}
	if got := len(l.Links("na")); got != 3 {
		t.Errorf("%d links, want 3", got)
	}
	if _, err := lab.Ask(l.Outside, "tcp", "192.0.2.1:8080"); err != nil {
		t.Error("host port after GC:", err)
	}
	for range 2 {
		for _, x := range []struct {
			list *libcni.NetworkConfigList
			rt   *libcni.RuntimeConf
		}{{list, a}, {list, b}, {other, o}} {
			if err := c.DelNetworkList(ctx, x.list, x.rt); err != nil {
				t.Error(err)
			}
		}
	}
	if got := held(l); got != "" {
		t.Errorf("held by %q", got)
	}
	if got := l.Links("na"); len(got) > 0 {
		t.Errorf("links left: %v", got)
	}
}

// held lists the owners of all address records.
func held(l *lab.Lab) string {
	files, _ := filepath.Glob(filepath.Join(l.Dir, "data", "ipam", "*[0-9a-f]"))
	owners := map[string]int{}
	for _, f := range files {
		if strings.HasSuffix(f, ".free") {
			continue
		}
		var r struct{ Sandbox string }
		if p, err := os.ReadFile(f); err == nil && json.Unmarshal(p, &r) == nil && r.Sandbox != "" {
			owners[r.Sandbox]++
		}
	}
	var all []string
	for _, o := range []string{"a", "b", "forgotten", "o"} {
		for range owners[o] {
			all = append(all, o)
		}
	}
	return strings.Join(all, " ")
}

// TestProtocolErrors checks the codes that runtimes act on, from the executable itself.
func TestProtocolErrors(t *testing.T) {
	l := lab.New(t)
	build(t, l.Dir)
	run := func(command, stdin string, env ...string) (code int, msg string) {
		cmd := exec.Command(filepath.Join(l.Dir, plugin.Type))
		cmd.Env = append([]string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=c", "CNI_NETNS=" + l.Dir + "/none", "CNI_IFNAME=eth0", "CNI_PATH=" + l.Dir}, env...)
		cmd.Stdin = strings.NewReader(stdin)
		var out bytes.Buffer
		cmd.Stdout = &out
		_ = lab.Do(l.Node, cmd.Run)
		var e cnitypes.Error
		if out.Len() > 0 {
			if err := json.Unmarshal(out.Bytes(), &e); err != nil {
				t.Errorf("output %q: %v", out.String(), err)
			}
		}
		return int(e.Code), e.Msg
	}
	good := fmt.Sprintf(`{"cniVersion":"1.1.0","name":"n","type":%q,"dataDir":%q`, plugin.Type, l.Dir+"/data")
	for _, c := range []struct {
		what, command, stdin string
		code                 uint
	}{
		{"no JSON", "ADD", "{", cnitypes.ErrDecodingFailure},
		{"unknown version", "ADD", `{"cniVersion":"9.0.0","name":"n"}`, cnitypes.ErrIncompatibleCNIVersion},
		{"no namespace", "ADD", good + `}`, cnitypes.ErrUnknownContainer},
		{"bad range", "ADD", good + `,"podCIDRs":["10.0.0.1/8"]}`, cnitypes.ErrInvalidNetworkConfig},
		{"bad quarantine", "STATUS", good + `,"quarantine":"long"}`, cnitypes.ErrInvalidNetworkConfig},
		{"unknown command", "FROB", good + `}`, cnitypes.ErrInvalidEnvironmentVariables},
		{"status", "STATUS", good + `}`, 0},
		{"removal of what never was", "DEL", good + `}`, 0},
		{"check without previous result", "CHECK", good + `}`, cnitypes.ErrInvalidNetworkConfig},
		{"check is not in 0.3.1", "CHECK", `{"cniVersion":"0.3.1","name":"n"}`, cnitypes.ErrIncompatibleCNIVersion},
	} {
		if code, msg := run(c.command, c.stdin); code != int(c.code) {
			t.Errorf("%s: code %d (%s), want %d", c.what, code, msg, c.code)
		}
	}
}
