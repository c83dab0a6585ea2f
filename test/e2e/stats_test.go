package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestContainerStats(t *testing.T) {
	p := runPod(t)
	c := p.run(t, script(`head -c 3000000 /dev/zero > /file; trap 'exit 0' TERM; while :; do i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; done`),
		func(c *runtimeapi.ContainerConfig) { c.Labels = map[string]string{"stats": "yes"} })
	var s *runtimeapi.ContainerStats
	eventually(t, func() error {
		r, err := shared.Runtime().ContainerStats(callCtx(t), &runtimeapi.ContainerStatsRequest{ContainerId: c.id})
		if err != nil {
			return err
		}
		s = r.Stats
		switch {
		case s.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0:
			return fmt.Errorf("no CPU usage: %v", s.Cpu)
		case s.GetCpu().GetUsageNanoCores().GetValue() == 0:
			return fmt.Errorf("no CPU rate: %v", s.Cpu)
		case s.GetMemory().GetWorkingSetBytes().GetValue() == 0:
			return fmt.Errorf("no memory: %v", s.Memory)
		case s.GetWritableLayer().GetUsedBytes().GetValue() < 3000000:
			return fmt.Errorf("writable layer %v, want at least the 3 MB that were written", s.WritableLayer)
		case s.GetWritableLayer().GetInodesUsed().GetValue() == 0:
			return fmt.Errorf("no inodes: %v", s.WritableLayer)
		}
		return nil
	})
	equal(t, "id", s.Attributes.Id, c.id)
	equal(t, "label", s.Attributes.Labels["stats"], "yes")
	if s.GetWritableLayer().GetFsId().GetMountpoint() == "" {
		t.Error("the writable layer has no file system")
	}
	l, err := shared.Runtime().ListContainerStats(callCtx(t), &runtimeapi.ListContainerStatsRequest{Filter: &runtimeapi.ContainerStatsFilter{LabelSelector: map[string]string{"stats": "yes"}}})
	if err != nil || len(l.Stats) != 1 || l.Stats[0].Attributes.Id != c.id {
		t.Errorf("list by label: %v, %v", l, err)
	}
	l, err = shared.Runtime().ListContainerStats(callCtx(t), &runtimeapi.ListContainerStatsRequest{Filter: &runtimeapi.ContainerStatsFilter{PodSandboxId: p.id}})
	if err != nil || len(l.Stats) != 1 {
		t.Errorf("list by sandbox: %v, %v", l, err)
	}
	st, err := shared.Runtime().StreamContainerStats(callCtx(t), &runtimeapi.StreamContainerStatsRequest{Filter: &runtimeapi.ContainerStatsFilter{PodSandboxId: p.id}})
	n := 0
	for _, m := range received(t, st, err) {
		n += len(m.ContainerStats)
	}
	equal(t, "streamed stats", n, 1)

	ps, err := shared.Runtime().PodSandboxStats(callCtx(t), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: p.id})
	if err != nil {
		t.Fatal(err)
	}
	lx := ps.Stats.GetLinux()
	if lx.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 || lx.GetMemory().GetWorkingSetBytes().GetValue() == 0 {
		t.Errorf("pod CPU %v, memory %v", lx.GetCpu(), lx.GetMemory())
	}
	if lx.GetProcess().GetProcessCount().GetValue() == 0 {
		t.Errorf("pod processes %v", lx.GetProcess())
	}
	if n := lx.GetNetwork().GetDefaultInterface(); n.GetName() == "" || n.GetTxBytes() == nil {
		t.Errorf("pod network %v", lx.GetNetwork())
	}
	if len(lx.GetContainers()) != 1 || lx.GetContainers()[0].Attributes.Id != c.id {
		t.Errorf("containers of the pod's stats: %v", lx.GetContainers())
	}
	lp, err := shared.Runtime().ListPodSandboxStats(callCtx(t), &runtimeapi.ListPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{Id: p.id}})
	if err != nil || len(lp.Stats) != 1 {
		t.Errorf("ListPodSandboxStats: %v, %v", lp, err)
	}
}

