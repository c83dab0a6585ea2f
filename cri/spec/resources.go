package spec

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func (b *builder) resources() error {
	if n := b.in.Defaults.PidsLimit; n != 0 {
		b.spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: &n}
	}
	res, err := MergeResources(b.spec.Linux.Resources, b.in.Container.GetLinux().GetResources(), b.in.Host)
	if err != nil {
		return err
	}
	b.spec.Linux.Resources = res
	return nil
}

// MergeResources returns a copy of old with what ask sets; zero fields of ask
// mean "leave as it is". It serves creation (old with the device rules only),
// UpdateContainerResources and pod level resources. oom_score_adj is not a
// cgroup resource and is ignored here. old may be nil.
//
// A memory limit without a swap limit forbids swap, where the kernel can.
// Shares stay shares: libcontainer converts them to a weight on cgroup v2.
//
// Errors: InvalidArgument for values that the kernel would refuse,
// FailedPrecondition for hugepages or unified on a host without them.
func MergeResources(old *specs.LinuxResources, ask *runtimeapi.LinuxContainerResources, host HostInfo) (*specs.LinuxResources, error) {
	out, err := cloneResources(old)
	if err != nil || ask == nil {
		return out, err
	}
	if err := checkResources(ask); err != nil {
		return nil, err
	}
	mergeCPU(out, ask)
	mergeMemory(out, ask, host)
	if err := mergeHugepages(out, ask.GetHugepageLimits(), host); err != nil {
		return nil, err
	}
	if u := ask.GetUnified(); len(u) > 0 {
		if !host.CgroupUnified {
			return nil, lacking("linux.resources.unified", slices.Sorted(maps.Keys(u)), "cgroup v2")
		}
		if out.Unified == nil {
			out.Unified = map[string]string{}
		}
		maps.Copy(out.Unified, u)
	}
	return out, checkMemory(out)
}

func cloneResources(old *specs.LinuxResources) (*specs.LinuxResources, error) {
	out := &specs.LinuxResources{}
	if old == nil {
		return out, nil
	}
	data, err := json.Marshal(old)
	if err == nil {
		err = json.Unmarshal(data, out)
	}
	if err != nil {
		return nil, fmt.Errorf("copy resources: %w", err)
	}
	return out, nil
}

func checkResources(ask *runtimeapi.LinuxContainerResources) error {
	const field = "linux.resources."
	// Kernel: kernel/sched/core.c, min_cfs_quota_period and max_cfs_quota_period.
	if p := ask.GetCpuPeriod(); p != 0 && (p < 1000 || p > 1000000) {
		return invalid(field+"cpu_period", p, "0 (unset) or 1000 to 1000000 microseconds")
	}
	if q := ask.GetCpuQuota(); q < -1 || (q > 0 && q < 1000) {
		return invalid(field+"cpu_quota", q, "-1 (no limit), 0 (unset) or at least 1000 microseconds")
	}
	if s := ask.GetCpuShares(); s != 0 && (s < 2 || s > 262144) {
		return invalid(field+"cpu_shares", s, "0 (unset) or 2 to 262144")
	}
	if m := ask.GetMemoryLimitInBytes(); m < -1 {
		return invalid(field+"memory_limit_in_bytes", m, "-1 (no limit), 0 (unset) or a number of bytes")
	}
	if m := ask.GetMemorySwapLimitInBytes(); m < -1 {
		return invalid(field+"memory_swap_limit_in_bytes", m, "-1 (no limit), 0 (unset) or a number of bytes, memory included")
	}
	if a := ask.GetOomScoreAdj(); a < -1000 || a > 1000 {
		return invalid(field+"oom_score_adj", a, "-1000 to 1000")
	}
	for f, list := range map[string]string{"cpuset_cpus": ask.GetCpusetCpus(), "cpuset_mems": ask.GetCpusetMems()} {
		if strings.Trim(list, "0123456789,-") != "" {
			return invalid(field+f, list, "a list such as 0-2,7")
		}
	}
	for k := range ask.GetUnified() {
		if k == "" || strings.Contains(k, "/") || hasNUL(k) {
			return invalid(field+"unified", k, "a cgroup v2 file name")
		}
	}
	return nil
}

