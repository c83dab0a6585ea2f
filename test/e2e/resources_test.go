package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// cgroupValue reads a file of the container's cgroup from the host: v1 by
// controller, or v2 by its own name.
func cgroupValue(t testing.TB, c *container, v1, v2 string) string {
	t.Helper()
	var tried []string
	for _, root := range node.CgroupRoots() {
		for _, name := range []string{v1, v2} {
			if name == "" {
				continue
			}
			found, _ := filepath.Glob(filepath.Join(root, podCgroup(c.pod.config.Metadata.Name), "*"+c.id+"*", name))
			for _, f := range found {
				b, err := os.ReadFile(f)
				if err == nil {
					return strings.TrimSpace(string(b))
				}
			}
			tried = append(tried, root+"/"+name)
		}
	}
	t.Fatalf("no cgroup file of container %s in %v", c.id, tried)
	return ""
}

func TestResources(t *testing.T) {
	p := runPod(t)
	c := p.run(t, resources(&runtimeapi.LinuxContainerResources{
		CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 500, CpusetCpus: "0",
	}))
	equal(t, "quota", strings.Fields(cgroupValue(t, c, "cpu.cfs_quota_us", "cpu.max"))[0], "50000")
	equal(t, "memory limit", cgroupValue(t, c, "memory.limit_in_bytes", "memory.max"), fmt.Sprint(64<<20))
	equal(t, "cpuset", cgroupValue(t, c, "cpuset.cpus", "cpuset.cpus"), "0")
	equal(t, "oom_score_adj", c.sh(t, "cat /proc/1/oom_score_adj"), "500")
	r := c.status(t).GetResources().GetLinux()
	equal(t, "quota in status", r.GetCpuQuota(), 50000)
	equal(t, "limit in status", r.GetMemoryLimitInBytes(), 64<<20)

	if _, err := shared.Runtime().UpdateContainerResources(callCtx(t), &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: c.id, Linux: &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 70000, MemoryLimitInBytes: 128 << 20},
	}); err != nil {
		t.Fatalf("UpdateContainerResources: %v", err)
	}
	equal(t, "quota after update", strings.Fields(cgroupValue(t, c, "cpu.cfs_quota_us", "cpu.max"))[0], "70000")
	equal(t, "memory limit after update", cgroupValue(t, c, "memory.limit_in_bytes", "memory.max"), fmt.Sprint(128<<20))
	equal(t, "shares kept", strings.TrimSpace(cgroupValue(t, c, "cpu.shares", "cpu.weight")) != "", true)
	r = c.status(t).GetResources().GetLinux()
	equal(t, "quota in status after update", r.GetCpuQuota(), 70000)
	equal(t, "shares in status after update", r.GetCpuShares(), 512)
	equal(t, "oom_score_adj in status", r.GetOomScoreAdj(), 500)

	// Before start: it takes effect at start.
	late := p.create(t)
	if _, err := shared.Runtime().UpdateContainerResources(callCtx(t), &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: late.id, Linux: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 32 << 20},
	}); err != nil {
		t.Fatalf("UpdateContainerResources of a created container: %v", err)
	}
	late.start(t)
	equal(t, "limit set before start", cgroupValue(t, late, "memory.limit_in_bytes", "memory.max"), fmt.Sprint(32<<20))
}

func TestOOMKilled(t *testing.T) {
	p := runPod(t)
	c := p.run(t, script(`x=$(head -c 60000000 /dev/zero | tr '\0' a); echo $x | wc -c; sleep 1`), resources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 16 << 20}))
	s := c.waitExit(t)
	equal(t, "reason", s.Reason, "OOMKilled")
	if s.ExitCode == 0 {
		t.Error("exit code 0")
	}
	// A child that is killed while the container lives on does not make it so.
	survivor := p.run(t, script(`(x=$(head -c 60000000 /dev/zero | tr '\0' a); echo $x | wc -c) ; exit 7`), resources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 16 << 20}))
	equal(t, "exit code of the survivor", survivor.waitExit(t).ExitCode, 7)
}

func TestExitCodes(t *testing.T) {
	p := runPod(t)
	for _, c := range []struct {
		script string
		code   int32
		reason string
	}{
		{"exit 0", 0, "Completed"},
		{"exit 3", 3, "Error"},
		{"exit 255", 255, "Error"},
		{"kill -9 $$", 137, "Error"},
		{"kill -TERM $$", 143, "Error"},
	} {
		// A shell as process 1 is immune to its own signals; a child is not.
		sh := c.script
		if strings.HasPrefix(sh, "kill") {
			sh = "sh -c '" + c.script + "'; exit $?"
		}
		ctr := p.run(t, script(sh))
		before := time.Now()
		s := ctr.waitExit(t)
		equal(t, c.script+": code", s.ExitCode, c.code)
		equal(t, c.script+": reason", s.Reason, c.reason)
		started, finished := time.Unix(0, s.StartedAt), time.Unix(0, s.FinishedAt)
		if finished.Before(started) || finished.After(time.Now()) || started.Before(before.Add(-time.Minute)) {
			t.Errorf("%s: started %v, finished %v", c.script, started, finished)
		}
	}
}

