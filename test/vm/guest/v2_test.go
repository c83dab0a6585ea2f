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

func TestV2Driver(t *testing.T) {
	ctx := service(t)
	c, err := runtime(t).RuntimeConfig(ctx, &runtimeapi.RuntimeConfigRequest{})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "driver by default", c.GetLinux().GetCgroupDriver(), runtimeapi.CgroupDriver_SYSTEMD)
}

// TestV2Limits: every limit is in its file, stays there when systemd reads its
// units again, and changes in place.
func TestV2Limits(t *testing.T) {
	ctx := service(t)
	p := run(t, "limits", "sleep 1000", &runtimeapi.LinuxContainerResources{
		CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, CpusetCpus: "1", CpusetMems: "0",
		MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 96 << 20,
		HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}},
		Unified:        map[string]string{"memory.high": fmt.Sprint(48 << 20), "memory.min": fmt.Sprint(1 << 20), "pids.max": "77", "memory.oom.group": "1"},
	}, nil)
	defer p.remove(t)
	check := func(when string, want map[string]string) {
		t.Helper()
		for file, value := range want {
			equal(t, when+": "+file, p.groupFile(t, file), value)
		}
	}
	want := map[string]string{
		"cpu.max": "50000 100000", "cpuset.cpus": "1", "cpuset.mems": "0", "memory.max": fmt.Sprint(64 << 20),
		"memory.swap.max": fmt.Sprint(32 << 20), "memory.high": fmt.Sprint(48 << 20), "memory.min": fmt.Sprint(1 << 20),
		"pids.max": "77", "hugetlb.2MB.max": fmt.Sprint(4 << 20), "memory.oom.group": "1",
	}
	check("at start", want)
	// systemd before 253 knows nothing of it for scopes and puts 0 back.
	delete(want, "memory.oom.group")
	if w := p.groupFile(t, "cpu.weight"); w == "100" || w == "-" {
		t.Errorf("cpu.weight %s for 512 shares", w)
	}
	weight := p.groupFile(t, "cpu.weight")
	command(t, "systemctl", "daemon-reload")
	check("after systemd reloaded", want)
	if _, err := p.rt.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: p.ctr, Linux: &runtimeapi.LinuxContainerResources{
		CpuPeriod: 100000, CpuQuota: 70000, MemoryLimitInBytes: 128 << 20, CpusetCpus: "0-1",
		Unified: map[string]string{"memory.high": fmt.Sprint(100 << 20)},
	}}); err != nil {
		t.Fatal(err)
	}
	want["cpu.max"], want["memory.max"], want["cpuset.cpus"], want["memory.high"] = "70000 100000", fmt.Sprint(128<<20), "0-1", fmt.Sprint(100<<20)
	delete(want, "memory.swap.max")
	check("after an update", want)
	equal(t, "cpu.weight after an update", p.groupFile(t, "cpu.weight"), weight)
	command(t, "systemctl", "daemon-reload")
	check("after an update and a reload", want)
	command(t, "systemctl", "restart", "nodeagent")
	waitActive(t)
	check("after a restart", want)
	equal(t, "the container sees its limit", p.sh(t, "cat /sys/fs/cgroup/memory.max"), fmt.Sprint(128<<20))
}

// TestV2Devices: the device program keeps a container from the host's disk,
// also after systemd read its units again.
func TestV2Devices(t *testing.T) {
	service(t)
	p := run(t, "devices", "sleep 1000", nil, func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"MKNOD"}}
	})
	defer p.remove(t)
	for _, when := range []string{"at start", "after a reload"} {
		if out, code := p.exec(t, "rm -f /disk; mknod /disk b 254 0 && head -c 1 /disk"); code == 0 {
			t.Errorf("%s: a container reads the host's disk: %q", when, out)
		}
		equal(t, when+": null", p.sh(t, "echo x > /dev/null && head -c 1 /dev/zero | wc -c"), "1")
		command(t, "systemctl", "daemon-reload")
	}
	privileged := run(t, "privileged", "sleep 1000", nil, func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })
	defer privileged.remove(t)
	equal(t, "a privileged one may", privileged.sh(t, "head -c 1 /dev/vda | wc -c"), "1")
}

