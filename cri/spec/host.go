package spec

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	selinux "github.com/opencontainers/selinux/go-selinux"
	"golang.org/x/sys/unix"
)

// HostInfo is what this host and this daemon can do. The zero value can do
// nothing beyond an ordinary container on cgroup v1.
type HostInfo struct {
	Hostname string
	// Capabilities that the daemon holds itself, in kernel order: all that a
	// container can get. Names with CAP_.
	Capabilities []string

	AppArmor        bool
	AppArmorDefault string // name of the loaded default profile, "" for none
	SELinux         bool
	Seccomp         bool

	RecursiveReadOnly bool // mount_setattr(AT_RECURSIVE), kernel 5.12
	IDMappedMounts    bool // kernel 5.12

	CgroupUnified      bool     // pure cgroup v2
	CgroupMountOptions []string // of the host's cgroup2 that a mount must repeat
	SwapLimit          bool     // swap can be limited
	Hugetlb            bool     // the hugetlb controller is there

	// OOMScoreFloor is the lowest oom_score_adj that a container can get:
	// -1000 with CAP_SYS_RESOURCE, else the daemon's own.
	OOMScoreFloor int
}

func (h HostInfo) oomScore(want int) int { return max(want, h.OOMScoreFloor) }

// Detect reads what this host can do. AppArmorDefault is left empty, see
// [LoadAppArmor].
//
// Errors: what cannot be read of /proc/self; a missing feature is no error.
func Detect() (HostInfo, error) {
	var h HostInfo
	var err error
	if h.Hostname, err = os.Hostname(); err != nil {
		return h, fmt.Errorf("read host name: %w", err)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return h, fmt.Errorf("read capabilities: %w", err)
	}
	if h.Capabilities, err = parseCapabilities(status); err != nil {
		return h, err
	}
	if h.OOMScoreFloor, err = oomFloor(h.Capabilities); err != nil {
		return h, err
	}
	h.Seccomp = bytes.Contains(status, []byte("\nSeccomp:"))
	h.SELinux = selinux.GetEnabled()
	h.AppArmor = appArmorEnabled("/sys/module/apparmor/parameters/enabled", "/sys/kernel/security/apparmor/profiles")
	h.RecursiveReadOnly = hasMountSetattr()
	h.IDMappedMounts = h.RecursiveReadOnly
	detectCgroups(&h, "/sys/fs/cgroup")
	return h, nil
}

// parseCapabilities returns the effective set within the bounding set: what a
// child can be given.
func parseCapabilities(status []byte) ([]string, error) {
	sets := map[string]uint64{"CapEff": 0, "CapBnd": 0}
	for line := range bytes.Lines(status) {
		k, v, _ := strings.Cut(string(line), ":")
		if _, ok := sets[k]; !ok {
			continue
		}
		n, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
		if err != nil {
			return nil, fmt.Errorf("parse %s of /proc/self/status: %w", k, err)
		}
		sets[k] = n
	}
	var out []string
	for bit, name := range capabilityNames() {
		if sets["CapEff"]&sets["CapBnd"]&(1<<bit) != 0 {
			out = append(out, name)
		}
	}
	return out, nil
}

// oomFloor: without CAP_SYS_RESOURCE a process cannot go below the score that
// it was started with (fs/proc/base.c, __set_oom_adj).
func oomFloor(caps []string) (int, error) {
	if len(union(nil, caps)) != len(union(caps, []string{"CAP_SYS_RESOURCE"})) {
		data, err := os.ReadFile("/proc/self/oom_score_adj")
		if err != nil {
			return 0, fmt.Errorf("read own OOM score: %w", err)
		}
		return strconv.Atoi(strings.TrimSpace(string(data)))
	}
	return -1000, nil
}

func appArmorEnabled(module, profiles string) bool {
	data, err := os.ReadFile(module)
	if err != nil || !bytes.HasPrefix(data, []byte("Y")) {
		return false
	}
	_, err = os.Stat(profiles)
	return err == nil
}

// hasMountSetattr: the kernel knows the call when it complains about the
// descriptor and not about the number.
func hasMountSetattr() bool {
	err := unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{})
	return !errors.Is(err, unix.ENOSYS)
}

func detectCgroups(h *HostInfo, root string) {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err == nil {
		h.CgroupUnified = st.Type == unix.CGROUP2_SUPER_MAGIC
	}
	exists := func(elem ...string) bool {
		_, err := os.Stat(filepath.Join(append([]string{root}, elem...)...))
		return err == nil
	}
	if !h.CgroupUnified {
		h.SwapLimit = exists("memory", "memory.memsw.limit_in_bytes")
		h.Hugetlb = exists("hugetlb")
		return
	}
	h.SwapLimit = exists(ownCgroup(), "memory.swap.max")
	controllers, _ := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	h.Hugetlb = bytes.Contains(controllers, []byte("hugetlb"))
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	h.CgroupMountOptions = cgroupOptions(mounts, root)
}

// ownCgroup is our path in the unified tree: memory.swap.max is not in its root.
func ownCgroup() string {
	data, _ := os.ReadFile("/proc/self/cgroup")
	for line := range bytes.Lines(data) {
		if p, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "0::"); ok {
			return p
		}
	}
	return ""
}

// cgroupOptions picks the superblock options that mounting cgroup2 again would
// otherwise reset for the whole host.
func cgroupOptions(mountinfo []byte, root string) (out []string) {
	for line := range bytes.Lines(mountinfo) {
		f := strings.Fields(string(line))
		if len(f) < 10 || f[4] != root {
			continue
		}
		out = nil
		for o := range strings.SplitSeq(f[len(f)-1], ",") {
			if o == "nsdelegate" || o == "memory_recursiveprot" {
				out = append(out, o)
			}
		}
	}
	return out
}
