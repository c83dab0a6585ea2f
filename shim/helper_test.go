//go:build linux

package shim_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim"
)

// binary is nodeagent-shim, built once for all tests.
var binary string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if os.Geteuid() != 0 {
			return m.Run() // every test skips
		}
		dir, err := os.MkdirTemp("", "shimtest")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		binary = os.Getenv("NODEAGENT_SHIM")
		if binary == "" {
			binary = filepath.Join(dir, "nodeagent-shim")
			cmd := exec.Command("go", "build", "-tags", "seccomp osusergo netgo", "-ldflags", "-extldflags -static -s -w",
				"-o", binary, "../cmd/nodeagent-shim")
			if out, err := cmd.CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "build nodeagent-shim: %v\n%s", err, out)
				return 1
			}
		}
		return m.Run()
	}())
}

// node is a shim in directories of its own, with a client.
type node struct {
	t      testing.TB
	dir    string
	parent string // cgroup of all its containers
	rootfs string
	client *shim.Client
	stop   func() // ends the client, not the shim

	mu    sync.Mutex
	exits []shim.Exit
}

func newNode(t testing.TB) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs busybox-static")
	}
	n := &node{t: t, dir: t.TempDir()}
	n.parent = "/nodeagent-shimtest-" + strconv.Itoa(os.Getpid()) + "-" + filepath.Base(filepath.Dir(n.dir))
	n.rootfs = filepath.Join(n.dir, "rootfs")
	for _, d := range []string{"bin", "proc", "dev", "sys", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(n.rootfs, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(n.rootfs, "bin/busybox"), busybox, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"sh", "sleep", "cat", "echo", "ls", "ps", "seq", "head", "yes", "dd", "stty", "true", "false", "id", "kill", "setsid", "usleep", "wc", "tr", "mkdir", "env", "grep"} {
		if err := os.Symlink("busybox", filepath.Join(n.rootfs, "bin", a)); err != nil {
			t.Fatal(err)
		}
	}
	n.connect()
	t.Cleanup(n.close)
	return n
}

func (n *node) state() string { return filepath.Join(n.dir, "state") }

// connect makes a new client, as a new daemon would.
func (n *node) connect() {
	n.t.Helper()
	if n.stop != nil {
		n.stop()
	}
	c, err := shim.New(shim.Config{
		Binary: binary, StateDir: n.state(), ExitDir: filepath.Join(n.dir, "exits"),
		Log: slog.New(slog.NewTextHandler(testWriter{n.t}, nil)),
	})
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = c.Run(ctx) })
	wg.Go(func() {
		for {
			select {
			case x := <-c.Exits():
				n.mu.Lock()
				n.exits = append(n.exits, x)
				n.mu.Unlock()
			case <-ctx.Done():
				return
			}
		}
	})
	n.client = c
	n.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	ready, done := context.WithTimeout(context.Background(), 10*time.Second)
	defer done()
	if err := c.Ready(ready); err != nil {
		n.t.Fatalf("shim does not come up: %v\n%s", err, n.log())
	}
}

func (n *node) log() string {
	b, _ := os.ReadFile(filepath.Join(n.state(), "shim.log"))
	return string(b)
}

func (n *node) close() {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	list, err := n.client.List(ctx)
	if err != nil {
		n.t.Errorf("list: %v", err)
	}
	for _, s := range list {
		if _, err := n.client.Delete(ctx, s.ID); err != nil {
			n.t.Errorf("delete: %v", err)
		}
	}
	n.stop()
	pids := n.pids()
	for _, p := range pids {
		_ = syscall.Kill(p, syscall.SIGKILL)
	}
	for _, p := range pids {
		waitGone(p)
	}
	if n.t.Failed() {
		n.t.Logf("log of the shim:\n%s", n.log())
	}
	n.removeCgroups()
}

// removeCgroups removes the parent group in every hierarchy and says what was
// left in it.
func (n *node) removeCgroups() {
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + n.parent)
	dirs = append(dirs, "/sys/fs/cgroup"+n.parent)
	for _, d := range dirs {
		left, _ := filepath.Glob(d + "/*/cgroup.procs")
		for _, l := range left {
			n.t.Errorf("cgroup left: %s", filepath.Dir(l))
			removeTree(filepath.Dir(l))
		}
		if err := unix.Rmdir(d); err != nil && err != unix.ENOENT {
			n.t.Errorf("remove cgroup %s: %v", d, err)
		}
	}
}