func TestV2Stats(t *testing.T) {
	ctx := service(t)
	p := run(t, "stats", "dd if=/dev/zero of=/f bs=1M count=8; sync; while :; do :; done",
		&runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 30000, MemoryLimitInBytes: 64 << 20}, nil)
	defer p.remove(t)
	eventually(t, "the stats are complete", func() error {
		r, err := p.rt.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: p.ctr})
		if err != nil {
			return err
		}
		s := r.Stats
		switch {
		case s.Cpu.GetUsageCoreNanoSeconds().GetValue() < 1e8:
			return fmt.Errorf("CPU %v", s.Cpu)
		case s.Cpu.GetUsageNanoCores().GetValue() == 0:
			return fmt.Errorf("CPU rate %v", s.Cpu)
		case s.Memory.GetWorkingSetBytes().GetValue() == 0 || s.Memory.GetAvailableBytes().GetValue() == 0:
			return fmt.Errorf("memory %v", s.Memory)
		case s.Cpu.GetPsi().GetSome().GetTotal() == 0:
			return fmt.Errorf("no CPU pressure: %v", s.Cpu.GetPsi())
		case s.Memory.GetPsi() == nil || s.Io.GetPsi() == nil:
			return fmt.Errorf("no memory or io pressure: %v %v", s.Memory.GetPsi(), s.Io)
		case s.Swap == nil:
			return fmt.Errorf("no swap")
		}
		pods, err := p.rt.PodSandboxStats(ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: p.id})
		if err != nil {
			return err
		}
		l := pods.Stats.Linux
		if l.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 || l.GetMemory().GetUsageBytes().GetValue() == 0 || l.GetProcess().GetProcessCount().GetValue() == 0 {
			return fmt.Errorf("pod: %v", l)
		}
		return nil
	})
	// What kernels without v2 cannot tell.
	m, err := p.rt.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, pm := range m.PodMetrics {
		for _, c := range pm.ContainerMetrics {
			for _, v := range c.Metrics {
				have[v.Name] = true
			}
		}
	}
	for _, name := range []string{
		"container_pressure_cpu_waiting_seconds_total", "container_pressure_memory_stalled_seconds_total", "container_pressure_io_waiting_seconds_total",
		"container_hugetlb_usage_bytes", "container_blkio_device_usage_total", "container_cpu_cfs_throttled_seconds_total",
	} {
		if !have[name] {
			t.Errorf("no %s", name)
		}
	}
}

// TestV2OOM: systemd removes a container's scope as soon as the OOM killer has
// taken its last process, often before the shim looks; it must be said anyway,
// of that container and of no other one.
func TestV2OOM(t *testing.T) {
	service(t)
	res := &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 32 << 20}
	// dd's buffer is more than the limit.
	const (
		dd  = "dd if=/dev/zero of=/dev/null bs=60M count=1"
		eat = "exec " + dd
	)
	const gate = "until [ -e /go ]; do sleep 0.1; done; "
	killed := func(t *testing.T, p *pod) {
		t.Helper()
		s := p.waitExit(t)
		equal(t, "reason", s.Reason, "OOMKilled")
		equal(t, "exit code", s.ExitCode, 137)
	}
	failed := func(t *testing.T, p *pod, code int32) {
		t.Helper()
		s := p.waitExit(t)
		equal(t, "reason of one that just failed", s.Reason, "Error")
		equal(t, "its exit code", s.ExitCode, code)
	}
	t.Run("Often", func(t *testing.T) {
		p := run(t, "oom", "sleep 1000", nil, nil)
		defer p.remove(t)
		for i := range 20 {
			killed(t, p.beside(t, fmt.Sprint("eater", i), eat, res))
			t.Logf("%d of 20", i+1)
		}
		failed(t, p.beside(t, "fails", "exit 3", res), 3)
	})
	t.Run("Child", func(t *testing.T) {
		p := run(t, "child", "("+dd+"); exit 7", res, nil)
		defer p.remove(t)
		equal(t, "exit code of one whose child was killed", p.waitExit(t).ExitCode, 7)
	})
	t.Run("Sibling", func(t *testing.T) {
		p := run(t, "sibling", gate+"exit 3", res, nil)
		defer p.remove(t)
		killed(t, p.beside(t, "eater", eat, res))
		p.sh(t, "touch /go")
		failed(t, p, 3)
	})
	// Daemon, shim or both are new when it happens.
	for name, kill := range map[string]func(){
		"DaemonKilled": func() { command(t, "systemctl", "kill", "-s", "KILL", "--kill-whom=main", "nodeagent") },
		"ShimKilled": func() {
			for _, pid := range node.ProcessesNaming("nodeagent-shim serve") {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := run(t, "restart", gate+eat, res, nil)
			defer p.remove(t)
			other := p.beside(t, "other", gate+"exit 3", res)
			killed(t, p.beside(t, "eater", eat, res))
			kill()
			for _, q := range []*pod{p, other} {
				eventually(t, "the container is told to go on", func() error {
					_, err := q.rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: q.ctr, Cmd: []string{"touch", "/go"}, Timeout: 50})
					return err
				})
			}
			killed(t, p)
			failed(t, other, 3)
		})
	}
	equal(t, "the service", property(t, "ActiveState"), "active")
}

