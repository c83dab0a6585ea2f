package cgroups

import (
	"bufio"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
)

// expecting lets one ExpectProcess run at a time.
type expecting struct{ busy atomic.Bool }

// ExpectProcess tells the kernel that a process will be put into a group in
// the next milliseconds. It returns at once and changes nothing.
//
// The first write to any cgroup.procs file after a pause waits for an RCU grace
// period, 1 to 15 ms, while the kernel turns the reader side of
// cgroup_threadgroup_rwsem from per-CPU counters to a lock; writes within the
// next grace period do not wait (kernel/rcu/sync.c; v5.5 to v6.18 measured,
// hierarchies mounted with favordynmods excepted). So this writes our own
// process into the group it is in, in the background, and the wait passes while
// the start of a pod is busy with other things.
func (m *Manager) ExpectProcess() {
	if !m.expecting.busy.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer m.expecting.busy.Store(false)
		if file := m.ownProcs(); file != "" {
			// "0" is the writer itself (cgroup-v2.rst, cgroup.procs). Nobody
			// depends on the outcome.
			_ = os.WriteFile(file, []byte("0"), 0)
		}
	}()
}

// ownProcs is the cgroup.procs file of the group that this process is in, in
// any one hierarchy; "" if none is in sight.
func (m *Manager) ownProcs() string {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return ""
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		// hierarchy-ID:controller-list:cgroup-path, the list empty for v2.
		f := strings.SplitN(s.Text(), ":", 3)
		if len(f) != 3 || strings.HasPrefix(f[2], "/..") {
			continue
		}
		name, _, _ := strings.Cut(f[1], ",")
		if name == "" {
			name = Unified
		}
		if mount := m.host.Mounts[name]; mount != "" {
			return filepath.Join(mount, f[2], "cgroup.procs")
		}
	}
	return ""
}