func removeTree(dir string) {
	sub, _ := filepath.Glob(dir + "/*/cgroup.procs")
	for _, s := range sub {
		removeTree(filepath.Dir(s))
	}
	_ = unix.Rmdir(dir)
}

// pids are the reaper and the shim of this node.
func (n *node) pids() []int {
	return append(n.find("reaper"), n.find("serve")...)
}

func (n *node) find(mode string) []int {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	var pids []int
	for _, p := range all {
		b, _ := os.ReadFile(p)
		f := strings.Split(string(b), "\x00")
		if len(f) > 3 && f[1] == mode && f[2] == n.state() {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(p)))
			pids = append(pids, pid)
		}
	}
	return pids
}

func waitGone(pid int) {
	for range 500 {
		st, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(st), ") Z ") {
			return
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// killShim kills the shim with SIGKILL and returns when it is dead.
func (n *node) killShim() {
	n.t.Helper()
	var pids []int
	eventually(n.t, 10*time.Second, func() string {
		pids = n.find("serve")
		return map[bool]string{false: "not one shim"}[len(pids) == 1]
	})
	n.killAll(pids)
}

func (n *node) killAll(pids []int) {
	for _, p := range pids {
		_ = syscall.Kill(p, syscall.SIGKILL)
	}
	for _, p := range pids {
		waitGone(p)
	}
}

func (n *node) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	n.t.Cleanup(cancel)
	return ctx
}

func (n *node) logPath(id string) string { return filepath.Join(n.dir, id+".log") }

// spec is a container like a pod's: new namespaces but for the network.
func (n *node) spec(id string, args ...string) shim.Spec {
	return shim.Spec{ID: id, SandboxID: "sandbox", OCI: n.oci(id, args...), LogPath: n.logPath(id)}
}

func (n *node) oci(id string, args ...string) *specs.Spec {
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_DAC_OVERRIDE"}
	return &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: n.rootfs},
		Process: n.process(args...),
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: n.parent + "/" + id,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.NetworkNamespace},
			},
			Resources:   &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
			MaskedPaths: []string{"/proc/kcore"},
		},
		Annotations: map[string]string{"caps": strings.Join(caps, ",")},
	}
}

func (n *node) process(args ...string) *specs.Process {
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_DAC_OVERRIDE"}
	return &specs.Process{
		Args: args, Cwd: "/", Env: []string{"PATH=/bin"}, NoNewPrivileges: true,
		Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
	}
}

func (n *node) start(s shim.Spec) shim.State {
	n.t.Helper()
	st, err := n.client.Start(n.ctx(), s)
	if err != nil {
		n.t.Fatalf("start: %v", err)
	}
	return st
}

func (n *node) wait(id string) shim.Exit {
	n.t.Helper()
	x, err := n.client.Wait(n.ctx(), id)
	if err != nil {
		n.t.Fatalf("wait: %v", err)
	}
	return x
}

// lines returns the text of the log's lines of a stream, checking their form.
func (n *node) lines(id, stream string) []string {
	n.t.Helper()
	b, err := os.ReadFile(n.logPath(id))
	if err != nil {
		n.t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(string(b)) {
		if !strings.HasSuffix(line, "\n") {
			break // the last one, being written or about to be written again
		}
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(f) != 4 {
			n.t.Fatalf("torn line %q", line)
		}
		if _, err := time.Parse(time.RFC3339Nano, f[0]); err != nil {
			n.t.Fatalf("line %q: %v", line, err)
		}
		if f[1] == stream {
			lines = append(lines, f[3])
		}
	}
	return lines
}

// eventually polls until f returns "".
func eventually(t testing.TB, limit time.Duration, f func() string) {
	t.Helper()
	var last string
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if last = f(); last == "" {
			return
		}
	}
	t.Fatalf("not after %v: %s", limit, last)
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	if os.Getenv("SHIM_TEST_VERBOSE") != "" {
		w.t.Log(strings.TrimSpace(string(p)))
	}
	return len(p), nil
}