// TestV2ExecTimeout: what an exec started is gone with it, also in a session of its own.
func TestV2ExecTimeout(t *testing.T) {
	ctx := service(t)
	p := run(t, "exec", "sleep 1000", nil, nil)
	defer p.remove(t)
	_, err := p.rt.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: p.ctr, Timeout: 3, Cmd: []string{"sh", "-c", "setsid sleep 4242 & sleep 4244"}})
	if err == nil {
		t.Error("no error at the time-out")
	}
	eventually(t, "nothing is left", func() error {
		if out, _ := exec.Command("pgrep", "-f", "sleep 424").CombinedOutput(); len(out) > 0 {
			return fmt.Errorf("processes %s", strings.Fields(string(out)))
		}
		return nil
	})
	equal(t, "exec works on", p.sh(t, "echo works"), "works")
}

// TestV2LeavesNothing: a pod's units and groups are gone with it.
func TestV2LeavesNothing(t *testing.T) {
	ctx := service(t)
	p := run(t, "gone", "sleep 1000", nil, nil)
	if out := command(t, "systemctl", "list-units", "--plain", "--no-legend", "*"+p.ctr+"*"); !strings.Contains(out, ".scope") {
		t.Errorf("no scope of the container: %q", out)
	}
	p.remove(t)
	own, err := p.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "noparent", Namespace: "guest", Uid: "uid-noparent"},
		Linux:    &runtimeapi.LinuxPodSandboxConfig{Resources: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 99 << 20}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	found, _ := filepath.Glob("/sys/fs/cgroup/nodeagent.slice/nodeagent-pod*.slice/memory.max")
	if len(found) != 1 {
		t.Errorf("groups of a pod without a parent: %v", found)
	} else if b, err := os.ReadFile(found[0]); err != nil || strings.TrimSpace(string(b)) != fmt.Sprint(99<<20) {
		t.Errorf("its memory.max: %s %v", b, err)
	}
	q := &pod{rt: p.rt, id: own.PodSandboxId}
	q.remove(t)
	eventually(t, "no unit and no group is left", func() error {
		time.Sleep(time.Second)
		units := command(t, "systemctl", "list-units", "--all", "--plain", "--no-legend", "nodeagent-*", "guest*")
		groups, _ := exec.Command("sh", "-c", "ls -d /sys/fs/cgroup/nodeagent.slice/* /sys/fs/cgroup/guest.slice/*.slice 2>/dev/null").Output()
		if units != "" || len(groups) > 0 {
			return fmt.Errorf("units %q, groups %q", units, groups)
		}
		return nil
	})
	if failed := command(t, "systemctl", "list-units", "--failed", "--plain", "--no-legend"); strings.Contains(failed, "nodeagent") || strings.Contains(failed, "guest") {
		t.Errorf("failed units: %s", failed)
	}
}