// metricNames are the 56 names that the CRI validation suite expects.
var metricNames = strings.Fields(`
container_blkio_device_usage_total container_cpu_cfs_periods_total container_cpu_cfs_throttled_periods_total
container_cpu_cfs_throttled_seconds_total container_cpu_system_seconds_total container_cpu_usage_seconds_total
container_cpu_user_seconds_total container_file_descriptors container_fs_inodes_free container_fs_inodes_total
container_fs_limit_bytes container_fs_reads_bytes_total container_fs_reads_total container_fs_usage_bytes
container_fs_writes_bytes_total container_fs_writes_total container_hugetlb_max_usage_bytes container_hugetlb_usage_bytes
container_last_seen container_memory_cache container_memory_failcnt container_memory_failures_total
container_memory_kernel_usage container_memory_mapped_file container_memory_max_usage_bytes container_memory_rss
container_memory_swap container_memory_usage_bytes container_memory_working_set_bytes
container_network_receive_bytes_total container_network_receive_errors_total
container_network_receive_packets_dropped_total container_network_receive_packets_total
container_network_transmit_bytes_total container_network_transmit_errors_total
container_network_transmit_packets_dropped_total container_network_transmit_packets_total container_oom_events_total
container_pressure_cpu_stalled_seconds_total container_pressure_cpu_waiting_seconds_total
container_pressure_io_stalled_seconds_total container_pressure_io_waiting_seconds_total
container_pressure_memory_stalled_seconds_total container_pressure_memory_waiting_seconds_total
container_processes container_sockets container_spec_cpu_period container_spec_cpu_quota container_spec_cpu_shares
container_spec_memory_limit_bytes container_spec_memory_reservation_limit_bytes container_spec_memory_swap_limit_bytes
container_start_time_seconds container_threads container_threads_max container_ulimits_soft`)

// hostDependent need what not every kernel or disk has: PSI per cgroup (v2),
// huge pages, block devices that account.
func hostDependent(name string) bool {
	return strings.HasPrefix(name, "container_pressure_") || strings.HasPrefix(name, "container_hugetlb_") ||
		strings.HasPrefix(name, "container_fs_reads") || strings.HasPrefix(name, "container_fs_writes") ||
		name == "container_blkio_device_usage_total"
}

func TestMetrics(t *testing.T) {
	equal(t, "names in this test", len(metricNames), 56)
	d, err := shared.Runtime().ListMetricDescriptors(callCtx(t), &runtimeapi.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string][]string{}
	for _, m := range d.Descriptors {
		keys[m.Name] = m.LabelKeys
		if m.Help == "" {
			t.Errorf("%s has no help text", m.Name)
		}
	}
	for _, n := range metricNames {
		if _, ok := keys[n]; !ok {
			t.Errorf("no descriptor of %s", n)
		}
	}
	p := runPod(t)
	p.run(t, resources(&runtimeapi.LinuxContainerResources{CpuQuota: 50000, CpuPeriod: 100000, MemoryLimitInBytes: 64 << 20}),
		script("echo x > /f; sync; sleep 1000"))
	eventually(t, func() error {
		r, err := shared.Runtime().ListPodSandboxMetrics(callCtx(t), &runtimeapi.ListPodSandboxMetricsRequest{})
		if err != nil {
			return err
		}
		for _, pm := range r.PodMetrics {
			if pm.PodSandboxId != p.id {
				continue
			}
			all := slices.Clone(pm.Metrics)
			for _, c := range pm.ContainerMetrics {
				all = append(all, c.Metrics...)
			}
			have := map[string]bool{}
			for _, m := range all {
				have[m.Name] = true
				if k, ok := keys[m.Name]; !ok || len(k) != len(m.LabelValues) {
					return fmt.Errorf("%s has labels %q, its descriptor says %q", m.Name, m.LabelValues, k)
				}
			}
			var missing []string
			for _, n := range metricNames {
				if !have[n] && !hostDependent(n) {
					missing = append(missing, n)
				}
			}
			if len(missing) > 0 {
				return fmt.Errorf("missing: %s", strings.Join(missing, " "))
			}
			return nil
		}
		return errors.New("the pod has no metrics")
	})
}
