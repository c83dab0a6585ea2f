//go:build linux

package shim_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim"
)

func TestStartErrorsLeaveNothing(t *testing.T) {
	n := newNode(t)
	before := n.resources()
	for i, c := range []struct {
		name   string
		change func(*shim.Spec)
		is     func(error) bool
		text   string
	}{
		{"no such program", func(s *shim.Spec) { s.OCI.Process.Args = []string{"nothing"} }, errdefs.IsNotFound, "executable file not found"},
		{"not executable", func(s *shim.Spec) { s.OCI.Process.Args = []string{"/etc"} }, errdefs.IsInvalidArgument, ""},
		{"no root", func(s *shim.Spec) { s.OCI.Root = &specs.Root{Path: n.dir + "/none"} }, func(err error) bool { return err != nil }, ""},
		{"no mount source", func(s *shim.Spec) {
			s.OCI.Mounts = append(s.OCI.Mounts, specs.Mount{Destination: "/m", Source: n.dir + "/none", Type: "bind", Options: []string{"bind"}})
		}, errdefs.IsNotFound, ""},
		{"bad id", func(s *shim.Spec) { s.ID = "a/b" }, errdefs.IsInvalidArgument, ""},
		{"no namespace", func(s *shim.Spec) {
			s.OCI.Linux.Namespaces[4].Path = n.dir + "/none"
		}, func(err error) bool { return err != nil }, ""},
		{"log in no directory", func(s *shim.Spec) { s.LogPath = n.dir + "/none/log" }, func(err error) bool { return err != nil }, "none/log"},
		{"bad rlimit", func(s *shim.Spec) { s.OCI.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NONE"}} }, errdefs.IsInvalidArgument, ""},
		{"no such CPU", func(s *shim.Spec) { s.OCI.Linux.Resources.CPU = &specs.LinuxCPU{Cpus: "900"} }, errdefs.IsInvalidArgument, ""},
		{"no spec", func(s *shim.Spec) { s.OCI = nil }, errdefs.IsInvalidArgument, ""},
	} {
		id := "c" + strconv.Itoa(i)
		spec := n.spec(id, "true")
		c.change(&spec)
		_, err := n.client.Start(n.ctx(), spec)
		if !c.is(err) || !strings.Contains(fmt.Sprint(err), c.text) {
			t.Errorf("%s: %v", c.name, err)
		}
		n.wantNothing(id)
	}
	n.wantResources(before)
}

// resources are what the shim and the machine hold for the containers.
func (n *node) resources() map[string]int {
	r := map[string]int{}
	for mode, pids := range map[string][]int{"shim": n.find("serve"), "reaper": n.find("reaper")} {
		for _, p := range pids {
			fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p))
			r[mode+" descriptors"] += len(fds)
			kids, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", p, p))
			r[mode+" children"] += len(strings.Fields(string(kids)))
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mounts")
	r["mounts"] = strings.Count(string(mounts), n.dir)
	groups, _ := filepath.Glob("/sys/fs/cgroup/*" + n.parent + "/*/cgroup.procs")
	r["cgroups"] = len(groups)
	dirs, _ := os.ReadDir(filepath.Join(n.state(), "c"))
	r["directories"] = len(dirs)
	return r
}

// wantResources waits for the resources to be what they were; the garbage
// collector of the shim closes a few descriptors later.
func (n *node) wantResources(want map[string]int) {
	n.t.Helper()
	for _, p := range n.find("serve") {
		_ = p
	}
	eventually(n.t, 10*time.Second, func() string {
		got := n.resources()
		for k, v := range want {
			slack := 0
			if k == "shim descriptors" {
				slack = 12 // pidfds that wait for the collector
			}
			if got[k] > v+slack {
				return fmt.Sprintf("%s: %d, were %d", k, got[k], v)
			}
		}
		return ""
	})
}

func TestNoLeaks(t *testing.T) {
	n := newNode(t)
	round := func(i int) {
		id := "c" + strconv.Itoa(i)
		spec := n.spec(id, "sh", "-c", "sleep 1000")
		spec.Stdin = i%2 == 0
		spec.Terminal = i%3 == 0
		spec.OCI.Process.Terminal = spec.Terminal
		n.start(spec)
		if _, err := n.client.ExecSync(n.ctx(), id, shim.ExecOptions{Process: n.process("true")}); err != nil {
			t.Fatal(err)
		}
		in, inT := pipe(t, true)
		_, outT := pipe(t, false)
		s, err := n.client.Attach(n.ctx(), id, shim.StreamOptions{Stdin: inT, Stdout: outT})
		if err != nil {
			t.Fatal(err)
		}
		in.Close()
		if i%2 == 0 {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := n.client.Delete(n.ctx(), id); err != nil {
			t.Fatal(err)
		}
		if err := n.client.Forget(n.ctx(), id); err != nil {
			t.Fatal(err)
		}
		n.wantNothing(id)
	}
	for i := range 6 {
		round(i)
	}
	before := n.resources()
	for i := range 60 {
		round(100 + i)
	}
	n.wantResources(before)
	if files, _ := os.ReadDir(filepath.Join(n.dir, "exits")); len(files) != 0 {
		t.Errorf("exit records: %v", files)
	}
}

func TestStartIsIdempotent(t *testing.T) {
	n := newNode(t)
	var wg sync.WaitGroup
	pids := make([]int, 6)
	for i := range pids {
		wg.Go(func() {
			st, err := n.client.Start(n.ctx(), n.spec("c", "sleep", "1000"))
			if err != nil {
				t.Error(err)
			}
			pids[i] = st.Pid
		})
	}
	wg.Wait()
	for _, p := range pids {
		if p != pids[0] || p == 0 {
			t.Errorf("pids = %v", pids)
		}
	}
	if _, err := n.client.Delete(n.ctx(), "c"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.client.Start(n.ctx(), n.spec("c", "true")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("start of a deleted one: %v", err)
	}
}

func TestAbandonedStartLeavesNothing(t *testing.T) {
	n := newNode(t)
	for i := range 25 {
		id := "c" + strconv.Itoa(i)
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*time.Millisecond)
		_, err := n.client.Start(ctx, n.spec(id, "sleep", "1000"))
		cancel()
		if err == nil {
			continue
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		if _, err := n.client.State(n.ctx(), id); !errdefs.IsNotFound(err) {
			t.Errorf("state: %v", err)
		}
		n.wantNothing(id)
	}
}

func TestParallelStarts(t *testing.T) {
	n := newNode(t)
	var wg sync.WaitGroup
	for i := range 24 {
		wg.Go(func() {
			id := "c" + strconv.Itoa(i)
			if _, err := n.client.Start(n.ctx(), n.spec(id, "sh", "-c", "echo $0; exit "+strconv.Itoa(i))); err != nil {
				t.Error(err)
				return
			}
			if x := n.wait(id); x.Code != i || !x.Known {
				t.Errorf("exit = %+v, want %d", x, i)
			}
			if _, err := n.client.Delete(n.ctx(), id); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestOOMKilled(t *testing.T) {
	n := newNode(t)
	spec := n.spec("c", "sh", "-c", "a=x; while :; do a=$a$a; done")
	limit := int64(16 << 20)
	spec.OCI.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
	n.start(spec)
	if x := n.wait("c"); x.Code != 137 || !x.OOMKilled || !x.Known {
		t.Errorf("exit = %+v", x)
	}
	// After an adoption too.
	spec = n.spec("d", "sh", "-c", "usleep 500000; a=x; while :; do a=$a$a; done")
	spec.OCI.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
	n.start(spec)
	n.killShim()
	if x := n.wait("d"); x.Code != 137 || !x.OOMKilled || !x.Known {
		t.Errorf("exit = %+v", x)
	}
}

func TestUpdate(t *testing.T) {
	n := newNode(t)
	spec := n.spec("c", "sleep", "1000")
	limit, shares := int64(64<<20), uint64(512)
	spec.OCI.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
	spec.OCI.Linux.Resources.CPU = &specs.LinuxCPU{Shares: &shares}
	st := n.start(spec)
	limit = 128 << 20
	quota, period, little := int64(20000), uint64(100000), int64(4096)
	for range 2 {
		if err := n.client.Update(n.ctx(), "c", &specs.LinuxResources{
			Memory: &specs.LinuxMemory{Limit: &limit}, CPU: &specs.LinuxCPU{Quota: &quota, Period: &period},
		}); err != nil {
			t.Fatal(err)
		}
	}
	for name, r := range map[string]*specs.LinuxResources{
		"less than is in use": {Memory: &specs.LinuxMemory{Limit: &little}},
		"no such CPU":         {CPU: &specs.LinuxCPU{Cpus: "900"}},
	} {
		// cgroup v2 takes a limit that is too low, and reclaims or kills.
		if v2 := st.CgroupPaths[""] != ""; v2 && r.Memory != nil {
			continue
		}
		if err := n.client.Update(n.ctx(), "c", r); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	read := func(controller, v1, v2 string) string {
		dir, name := st.CgroupPaths[controller], v1
		if dir == "" {
			dir, name = st.CgroupPaths[""], v2
		}
		b, _ := os.ReadFile(filepath.Join(dir, name))
		return strings.TrimSpace(string(b))
	}
	if got := read("memory", "memory.limit_in_bytes", "memory.max"); got != "134217728" {
		t.Errorf("memory limit = %s", got)
	}
	if got := read("cpu", "cpu.cfs_quota_us", "cpu.max"); got != "20000" && got != "20000 100000" {
		t.Errorf("quota = %s", got)
	}
	if got := read("cpu", "cpu.shares", "cpu.weight"); got == "1024" || got == "100" {
		t.Errorf("shares are back at %s", got)
	}
	if _, err := n.client.ExecSync(n.ctx(), "c", shim.ExecOptions{Process: n.process("true")}); err != nil {
		t.Errorf("exec after update: %v", err)
	}
	n.killShim()
	if err := n.client.Update(n.ctx(), "c", &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &shares}}); err != nil {
		t.Errorf("update after adoption: %v", err)
	}
}

// What this process may not give is cut down instead of refused.
func TestLimitsAreClamped(t *testing.T) {
	n := newNode(t)
	spec := n.spec("c", "sh", "-c", "cat /proc/self/oom_score_adj; ulimit -Hn")
	score := -900
	spec.OCI.Process.OOMScoreAdj = &score
	spec.OCI.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1 << 20, Hard: 1 << 20}}
	n.start(spec)
	if x := n.wait("c"); x.Code != 0 {
		t.Errorf("exit = %+v", x)
	}
	lines := n.lines("c", "stdout")
	if len(lines) != 2 {
		t.Fatalf("lines = %q", lines)
	}
	var hdr unix.CapUserHeader
	hdr.Version = unix.LINUX_CAPABILITY_VERSION_3
	var caps [2]unix.CapUserData
	if err := unix.Capget(&hdr, &caps[0]); err != nil {
		t.Fatal(err)
	}
	if caps[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		if lines[0] != "-900" || lines[1] != "1048576" {
			t.Errorf("limits = %q", lines)
		}
		return
	}
	if got := strings.Count(n.log(), "CAP_SYS_RESOURCE is missing"); got != 1 {
		t.Errorf("said %d times", got)
	}
}

// Another boot: nothing of the old one runs; what is left of it is an exit that
// nobody knows, and Delete cleans up.
func TestOtherBoot(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("c", "sleep", "1000"))
	pid := n.pid("c")
	n.killAll(append(n.pids(), pid))
	if err := os.WriteFile(filepath.Join(n.state(), "boot"), []byte("another\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if x := n.wait("c"); x.Known || x.Code != 0 {
		t.Errorf("exit = %+v", x)
	}
	if _, err := n.client.Delete(n.ctx(), "c"); err != nil {
		t.Fatal(err)
	}
	n.wantNothing("c")
}

func TestReopenLog(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("c", "sh", "-c", "i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); usleep 100; done"))
	var old []string
	for i := range 10 {
		time.Sleep(20 * time.Millisecond)
		name := fmt.Sprintf("%s.%d", n.logPath("c"), i)
		if err := os.Rename(n.logPath("c"), name); err != nil {
			t.Fatal(err)
		}
		if i == 5 {
			n.killShim()
		}
		if err := n.client.ReopenLog(n.ctx(), "c"); err != nil {
			t.Fatal(err)
		}
		old = append(old, name)
	}
	n.wait("c")
	var all strings.Builder
	for _, name := range append(old, n.logPath("c")) {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(b)
	}
	if err := os.WriteFile(n.logPath("all"), []byte(all.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	wantCount(t, "rotated logs", n.lines("all", "stdout"), 3000)
}

func TestDeleteKillsForks(t *testing.T) {
	n := newNode(t)
	spec := n.spec("c", "sh", "-c", "trap '' TERM HUP; while :; do (sleep 1000 &); usleep 500; done")
	limit := int64(200)
	spec.OCI.Linux.Resources.Pids = &specs.LinuxPids{Limit: &limit}
	n.start(spec)
	time.Sleep(100 * time.Millisecond)
	if err := n.client.Signal(n.ctx(), "c", syscall.SIGTERM, true); err != nil {
		t.Error(err)
	}
	x, err := n.client.Delete(n.ctx(), "c")
	if err != nil || x.Code != 137 {
		t.Errorf("delete = %+v, %v", x, err)
	}
	n.wantNothing("c")
}

// Out of descriptors: a clear error, nothing left, and all well afterwards.
func TestOutOfDescriptors(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("before", "sleep", "1000"))
	pid := n.find("serve")[0]
	for limit := uint64(12); limit < 60; limit += 3 {
		if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit, Max: 4096}, nil); err != nil {
			t.Fatal(err)
		}
		id := "c" + strconv.FormatUint(limit, 10)
		_, err := n.client.Start(n.ctx(), n.spec(id, "sleep", "1000"))
		if err != nil {
			if !errdefs.IsResourceExhausted(err) {
				t.Errorf("%d descriptors: %v", limit, err)
			}
			if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 4096, Max: 4096}, nil); err != nil {
				t.Fatal(err)
			}
			if _, err := n.client.State(n.ctx(), id); !errdefs.IsNotFound(err) {
				t.Errorf("state: %v", err)
			}
			eventually(t, 5*time.Second, func() string {
				_, err := os.Stat(filepath.Join(n.state(), "c", id))
				return map[bool]string{false: "its directory is left"}[errors.Is(err, os.ErrNotExist)]
			})
			n.wantNothing(id)
		}
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 4096, Max: 4096}, nil); err != nil {
		t.Fatal(err)
	}
	n.start(n.spec("after", "sh", "-c", "echo well; exit 3"))
	if x := n.wait("after"); x.Code != 3 {
		t.Errorf("exit = %+v", x)
	}
	if got := n.find("serve"); len(got) != 1 || got[0] != pid {
		t.Errorf("the shim was replaced: %v, was %d", got, pid)
	}
}

