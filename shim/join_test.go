//go:build linux

package shim_test

import (
	encodingbinary "encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/nodeagent/nodeagent/shim"
)

// seeAll prints all that a process can see of how it was started.
const seeAll = `
grep -E '^(Umask|Uid|Gid|Groups|NoNewPrivs|Seccomp|Cap|Sig[BIC]|Cpus_allowed)' /proc/$$/status
pwd; umask; ulimit -a; ulimit -Ha; export -p
cd /proc/$$; /bin/busybox stat -c '%N %A %u %g' exe ns/cgroup ns/ipc ns/mnt ns/net ns/pid ns/user ns/uts fd/*
cat cgroup oom_score_adj timerslack_ns loginuid personality cmdline
/bin/busybox awk -v pid=$$ '
	FILENAME == "stat" { print "leader", $5 == pid, $6 == pid, "tty", $7, "nice", $19, "priority", $18, "policy", $41 }
	$8 == "keyring" && /KEYRING/ { print $2, $5, $6, $7, $9, $10 }' stat /proc/keys
read line; echo $line; echo problem >&2; exit 7`

// joinContainers are containers that differ in what an exec has to do.
func (n *node) joinContainers() map[string]func(*shim.Spec) {
	var all []string
	for _, word := range strings.Fields(allCaps) {
		all = append(all, "CAP_"+word)
	}
	keep := func(s *shim.Spec, types ...specs.LinuxNamespaceType) {
		var left []specs.LinuxNamespace
		for _, ns := range s.OCI.Linux.Namespaces {
			for _, t := range types {
				if ns.Type == t {
					left = append(left, ns)
				}
			}
		}
		s.OCI.Linux.Namespaces = left
	}
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
	return map[string]func(*shim.Spec){
		"plain": func(*shim.Spec) {},
		"seccomp": func(s *shim.Spec) {
			s.OCI.Linux.Seccomp = seccomp.DefaultProfile(s.OCI)
		},
		"seccomp with a flag": func(s *shim.Spec) {
			s.OCI.Linux.Seccomp = seccomp.DefaultProfile(s.OCI)
			s.OCI.Linux.Seccomp.Flags = []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog}
		},
		"host PID": func(s *shim.Spec) {
			keep(s, specs.MountNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.NetworkNamespace)
		},
		"privileged": func(s *shim.Spec) {
			keep(s, specs.MountNamespace, specs.UTSNamespace)
			s.OCI.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all, Inheritable: all}
			s.OCI.Process.NoNewPrivileges = false
		},
		"user namespace": func(s *shim.Spec) {
			s.OCI.Linux.Namespaces = append(s.OCI.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace}, specs.LinuxNamespace{Type: specs.CgroupNamespace})
			s.OCI.Linux.UIDMappings, s.OCI.Linux.GIDMappings = ids, ids
			s.OCI.Linux.Seccomp = seccomp.DefaultProfile(s.OCI)
		},
		"umask, oom score": func(s *shim.Spec) {
			mask, score := uint32(0o077), 345
			s.OCI.Process.User.Umask, s.OCI.Process.OOMScoreAdj = &mask, &score
		},
	}
}

const allCaps = `CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT
SYS_NICE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM
BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE`

// joinEverywhere are those of joinProcesses that each container sees; the
// others say how to find and name the program, whatever the container.
const joinEverywhere = "root|user|user with caps|privileges|user, sets uid|no caps|container caps|rlimits|no directory|other's one|" +
	"unmapped user|unmapped group|no program|not in PATH|no interpreter|killed"

