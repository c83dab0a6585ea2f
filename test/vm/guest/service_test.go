package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// TestService follows one pod through the life of the service: whatever
// happens to the daemon, the pod's container keeps its process and its log.
func TestService(t *testing.T) {
	machine(t)
	install(t, "previous.deb")
	waitActive(t)
	before, older := installed(t), command(t, "nodeagent", "version")
	importImage(t)
	p := run(t, "steady", counting, nil, nil)
	pid := containerPID(t, p)
	same := func(t *testing.T) {
		t.Helper()
		waitActive(t)
		equal(t, "state", p.status(t).State, runtimeapi.ContainerState_CONTAINER_RUNNING)
		equal(t, "process", containerPID(t, p), pid)
		equal(t, "exec", p.sh(t, "echo works"), "works")
		p.countsOn(t)
	}
	t.Run("upgrade", func(t *testing.T) {
		install(t, "nodeagent.deb")
		same(t)
		if now := installed(t); now == before {
			t.Errorf("version %s after the upgrade too", now)
		}
		t.Logf("upgraded from %s to %s\n%s\nto\n%s", before, installed(t), older, command(t, "nodeagent", "version"))
		equal(t, "restarts after a crash", property(t, "NRestarts"), "0")
	})
	equal(t, "enabled", command(t, "systemctl", "is-enabled", "nodeagent"), "enabled")
	for _, f := range []string{
		"/etc/nodeagent/config.yaml", "/usr/share/bash-completion/completions/nodeagent", "/usr/share/man/man8/nodeagent.8.gz", "/usr/share/man/man8/nodeagent-shim.8.gz",
		"/usr/lib/systemd/system/nodeagent.service", "/usr/lib/sysctl.d/60-nodeagent.conf",
	} {
		if _, err := os.Stat(f); err != nil {
			t.Error(err)
		}
	}
	t.Run("check", func(t *testing.T) { t.Log("\n" + command(t, "nodeagent", "check")) })
	t.Run("restart", func(t *testing.T) {
		command(t, "systemctl", "restart", "nodeagent")
		same(t)
	})
	t.Run("crash", func(t *testing.T) {
		before := mainPID(t)
		syscall.Kill(before, syscall.SIGKILL)
		eventually(t, "another daemon", func() error {
			if now := mainPID(t); now == before || now == 0 {
				return fmt.Errorf("main process %d", now)
			}
			return nil
		})
		same(t)
	})
	t.Run("stop and start", func(t *testing.T) {
		short := run(t, "short", "sleep 5; exit 42", nil, nil)
		command(t, "systemctl", "stop", "nodeagent")
		equal(t, "state", property(t, "ActiveState"), "inactive")
		p.countsOn(t)
		time.Sleep(6 * time.Second)
		command(t, "systemctl", "start", "nodeagent")
		same(t)
		equal(t, "exit code of the time without a daemon", short.waitExit(t).ExitCode, 42)
		short.remove(t)
	})
	t.Run("shim killed", func(t *testing.T) {
		for _, pid := range node.ProcessesNaming("nodeagent-shim serve") {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		same(t)
	})
	t.Run("watchdog", func(t *testing.T) {
		dropIn := "/run/systemd/system/nodeagent.service.d/watchdog.conf"
		if err := os.MkdirAll(filepath.Dir(dropIn), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dropIn, []byte("[Service]\nWatchdogSec=10\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		defer func() {
			os.RemoveAll(filepath.Dir(dropIn))
			command(t, "systemctl", "daemon-reload")
			command(t, "systemctl", "restart", "nodeagent")
		}()
		command(t, "systemctl", "daemon-reload")
		command(t, "systemctl", "restart", "nodeagent")
		same(t)
		hung := mainPID(t)
		time.Sleep(15 * time.Second)
		equal(t, "a daemon that is well keeps its process", mainPID(t), hung)
		syscall.Kill(hung, syscall.SIGSTOP)
		eventually(t, "the watchdog ends a daemon that hangs", func() error {
			if now := mainPID(t); now == hung || now == 0 {
				return fmt.Errorf("main process %d", now)
			}
			return nil
		})
		same(t)
	})
	t.Run("systemctl status", func(t *testing.T) {
		t.Log("\n" + command(t, "systemctl", "status", "--no-pager", "-n", "5", "nodeagent"))
	})
	p.remove(t)
}

// containerPID is the host's pid of the container's first process.
func containerPID(t testing.TB, p *pod) int {
	t.Helper()
	procs := strings.Fields(p.groupFile(t, "cgroup.procs"))
	for _, s := range procs {
		b, _ := os.ReadFile("/proc/" + s + "/status")
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) > 2 && f[0] == "NSpid:" && f[len(f)-1] == "1" {
				var pid int
				fmt.Sscan(s, &pid)
				return pid
			}
		}
	}
	t.Fatalf("no first process of %s among %q", p.ctr, procs)
	return 0
}

