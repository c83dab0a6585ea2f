package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// memory is the PSS of a runtime's own processes, in bytes.
type memory struct {
	PSS, RSS int64
	Daemon   int64 // PSS of the daemon alone
	Procs    int
}

// memory adds up the daemon, what descends from it and what names the
// runtime's directory, without processes in containers; pause counts.
func (r *runtime) memory() memory {
	parent, comm := map[int]int{}, map[int]string{}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		s := string(b)
		open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
		f := strings.Fields(s[end+1:])
		parent[pid], _ = strconv.Atoi(f[1])
		comm[pid] = s[open+1 : end]
	}
	roots := map[int]bool{r.pid(): true}
	if r.mark != "" {
		for _, pid := range node.ProcessesNaming(r.mark) {
			roots[pid] = true
		}
	}
	host, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", r.pid()))
	var m memory
	for pid := range parent {
		if !descends(pid, parent, roots) {
			continue
		}
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
		if err != nil || (ns != host && (comm[pid] != "pause" || !isSandbox(pid))) {
			continue
		}
		pss, rss := rollup(pid)
		m.PSS, m.RSS, m.Procs = m.PSS+pss, m.RSS+rss, m.Procs+1
		if pid == r.pid() {
			m.Daemon = pss
		}
	}
	return m
}

// isSandbox tells a pod's own pause process from a container that happens to
// run a program of that name: the harness gives its containers an argument.
func isSandbox(pid int) bool {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return !strings.Contains(string(b), workloadArg)
}

const workloadArg = "workload"

func descends(pid int, parent map[int]int, roots map[int]bool) bool {
	for range 64 {
		if roots[pid] {
			return true
		}
		p, ok := parent[pid]
		if !ok || p == 0 || p == pid {
			return false
		}
		pid = p
	}
	return false
}

func rollup(pid int) (pss, rss int64) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kb, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "Pss:":
			pss = kb << 10
		case "Rss:":
			rss = kb << 10
		}
	}
	return pss, rss
}

// cpu is processor time in seconds: of the runtime's cgroup tree, and of the
// whole machine without this process.
type cpu struct{ group, machine float64 }

func (a cpu) sub(b cpu) cpu { return cpu{a.group - b.group, a.machine - b.machine} }

func (r *runtime) cpu() cpu {
	var c cpu
	if r.cgroup != "" {
		c.group = groupCPU(r.cgroup)
	}
	c.machine = machineCPU() - selfCPU()
	if r.cgroup == "" {
		c.group = c.machine
	}
	return c
}

func groupCPU(rel string) float64 {
	for _, root := range node.CgroupRoots() {
		if b, err := os.ReadFile(filepath.Join(root, rel, "cpuacct.usage")); err == nil {
			ns, _ := strconv.ParseFloat(strings.TrimSpace(string(b)), 64)
			return ns / 1e9
		}
	}
	for _, root := range node.CgroupRoots() {
		b, err := os.ReadFile(filepath.Join(root, rel, "cpu.stat"))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			if us, ok := strings.CutPrefix(line, "usage_usec "); ok {
				v, _ := strconv.ParseFloat(strings.TrimSpace(us), 64)
				return v / 1e6
			}
		}
	}
	return 0
}

// machineCPU is all time that was not idle, from /proc/stat, in seconds.
func machineCPU() float64 {
	b, _ := os.ReadFile("/proc/stat")
	line, _, _ := strings.Cut(string(b), "\n")
	var sum float64
	for i, f := range strings.Fields(line)[1:9] {
		if i == 3 || i == 4 { // idle, iowait
			continue
		}
		v, _ := strconv.ParseFloat(f, 64)
		sum += v / 100
	}
	return sum
}

func selfCPU() float64 {
	var u unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &u)
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}