// joinProcesses are processes that differ in what is done to them, or why they
// cannot run.
func (n *node) joinProcesses() map[string]func(*specs.Process) {
	show := func(p *specs.Process, args ...string) { p.Args = args }
	caps := func(names ...string) *specs.LinuxCapabilities {
		return &specs.LinuxCapabilities{Bounding: names, Effective: names, Permitted: names, Inheritable: names, Ambient: names}
	}
	return map[string]func(*specs.Process){
		"root": func(*specs.Process) {},
		"user": func(p *specs.Process) { p.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{7, 4000}} },
		"user with caps": func(p *specs.Process) {
			p.User.UID = 1000
			p.Capabilities = caps("CAP_KILL", "CAP_NET_RAW", "CAP_NONE")
		},
		"privileges":     func(p *specs.Process) { p.NoNewPrivileges = false },
		"user, sets uid": func(p *specs.Process) { p.NoNewPrivileges = false; p.User.UID = 1000 },
		"no caps":        func(p *specs.Process) { p.Capabilities = &specs.LinuxCapabilities{} },
		"container caps": func(p *specs.Process) { p.Capabilities = nil },
		"rlimits": func(p *specs.Process) {
			p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 77, Hard: 99}, {Type: "RLIMIT_CORE"}}
		},
		"directory":    func(p *specs.Process) { p.Cwd = "/etc" },
		"no directory": func(p *specs.Process) { p.Cwd = "/none" },
		"file as one":  func(p *specs.Process) { p.Cwd = "/etc/passwd" },
		"user's one":   func(p *specs.Process) { p.Cwd = "/private"; p.User.UID, p.User.GID = 1000, 1000; p.Capabilities = nil },
		"other's one": func(p *specs.Process) {
			p.Cwd = "/private"
			p.User.UID, p.User.GID = 1002, 1002
			p.Capabilities = caps()
		},
		"environment": func(p *specs.Process) {
			p.Env = []string{"A=1", "PATH=/none:/bin", "A=2", "HOME=", "B=", "GOMAXPROCS=9"}
		},
		"own home":        func(p *specs.Process) { p.Env = append(p.Env, "HOME=/x y") },
		"home of 1002":    func(p *specs.Process) { p.User.UID = 1002 },
		"home of 1003":    func(p *specs.Process) { p.User.UID = 1003 },
		"home of 1004":    func(p *specs.Process) { p.User.UID = 1004 },
		"bad variable":    func(p *specs.Process) { p.Env = append(p.Env, "nothing") },
		"nameless":        func(p *specs.Process) { p.Env = append(p.Env, "=x") },
		"unmapped user":   func(p *specs.Process) { p.User.UID = 70000 },
		"unmapped group":  func(p *specs.Process) { p.User.GID = 70000 },
		"no program":      func(p *specs.Process) { show(p, "/no/such") },
		"not in PATH":     func(p *specs.Process) { show(p, "nothing") },
		"no PATH":         func(p *specs.Process) { show(p, "sh"); p.Env = nil },
		"empty name":      func(p *specs.Process) { show(p, "") },
		"dots":            func(p *specs.Process) { show(p, "..") },
		"dir as program":  func(p *specs.Process) { show(p, "/etc") },
		"not executable":  func(p *specs.Process) { show(p, "/etc/passwd") },
		"in no directory": func(p *specs.Process) { show(p, "/etc/passwd/x") },
		"not for user": func(p *specs.Process) {
			show(p, "/bin/rootonly")
			p.User.UID, p.User.GID = 1000, 1000
			p.Capabilities = nil
		},
		"bad format":     func(p *specs.Process) { show(p, "/bin/garbage") },
		"no interpreter": func(p *specs.Process) { show(p, "/bin/orphan") },
		"here":           func(p *specs.Process) { show(p, "busybox", "true"); p.Cwd, p.Env = "/bin", []string{"PATH=.:/bin"} },
		"relative":       func(p *specs.Process) { show(p, "./busybox", "echo", "x"); p.Cwd = "/bin" },
		"killed":         func(p *specs.Process) { show(p, "sh", "-c", "kill -TERM $$") },
		"long": func(p *specs.Process) {
			show(p, "sh", "-c", "echo $#", strings.Repeat("x", 100000), strings.Repeat("y", 100000))
		},
		"too long": func(p *specs.Process) { show(p, "echo", strings.Repeat("x", 200000)) },
	}
}

func (n *node) joinFiles() {
	for name, f := range map[string]struct {
		text string
		mode os.FileMode
	}{
		"etc/passwd": {"\n  # none\nroot:x:0:0:root:/root:/bin/sh\na:x:1000:1000::/home/a:\nshort:x:1002\nb:x:1003:1:b:  /home/b \t\r\nb2:x:1003:1:b:/other:\n" +
			strings.Repeat("f:x:9999:9:long line "+strings.Repeat("z", 900)+":/f:/bin/sh\n", 9) + "c:x:+1004:1::/home/" + strings.Repeat("c", 3000) + ":/bin/sh", 0o644},
		"bin/garbage":  {"\x00\x01\x02 no program", 0o755},
		"bin/orphan":   {"#!/no/interpreter\n", 0o755},
		"bin/rootonly": {"#!/bin/sh\necho no", 0o700},
	} {
		if err := os.WriteFile(filepath.Join(n.rootfs, name), []byte(f.text), f.mode); err != nil {
			n.t.Fatal(err)
		}
	}
	private := filepath.Join(n.rootfs, "private")
	if err := os.Mkdir(private, 0o700); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Chown(private, 1000, 1000); err != nil {
		n.t.Fatal(err)
	}
	// A container's root in a user namespace has to get here.
	for dir := n.dir; len(dir) > len(os.TempDir()); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			n.t.Fatal(err)
		}
	}
}

var (
	execGroupName = regexp.MustCompile(`/exec-\d+`)
	pipeName      = regexp.MustCompile(`(pipe|socket):\[\d+\]`)
)

// outcome is what a client sees of an exec with all three streams.
func (n *node) outcome(id string, p *specs.Process) string {
	n.t.Helper()
	in, inT := pipe(n.t, true)
	out, outT := pipe(n.t, false)
	errs, errT := pipe(n.t, false)
	s, err := n.client.Exec(n.ctx(), id, shim.StreamOptions{Process: p, Stdin: inT, Stdout: outT, Stderr: errT})
	if err != nil {
		return "error: " + err.Error()
	}
	_, _ = io.WriteString(in, "input\n")
	in.Close()
	text, _ := io.ReadAll(out)
	problem, _ := io.ReadAll(errs)
	code, err := s.Wait(n.ctx())
	_ = s.Close()
	all := fmt.Sprintf("code %d, %v\n%s--\n%s", code, err, text, problem)
	lines := strings.Split(pipeName.ReplaceAllString(execGroupName.ReplaceAllString(all, "/exec"), "$1"), "\n")
	// Keys come in the order of random numbers, and those of processes that
	// have ended stay for a while.
	slices.Sort(lines)
	return strings.Join(slices.Compact(lines), "\n")
}

