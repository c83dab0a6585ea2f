package cgroups

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Mode is the arrangement of the host's hierarchies.
type Mode int

// The arrangements. Hybrid is V1 with a v2 hierarchy without controllers
// beside it; systemd used to do so, and it gives us pressure information.
const (
	Unknown Mode = iota
	V1
	Hybrid
	V2
)

func (m Mode) String() string {
	return [...]string{"unknown", "v1", "hybrid", "v2"}[m]
}

// Driver says who makes groups: we with mkdir, or systemd at our request.
type Driver string

// The drivers, named as kubelet names them.
const (
	CgroupFS Driver = "cgroupfs"
	Systemd  Driver = "systemd"
)

// Unified is the key of the v2 hierarchy in Host.Mounts.
const Unified = ""

// Host describes the control groups of this machine. The zero value is
// unknown; Detect fills it.
type Host struct {
	Mode Mode
	// Mounts maps a v1 controller (or "name=systemd") to its mount point, and
	// Unified to that of the v2 hierarchy. On v2 it has that one entry.
	Mounts map[string]string
	// Controllers that can limit or count something, sorted.
	Controllers []string
	// SystemdRunning: the machine was booted with systemd, so its driver works.
	SystemdRunning bool
}

// Detect reads the mount table of this process.
//
// Errors: NotFound if no hierarchy is mounted.
func Detect() (Host, error) {
	return detect("/proc/self/mountinfo", "/run/systemd/system")
}

func detect(mountinfo, systemdDir string) (Host, error) {
	f, err := os.Open(mountinfo)
	if err != nil {
		return Host{}, fmt.Errorf("detect cgroups: %w", err)
	}
	defer f.Close()
	h, err := parseMounts(f)
	if err != nil {
		return Host{}, fmt.Errorf("detect cgroups in %s: %w", mountinfo, err)
	}
	if h.Mode == V2 {
		data, err := os.ReadFile(path.Join(h.Mounts[Unified], "cgroup.controllers"))
		if err != nil {
			return Host{}, fmt.Errorf("detect cgroup controllers: %w", err)
		}
		h.Controllers = strings.Fields(string(data))
		slices.Sort(h.Controllers)
	}
	// sd_booted(3): the directory itself, not a symlink.
	fi, err := os.Lstat(systemdDir)
	h.SystemdRunning = err == nil && fi.IsDir()
	return h, nil
}

// parseMounts finds the hierarchies in a mountinfo table (proc(5)). The first
// mount of a controller wins, as for libcontainer.
func parseMounts(r io.Reader) (Host, error) {
	h := Host{Mounts: map[string]string{}}
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		left, right, ok := strings.Cut(s.Text(), " - ")
		fields, tail := strings.Fields(left), strings.Fields(right)
		if !ok || len(fields) < 6 || len(tail) < 3 {
			continue
		}
		switch point := unescapeMount(fields[4]); tail[0] {
		case "cgroup2":
			addMount(h.Mounts, Unified, point)
		case "cgroup":
			for _, opt := range strings.Split(tail[2], ",") {
				if strings.HasPrefix(opt, "name=") || isV1Controller(opt) {
					addMount(h.Mounts, opt, point)
				}
			}
		}
	}
	if err := s.Err(); err != nil {
		return Host{}, err
	}
	_, unified := h.Mounts[Unified]
	legacy := h.Mounts["memory"] != "" || h.Mounts["cpu"] != "" || h.Mounts["pids"] != ""
	switch {
	case unified && !legacy:
		// A stray v1 mount (net_cls for some VPN) does not make a host hybrid.
		return Host{Mode: V2, Mounts: map[string]string{Unified: h.Mounts[Unified]}}, nil
	case !legacy:
		return Host{}, errNoHierarchy
	case unified:
		h.Mode = Hybrid
	default:
		h.Mode = V1
	}
	for c := range maps.Keys(h.Mounts) {
		if c != Unified && !strings.HasPrefix(c, "name=") {
			h.Controllers = append(h.Controllers, c)
		}
	}
	slices.Sort(h.Controllers)
	return h, nil
}

func addMount(m map[string]string, key, point string) {
	if _, ok := m[key]; !ok {
		m[key] = point
	}
}

func isV1Controller(opt string) bool {
	switch opt {
	case "cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids",
		"hugetlb", "net_cls", "net_prio", "perf_event", "rdma", "misc":
		return true
	}
	return false
}

// unescapeMount undoes the octal escapes of mountinfo ("\040" for a space).
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// PreferredDriver is systemd where it runs: two managers of one tree would
// undo each other's work.
func (h Host) PreferredDriver() Driver {
	if h.SystemdRunning {
		return Systemd
	}
	return CgroupFS
}

// Has reports whether a controller can be used.
func (h Host) Has(controller string) bool {
	return slices.Contains(h.Controllers, controller)
}

// hierarchies lists the distinct mount points, sorted: controllers mounted
// together ("cpu,cpuacct") share one.
func (h Host) hierarchies() []string {
	return slices.Compact(slices.Sorted(maps.Values(h.Mounts)))
}

// mkdir makes one group and marks it as owner's. made is false if it was there.
func mkdir(dir, owner string) (made bool, err error) {
	switch err := unix.Mkdir(dir, 0o755); {
	case errors.Is(err, unix.EEXIST):
		return false, nil
	case err != nil:
		return false, &os.PathError{Op: "mkdir", Path: dir, Err: err}
	}
	if err := mark(dir, owner); err != nil {
		_ = unix.Rmdir(dir)
		return false, err
	}
	return true, nil
}

// The mark's name, and its version; the owner's name follows: daemons side by
// side must not take each other's groups for their own.
const (
	markName    = "trusted.nodeagent"
	markVersion = "1 "
)

func mark(dir, owner string) error {
	if err := unix.Setxattr(dir, markName, []byte(markVersion+owner), 0); err != nil {
		return &os.PathError{Op: "setxattr " + markName, Path: dir, Err: err}
	}
	return nil
}

// marked reports whether owner made the group; false if it does not exist.
func marked(dir, owner string) (bool, error) {
	var b [256]byte
	switch n, err := unix.Getxattr(dir, markName, b[:]); {
	case err == nil:
		name, ok := strings.CutPrefix(string(b[:n]), markVersion)
		if !ok {
			return false, fmt.Errorf("cgroup %s: unknown mark %q, leaving it alone", dir, b[:n])
		}
		return name == owner, nil
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return false, nil
	default:
		return false, &os.PathError{Op: "getxattr " + markName, Path: dir, Err: err}
	}
}
