//go:build linux

package shim_test

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/nodeagent/nodeagent/shim"
)

func TestStartLogExitDelete(t *testing.T) {
	n := newNode(t)
	st := n.start(n.spec("one", "sh", "-c", "echo out; echo err >&2; printf tail; exit 7"))
	if st.Pid <= 0 || st.StartTime == 0 || len(st.CgroupPaths) == 0 {
		t.Errorf("state = %+v", st)
	}
	x := n.wait("one")
	if !x.Known || x.Code != 7 || x.Signal != 0 || x.OOMKilled {
		t.Errorf("exit = %+v", x)
	}
	if got := strings.Join(n.lines("one", "stdout"), "|"); got != "out|tail" {
		t.Errorf("stdout = %q", got)
	}
	if got := strings.Join(n.lines("one", "stderr"), "|"); got != "err" {
		t.Errorf("stderr = %q", got)
	}
	for range 2 {
		d, err := n.client.Delete(n.ctx(), "one")
		if err != nil || d.Code != 7 {
			t.Errorf("delete = %+v, %v", d, err)
		}
	}
	if err := n.client.Forget(n.ctx(), "one"); err != nil {
		t.Error(err)
	}
	if _, err := n.client.State(n.ctx(), "one"); !errdefs.IsNotFound(err) {
		t.Errorf("state after forget: %v", err)
	}
}

func TestExecSync(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("c", "sleep", "1000"))
	r, err := n.client.ExecSync(n.ctx(), "c", shim.ExecOptions{Process: n.process("sh", "-c", "echo a; echo b >&2; exit 3")})
	if err != nil || string(r.Stdout) != "a\n" || string(r.Stderr) != "b\n" || r.Code != 3 || r.TimedOut {
		t.Errorf("exec = %+v, %v", r, err)
	}
	if _, err := n.client.ExecSync(n.ctx(), "c", shim.ExecOptions{Process: n.process("nothing")}); !errdefs.IsNotFound(err) {
		t.Errorf("exec of nothing: %v", err)
	}
}

func TestSignal(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("c", "sleep", "1000"))
	if err := n.client.Signal(n.ctx(), "c", syscall.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	if x := n.wait("c"); x.Code != 137 || x.Signal != 9 || !x.Known {
		t.Errorf("exit = %+v", x)
	}
	if err := n.client.Signal(n.ctx(), "c", syscall.SIGTERM, false); !errdefs.IsNotFound(err) {
		t.Errorf("signal after exit: %v", err)
	}
	eventually(t, time.Second, func() string {
		n.mu.Lock()
		defer n.mu.Unlock()
		if len(n.exits) == 1 && n.exits[0].Code == 137 {
			return ""
		}
		return "no exit event"
	})
}

// The shim's own timer slack is not for containers.
func TestTimerSlack(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("c", "sleep", "1000"))
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/timerslack_ns", n.pid("c")))
	if err != nil || strings.TrimSpace(string(b)) != "50000" {
		t.Errorf("slack = %q, %v", b, err)
	}
	r, err := n.client.ExecSync(n.ctx(), "c", shim.ExecOptions{Process: n.process("cat", "/proc/self/timerslack_ns")})
	if err != nil || strings.TrimSpace(string(r.Stdout)) != "50000" {
		t.Errorf("slack of an exec = %q, %v", r.Stdout, err)
	}
}