// difference shows the lines that only one of them has.
func difference(joined, old string) string {
	only := func(in, out string) string {
		have := strings.Split(out, "\n")
		return strings.Join(slices.DeleteFunc(strings.Split(in, "\n"), func(l string) bool { return slices.Contains(have, l) }), "\n")
	}
	return "joined only:\n" + only(joined, old) + "\nby libcontainer only:\n" + only(old, joined)
}

// awaitFilters waits until the shim has so many seccomp programs in its table.
func (n *node) awaitFilters(want int) {
	n.t.Helper()
	eventually(n.t, time.Minute, func() string {
		const head = 32
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/fd/200", n.find("serve")[0]))
		if err != nil || len(b) < head {
			return fmt.Sprintf("table of %d bytes, %v", len(b), err)
		}
		have := 0
		for b = b[head:]; len(b) > 8; have++ {
			b = b[8+encodingbinary.NativeEndian.Uint32(b)+encodingbinary.NativeEndian.Uint32(b[4:]):]
		}
		if have < want {
			return fmt.Sprintf("%d programs, want %d", have, want)
		}
		return ""
	})
}

// An exec is the same whether libcontainer starts it or package join, and join
// does start it. The scheduler that every process has anyway, but named, is
// among what only libcontainer does.
func TestJoinIsLibcontainer(t *testing.T) {
	n := newNode(t)
	n.joinFiles()
	everywhere := joinEverywhere
	if testing.Short() {
		everywhere = "root|user with caps|privileges|no program"
	}
	profiles := map[string]bool{}
	for name, change := range n.joinContainers() {
		spec := n.spec(strings.NewReplacer(" ", "-", ",", "").Replace(name), "sleep", "1000")
		change(&spec)
		n.start(spec)
		if p := spec.OCI.Linux.Seccomp; p != nil {
			text, _ := json.Marshal(p)
			profiles[string(text)] = true
			n.awaitFilters(len(profiles))
		}
		for what, change := range n.joinProcesses() {
			if name != "plain" && !slices.Contains(strings.Split(everywhere, "|"), what) {
				continue
			}
			p := n.process("sh", "-c", strings.Replace(seeAll, "KEYRING", "_ses."+spec.ID+":", 1))
			change(p)
			joined := n.outcome(spec.ID, p)
			p.Scheduler = &specs.Scheduler{Policy: specs.SchedOther}
			if old := n.outcome(spec.ID, p); joined != old {
				t.Errorf("%s, %s: %s", name, what, difference(joined, old))
			}
		}
		n.wantProcesses(spec.ID, 1)
		n.wantNoExecGroups(spec.ID)
	}
	if log := n.log(); strings.Contains(log, "exec goes by way of libcontainer") {
		t.Errorf("not joined:\n%s", log)
	}
}

// A shim that dies while a process joins takes it along: held up in a frozen
// container it has not become anything yet.
func TestKillShimWhileJoining(t *testing.T) {
	n := newNode(t)
	st := n.start(n.spec("c", "sleep", "1000"))
	group, ok := st.CgroupPaths["freezer"]
	if !ok {
		t.Skip("needs the freezer of cgroup v1")
	}
	set := func(state string) {
		if err := os.WriteFile(filepath.Join(group, "freezer.state"), []byte(state), 0); err != nil {
			t.Fatal(err)
		}
	}
	set("FROZEN")
	done := make(chan error)
	go func() {
		_, err := n.client.ExecSync(n.ctx(), "c", shim.ExecOptions{Process: n.process("sleep", "1001")})
		done <- err
	}()
	eventually(t, time.Minute, func() string {
		if procs, _ := filepath.Glob(group + "/exec-*/cgroup.procs"); len(procs) == 1 {
			if b, _ := os.ReadFile(procs[0]); len(b) > 0 {
				return ""
			}
		}
		return "no process joins"
	})
	n.killShim()
	if err := <-done; err == nil {
		t.Error("the exec succeeded")
	}
	set("THAWED")
	eventually(t, time.Minute, func() string {
		b, _ := os.ReadFile(filepath.Join(group, "cgroup.procs"))
		left, _ := filepath.Glob(group + "/exec-*/cgroup.procs")
		for _, f := range left {
			more, _ := os.ReadFile(f)
			b = append(b, more...)
		}
		if all := strings.Fields(string(b)); len(all) != 1 {
			return fmt.Sprintf("processes %q", all)
		}
		return ""
	})
	if r, err := n.client.ExecSync(n.ctx(), "c", shim.ExecOptions{Process: n.process("true")}); err != nil || r.Code != 0 {
		t.Errorf("exec under the next shim: %+v, %v", r, err)
	}
}