// TestKilledFromOutside kills a container's process behind the runtime's back.
func TestKilledFromOutside(t *testing.T) {
	p := runPod(t)
	seconds := strconv.Itoa(919191 + os.Getpid()) // ours, whoever else tests here
	c := p.run(t, command("/bin/sleep", seconds))
	// The start returns when the process is let go, just before it becomes sleep.
	eventually(t, func() error {
		pids := node.ProcessesNaming("sleep " + seconds)
		if len(pids) == 0 {
			return fmt.Errorf("no process sleep %s", seconds)
		}
		for _, pid := range pids {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		return nil
	})
	s := c.waitExit(t)
	equal(t, "exit code", s.ExitCode, 137)
	equal(t, "reason", s.Reason, "Error")
}

func TestStartFailures(t *testing.T) {
	p := runPod(t)
	for name, o := range map[string]containerOption{
		"missing program": command("/no/such/program"),
		"not executable":  command("/etc/passwd"),
		"a directory":     command("/etc"),
	} {
		t.Run(name, func(t *testing.T) {
			c, err := p.tryCreate(callCtx(t), o)
			if err == nil {
				err = c.tryStart(callCtx(t))
			}
			if err == nil {
				t.Fatal("started")
			}
			if c == nil {
				return
			}
			s := c.status(t)
			equal(t, "state", s.State, runtimeapi.ContainerState_CONTAINER_EXITED)
			if s.ExitCode == 0 || s.Reason == "" || s.Message == "" {
				t.Errorf("exit code %d, reason %q, message %q", s.ExitCode, s.Reason, s.Message)
			}
			c.remove(t)
		})
	}
}

func TestStop(t *testing.T) {
	p := runPod(t)
	t.Run("polite", func(t *testing.T) {
		c := p.run(t, script(`trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 1000 & wait; done`))
		waitLog(t, c, "up")
		start := time.Now()
		c.stop(t, 10)
		if d := time.Since(start); d > 2*time.Second {
			t.Errorf("took %v", d)
		}
		equal(t, "exit code", c.status(t).ExitCode, 5)
		contains(t, "log", c.text(t), "bye")
		c.stop(t, 10) // again
	})
	t.Run("deaf", func(t *testing.T) {
		c := p.run(t, script(`trap '' TERM; echo up; while :; do sleep 1; done`))
		waitLog(t, c, "up")
		start := time.Now()
		c.stop(t, 1)
		if d := time.Since(start); d < 900*time.Millisecond || d > 4*time.Second {
			t.Errorf("took %v, want the grace period of 1 s", d)
		}
		equal(t, "exit code", c.status(t).ExitCode, 137)
	})
	t.Run("no grace", func(t *testing.T) {
		c := p.run(t)
		start := time.Now()
		c.stop(t, 0)
		if d := time.Since(start); d > time.Second {
			t.Errorf("took %v", d)
		}
		equal(t, "exit code", c.status(t).ExitCode, 137)
	})
	t.Run("signal of the image", func(t *testing.T) {
		c := p.run(t, image(stopper), script(`trap 'exit 11' USR1; trap 'exit 12' TERM; echo up; while :; do sleep 1000 & wait; done`))
		waitLog(t, c, "up")
		c.stop(t, 5)
		equal(t, "exit code", c.status(t).ExitCode, 11)
	})
	t.Run("signal of the spec", func(t *testing.T) {
		c := p.run(t, image(stopper), script(`trap 'exit 11' USR1; trap 'exit 13' HUP; echo up; while :; do sleep 1000 & wait; done`),
			func(c *runtimeapi.ContainerConfig) { c.StopSignal = runtimeapi.Signal_SIGNAL_SIGHUP })
		waitLog(t, c, "up")
		equal(t, "signal in status", c.status(t).StopSignal, runtimeapi.Signal_SIGNAL_SIGHUP)
		c.stop(t, 5)
		equal(t, "exit code", c.status(t).ExitCode, 13)
	})
	t.Run("a shorter grace overtakes", func(t *testing.T) {
		c := p.run(t, script(`trap '' TERM; echo up; while :; do sleep 1; done`))
		waitLog(t, c, "up")
		first := make(chan error, 1)
		ctx := callCtx(t)
		go func() {
			_, err := shared.Runtime().StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c.id, Timeout: 25})
			first <- err
		}()
		time.Sleep(100 * time.Millisecond)
		start := time.Now()
		c.stop(t, 0)
		if d := time.Since(start); d > 2*time.Second {
			t.Errorf("the second stop took %v", d)
		}
		select {
		case err := <-first:
			if err != nil {
				t.Errorf("first stop: %v", err)
			}
		case <-time.After(patience):
			t.Error("the first stop still waits")
		}
	})
	t.Run("children die too", func(t *testing.T) {
		c := p.run(t, script(`setsid sleep 987654 & setsid sleep 987653 & sleep 1000 & wait`))
		eventually(t, func() error {
			if len(node.ProcessesNaming("sleep 98765")) < 2 {
				return fmt.Errorf("children not there yet")
			}
			return nil
		})
		c.stop(t, 0)
		eventually(t, func() error {
			if left := node.ProcessesNaming("sleep 98765"); len(left) > 0 {
				return fmt.Errorf("processes %v live on", left)
			}
			return nil
		})
	})
}

