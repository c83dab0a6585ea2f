// Package cli runs the built nodeagent's commands against a daemon of their
// own, as a person and as systemd would. It needs root and bin/nodeagent, and
// skips without. The commands that need no daemon are tested beside their code.
package cli

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nodeagent/nodeagent/test/e2e/node"
	"github.com/nodeagent/nodeagent/test/images"
	"github.com/nodeagent/nodeagent/test/registry"
)

// start runs a daemon with the environment given.
func start(t *testing.T, env ...string) *node.Node {
	t.Helper()
	return node.StartTest(t, node.Config{Env: env})
}

// nodeagent runs a command against n's daemon.
func nodeagent(t *testing.T, n *node.Node, args ...string) (out string, err error) {
	t.Helper()
	cmd := exec.Command(n.Config.Binary, append(args, "--config", n.ConfigPath())...)
	b, err := cmd.CombinedOutput()
	return string(b), err
}

func hello(t *testing.T) images.Image {
	t.Helper()
	img, err := images.Build(images.Config{Cmd: []string{"hello"}}, images.File("hello", "world"))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestImages takes one image in by every way there is.
func TestImages(t *testing.T) {
	n := start(t)
	img := hello(t)
	id := strings.TrimPrefix(img.ID(), "sha256:")[:12]
	reg, err := registry.Start(registry.Config{User: "me", Password: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	remote := reg.Addr + "/cli/hello:1"
	if err := images.Push(t.Context(), remote, img, "me", "secret"); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	layout, archive, docker := filepath.Join(dir, "layout"), filepath.Join(dir, "oci.tar"), filepath.Join(dir, "docker.tar")
	if err := images.WriteLayout(layout, map[string]images.Artifact{"example.test/hello:1": img}); err != nil {
		t.Fatal(err)
	}
	write(t, archive, func(w *bytes.Buffer) error {
		return images.WriteArchive(w, map[string]images.Artifact{"example.test/hello:1": img})
	})
	write(t, docker, func(w *bytes.Buffer) error {
		return images.WriteDockerArchive(w, map[string]images.Image{"example.test/hello:1": img})
	})
	for _, tt := range []struct {
		name string
		args []string
		ref  string
	}{
		{"pull", []string{"pull", "--creds", "me:secret", remote}, remote},
		{"layout", []string{"import", layout}, "example.test/hello:1"},
		{"oci archive", []string{"import", archive}, "example.test/hello:1"},
		{"docker archive", []string{"import", docker}, "example.test/hello:1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, err := nodeagent(t, n, append([]string{"image"}, tt.args...)...)
			if err != nil || !strings.Contains(out, id+"  "+tt.ref) {
				t.Fatalf("%v: %s", err, out)
			}
			if out, err := nodeagent(t, n, "image", "ls"); err != nil || !strings.Contains(out, tt.ref) {
				t.Errorf("ls: %v: %s", err, out)
			}
			if out, err := nodeagent(t, n, "image", "rm", tt.ref); err != nil || out != "removed "+tt.ref+"\n" {
				t.Errorf("rm: %v: %s", err, out)
			}
			if out, err := nodeagent(t, n, "image", "ls"); err != nil || strings.Contains(out, id) {
				t.Errorf("ls after rm: %v: %s", err, out)
			}
		})
	}
}

func write(t *testing.T, path string, fill func(*bytes.Buffer) error) {
	t.Helper()
	var b bytes.Buffer
	if err := fill(&b); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestImageErrors: one clear line, nothing kept.
func TestImageErrors(t *testing.T) {
	n := start(t)
	broken := filepath.Join(t.TempDir(), "broken.tar")
	if err := os.WriteFile(broken, []byte("no archive"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"pull", "127.0.0.1:1/absent:1"},
		{"pull", "not a name"},
		{"import", broken},
		{"import", "/absent"},
		{"rm", "example.test/absent:1"},
	} {
		out, err := nodeagent(t, n, append([]string{"image"}, args...)...)
		if err == nil || !strings.HasPrefix(out, "nodeagent: ") || strings.Count(out, "\n") != 1 || strings.Contains(out, "rpc error") {
			t.Errorf("%v: %v: %s", args, err, out)
		}
	}
	if out, err := nodeagent(t, n, "image", "ls"); err != nil || !strings.Contains(out, "no images") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestSupervision speaks systemd's side of sd_notify(3).
func TestSupervision(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	n := start(t, "NOTIFY_SOCKET="+path, "WATCHDOG_USEC=300000")
	expect := func(want string) {
		t.Helper()
		socket.SetReadDeadline(time.Now().Add(10 * time.Second))
		buf := make([]byte, 4096)
		for {
			size, err := socket.Read(buf)
			if err != nil {
				t.Fatalf("wait for %s: %v\n%s", want, err, n.LogTail(10))
			}
			if strings.Contains(string(buf[:size]), want) {
				return
			}
		}
	}
	expect("READY=1")
	for range 3 {
		expect("WATCHDOG=1")
	}
	if err := n.Stop(); err != nil {
		t.Fatal(err)
	}
	expect("STOPPING=1")
}

// TestRefusesAChroot: there, an exec would leave the container.
func TestRefusesAChroot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	binary, err := node.Binary()
	if err != nil {
		t.Skip(err)
	}
	root := t.TempDir()
	if out, err := exec.Command("cp", binary, root+"/nodeagent").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	script := `mkdir -p $0/proc && mount --bind $0 $0 && mount -t proc proc $0/proc && exec chroot $0 /nodeagent run`
	out, err := exec.Command("unshare", "-m", "--propagation", "private", "sh", "-c", script, root).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "runs in a chroot") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestMetrics(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	free.Close()
	node.StartTest(t, node.Config{Extra: "metrics:\n  address: " + addr})
	var body []byte
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		resp, err := http.Get("http://" + addr + "/metrics")
		if err == nil {
			body, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"nodeagent_build_info{", "process_resident_memory_bytes", "go_goroutines"} {
		if !bytes.Contains(body, []byte(want)) {
			t.Errorf("no %s in\n%.2000s", want, body)
		}
	}
}

// TestStoppedWhileStarting: a daemon that is stopped early leaves as little.
func TestStoppedWhileStarting(t *testing.T) {
	n := start(t)
	for _, after := range []time.Duration{0, 2, 5, 10, 15, 20, 30, 50, 80, 150} {
		if err := n.Stop(); err != nil {
			t.Fatal(err)
		}
		if left := n.WaitNoLeaks(node.Leaks{}); left != "" {
			t.Fatalf("left behind:\n%s", left)
		}
		if err := n.Launch(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(after * time.Millisecond)
	}
}

// TestStopsCleanly: with no pod, nothing outlives the daemon; a second daemon
// on the same directories is refused while the first runs.
func TestStopsCleanly(t *testing.T) {
	n := start(t)
	out, err := nodeagent(t, n, "run")
	if err == nil || !strings.Contains(out, fmt.Sprintf("another nodeagent (pid %d) uses %s", n.Pid(), n.State)) {
		t.Errorf("second daemon: %v: %s", err, out)
	}
	if err := n.Stop(); err != nil {
		t.Fatal(err)
	}
	if s := n.ExitState(); s.ExitCode() != 0 {
		t.Errorf("exit %s\n%s", s, n.LogTail(10))
	}
	if left := n.WaitNoLeaks(node.Leaks{}); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
}
