//go:build linux

package shim_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim"
)

const counter = "i=0; while [ $i -lt %d ]; do echo $i; echo $i >&2; i=$((i+1)); done; exit 5"

// wantCount checks that the lines are 0..n-1.
func wantCount(t *testing.T, what string, lines []string, n int) {
	t.Helper()
	for i, l := range lines {
		if l != strconv.Itoa(i) {
			t.Fatalf("%s: line %d is %q", what, i, l)
		}
	}
	if len(lines) != n {
		t.Fatalf("%s: %d lines, want %d", what, len(lines), n)
	}
}

// The shim is killed again and again while containers count: each number is in
// the log once and in order, and the exit codes are exact.
func TestKillShimWhileCounting(t *testing.T) {
	n := newNode(t)
	const count, containers = 60000, 3
	for i := range containers {
		n.start(n.spec("c"+strconv.Itoa(i), "sh", "-c", fmt.Sprintf(counter, count)))
	}
	kills := 0
	for running := true; running; {
		n.killShim()
		kills++
		if err := n.client.Ready(n.ctx()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(kills%7) * 5 * time.Millisecond)
		running = false
		for i := range containers {
			eventually(t, 10*time.Second, func() string {
				st, err := n.client.State(n.ctx(), "c"+strconv.Itoa(i))
				if err != nil {
					return err.Error()
				}
				running = running || st.Exit == nil
				return ""
			})
		}
	}
	t.Logf("%d kills", kills)
	if kills < 5 {
		t.Errorf("only %d kills: the test shows nothing", kills)
	}
	for i := range containers {
		id := "c" + strconv.Itoa(i)
		if x := n.wait(id); !x.Known || x.Code != 5 {
			t.Errorf("%s: exit = %+v", id, x)
		}
		wantCount(t, id+" stdout", n.lines(id, "stdout"), count)
		wantCount(t, id+" stderr", n.lines(id, "stderr"), count)
	}
}

// Exits that happen while no shim lives are known to the reaper.
func TestExitWhileShimIsDead(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("code", "sh", "-c", "trap 'exit 42' TERM; while :; do usleep 1000; done"))
	n.start(n.spec("sig", "sleep", "1000"))
	code, sig := n.pid("code"), n.pid("sig")
	time.Sleep(50 * time.Millisecond) // the trap
	shimPid := n.find("serve")[0]
	// Stopped it does nothing, and its death is its next event.
	_ = syscall.Kill(shimPid, syscall.SIGSTOP)
	_ = syscall.Kill(code, syscall.SIGTERM)
	_ = syscall.Kill(sig, syscall.SIGKILL)
	waitGone(code)
	waitGone(sig)
	n.killAll([]int{shimPid})
	if x := n.wait("code"); !x.Known || x.Code != 42 || x.Signal != 0 {
		t.Errorf("exit = %+v", x)
	}
	if x := n.wait("sig"); !x.Known || x.Code != 137 || x.Signal != 9 {
		t.Errorf("exit = %+v", x)
	}
}

func (n *node) pid(id string) int {
	n.t.Helper()
	st, err := n.client.State(n.ctx(), id)
	if err != nil {
		n.t.Fatal(err)
	}
	return st.Pid
}

// Shim and reaper die together: the containers run on, are adopted, and work.
func TestKillShimAndReaper(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("c", "sh", "-c", "trap 'exit 9' TERM; i=0; while :; do echo $i; i=$((i+1)); usleep 2000; done"))
	time.Sleep(50 * time.Millisecond)
	pid := n.pid("c")
	n.killAll(n.pids())
	if err := syscall.Kill(pid, 0); err != nil {
		t.Fatalf("container is gone: %v", err)
	}
	if err := n.client.Ready(n.ctx()); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, func() string {
		st, err := n.client.State(n.ctx(), "c")
		if err != nil || st.Pid != pid || st.Exit != nil {
			return fmt.Sprint(st, err)
		}
		return ""
	})
	r, err := n.client.ExecSync(n.ctx(), "c", shim.ExecOptions{Process: n.process("echo", "hello")})
	if err != nil || string(r.Stdout) != "hello\n" {
		t.Errorf("exec after adoption = %+v, %v", r, err)
	}
	before := len(n.lines("c", "stdout"))
	eventually(t, 5*time.Second, func() string {
		if len(n.lines("c", "stdout")) > before+10 {
			return ""
		}
		return "log does not go on"
	})
	if err := n.client.Signal(n.ctx(), "c", syscall.SIGTERM, false); err != nil {
		t.Fatal(err)
	}
	x := n.wait("c")
	if kernelHasExitInfo(t) && (!x.Known || x.Code != 9) {
		t.Errorf("exit = %+v", x)
	}
	lines := n.lines("c", "stdout")
	wantCount(t, "stdout", lines, len(lines))
}

