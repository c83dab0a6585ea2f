package cgroups

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

// Stats is one reading of a group. It is defined in metrics/sample, which all
// that pass it on may import.
type Stats = sample.Cgroup

// Group is a handle on one group. It holds no descriptor and stays valid when
// the group goes: calls then answer NotFound. The zero Group does too.
type Group struct {
	v2    bool
	rel   string   // below the hierarchies' roots
	pages []string // huge page sizes

	// Directories per controller; "" where the host has none. On v2 all equal.
	cpu, cpuacct, memory, pids, blkio, hugetlb, unified string
}

// Resolve returns the group of a container in the pod group parent, or with
// an empty id the pod's own. It does not look whether it exists.
//
// Errors: InvalidArgument if the parent does not fit the driver.
func (m *Manager) Resolve(parent, id string) (Group, error) {
	rel, err := m.parentPath(parent)
	if err != nil {
		return Group{}, err
	}
	if id != "" {
		if err := checkID(id); err != nil {
			return Group{}, err
		}
		name := id
		if m.driver == Systemd {
			name = scopePrefix + "-" + id + ".scope"
		}
		rel = join(rel, name)
	}
	return m.group(rel), nil
}

// groupAt returns the group at paths, by controller; the v2 hierarchy under
// Unified.
func (m *Manager) groupAt(paths map[string]string) Group {
	g := Group{v2: m.host.Mode == V2, pages: m.pages, unified: paths[Unified]}
	if g.v2 {
		g.cpu, g.cpuacct, g.memory, g.pids, g.blkio, g.hugetlb = g.unified, g.unified, g.unified, g.unified, g.unified, g.unified
		return g
	}
	g.cpu, g.cpuacct, g.memory = paths["cpu"], paths["cpuacct"], paths["memory"]
	g.pids, g.blkio, g.hugetlb = paths["pids"], paths["blkio"], paths["hugetlb"]
	return g
}

func (m *Manager) group(rel string) Group {
	paths := make(map[string]string, len(m.host.Mounts))
	for controller, mount := range m.host.Mounts {
		paths[controller] = join(mount, rel)
	}
	g := m.groupAt(paths)
	g.rel = rel
	return g
}

func join(dir, name string) string {
	switch {
	case name == "/" || name == "":
		return dir
	case dir == "/" || dir == "":
		return "/" + trimSlash(name)
	}
	return dir + "/" + trimSlash(name)
}

func trimSlash(s string) string {
	for len(s) > 0 && s[0] == '/' {
		s = s[1:]
	}
	return s
}

// Path is a directory of the group, for logs.
func (g Group) Path() string {
	return firstOf(g.memory, g.cpuacct, g.pids, g.unified)
}

func firstOf(dirs ...string) string {
	i := slices.IndexFunc(dirs, func(d string) bool { return d != "" })
	if i < 0 {
		return ""
	}
	return dirs[i]
}

// Stats reads everything; see Read.
func (g Group) Stats(s *Stats) error { return g.Read(s, sample.Full) }

// Read fills s with the wanted parts and says in s.Have which of them the
// kernel gave; all else is zeroed. It allocates nothing if s is used again
// (s.IO and s.Hugetlb keep their arrays).
//
// Errors: NotFound if the group is gone.
func (g Group) Read(s *Stats, want sample.Set) error {
	*s = Stats{Time: time.Now(), Path: g.rel, IO: s.IO[:0], Hugetlb: s.Hugetlb[:0]}
	if g.Path() == "" {
		return fmt.Errorf("read cgroup: none is known: %w", errdefs.ErrNotFound)
	}
	r := readers.Get().(*reader)
	defer readers.Put(r)
	for _, part := range [...]struct {
		bit  sample.Set
		read func(Group, *reader, *Stats, sample.Set) error
	}{
		{sample.CPU, Group.readCPU},
		{sample.CPUDetail, Group.readCPUDetail},
		{sample.Memory, Group.readMemory},
		{sample.MemoryDetail, Group.readMemoryDetail},
		{sample.Pids, Group.readPids},
		{sample.IO, Group.readIO},
		{sample.Hugetlb, Group.readHugetlb},
		{sample.PSI, Group.readPSI},
	} {
		if want&part.bit == 0 {
			continue
		}
		switch err := part.read(g, r, s, want); {
		case err == nil:
			s.Have |= part.bit
		case !absent(err):
			return fmt.Errorf("read cgroup: %w", err)
		}
	}
	if s.Have == 0 && want != 0 {
		return fmt.Errorf("read cgroup %s: %w", g.Path(), errdefs.ErrNotFound)
	}
	return nil
}

