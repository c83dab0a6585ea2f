//go:build linux

package server

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/cgroups"
)

// marked stands for a cgroup: its processes are those with a certain
// environment.
type marked struct {
	cgroups.Manager
	mark string
}

func (m marked) GetAllPids() ([]int, error) {
	var pids []int
	all, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range all {
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), m.mark) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if st, err := procStat(pid); err == nil && st.state != 'Z' {
				pids = append(pids, pid)
			}
		}
	}
	return pids, nil
}

func TestKillSession(t *testing.T) {
	m := marked{mark: "NODEAGENT_TEST_MARK=" + strconv.Itoa(os.Getpid()) + "-" + t.Name()}
	other := exec.Command("sleep", "1000") // the container's own
	other.Env = []string{m.mark, "PATH=" + os.Getenv("PATH")}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	cmd := exec.Command("sh", "-c", "sleep 1000 & (sleep 1001 &); setsid sh -c 'sleep 1002; true' & sleep 1003; true")
	cmd.Env = other.Env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	wait := func(want int) {
		t.Helper()
		var pids []int
		for range 500 {
			if pids, _ = m.GetAllPids(); len(pids) == want {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Fatalf("%d processes, want %d", len(pids), want)
	}
	wait(7)
	killSession(&container{cgroup: m}, cmd.Process.Pid)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	wait(1)
}
