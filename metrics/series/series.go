// Package series is the table of the container metrics that the node exports:
// name, type, labels and how to take the value from a sample. The names, types
// and labels are cAdvisor's, so that dashboards and alerts written for it hold;
// the set is that which the CRI validation suite knows, all 56.
//
// It is pure: no I/O, no goroutines, no state. cri/stats makes CRI messages of
// it, metrics the Prometheus exposition.
package series

import (
	"strconv"
	"time"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

// Kind of a metric.
type Kind int

// The kinds.
const (
	Counter Kind = iota
	Gauge
)

// Metric describes one metric.
type Metric struct {
	Name, Help string
	Kind       Kind
	// Labels are the keys, in the order of a point's values.
	Labels []string

	container func(c *sample.Container, emit func(value float64, extra ...string))
	pod       func(p *sample.Pod, emit func(value float64, extra ...string))
}

// Point is one value. Labels belongs to the point and may be shared between
// points: do not change it.
type Point struct {
	Metric *Metric
	Labels []string
	Value  float64
	Time   time.Time // when it was read
}

// base are the labels of every metric. "id" is the path of the control group
// and "name" the ID of the container (of the sandbox for the pod's own).
var base = []string{"container", "id", "image", "name", "namespace", "pod"}

// All returns the table, sorted by name. It is shared: do not change it.
func All() []Metric { return table }

// Pod hands over the points of the pod itself, its network.
func Pod(p *sample.Pod, emit func(Point)) {
	if p.Network == nil {
		return
	}
	labels := []string{"", p.Cgroup.Path, "", p.Target.ID, p.Target.Namespace, p.Target.Name}
	for i := range table {
		m := &table[i]
		if m.pod == nil {
			continue
		}
		m.pod(p, func(v float64, extra ...string) {
			emit(Point{m, join(labels, extra), v, p.Network.Time})
		})
	}
}

// Container hands over the points of a container of p that runs.
func Container(p *sample.Pod, c *sample.Container, emit func(Point)) {
	if c.Cgroup.Have == 0 {
		return
	}
	labels := []string{c.Target.Name, c.Cgroup.Path, c.Target.Image, c.Target.ID, p.Target.Namespace, p.Target.Name}
	for i := range table {
		m := &table[i]
		if m.container == nil {
			continue
		}
		m.container(c, func(v float64, extra ...string) {
			emit(Point{m, join(labels, extra), v, c.Cgroup.Time})
		})
	}
}

func join(labels, extra []string) []string {
	if len(extra) == 0 {
		return labels
	}
	return append(append(make([]string, 0, len(labels)+len(extra)), labels...), extra...)
}

// unlimited is 0 for a limit that is not set, as cAdvisor has it.
func unlimited(n uint64) float64 {
	if n == sample.Unlimited {
		return 0
	}
	return float64(n)
}

func seconds(ns uint64) float64 { return float64(ns) / float64(time.Second) }

// micro turns microseconds into seconds.
func micro(us uint64) float64 { return float64(us) / 1e6 }

// one makes a metric with one point a container.
func one(kind Kind, name, help string, value func(*sample.Container) float64) Metric {
	return Metric{Name: name, Help: help, Kind: kind, Labels: base,
		container: func(c *sample.Container, emit func(float64, ...string)) { emit(value(c)) }}
}

// with makes a metric with extra labels.
func with(kind Kind, name, help string, extra []string, points func(*sample.Container, func(float64, ...string))) Metric {
	return Metric{Name: name, Help: help, Kind: kind, Labels: join(base, extra), container: points}
}

// perDevice makes a metric with one point a block device; without any I/O it
// is zero on the device of the writable layer.
func perDevice(name, help string, value func(*sample.DeviceIO) uint64) Metric {
	return with(Counter, name, help, []string{"device"}, func(c *sample.Container, emit func(float64, ...string)) {
		for _, d := range devices(c) {
			emit(float64(value(&d)), d.Device)
		}
	})
}

// devices are those with I/O, or the writable layer's with none.
func devices(c *sample.Container) []sample.DeviceIO {
	if len(c.Cgroup.IO) > 0 {
		return c.Cgroup.IO
	}
	return []sample.DeviceIO{{Device: writable(c).Device}}
}

// writable is the layer's use, zero if it is not known.
func writable(c *sample.Container) sample.Filesystem {
	if c.Writable == nil {
		return sample.Filesystem{}
	}
	return *c.Writable
}

// ofLayer makes a metric of the writable layer.
func ofLayer(name, help string, value func(sample.Filesystem) uint64) Metric {
	return with(Gauge, name, help, []string{"device"}, func(c *sample.Container, emit func(float64, ...string)) {
		w := writable(c)
		emit(float64(value(w)), w.Device)
	})
}

// perPageSize makes a metric with one point a huge page size.
func perPageSize(name, help string, value func(sample.HugePages) uint64) Metric {
	return with(Gauge, name, help, []string{"pagesize"}, func(c *sample.Container, emit func(float64, ...string)) {
		if len(c.Cgroup.Hugetlb) == 0 {
			emit(0, "2MB") // the controller is off: none can be used
		}
		for _, h := range c.Cgroup.Hugetlb {
			emit(float64(value(h)), h.Size)
		}
	})
}

// perInterface makes a metric with one point an interface of the pod.
func perInterface(name, help string, value func(sample.Interface) uint64) Metric {
	return Metric{Name: name, Help: help, Kind: Counter, Labels: join(base, []string{"interface"}),
		pod: func(p *sample.Pod, emit func(float64, ...string)) {
			for _, i := range p.Network.Interfaces {
				emit(float64(value(i)), i.Name)
			}
		}}
}

// pressure makes a metric of a PSI total.
func pressure(name, help string, line func(*sample.PSIStats) sample.PressureLine) Metric {
	return one(Counter, name, help, func(c *sample.Container) float64 { return micro(line(&c.Cgroup.PSI).Total) })
}

var table = []Metric{
	with(Counter, "container_blkio_device_usage_total", "Bytes read from and written to a block device.",
		[]string{"device", "major", "minor", "operation"},
		func(c *sample.Container, emit func(float64, ...string)) {
			for _, d := range devices(c) {
				major, minor := strconv.FormatUint(uint64(d.Major), 10), strconv.FormatUint(uint64(d.Minor), 10)
				emit(float64(d.ReadBytes), d.Device, major, minor, "Read")
				emit(float64(d.WriteBytes), d.Device, major, minor, "Write")
			}
		}),
	one(Counter, "container_cpu_cfs_periods_total", "Elapsed enforcement periods of the CPU quota.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.CPU.Periods) }),
	one(Counter, "container_cpu_cfs_throttled_periods_total", "Periods in which the container was throttled.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.CPU.ThrottledPeriods) }),
	one(Counter, "container_cpu_cfs_throttled_seconds_total", "Time for which the container was throttled.",
		func(c *sample.Container) float64 { return seconds(c.Cgroup.CPU.ThrottledTime) }),
	one(Counter, "container_cpu_system_seconds_total", "System CPU time consumed.",
		func(c *sample.Container) float64 { return seconds(c.Cgroup.CPU.System) }),
	with(Counter, "container_cpu_usage_seconds_total", "CPU time consumed.", []string{"cpu"},
		func(c *sample.Container, emit func(float64, ...string)) { emit(seconds(c.Cgroup.CPU.Usage), "total") }),
	one(Counter, "container_cpu_user_seconds_total", "User CPU time consumed.",
		func(c *sample.Container) float64 { return seconds(c.Cgroup.CPU.User) }),
	one(Gauge, "container_file_descriptors", "Open file descriptors.",
		func(c *sample.Container) float64 { return float64(c.Process.FDs) }),
	ofLayer("container_fs_inodes_free", "Free inodes of the writable layer's filesystem.",
		func(w sample.Filesystem) uint64 { return w.FreeInodes }),
	ofLayer("container_fs_inodes_total", "Inodes of the writable layer's filesystem.",
		func(w sample.Filesystem) uint64 { return w.TotalInodes }),
	ofLayer("container_fs_limit_bytes", "Size of the writable layer's filesystem.",
		func(w sample.Filesystem) uint64 { return w.LimitBytes }),
	perDevice("container_fs_reads_bytes_total", "Bytes read.", func(d *sample.DeviceIO) uint64 { return d.ReadBytes }),
	perDevice("container_fs_reads_total", "Reads completed.", func(d *sample.DeviceIO) uint64 { return d.Reads }),
	ofLayer("container_fs_usage_bytes", "Bytes used by the writable layer.",
		func(w sample.Filesystem) uint64 { return w.UsedBytes }),
	perDevice("container_fs_writes_bytes_total", "Bytes written.", func(d *sample.DeviceIO) uint64 { return d.WriteBytes }),
	perDevice("container_fs_writes_total", "Writes completed.", func(d *sample.DeviceIO) uint64 { return d.Writes }),
	perPageSize("container_hugetlb_max_usage_bytes", "Greatest use of huge pages recorded.",
		func(h sample.HugePages) uint64 { return h.MaxUsage }),
	perPageSize("container_hugetlb_usage_bytes", "Huge pages in use.",
		func(h sample.HugePages) uint64 { return h.Usage }),
	one(Gauge, "container_last_seen", "Unix time at which the container was last seen.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.Time.Unix()) }),
	one(Gauge, "container_memory_cache", "Page cache memory.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.Memory.Cache) }),
	one(Counter, "container_memory_failcnt", "Times that memory use hit the limit.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.Memory.FailCount) }),
	with(Counter, "container_memory_failures_total", "Page faults.", []string{"failure_type", "scope"},
		func(c *sample.Container, emit func(float64, ...string)) {
			m := &c.Cgroup.Memory
			emit(float64(m.LocalPageFaults), "pgfault", "container")
			emit(float64(m.LocalMajorPageFaults), "pgmajfault", "container")
			emit(float64(m.PageFaults), "pgfault", "hierarchy")
			emit(float64(m.MajorPageFaults), "pgmajfault", "hierarchy")
		}),
	one(Gauge, "container_memory_kernel_usage", "Kernel memory allocated.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.Memory.Kernel) }),
	one(Gauge, "container_memory_mapped_file", "Memory mapped files.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.Memory.MappedFile) }),
	one(Gauge, "container_memory_max_usage_bytes", "Greatest memory use recorded.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.Memory.MaxUsage) }),
	one(Gauge, "container_memory_rss", "Anonymous memory, huge pages included.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.Memory.RSS) }),
	one(Gauge, "container_memory_swap", "Swap in use.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.Memory.Swap) }),
	one(Gauge, "container_memory_usage_bytes", "Memory in use, whenever it was last accessed.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.Memory.Usage) }),
	one(Gauge, "container_memory_working_set_bytes", "Memory in use less inactive file pages.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.Memory.WorkingSet) }),
	perInterface("container_network_receive_bytes_total", "Bytes received.",
		func(i sample.Interface) uint64 { return i.Rx.Bytes }),
	perInterface("container_network_receive_errors_total", "Errors while receiving.",
		func(i sample.Interface) uint64 { return i.Rx.Errors }),
	perInterface("container_network_receive_packets_dropped_total", "Packets dropped while receiving.",
		func(i sample.Interface) uint64 { return i.Rx.Dropped }),
	perInterface("container_network_receive_packets_total", "Packets received.",
		func(i sample.Interface) uint64 { return i.Rx.Packets }),
	perInterface("container_network_transmit_bytes_total", "Bytes transmitted.",
		func(i sample.Interface) uint64 { return i.Tx.Bytes }),
	perInterface("container_network_transmit_errors_total", "Errors while transmitting.",
		func(i sample.Interface) uint64 { return i.Tx.Errors }),
	perInterface("container_network_transmit_packets_dropped_total", "Packets dropped while transmitting.",
		func(i sample.Interface) uint64 { return i.Tx.Dropped }),
	perInterface("container_network_transmit_packets_total", "Packets transmitted.",
		func(i sample.Interface) uint64 { return i.Tx.Packets }),
	one(Counter, "container_oom_events_total", "Processes killed for lack of memory.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.Memory.OOMKills) }),
	pressure("container_pressure_cpu_stalled_seconds_total", "Time in which no task could run for lack of CPU.",
		func(p *sample.PSIStats) sample.PressureLine { return p.CPU.Full }),
	pressure("container_pressure_cpu_waiting_seconds_total", "Time in which some task waited for CPU.",
		func(p *sample.PSIStats) sample.PressureLine { return p.CPU.Some }),
	pressure("container_pressure_io_stalled_seconds_total", "Time in which no task could run for waiting on I/O.",
		func(p *sample.PSIStats) sample.PressureLine { return p.IO.Full }),
	pressure("container_pressure_io_waiting_seconds_total", "Time in which some task waited for I/O.",
		func(p *sample.PSIStats) sample.PressureLine { return p.IO.Some }),
	pressure("container_pressure_memory_stalled_seconds_total", "Time in which no task could run for lack of memory.",
		func(p *sample.PSIStats) sample.PressureLine { return p.Memory.Full }),
	pressure("container_pressure_memory_waiting_seconds_total", "Time in which some task waited for memory.",
		func(p *sample.PSIStats) sample.PressureLine { return p.Memory.Some }),
	one(Gauge, "container_processes", "Processes running.",
		func(c *sample.Container) float64 { return float64(c.Process.Processes) }),
	one(Gauge, "container_sockets", "Open sockets.",
		func(c *sample.Container) float64 { return float64(c.Process.Sockets) }),
	one(Gauge, "container_spec_cpu_period", "CPU period in microseconds.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.CPU.Period) }),
	one(Gauge, "container_spec_cpu_quota", "CPU quota in microseconds a period, 0 for none.",
		func(c *sample.Container) float64 { return float64(max(0, c.Cgroup.CPU.Quota)) }),
	one(Gauge, "container_spec_cpu_shares", "CPU shares.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.CPU.Shares) }),
	one(Gauge, "container_spec_memory_limit_bytes", "Memory limit, 0 for none.",
		func(c *sample.Container) float64 { return unlimited(c.Cgroup.Memory.Limit) }),
	one(Gauge, "container_spec_memory_reservation_limit_bytes", "Memory reservation, 0 for none.",
		func(c *sample.Container) float64 { return unlimited(c.Cgroup.Memory.Reservation) }),
	one(Gauge, "container_spec_memory_swap_limit_bytes", "Swap limit, 0 for none.",
		func(c *sample.Container) float64 { return unlimited(c.Cgroup.Memory.SwapLimit) }),
	one(Gauge, "container_start_time_seconds", "Unix time at which the container started.",
		func(c *sample.Container) float64 { return float64(c.Target.StartedAt.Unix()) }),
	one(Gauge, "container_threads", "Threads running.",
		func(c *sample.Container) float64 { return float64(c.Cgroup.Pids.Current) }),
	one(Gauge, "container_threads_max", "Threads that may run, 0 for any number.",
		func(c *sample.Container) float64 { return unlimited(c.Cgroup.Pids.Limit) }),
	with(Gauge, "container_ulimits_soft", "Soft limits of the container's first process.", []string{"ulimit"},
		func(c *sample.Container, emit func(float64, ...string)) {
			emit(float64(c.Process.OpenFilesSoft), "max_open_files")
		}),
}