// value reads one number into to.
func (r *reader) value(dir, name string, to *uint64) error {
	return r.parse(dir, name, to, parseValue)
}

// limit reads one number of bytes, huge ones meaning Unlimited.
func (r *reader) limit(dir, name string, to *uint64) error {
	return r.parse(dir, name, to, parseLimit)
}

func (r *reader) parse(dir, name string, to *uint64, parse func([]byte) (uint64, error)) error {
	b, err := r.read(dir, name)
	if err != nil {
		return err
	}
	if *to, err = parse(b); err != nil {
		return r.pathError("parse", err)
	}
	return nil
}

// optional makes of a file that is not there no error.
func optional(err error) error {
	if absent(err) {
		return nil
	}
	return err
}

// keyed reads a flat keyed file.
func (r *reader) keyed(dir, name string, fields ...field) error {
	b, err := r.read(dir, name)
	if err != nil {
		return err
	}
	if err := parseKeyed(b, fields...); err != nil {
		return r.pathError("parse", err)
	}
	return nil
}

func (g Group) readCPU(r *reader, s *Stats, want sample.Set) error {
	c := &s.CPU
	if !g.v2 {
		return r.value(g.cpuacct, "cpuacct.usage", &c.Usage)
	}
	b, err := r.read(g.cpu, "cpu.stat")
	if err != nil {
		return err
	}
	if err := parseKeyed(b, field{"usage_usec", &c.Usage}, field{"user_usec", &c.User}, field{"system_usec", &c.System},
		field{"nr_periods", &c.Periods}, field{"nr_throttled", &c.ThrottledPeriods}, field{"throttled_usec", &c.ThrottledTime}); err != nil {
		return r.pathError("parse", err)
	}
	for _, n := range [...]*uint64{&c.Usage, &c.User, &c.System, &c.ThrottledTime} {
		*n *= uint64(time.Microsecond)
	}
	return nil
}

// userHZ is the unit of cpuacct.stat, 1/100 s in the ABI of every Linux port
// that Go runs on.
const userHZ = 100

func (g Group) readCPUDetail(r *reader, s *Stats, want sample.Set) error {
	c := &s.CPU
	c.Quota = -1
	if g.v2 {
		return g.readCPUDetailV2(r, c)
	}
	if err := r.keyed(g.cpuacct, "cpuacct.stat", field{"user", &c.User}, field{"system", &c.System}); err != nil {
		return err
	}
	c.User *= uint64(time.Second) / userHZ
	c.System *= uint64(time.Second) / userHZ
	err := r.keyed(g.cpu, "cpu.stat", field{"nr_periods", &c.Periods}, field{"nr_throttled", &c.ThrottledPeriods}, field{"throttled_time", &c.ThrottledTime})
	var quota uint64
	err = errors.Join(err, r.value(g.cpu, "cpu.cfs_quota_us", &quota))
	err = errors.Join(err, r.value(g.cpu, "cpu.cfs_period_us", &c.Period))
	err = errors.Join(err, r.value(g.cpu, "cpu.shares", &c.Shares))
	c.Quota = limitToQuota(quota)
	return err
}

func (g Group) readCPUDetailV2(r *reader, c *sample.CPUStats) error {
	b, err := r.read(g.cpu, "cpu.max")
	if err != nil {
		return err // the cpu controller is not enabled for the group
	}
	if c.Quota, c.Period, err = parseCPUMax(b); err != nil {
		return r.pathError("parse", err)
	}
	var weight uint64
	if err := r.value(g.cpu, "cpu.weight", &weight); err != nil {
		return err
	}
	c.Shares = sharesOf(weight)
	return nil
}

func (g Group) readMemory(r *reader, s *Stats, want sample.Set) error {
	if g.v2 {
		return g.readMemoryV2(r, &s.Memory, want)
	}
	m := &s.Memory
	if err := r.value(g.memory, "memory.usage_in_bytes", &m.Usage); err != nil {
		return err
	}
	if err := r.limit(g.memory, "memory.limit_in_bytes", &m.Limit); err != nil {
		return err
	}
	// The order is that of the file: the parse ends at the last key found.
	memLimit, swapLimit := &r.n[0], &r.n[1]
	*memLimit, *swapLimit = 0, sample.Unlimited
	if err := r.keyed(g.memory, "memory.stat",
		field{"pgfault", &m.LocalPageFaults}, field{"pgmajfault", &m.LocalMajorPageFaults},
		field{"hierarchical_memory_limit", memLimit}, field{"hierarchical_memsw_limit", swapLimit},
		field{"total_cache", &m.Cache}, field{"total_rss", &m.RSS}, field{"total_mapped_file", &m.MappedFile},
		field{"total_swap", &m.Swap}, field{"total_pgfault", &m.PageFaults}, field{"total_pgmajfault", &m.MajorPageFaults},
		field{"total_inactive_file", &m.InactiveFile}, field{"total_active_file", &m.ActiveFile}); err != nil {
		return err
	}
	m.SwapLimit = sample.Unlimited
	if *swapLimit < noLimit && *memLimit <= *swapLimit {
		m.SwapLimit = *swapLimit - *memLimit
	}
	m.WorkingSet = m.Usage - min(m.Usage, m.InactiveFile)
	return nil
}

