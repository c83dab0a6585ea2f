package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// TestPolicy: a daemon that enforces the policies of a directory, through a
// change of them, a kill of the daemon and its restart.
func TestPolicy(t *testing.T) {
	dir, fs := t.TempDir(), filepath.Join(t.TempDir(), "bpf")
	t.Cleanup(func() { // pinned programs go with the mount, after the daemon
		if err := unix.Unmount(fs, 0); err != nil {
			t.Error(err)
		}
	})
	file := filepath.Join(dir, "web.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const web = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: %s}}}]
    ports: [{port: 8080}]
`
	write(fmt.Sprintf(web, "good"))
	n := ownNode(t, func(c *node.Config) {
		c.Extra = fmt.Sprintf("policy:\n  mode: enforce\n  dir: %s\n  bpffs: %s\n  uplinks: [none]\n", dir, fs)
	})
	start := func(app string) *pod {
		c := podConfig(t)
		c.Metadata.Namespace, c.Labels = "shop", map[string]string{"app": app}
		c.Metadata.Name = app
		return runPodOn(t, n, c)
	}
	server, good, bad := start("web"), start("good"), start("bad")
	server.run(t, echoServer(8080))
	shells := map[string]*container{"good": good.run(t), "bad": bad.run(t)}
	v4, v6 := server.ips(t)
	reaches := func(from string, to netip.Addr) bool {
		r := shells[from].execSync(t, "/bin/sh", "-c", fmt.Sprintf("echo | nc -w 1 %s 8080", to))
		return strings.HasPrefix(string(r.Stdout), "hello")
	}
	want := func(what string, allowed, denied string) {
		t.Helper()
		for _, to := range []netip.Addr{v4, v6} {
			eventually(t, func() error {
				if !reaches(allowed, to) {
					return fmt.Errorf("%s: %s does not reach %s", what, allowed, to)
				}
				if reaches(denied, to) {
					return fmt.Errorf("%s: %s reaches %s", what, denied, to)
				}
				return nil
			})
		}
	}
	if reaches("bad", v4) {
		t.Error("a pod was reached that its policy forbids")
	}
	want("at first", "good", "bad")
	if got, err := dialEcho(netip.AddrPortFrom(v4, 8080).String()); err != nil {
		t.Errorf("the node does not reach its own pod: %q, %v", got, err)
	}
	write(fmt.Sprintf(web, "bad"))
	want("changed", "bad", "good")
	why, err := exec.Command(n.Config.Binary, "--config", n.ConfigPath(), "policy", "why", "--from", "shop/good", "--to", "shop/web:8080/tcp").CombinedOutput()
	if err != nil || !strings.Contains(string(why), "denied; the loaded program: denied (ingress-denied)") {
		t.Errorf("policy why: %v\n%s", err, why)
	}
	n.Kill()
	if err := n.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	want("daemon back", "bad", "good")
	write(fmt.Sprintf(web, "good"))
	want("changed back", "good", "bad")
	list, err := exec.Command(n.Config.Binary, "--config", n.ConfigPath(), "policy", "list").CombinedOutput()
	if err != nil {
		t.Errorf("policy list: %v", err)
	}
	t.Logf("%s\n%s", why, list)
	for _, p := range []*pod{server, good, bad} {
		p.remove(t)
	}
}