// An exit is told when it is on disk, and not before.
func TestNoSpaceForExit(t *testing.T) {
	n := newNode(t)
	exits := filepath.Join(n.dir, "exits")
	if err := unix.Mount("tmpfs", exits, "tmpfs", 0, "size=16k"); err != nil {
		t.Skip("mount tmpfs:", err)
	}
	defer unix.Unmount(exits, unix.MNT_DETACH)
	fill := filepath.Join(exits, "fill")
	_ = os.WriteFile(fill, make([]byte, 64<<10), 0o600)
	n.start(n.spec("c", "sh", "-c", "exit 6"))
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	if x, err := n.client.Wait(ctx, "c"); err == nil {
		t.Errorf("exit = %+v, with no space to record it", x)
	}
	if _, err := n.client.Delete(ctx, "c"); err == nil {
		t.Error("deleted without a record")
	}
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	if x := n.wait("c"); x.Code != 6 || !x.Known {
		t.Errorf("exit = %+v", x)
	}
	if _, err := n.client.Delete(n.ctx(), "c"); err != nil {
		t.Error(err)
	}
}

// What the daemon is given to survive is not for containers.
func TestInheritance(t *testing.T) {
	n := newNode(t)
	n.stop()
	n.killAll(n.pids())
	signal.Ignore(syscall.SIGHUP, syscall.SIGUSR1)
	defer signal.Reset(syscall.SIGHUP, syscall.SIGUSR1)
	own, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		t.Fatal(err)
	}
	protected := os.WriteFile("/proc/self/oom_score_adj", []byte("-500"), 0) == nil
	n.connect()
	if protected {
		_ = os.WriteFile("/proc/self/oom_score_adj", own, 0)
	}
	n.start(n.spec("c", "sh", "-c", "grep -E 'SigIgn|SigBlk' /proc/self/status; cat /proc/self/oom_score_adj"))
	n.wait("c")
	if got := strings.Join(n.lines("c", "stdout"), "|"); got != "SigBlk:\t0000000000000000|SigIgn:\t0000000000000000|0" {
		t.Errorf("container has %q", got)
	}
}
