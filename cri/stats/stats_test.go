package stats

import (
	"reflect"
	"slices"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

// expected are the names that critest wants (cri-tools, pkg/validate/pod.go,
// for Kubernetes 1.37).
var expected = []string{
	"container_blkio_device_usage_total",
	"container_cpu_cfs_periods_total",
	"container_cpu_cfs_throttled_periods_total",
	"container_cpu_cfs_throttled_seconds_total",
	"container_cpu_system_seconds_total",
	"container_cpu_usage_seconds_total",
	"container_cpu_user_seconds_total",
	"container_file_descriptors",
	"container_fs_inodes_free",
	"container_fs_inodes_total",
	"container_fs_limit_bytes",
	"container_fs_reads_bytes_total",
	"container_fs_reads_total",
	"container_fs_usage_bytes",
	"container_fs_writes_bytes_total",
	"container_fs_writes_total",
	"container_hugetlb_max_usage_bytes",
	"container_hugetlb_usage_bytes",
	"container_last_seen",
	"container_memory_cache",
	"container_memory_failcnt",
	"container_memory_failures_total",
	"container_memory_kernel_usage",
	"container_memory_mapped_file",
	"container_memory_max_usage_bytes",
	"container_memory_rss",
	"container_memory_swap",
	"container_memory_usage_bytes",
	"container_memory_working_set_bytes",
	"container_network_receive_bytes_total",
	"container_network_receive_errors_total",
	"container_network_receive_packets_dropped_total",
	"container_network_receive_packets_total",
	"container_network_transmit_bytes_total",
	"container_network_transmit_errors_total",
	"container_network_transmit_packets_dropped_total",
	"container_network_transmit_packets_total",
	"container_oom_events_total",
	"container_pressure_cpu_stalled_seconds_total",
	"container_pressure_cpu_waiting_seconds_total",
	"container_pressure_io_stalled_seconds_total",
	"container_pressure_io_waiting_seconds_total",
	"container_pressure_memory_stalled_seconds_total",
	"container_pressure_memory_waiting_seconds_total",
	"container_processes",
	"container_sockets",
	"container_spec_cpu_period",
	"container_spec_cpu_quota",
	"container_spec_cpu_shares",
	"container_spec_memory_limit_bytes",
	"container_spec_memory_reservation_limit_bytes",
	"container_spec_memory_swap_limit_bytes",
	"container_start_time_seconds",
	"container_threads",
	"container_threads_max",
	"container_ulimits_soft",
}

var (
	started = time.Unix(1_700_000_000, 0)
	read    = time.Unix(1_700_000_100, 5)
)

// pod has one container with every figure and one that does not run.
func pod() *sample.Pod {
	var g sample.Cgroup
	g.Time, g.Path, g.Have = read, "/kubepods/podu/c1", sample.Full
	g.CPU = sample.CPUStats{Usage: 12_900_000_000, User: 8e9, System: 4e9, Periods: 10, ThrottledPeriods: 2, ThrottledTime: 3_500_000_000, Quota: 20000, Period: 100000, Shares: 1024}
	g.Memory = sample.MemoryStats{Usage: 100, WorkingSet: 70, RSS: 40, Limit: 1000, SwapLimit: sample.Unlimited, Reservation: sample.Unlimited, Swap: 5, PageFaults: 9, MajorPageFaults: 8, OOMKills: 1}
	g.Pids = sample.PidsStats{Current: 4, Limit: sample.Unlimited}
	g.PSI.CPU.Some = sample.PressureLine{Avg10: 1.5, Total: 2_500_000}
	c := &sample.Container{
		Target:   sample.ContainerTarget{ID: "c1", Name: "web", Image: "img:1", StartedAt: started},
		Cgroup:   g,
		Rate:     sample.Rate{Valid: true, NanoCores: 250e6, Window: time.Second},
		Writable: &sample.Filesystem{Time: read, Mountpoint: "/var/lib/nodeagent", Device: "/dev/vda", UsedBytes: 4096, UsedInodes: 3, LimitBytes: 1 << 30},
		Process:  sample.Process{Processes: 2, FDs: 11, Sockets: 1, OpenFilesSoft: 1024},
	}
	return &sample.Pod{
		Target:  sample.PodTarget{ID: "p1", Name: "web-0", Namespace: "shop", UID: "u"},
		Network: &sample.Network{Time: read, Interfaces: []sample.Interface{{Name: "eth0", Rx: sample.Traffic{Bytes: 7, Errors: 1}, Tx: sample.Traffic{Bytes: 8}}, {Name: "net1"}}},
		Containers: []*sample.Container{c, {
			Target: sample.ContainerTarget{ID: "c2", Name: "done"},
		}},
	}
}

func TestDescriptors(t *testing.T) {
	var names []string
	for _, d := range Descriptors() {
		names = append(names, d.Name)
		if d.Help == "" || len(d.LabelKeys) < 6 {
			t.Errorf("%s: help %q, labels %q", d.Name, d.Help, d.LabelKeys)
		}
	}
	if !slices.Equal(names, expected) {
		t.Errorf("names %q", names)
	}
}

// What critest checks, and more: each name has a value, each point as many
// labels as its descriptor, even without any block I/O or huge pages.
func TestMetricsComplete(t *testing.T) {
	labels := map[string]int{}
	for _, d := range Descriptors() {
		labels[d.Name] = len(d.LabelKeys)
	}
	p := pod()
	m := Metrics(p)
	if m.PodSandboxId != "p1" || len(m.ContainerMetrics) != 1 || m.ContainerMetrics[0].ContainerId != "c1" {
		t.Fatalf("pod %q with %d containers", m.PodSandboxId, len(m.ContainerMetrics))
	}
	found := map[string]bool{}
	series := map[string]bool{}
	for _, x := range append(m.Metrics, m.ContainerMetrics[0].Metrics...) {
		found[x.Name] = true
		if n, ok := labels[x.Name]; !ok || n != len(x.LabelValues) {
			t.Errorf("%s has labels %q, declared %d", x.Name, x.LabelValues, n)
		}
		if x.Timestamp != read.UnixNano() || x.Value == nil {
			t.Errorf("%s at %d: %v", x.Name, x.Timestamp, x.Value)
		}
		key := x.Name
		for _, l := range x.LabelValues {
			key += "\x00" + l
		}
		if series[key] {
			t.Errorf("%s %q twice", x.Name, x.LabelValues)
		}
		series[key] = true
	}
	for _, name := range expected {
		if !found[name] {
			t.Errorf("%s has no value", name)
		}
	}
}

func TestMetricValues(t *testing.T) {
	m := Metrics(pod())
	all := append(m.Metrics, m.ContainerMetrics[0].Metrics...)
	base := []string{"web", "/kubepods/podu/c1", "img:1", "c1", "shop", "web-0"}
	for _, c := range []struct {
		name   string
		labels []string
		kind   runtimeapi.MetricType
		value  uint64
	}{
		{"container_cpu_usage_seconds_total", append(slices.Clone(base), "total"), runtimeapi.MetricType_COUNTER, 12},
		{"container_cpu_cfs_throttled_seconds_total", base, runtimeapi.MetricType_COUNTER, 3},
		{"container_pressure_cpu_waiting_seconds_total", base, runtimeapi.MetricType_COUNTER, 2},
		{"container_spec_cpu_quota", base, runtimeapi.MetricType_GAUGE, 20000},
		{"container_spec_memory_limit_bytes", base, runtimeapi.MetricType_GAUGE, 1000},
		{"container_spec_memory_swap_limit_bytes", base, runtimeapi.MetricType_GAUGE, 0},
		{"container_threads_max", base, runtimeapi.MetricType_GAUGE, 0},
		{"container_start_time_seconds", base, runtimeapi.MetricType_GAUGE, uint64(started.Unix())},
		{"container_last_seen", base, runtimeapi.MetricType_GAUGE, uint64(read.Unix())},
		{"container_fs_usage_bytes", append(slices.Clone(base), "/dev/vda"), runtimeapi.MetricType_GAUGE, 4096},
		{"container_ulimits_soft", append(slices.Clone(base), "max_open_files"), runtimeapi.MetricType_GAUGE, 1024},
		{"container_memory_failures_total", append(slices.Clone(base), "pgmajfault", "hierarchy"), runtimeapi.MetricType_COUNTER, 8},
		{"container_network_receive_bytes_total", []string{"", "", "", "p1", "shop", "web-0", "eth0"}, runtimeapi.MetricType_COUNTER, 7},
		{"container_blkio_device_usage_total", append(slices.Clone(base), "/dev/vda", "0", "0", "Write"), runtimeapi.MetricType_COUNTER, 0},
	} {
		i := slices.IndexFunc(all, func(m *runtimeapi.Metric) bool { return m.Name == c.name && slices.Equal(m.LabelValues, c.labels) })
		if i < 0 {
			t.Errorf("no %s %q", c.name, c.labels)
			continue
		}
		if m := all[i]; m.Value.Value != c.value || m.MetricType != c.kind {
			t.Errorf("%s = %d (%v), want %d (%v)", c.name, m.Value.Value, m.MetricType, c.value, c.kind)
		}
	}
}

func TestContainer(t *testing.T) {
	p := pod()
	attrs := &runtimeapi.ContainerAttributes{Id: "c1"}
	got := Container(attrs, p.Containers[0])
	want := &runtimeapi.ContainerStats{
		Attributes: attrs,
		Cpu: &runtimeapi.CpuUsage{Timestamp: read.UnixNano(), UsageCoreNanoSeconds: value(12_900_000_000), UsageNanoCores: value(250e6),
			Psi: &runtimeapi.PsiStats{Some: &runtimeapi.PsiData{Avg10: 1.5, Total: 2_500_000_000}, Full: &runtimeapi.PsiData{}}},
		Memory: &runtimeapi.MemoryUsage{Timestamp: read.UnixNano(), WorkingSetBytes: value(70), AvailableBytes: value(930), UsageBytes: value(100),
			RssBytes: value(40), PageFaults: value(9), MajorPageFaults: value(8), Psi: &runtimeapi.PsiStats{Some: &runtimeapi.PsiData{}, Full: &runtimeapi.PsiData{}}},
		Swap: &runtimeapi.SwapUsage{Timestamp: read.UnixNano(), SwapUsageBytes: value(5)},
		Io:   &runtimeapi.IoUsage{Timestamp: read.UnixNano(), Psi: &runtimeapi.PsiStats{Some: &runtimeapi.PsiData{}, Full: &runtimeapi.PsiData{}}},
		WritableLayer: &runtimeapi.FilesystemUsage{Timestamp: read.UnixNano(), FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: "/var/lib/nodeagent"},
			UsedBytes: value(4096), InodesUsed: value(3)},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	for _, c := range []*sample.Container{nil, p.Containers[1]} {
		if got := Container(attrs, c); !reflect.DeepEqual(got, &runtimeapi.ContainerStats{Attributes: attrs}) {
			t.Errorf("a container that does not run: %v", got)
		}
	}
	// Without pressure information there is none, rather than a zero.
	c := *p.Containers[0]
	c.Cgroup.Have &^= sample.PSI
	if got := Container(attrs, &c); got.Cpu.Psi != nil || got.Memory.Psi != nil || got.Io != nil {
		t.Errorf("pressure made up: %v", got)
	}
}

func TestPod(t *testing.T) {
	p := pod()
	attrs := &runtimeapi.PodSandboxAttributes{Id: "p1"}
	// Without a group of its own: the sum.
	got := Pod(attrs, p, nil).Linux
	if got.Cpu.UsageCoreNanoSeconds.Value != 12_900_000_000 || got.Memory.WorkingSetBytes.Value != 70 || got.Memory.AvailableBytes != nil ||
		got.Process.ProcessCount.Value != 2 || got.Cpu.Psi != nil || got.Cpu.UsageNanoCores.Value != 250e6 {
		t.Errorf("sum: %v", got)
	}
	n := got.Network
	if n.Timestamp != read.UnixNano() || n.DefaultInterface.Name != "eth0" || n.DefaultInterface.RxBytes.Value != 7 || n.DefaultInterface.RxErrors.Value != 1 ||
		n.DefaultInterface.TxBytes.Value != 8 || len(n.Interfaces) != 1 || n.Interfaces[0].Name != "net1" {
		t.Errorf("network: %v", n)
	}
	p.Cgroup = sample.Cgroup{Time: read, Have: sample.Basic, CPU: sample.CPUStats{Usage: 5}}
	p.Processes = 6
	got = Pod(attrs, p, []*runtimeapi.ContainerStats{{Attributes: &runtimeapi.ContainerAttributes{Id: "c1"}}}).Linux
	if got.Cpu.UsageCoreNanoSeconds.Value != 5 || got.Process.ProcessCount.Value != 6 || len(got.Containers) != 1 || got.Io == nil || got.Cpu.UsageNanoCores != nil {
		t.Errorf("group: %v", got)
	}
	if empty := Pod(attrs, &sample.Pod{}, nil); empty.Linux.Cpu != nil || empty.Linux.Network != nil || empty.Linux.Process != nil {
		t.Errorf("a pod with nothing in it: %v", empty)
	}
}

func BenchmarkMetrics50(b *testing.B) {
	p := pod()
	b.ReportAllocs()
	for b.Loop() {
		for range 50 {
			Metrics(p)
		}
	}
}