func (g Group) readMemoryV2(r *reader, m *sample.MemoryStats, want sample.Set) error {
	if err := r.value(g.memory, "memory.current", &m.Usage); err != nil {
		return err
	}
	stack, slab := &r.n[0], &r.n[1]
	*stack, *slab = 0, 0
	if err := r.keyed(g.memory, "memory.stat",
		field{"anon", &m.RSS}, field{"file", &m.Cache}, field{"kernel", &m.Kernel}, field{"kernel_stack", stack}, field{"file_mapped", &m.MappedFile},
		field{"inactive_file", &m.InactiveFile}, field{"active_file", &m.ActiveFile}, field{"slab", slab},
		field{"pgfault", &m.PageFaults}, field{"pgmajfault", &m.MajorPageFaults}); err != nil {
		return err
	}
	if m.Kernel == 0 { // "kernel" came with 5.18
		m.Kernel = *stack + *slab
	}
	m.LocalPageFaults, m.LocalMajorPageFaults = m.PageFaults, m.MajorPageFaults
	m.Limit, m.SwapLimit = sample.Unlimited, sample.Unlimited
	err := optional(r.limit(g.memory, "memory.max", &m.Limit))
	// Without swap accounting there is no swap to use.
	err = errors.Join(err, optional(r.value(g.memory, "memory.swap.current", &m.Swap)))
	err = errors.Join(err, optional(r.limit(g.memory, "memory.swap.max", &m.SwapLimit)))
	m.WorkingSet = m.Usage - min(m.Usage, m.InactiveFile)
	return err
}

func (g Group) readMemoryDetail(r *reader, s *Stats, want sample.Set) error {
	m := &s.Memory
	if g.v2 {
		err := r.keyed(g.memory, "memory.events", field{"max", &m.FailCount}, field{"oom_kill", &m.OOMKills})
		if err != nil {
			return err
		}
		// memory.peak came with 5.19.
		err = optional(r.value(g.memory, "memory.peak", &m.MaxUsage))
		return errors.Join(err, optional(r.limit(g.memory, "memory.low", &m.Reservation)))
	}
	if err := r.value(g.memory, "memory.max_usage_in_bytes", &m.MaxUsage); err != nil {
		return err
	}
	err := r.value(g.memory, "memory.failcnt", &m.FailCount)
	err = errors.Join(err, r.limit(g.memory, "memory.soft_limit_in_bytes", &m.Reservation))
	err = errors.Join(err, optional(r.value(g.memory, "memory.kmem.usage_in_bytes", &m.Kernel)))
	// oom_kill came with 4.13.
	return errors.Join(err, r.keyed(g.memory, "memory.oom_control", field{"oom_kill", &m.OOMKills}))
}

func (g Group) readPids(r *reader, s *Stats, want sample.Set) error {
	if err := r.value(g.pids, "pids.current", &s.Pids.Current); err != nil {
		return err
	}
	return optional(r.value(g.pids, "pids.max", &s.Pids.Limit))
}

func (g Group) readIO(r *reader, s *Stats, want sample.Set) error {
	if g.v2 {
		b, err := r.read(g.blkio, "io.stat")
		if err != nil {
			return err
		}
		if s.IO, err = parseIOStat(b, s.IO); err != nil {
			return r.pathError("parse", err)
		}
	} else {
		// Counted for every scheduler; blkio.bfq.* only for bfq.
		for _, f := range [...]struct {
			name string
			pick func(*sample.DeviceIO, blkioOp) *uint64
		}{{"blkio.throttle.io_service_bytes_recursive", blkioBytes}, {"blkio.throttle.io_serviced_recursive", blkioCount}} {
			b, err := r.read(g.blkio, f.name)
			if err != nil {
				return err
			}
			if s.IO, err = parseBlkio(b, s.IO, f.pick); err != nil {
				return r.pathError("parse", err)
			}
		}
	}
	slices.SortFunc(s.IO, func(a, b sample.DeviceIO) int {
		if a.Major != b.Major {
			return int(int64(a.Major) - int64(b.Major))
		}
		return int(int64(a.Minor) - int64(b.Minor))
	})
	return nil
}

