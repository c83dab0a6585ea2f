package main

import (
	"encoding/hex"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

func environment() (any, error) {
	out := map[string]string{}
	for _, kv := range os.Environ() {
		k, v, _ := strings.Cut(kv, "=")
		out[k] = v
	}
	return out, nil
}

func identity() (any, error) {
	groups, err := os.Getgroups()
	wd, _ := os.Getwd()
	host, _ := os.Hostname()
	return map[string]any{"uid": os.Getuid(), "gid": os.Getgid(), "euid": os.Geteuid(), "egid": os.Getegid(),
		"groups": groups, "pid": os.Getpid(), "ppid": os.Getppid(), "cwd": wd, "hostname": host}, err
}

// status reads the fields of /proc/self/status.
func status() (map[string]string, error) {
	b, err := os.ReadFile("/proc/self/status")
	out := map[string]string{}
	for line := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(line, ":")
		out[k] = strings.TrimSpace(v)
	}
	return out, err
}

func capabilities() (any, error) {
	st, err := status()
	if err != nil {
		return nil, err
	}
	lsm, _ := os.ReadFile("/proc/self/attr/current")
	return map[string]any{"inheritable": st["CapInh"], "permitted": st["CapPrm"], "effective": st["CapEff"], "bounding": st["CapBnd"],
		"ambient": st["CapAmb"], "seccomp": st["Seccomp"], "noNewPrivs": st["NoNewPrivs"], "lsm": strings.TrimRight(string(lsm), "\n\x00")}, nil
}

func namespaces() (any, error) {
	entries, err := os.ReadDir("/proc/self/ns")
	out := map[string]string{}
	for _, e := range entries {
		if link, err := os.Readlink("/proc/self/ns/" + e.Name()); err == nil {
			out[e.Name()] = link
		}
	}
	return out, err
}

// mountEntry is a line of mountinfo.
type mountEntry struct {
	Root, Path, Options, Propagation, Type, Source, Super string
}

func mounts() (any, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	var out []mountEntry
	for line := range strings.Lines(string(b)) {
		left, right, ok := strings.Cut(strings.TrimSpace(line), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 6 || len(r) < 3 {
			return nil, fmt.Errorf("mountinfo line %q", line)
		}
		out = append(out, mountEntry{l[3], l[4], l[5], strings.Join(l[6:], ","), r[0], r[1], r[2]})
	}
	return out, err
}

func limits() (any, error) {
	rlimits := map[string]unix.Rlimit{}
	for name, id := range map[string]int{"nofile": unix.RLIMIT_NOFILE, "nproc": unix.RLIMIT_NPROC, "core": unix.RLIMIT_CORE,
		"memlock": unix.RLIMIT_MEMLOCK, "stack": unix.RLIMIT_STACK, "as": unix.RLIMIT_AS} {
		var l unix.Rlimit
		if err := unix.Getrlimit(id, &l); err != nil {
			return nil, err
		}
		rlimits[name] = l
	}
	oom, _ := os.ReadFile("/proc/self/oom_score_adj")
	cgroup, _ := os.ReadFile("/proc/self/cgroup")
	affinity := unix.CPUSet{}
	_ = unix.SchedGetaffinity(0, &affinity)
	return map[string]any{"rlimits": rlimits, "oomScoreAdj": strings.TrimSpace(string(oom)),
		"cgroup": strings.Split(strings.TrimSpace(string(cgroup)), "\n"), "cpus": affinity.Count()}, nil
}

func everything() (any, error) {
	out := map[string]any{}
	for name, collect := range map[string]func() (any, error){"env": environment, "id": identity, "caps": capabilities,
		"ns": namespaces, "mounts": mounts, "limits": limits} {
		v, err := collect()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out[name] = v
	}
	out["args"] = os.Args
	return out, nil
}

// fileInfo is what stat tells of a path; Error instead if it cannot.
type fileInfo struct {
	Path, Type, Mode, Link string
	UID, GID               uint32
	Size                   int64
	Major, Minor           uint32
	Xattrs                 map[string]string `json:",omitempty"` // hexadecimal
	Error                  string            `json:",omitempty"`
}

func stat(args []string) error {
	out := []fileInfo{}
	for _, path := range args {
		out = append(out, statOne(path))
	}
	return printJSON(out)
}

func statOne(path string) fileInfo {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fileInfo{Path: path, Error: err.Error()}
	}
	kinds := map[uint32]string{unix.S_IFDIR: "dir", unix.S_IFREG: "file", unix.S_IFLNK: "symlink", unix.S_IFCHR: "char",
		unix.S_IFBLK: "block", unix.S_IFIFO: "fifo", unix.S_IFSOCK: "socket"}
	fi := fileInfo{Path: path, Type: kinds[st.Mode&unix.S_IFMT], Mode: fmt.Sprintf("%04o", st.Mode&0o7777), UID: st.Uid, GID: st.Gid, Size: st.Size,
		Major: unix.Major(st.Rdev), Minor: unix.Minor(st.Rdev)}
	if fi.Type == "symlink" {
		fi.Link, _ = os.Readlink(path)
	}
	names := make([]byte, 4096)
	n, err := unix.Llistxattr(path, names)
	if err != nil || n == 0 {
		return fi
	}
	fi.Xattrs = map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		value := make([]byte, 4096)
		if size, err := unix.Lgetxattr(path, name, value); err == nil {
			fi.Xattrs[name] = hex.EncodeToString(value[:size])
		}
	}
	return fi
}