func kernelHasExitInfo(t *testing.T) bool {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	_, _ = fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return major > 6 || major == 6 && minor >= 15
}

// A daemon that comes back hears of the exits that it missed.
func TestExitsWhileDaemonIsAway(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("c", "sh", "-c", "usleep 300000; exit 3"))
	n.stop()
	n.mu.Lock()
	n.exits = nil
	n.mu.Unlock()
	time.Sleep(500 * time.Millisecond)
	n.connect()
	eventually(t, 5*time.Second, func() string {
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, x := range n.exits {
			if x.ID == "c" && x.Code == 3 {
				return ""
			}
		}
		return "no exit"
	})
}

// A start that the shim does not live to end leaves nothing, wherever it dies.
func TestKillShimWhileStarting(t *testing.T) {
	n := newNode(t)
	for i := range 24 {
		id := "c" + strconv.Itoa(i)
		done := make(chan error, 1)
		go func() {
			_, err := n.client.Start(n.ctx(), n.spec(id, "sleep", "1000"))
			done <- err
		}()
		time.Sleep(time.Duration(i) * 1100 * time.Microsecond)
		n.killShim()
		err := <-done
		if rerr := n.client.Ready(n.ctx()); rerr != nil {
			t.Fatal(rerr)
		}
		st, serr := n.client.State(n.ctx(), id)
		if err == nil && serr != nil {
			t.Errorf("%s: started, then %v", id, serr)
		}
		if serr != nil {
			n.wantNothing(id)
		} else if st.Exit == nil {
			if kerr := syscall.Kill(st.Pid, 0); kerr != nil {
				t.Errorf("%s: %v", id, kerr)
			}
		}
	}
}

// wantNothing checks that nothing of a container is left.
func (n *node) wantNothing(id string) {
	n.t.Helper()
	if _, err := os.Stat(filepath.Join(n.state(), "c", id)); !errors.Is(err, os.ErrNotExist) {
		n.t.Errorf("directory of %s is left: %v", id, err)
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*" + n.parent + "/" + id)
	if len(groups) > 0 {
		n.t.Errorf("cgroups of %s are left: %v", id, groups)
	}
	b, _ := os.ReadFile("/proc/self/mounts")
	if strings.Contains(string(b), filepath.Join(n.state(), "c", id)) {
		n.t.Errorf("mounts of %s are left", id)
	}
}

// The reaper's death hurts nobody; the next shim gets a new one.
func TestKillReaper(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("a", "sh", "-c", "trap 'exit 11' TERM; while :; do usleep 1000; done"))
	n.start(n.spec("b", "sh", "-c", "trap 'exit 12' TERM; while :; do usleep 1000; done"))
	time.Sleep(50 * time.Millisecond) // the traps
	n.killAll(n.find("reaper"))
	r, err := n.client.ExecSync(n.ctx(), "a", shim.ExecOptions{Process: n.process("echo", "hello")})
	if err != nil || string(r.Stdout) != "hello\n" {
		t.Errorf("exec without a reaper = %+v, %v", r, err)
	}
	n.start(n.spec("c", "sh", "-c", "exit 13"))
	if x := n.wait("c"); !x.Known || x.Code != 13 {
		t.Errorf("exit = %+v", x)
	}
	if err := n.client.Signal(n.ctx(), "a", syscall.SIGTERM, false); err != nil {
		t.Fatal(err)
	}
	if x := n.wait("a"); !x.Known || x.Code != 11 {
		t.Errorf("exit = %+v", x)
	}
	n.killShim()
	if err := n.client.Signal(n.ctx(), "b", syscall.SIGTERM, false); err != nil {
		t.Fatal(err)
	}
	if x := n.wait("b"); kernelHasExitInfo(t) && (!x.Known || x.Code != 12) {
		t.Errorf("exit = %+v", x)
	}
	if pids := n.pids(); len(pids) != 2 {
		t.Errorf("%d processes, want reaper and shim", len(pids))
	}
}

// Daemons that start at the same time get one shim.
func TestOneShim(t *testing.T) {
	n := newNode(t)
	n.stop()
	n.killAll(n.pids())
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var clients []*shim.Client
	for range 6 {
		c, err := shim.New(shim.Config{Binary: binary, StateDir: n.state(), ExitDir: filepath.Join(n.dir, "exits")})
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() { _ = c.Run(ctx) })
		clients = append(clients, c)
	}
	for _, c := range clients {
		if err := c.Ready(n.ctx()); err != nil {
			t.Error(err)
		}
	}
	time.Sleep(100 * time.Millisecond)
	if r, s := n.find("reaper"), n.find("serve"); len(r) != 1 || len(s) != 1 {
		t.Errorf("%d reapers and %d shims", len(r), len(s))
	}
	cancel()
	wg.Wait()
	n.connect()
}