func checkMemory(r *specs.LinuxResources) error {
	if r.Memory == nil || r.Memory.Limit == nil || r.Memory.Swap == nil {
		return nil
	}
	if limit, swap := *r.Memory.Limit, *r.Memory.Swap; swap > 0 && limit > 0 && swap < limit {
		return invalid("linux.resources.memory_swap_limit_in_bytes", swap, "at least the memory limit (%d): it counts both", limit)
	}
	return nil
}

func mergeCPU(out *specs.LinuxResources, ask *runtimeapi.LinuxContainerResources) {
	cpu := out.CPU
	if cpu == nil {
		cpu = &specs.LinuxCPU{}
	}
	if p := ask.GetCpuPeriod(); p != 0 {
		cpu.Period = ptr(uint64(p))
	}
	if q := ask.GetCpuQuota(); q != 0 {
		cpu.Quota = ptr(q)
	}
	if s := ask.GetCpuShares(); s != 0 {
		cpu.Shares = ptr(uint64(s))
	}
	if c := ask.GetCpusetCpus(); c != "" {
		cpu.Cpus = c
	}
	if m := ask.GetCpusetMems(); m != "" {
		cpu.Mems = m
	}
	if *cpu != (specs.LinuxCPU{}) {
		out.CPU = cpu
	}
}

func mergeMemory(out *specs.LinuxResources, ask *runtimeapi.LinuxContainerResources, host HostInfo) {
	mem := out.Memory
	if mem == nil {
		mem = &specs.LinuxMemory{}
	}
	limit, swap := ask.GetMemoryLimitInBytes(), ask.GetMemorySwapLimitInBytes()
	if limit != 0 {
		mem.Limit = ptr(limit)
		if swap == 0 && host.SwapLimit {
			mem.Swap = ptr(limit)
		}
	}
	if swap != 0 && host.SwapLimit {
		mem.Swap = ptr(swap)
	}
	if *mem != (specs.LinuxMemory{}) {
		out.Memory = mem
	}
}

func mergeHugepages(out *specs.LinuxResources, ask []*runtimeapi.HugepageLimit, host HostInfo) error {
	for i, l := range ask {
		field := fmt.Sprintf("linux.resources.hugepage_limits[%d]", i)
		size := l.GetPageSize()
		num := strings.TrimRight(size, "KMGTPB")
		if num == "" || strings.Trim(num, "0123456789") != "" || num == size {
			return invalid(field+".page_size", size, "a size such as 2MB or 1GB")
		}
		if !host.Hugetlb {
			// kubelet sends a limit of 0 for every page size of the node.
			if l.GetLimit() == 0 {
				continue
			}
			return lacking(field, l, "hugetlb cgroup controller")
		}
		out.HugepageLimits = slices.DeleteFunc(out.HugepageLimits, func(h specs.LinuxHugepageLimit) bool { return h.Pagesize == size })
		out.HugepageLimits = append(out.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: size, Limit: l.GetLimit()})
	}
	return nil
}

// StatusResources is the inverse for ContainerStatus.resources: what is in
// force according to res. oomScoreAdj is the process's, nil for unset.
func StatusResources(res *specs.LinuxResources, oomScoreAdj *int) *runtimeapi.ContainerResources {
	l := &runtimeapi.LinuxContainerResources{}
	if res == nil {
		res = &specs.LinuxResources{}
	}
	if c := res.CPU; c != nil {
		l.CpuPeriod = int64(value(c.Period))
		l.CpuQuota = value(c.Quota)
		l.CpuShares = int64(value(c.Shares))
		l.CpusetCpus, l.CpusetMems = c.Cpus, c.Mems
	}
	if m := res.Memory; m != nil {
		l.MemoryLimitInBytes, l.MemorySwapLimitInBytes = value(m.Limit), value(m.Swap)
	}
	l.OomScoreAdj = int64(value(oomScoreAdj))
	for _, h := range res.HugepageLimits {
		l.HugepageLimits = append(l.HugepageLimits, &runtimeapi.HugepageLimit{PageSize: h.Pagesize, Limit: h.Limit})
	}
	l.Unified = maps.Clone(res.Unified)
	return &runtimeapi.ContainerResources{Linux: l}
}

func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// oomScore: without CAP_SYS_RESOURCE the kernel refuses a score below the
// daemon's own, so that is the floor then.
func (b *builder) oomScore() error {
	if r := b.in.Container.GetLinux().GetResources(); r != nil {
		b.spec.Process.OOMScoreAdj = ptr(b.in.Host.oomScore(int(r.GetOomScoreAdj())))
	}
	return nil
}