func waitLog(t testing.TB, c *container, text string) {
	t.Helper()
	eventually(t, func() error {
		b, err := os.ReadFile(c.logPath())
		if err == nil && !strings.Contains(string(b), text) {
			err = fmt.Errorf("log %q, want %q in it", b, text)
		}
		return err
	})
}

func TestRemove(t *testing.T) {
	p := runPod(t)
	created := p.create(t)
	created.remove(t)
	created.remove(t) // idempotent
	running := p.run(t)
	running.remove(t) // by force
	if l := p.list(t); len(l) != 0 {
		t.Errorf("left: %v", l)
	}
	// The log stays: it is the kubelet's.
	if _, err := os.Stat(running.logPath()); err != nil {
		t.Errorf("the log of a removed container: %v", err)
	}
	// The name is free again.
	again := p.create(t, func(c *runtimeapi.ContainerConfig) { c.Metadata = running.config.Metadata })
	if again.id == running.id {
		t.Error("the id was used twice")
	}
}

func (p *pod) list(t testing.TB) []*runtimeapi.Container {
	t.Helper()
	r, err := p.node.Runtime().ListContainers(callCtx(t), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: p.id}})
	if err != nil {
		t.Fatalf("ListContainers: %v", err)
	}
	return r.Containers
}

// podCgroupValue reads a file of the pod's own cgroup.
func podCgroupValue(t testing.TB, p *pod, v1, v2 string) string {
	t.Helper()
	for _, root := range node.CgroupRoots() {
		for _, name := range []string{v1, v2} {
			if b, err := os.ReadFile(filepath.Join(root, p.config.Linux.CgroupParent, name)); err == nil {
				return strings.TrimSpace(string(b))
			}
		}
	}
	t.Fatalf("no file %s or %s in cgroup %s", v1, v2, p.config.Linux.CgroupParent)
	return ""
}

// TestPodResources: a pod's own cgroup allows what its containers may use
// together, and the overhead.
func TestPodResources(t *testing.T) {
	p := runPod(t, func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuPeriod: 100000, CpuQuota: 50000}
		c.Linux.Overhead = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 16 << 20, CpuPeriod: 100000, CpuQuota: 10000}
	})
	limits := func(when string, memory int, quota string) {
		t.Helper()
		equal(t, "memory limit "+when, podCgroupValue(t, p, "memory.limit_in_bytes", "memory.max"), fmt.Sprint(memory))
		equal(t, "quota "+when, strings.Fields(podCgroupValue(t, p, "cpu.cfs_quota_us", "cpu.max"))[0], quota)
	}
	limits("at first", 80<<20, "60000")
	p.run(t)
	update := func(o, r *runtimeapi.LinuxContainerResources) error {
		_, err := shared.Runtime().UpdatePodSandboxResources(callCtx(t), &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: p.id, Overhead: o, Resources: r})
		return err
	}
	if err := update(nil, &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 128 << 20, CpuPeriod: 100000, CpuQuota: 70000}); err != nil {
		t.Fatalf("UpdatePodSandboxResources: %v", err)
	}
	limits("after the update", 144<<20, "80000")
	wantCode(t, "a quota of nothing", update(nil, &runtimeapi.LinuxContainerResources{CpuPeriod: 1}), codes.InvalidArgument)
	limits("after a refused update", 144<<20, "80000")
}

func TestHugepages(t *testing.T) {
	if _, err := os.Stat("/sys/kernel/mm/hugepages/hugepages-2048kB"); err != nil {
		t.Skip("no pages of 2 MB")
	}
	p := runPod(t)
	c, err := p.tryCreate(callCtx(t), resources(&runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}}}))
	if err != nil {
		wantCode(t, "huge pages without their controller", err, codes.FailedPrecondition)
		return
	}
	c.start(t)
	equal(t, "limit", cgroupValue(t, c, "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"), fmt.Sprint(4<<20))
	equal(t, "in status", c.status(t).Resources.Linux.HugepageLimits[0].Limit, 4<<20)
}