// errAbsent is a part that this host does not have.
var errAbsent error = unix.ENOENT

func (g Group) readHugetlb(r *reader, s *Stats, want sample.Set) error {
	if g.hugetlb == "" {
		return errAbsent
	}
	for _, size := range g.pages {
		h := sample.HugePages{Size: size}
		prefix := "hugetlb." + size + "."
		var err error
		if g.v2 {
			if err = r.value(g.hugetlb, prefix+"current", &h.Usage); err == nil {
				err = r.keyed(g.hugetlb, prefix+"events", field{"max", &h.FailCount})
			}
		} else {
			err = r.value(g.hugetlb, prefix+"usage_in_bytes", &h.Usage)
			err = errors.Join(err, r.value(g.hugetlb, prefix+"max_usage_in_bytes", &h.MaxUsage))
			err = errors.Join(err, r.value(g.hugetlb, prefix+"failcnt", &h.FailCount))
		}
		if err != nil {
			return err
		}
		s.Hugetlb = append(s.Hugetlb, h)
	}
	return nil
}

func (g Group) readPSI(r *reader, s *Stats, want sample.Set) error {
	if g.unified == "" {
		return errAbsent
	}
	for _, f := range [...]struct {
		name string
		to   *sample.Pressure
	}{{"cpu.pressure", &s.PSI.CPU}, {"memory.pressure", &s.PSI.Memory}, {"io.pressure", &s.PSI.IO}} {
		b, err := r.read(g.unified, f.name)
		if err != nil {
			return err
		}
		if err := parsePSI(b, f.to); err != nil {
			return r.pathError("parse", err)
		}
	}
	return nil
}

// Pids appends the processes of the group and of those below it to pids.
//
// Errors: NotFound if the group is gone.
func (g Group) Pids(pids []int) ([]int, error) {
	err := g.processes(func(b []byte) error {
		for line, rest := nextLine(b); line != nil; line, rest = nextLine(rest) {
			pid, err := parseUint(line)
			if err != nil {
				return err
			}
			pids = append(pids, int(pid))
		}
		return nil
	})
	return pids, err
}

// Processes counts the processes of the group and of those below it.
//
// Errors: NotFound if the group is gone.
func (g Group) Processes() (uint64, error) {
	n := 0
	err := g.processes(func(b []byte) error {
		n += bytes.Count(b, []byte{'\n'})
		return nil
	})
	return uint64(n), err
}

// processes hands each process list of the group's tree to visit.
func (g Group) processes(visit func([]byte) error) error {
	dir := firstOf(g.pids, g.memory, g.cpuacct, g.unified)
	if dir == "" {
		return fmt.Errorf("list processes of cgroup: none is known: %w", errdefs.ErrNotFound)
	}
	r := readers.Get().(*reader)
	defer readers.Put(r)
	err := r.procs(dir, visit)
	if gone(err) {
		err = errdefs.ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("list processes of cgroup %s: %w", dir, err)
	}
	return nil
}

// procs visits the process list of dir and of those below.
func (r *reader) procs(dir string, visit func([]byte) error) error {
	b, err := r.read(dir, "cgroup.procs")
	if errors.Is(err, unix.EOPNOTSUPP) {
		b, err = nil, nil // a threaded group (v2): its processes count above
	}
	if err == nil {
		err = visit(b)
	}
	var st unix.Stat_t
	if err != nil || unix.Stat(dir, &st) != nil || st.Nlink <= 2 {
		return err
	}
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if err := r.procs(join(dir, e.Name()), visit); err != nil && !gone(err) {
			return err
		}
	}
	return err
}

// OOMKills counts the processes of the group that the OOM killer took; v1 does
// not count those of groups below it.
//
// Errors: NotFound if the group is gone or memory is not accounted.
func (g Group) OOMKills() (uint64, error) {
	r := readers.Get().(*reader)
	defer readers.Put(r)
	name := "memory.oom_control"
	if g.v2 {
		name = "memory.events"
	}
	var n uint64
	err := r.keyed(g.memory, name, field{"oom_kill", &n})
	if gone(err) || g.memory == "" {
		err = errdefs.ErrNotFound
	}
	if err != nil {
		return 0, fmt.Errorf("read OOM kills of cgroup %s: %w", g.memory, err)
	}
	return n, nil
}

// empty tells on v2 that no process is in the group or below.
func (g Group) empty() bool {
	if !g.v2 {
		return false
	}
	r := readers.Get().(*reader)
	defer readers.Put(r)
	var populated uint64
	err := r.keyed(g.memory, "cgroup.events", field{"populated", &populated})
	return err == nil && populated == 0
}