// TestServiceLimits: root with CAP_SYS_RESOURCE may lower oom_score_adj and
// raise limits, which not every development machine can.
func TestServiceLimits(t *testing.T) {
	service(t)
	equal(t, "oom_score_adj of the daemon", fileOf(t, mainPID(t), "oom_score_adj"), "-999")
	for _, score := range []int64{-997, 0, 1000} {
		p := run(t, fmt.Sprintf("oom%d", score+1000), "sleep 1000", &runtimeapi.LinuxContainerResources{OomScoreAdj: score}, nil)
		equal(t, "oom_score_adj", p.sh(t, "cat /proc/1/oom_score_adj"), fmt.Sprint(score))
		equal(t, "oom_score_adj of an exec", p.sh(t, "cat /proc/self/oom_score_adj"), fmt.Sprint(score))
		equal(t, "limit of open files", p.sh(t, "ulimit -Hn"), "1048576")
		p.remove(t)
	}
}

func fileOf(t testing.TB, pid int, name string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// TestServiceClock sets the clock forwards and backwards under a running pod.
func TestServiceClock(t *testing.T) {
	service(t)
	p := run(t, "clock", counting, nil, nil)
	defer p.remove(t)
	real := time.Now()
	began := time.Now() // has the monotonic clock
	defer func() {
		now := real.Round(0).Add(time.Since(began))
		tv := syscall.NsecToTimeval(now.UnixNano())
		syscall.Settimeofday(&tv)
	}()
	for _, jump := range []time.Duration{24 * time.Hour, -48 * time.Hour} {
		tv := syscall.NsecToTimeval(time.Now().Round(0).Add(jump).UnixNano())
		if err := syscall.Settimeofday(&tv); err != nil {
			t.Fatal(err)
		}
		p.countsOn(t)
		equal(t, "exec", p.sh(t, "echo works"), "works")
		q := run(t, "clockq", "sleep 1; exit 3", nil, nil)
		s := q.waitExit(t)
		equal(t, "exit code", s.ExitCode, 3)
		if s.FinishedAt < s.StartedAt {
			t.Errorf("finished %d before it started %d", s.FinishedAt, s.StartedAt)
		}
		q.remove(t)
		stats, err := p.rt.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: p.ctr})
		if err != nil || stats.Stats.Cpu.UsageNanoCores.GetValue() > 4e9 {
			t.Errorf("stats after the jump: %v %v", stats, err)
		}
	}
	equal(t, "restarts", property(t, "Result"), "success")
}

// TestServiceDiskFull fills the disk below /var/lib/nodeagent.
func TestServiceDiskFull(t *testing.T) {
	service(t)
	p := run(t, "full", counting, nil, nil)
	defer p.remove(t)
	const hog = "/var/lib/hog"
	defer os.Remove(hog)
	var fs syscall.Statfs_t
	if err := syscall.Statfs("/var/lib", &fs); err != nil {
		t.Fatal(err)
	}
	// Root's reserve too.
	command(t, "fallocate", "-l", fmt.Sprint(int64(fs.Bfree)*fs.Bsize-64<<20), hog)
	if out, err := exec.Command("sh", "-c", "cat /dev/zero > "+hog+".2").CombinedOutput(); err == nil {
		t.Fatalf("the disk is not full: %s", out)
	}
	defer os.Remove(hog + ".2")
	if q, err := tryRun(t, "fullq", "sleep 1000", nil, nil); err == nil {
		t.Log("a pod could be started with a full disk")
		q.remove(t)
	} else {
		if !strings.Contains(err.Error(), "no space left on device") {
			t.Errorf("with a full disk: %v", err)
		}
		t.Log(err)
		if q != nil {
			q.remove(t)
		}
	}
	equal(t, "exec with a full disk", p.sh(t, "echo works"), "works")
	command(t, "systemctl", "restart", "nodeagent")
	waitActive(t)
	equal(t, "exec after a restart with a full disk", p.sh(t, "echo works"), "works")
	os.Remove(hog)
	os.Remove(hog + ".2")
	q := run(t, "afterfull", "exit 5", nil, nil)
	equal(t, "exit code", q.waitExit(t).ExitCode, 5)
	q.remove(t)
}
