// Package sample holds the plain data that a reading of the kernel yields:
// what one cgroup, one pod's network and one writable layer used, and when.
//
// It has types and no behaviour: no I/O, no goroutines, no locks; it
// imports nothing but time. cgroups fills Cgroup, metrics adds rates and
// puts whole samples together, cri/stats and the Prometheus exposition turn
// them into messages. Because it is only data it is the one package that all
// of them may import; the packages themselves do not import each other.
package sample

import "time"

// Set says which parts of a Cgroup were read (or are wanted).
type Set uint16

// The parts of a Cgroup. A part that the kernel does not offer for a group
// (PSI on a pure v1 host, hugetlb where the controller is off) is absent from
// Cgroup.Have and its fields are zero.
const (
	CPU          Set = 1 << iota // cumulative usage
	CPUDetail                    // user and system time, throttling, quota, shares
	Memory                       // usage, memory.stat, limit, swap
	MemoryDetail                 // peak, reservation, fail count, OOM kills, kernel memory
	Pids                         // tasks and their limit
	IO                           // block I/O per device
	Hugetlb                      // huge pages per page size
	PSI                          // pressure stall information

	// Basic is what ContainerStats and PodSandboxStats carry.
	Basic = CPU | Memory | PSI
	// Full is everything.
	Full = Basic | CPUDetail | MemoryDetail | Pids | IO | Hugetlb
)

// Unlimited is the value of a limit that is not set.
const Unlimited = ^uint64(0)

// Cgroup is one reading of one control group, descendants included.
type Cgroup struct {
	Time time.Time // when the reading began
	Path string    // below the hierarchy's root, as /proc/<pid>/cgroup has it
	Have Set

	CPU     CPUStats
	Memory  MemoryStats
	Pids    PidsStats
	IO      []DeviceIO // sorted by device; reused from reading to reading
	Hugetlb []HugePages
	PSI     PSIStats
}

// CPUStats: times in nanoseconds since the group was made.
type CPUStats struct {
	Usage, User, System uint64

	Periods          uint64 // enforcement periods that have elapsed
	ThrottledPeriods uint64
	ThrottledTime    uint64 // ns

	Quota  int64  // µs a period, -1 is none
	Period uint64 // µs
	Shares uint64 // v1 shares; on v2 converted from cpu.weight
}

// MemoryStats: bytes unless said otherwise. Limits are Unlimited when not set.
type MemoryStats struct {
	Usage      uint64 // includes page cache
	MaxUsage   uint64 // 0 where the kernel does not tell (v2 before 5.19)
	WorkingSet uint64 // Usage less inactive file pages
	RSS        uint64 // anonymous memory
	Cache      uint64
	MappedFile uint64
	Kernel     uint64

	ActiveFile, InactiveFile uint64

	Swap uint64 // swap in use (without memory)

	Limit       uint64
	Reservation uint64 // soft limit (v1), memory.low (v2)
	SwapLimit   uint64 // swap alone, as v2; on v1 memsw limit less memory limit

	FailCount uint64 // times usage hit the limit (v2: memory.events max)
	OOMKills  uint64 // processes killed by the OOM killer

	PageFaults, MajorPageFaults           uint64 // hierarchical
	LocalPageFaults, LocalMajorPageFaults uint64 // of this group alone; equal to the above on v2
}

// PidsStats counts tasks (threads).
type PidsStats struct {
	Current uint64
	Limit   uint64 // Unlimited when not set
}

// DeviceIO is the block I/O on one device.
type DeviceIO struct {
	Device                               string // "/dev/sda"; the sampler fills it in
	Major, Minor                         uint32
	ReadBytes, WriteBytes, Reads, Writes uint64
	DiscardBytes, Discards               uint64
}

// HugePages is the use of one page size.
type HugePages struct {
	Size            string // as the kernel spells it, "2MB"
	Usage, MaxUsage uint64 // bytes
	FailCount       uint64
}

// PSIStats is pressure stall information of one group.
type PSIStats struct {
	CPU, Memory, IO Pressure
}

// Pressure of one resource: some tasks waited, all of them did.
type Pressure struct {
	Some, Full PressureLine
}

// PressureLine has averages in percent and the total in microseconds.
type PressureLine struct {
	Avg10, Avg60, Avg300 float64
	Total                uint64
}

// Depth says how much a sample holds; each holds what the ones before do.
type Depth int

// The depths.
const (
	Containers Depth = iota // the containers' CPU, memory, PSI, writable layer
	Pods                    // and the pod's group, processes and network
	Everything              // and all of the containers that the CRI's pod metrics know
)

// Parts of a container's group that a depth needs.
func (d Depth) Parts() Set {
	if d == Everything {
		return Full
	}
	return Basic
}

// PodTarget names a pod to be sampled: where its figures are to be found.
type PodTarget struct {
	ID, Name, Namespace, UID string

	CreatedAt    time.Time
	CgroupParent string // as cgroups.PodParent gave it
	// Netns is the path of the pod's network namespace; "" is the host's, and
	// then the pod has no network figures of its own.
	Netns string
	// HostInterface is the host's end of the pod's only link, if the built-in
	// network made it; its counters are read instead of entering Netns.
	HostInterface string

	Containers []ContainerTarget
}

// ContainerTarget names a container that runs.
type ContainerTarget struct {
	ID, Name, Image string
	StartedAt       time.Time
	Pid             int // its first process; 0 is unknown
}

// Pod is what one pod used. Samples are shared: do not change them.
type Pod struct {
	Target  PodTarget
	Cgroup  Cgroup   // Have is 0 if the pod has no group of its own
	Rate    Rate     // of Cgroup.CPU.Usage
	Network *Network // nil: not asked for, host network, or not to be had
	// Processes in the pod's group; 0 if Cgroup.Have is.
	Processes  uint64
	Containers []*Container
}

// Container is what one container used.
type Container struct {
	Target   ContainerTarget
	Cgroup   Cgroup // Have is 0 if the container does not run
	Rate     Rate
	Writable *Filesystem // nil: not known (yet)
	Process  Process     // only in a full sample
}

// Rate is CPU use over a time.
type Rate struct {
	Valid     bool
	NanoCores uint64        // ns of CPU time a second, over all cores
	Window    time.Duration // over which it was measured
}

// Filesystem is the use of a writable layer and of the filesystem it is on.
type Filesystem struct {
	Time       time.Time // when the layer was measured
	Mountpoint string
	Device     string // "/dev/sda1", or what the filesystem calls itself
	UsedBytes  uint64 // of the layer
	UsedInodes uint64

	LimitBytes, TotalInodes, FreeInodes uint64 // of the filesystem
}

// Network has the counters of a pod's interfaces, without loopback, as the pod
// sees them.
type Network struct {
	Time       time.Time
	Interfaces []Interface // the default one first
}

// Interface counts since the interface was made.
type Interface struct {
	Name   string
	Rx, Tx Traffic
}

// Traffic of one direction.
type Traffic struct {
	Bytes, Packets, Errors, Dropped uint64
}

// Process counts what the processes of a container hold.
type Process struct {
	Processes, FDs, Sockets uint64
	OpenFilesSoft           uint64 // RLIMIT_NOFILE of its first process; 0 is unknown
}
