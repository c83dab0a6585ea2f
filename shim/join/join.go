//go:build linux && cgo

// Package join puts a process into a running container without a Go program in
// the child. A Go program that does nothing costs several hundred page faults
// and 14 ms of CPU on a virtual machine without hardware page tables; this costs
// two forks and the start of a program of one page.
//
// That program (join.c) is sealed in memory, as the shim itself is: a container
// that gets hold of its own /proc/PID/exe (CVE-2019-5736) cannot change it, and
// finds neither data nor other code of the shim there. It does what
// libcontainer's nsexec.c, setns_init_linux.go and init_linux.go do (runc
// 1.5), in their order:
//
//	shim    born in the cgroup v2 group (clone3)           setnsProcess.startWithCgroupFD
//	first   closes what it was not given                   Container.start (CloseExecFrom)
//	        signal mask, timer slack                       -, shim/initmode
//	        oom_score_adj                                  nsexec, before it is not dumpable
//	        cgroup v1: itself into each tasks file         addIntoCgroupV1
//	        any CPU that the cpuset allows                 setFinalCPUAffinity
//	        not dumpable                                   nsexec
//	        setns by pidfd, all namespaces at once         nsexec join_namespaces
//	        root in the user namespace                     nsexec join_namespaces
//	        fork with the shim as parent (PID namespace)   nsexec stage 1 to 2
//	second  setsid, setuid 0, setgid 0                     nsexec stage 2
//	        session keyring, no_new_privs, umask           linuxSetnsInit.Init
//	        ready; the shim sets rlimits                   syncParentReady, setupRlimits
//	        seccomp, unless no_new_privs                   linuxSetnsInit.Init
//	        chdir, as root                                 finalizeNamespace
//	        HOME from /etc/passwd                          prepareEnv
//	        bounding set, keep capabilities                finalizeNamespace
//	        owner of stdio, groups, gid, uid               setupUser
//	        chdir, as the user; is it in the container     finalizeNamespace, verifyCwd
//	        capabilities, ambient ones                     finalizeNamespace
//	        the program in $PATH                           exec.LookPath
//	        seccomp, with no_new_privs                     linuxSetnsInit.Init
//	        execve, which closes the socket                linuxSetnsInit.Init
//
// Different on purpose: the container is named by a pidfd, so no other process
// can be meant; whoever enters the PID namespace has no descriptor but stdio and
// the socket; there is no third process. What cannot be done this way is not
// tried: shim/server decides that, and everything that fails before the second
// process exists is ErrNotJoined, so that libcontainer has its turn.
//
// A shim that dies takes the process with it as long as it waits to be ready,
// by the end of the socket. The number of the second process is written by the
// kernel into a page that only the first one and the shim have: it is known
// whoever is killed when, and nobody in the container can forge it.
//
// Called by shim/server. No goroutine, no lock. Linux 5.9; x86-64 and arm64.
package join

/*
#include "join.h"
const void *nodeagent_join_code(void);
unsigned long nodeagent_join_size(void);
unsigned long nodeagent_join_entry(void);
*/
import "C"

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"github.com/opencontainers/runc/libcontainer/exeseal"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim/tinyelf"
)

// ErrNotJoined says that the container could not be entered and nothing was
// done to it.
var ErrNotJoined = errors.New("container not joined")

// Container is where a process is to be.
type Container struct {
	Pidfd      *os.File // its first process
	Namespaces uint64   // CLONE_NEW*: those of the first process to join
	Tasks      []string // tasks files of cgroup v1
	Unified    string   // directory of cgroup v2, "" for none
	OOMScore   string   // oom_score_adj, "" to keep the shim's
}

// Process is what is to run there.
type Process struct {
	Args, Env    []string
	Cwd          string // "": the container's root
	UID, GID     uint32
	Groups       []uint32
	Umask        *uint32 // nil: the shim's
	Keyring      string  // name of a new session keyring, "": the shim's
	NoNewPrivs   bool
	Capabilities *Capabilities // nil: all of the shim's
	Rlimits      []Rlimit
	Filter       *Filter     // nil: none
	Stdio        [3]*os.File // all there
}

// Capabilities are sets of bits, 1<<CAP_*.
type Capabilities struct {
	Bounding, Effective, Permitted, Inheritable, Ambient uint64
	Last                                                 int // the highest that the kernel knows
}

// Rlimit is a limit of RLIMIT_*.
type Rlimit struct {
	Which      int
	Soft, Hard uint64
}

// Filter is a seccomp program and the flags of seccomp(2).
type Filter struct {
	Program []byte // of struct sock_filter
	Flags   uint64
}

// Joiner starts processes; it may be used from any goroutine.
type Joiner struct {
	program *os.File
}

// New makes the program.
func New() (*Joiner, error) {
	code := unsafe.Slice((*byte)(C.nodeagent_join_code()), int(C.nodeagent_join_size()))
	elf, err := tinyelf.Program(code, int(C.nodeagent_join_entry()))
	if err != nil {
		return nil, err
	}
	f, err := exeseal.CloneBinary(bytes.NewReader(elf), int64(len(elf)), "nodeagent-join", os.TempDir())
	if err != nil {
		return nil, fmt.Errorf("make program that joins containers: %w", err)
	}
	return &Joiner{f}, nil
}

// Start returns the number of the process, a child of this one, once it has
// become its program. On error there is none.
func (j *Joiner) Start(c *Container, p *Process) (int, error) {
	r, err := newRequest(c, p)
	if err != nil {
		return 0, err
	}
	file, err := r.file()
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrNotJoined, err)
	}
	defer file.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrNotJoined, os.NewSyscallError("socketpair", err))
	}
	first, err := j.fork(c, p, pair[1], int(file.Fd()))
	unix.Close(pair[1])
	if err != nil {
		unix.Close(pair[0])
		return 0, fmt.Errorf("%w: start: %w", ErrNotJoined, err)
	}
	a := attempt{p: p, candidates: r.candidates, socket: pair[0], file: file, first: first}
	err = a.follow()
	unix.Close(a.socket)
	if err != nil {
		a.reap()
		return 0, err
	}
	return a.second, nil
}

// fork starts the first process.
func (j *Joiner) fork(c *Container, p *Process, socket, request int) (int, error) {
	attr := &syscall.ProcAttr{Sys: &syscall.SysProcAttr{}}
	if c.Unified != "" {
		group, err := unix.Open(c.Unified, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return 0, &os.PathError{Op: "open", Path: c.Unified, Err: err}
		}
		defer unix.Close(group)
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, group
	}
	for _, f := range p.Stdio {
		fd, err := number(f)
		if err != nil {
			return 0, err
		}
		attr.Files = append(attr.Files, fd)
	}
	program, err := number(j.program)
	if err != nil {
		return 0, err
	}
	pidfd, err := c.Pidfd.SyscallConn()
	if err != nil {
		return 0, err
	}
	pid := 0
	cerr := pidfd.Control(func(fd uintptr) { // a delete may close it meanwhile
		attr.Files = append(attr.Files, uintptr(socket), uintptr(request), fd) // JOIN_SOCKET, JOIN_FILE, JOIN_PIDFD
		// By way of this process, whose descriptors nobody renumbers meanwhile
		// (golang.org/issue/61751).
		pid, err = syscall.ForkExec(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), program), []string{"nodeagent-join"}, attr)
	})
	runtime.KeepAlive(p)
	return pid, errors.Join(cerr, err)
}

// number is f's descriptor; unlike f.Fd it does not change its mode.
func number(f *os.File) (fd uintptr, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	err = raw.Control(func(n uintptr) { fd = n })
	return fd, err
}

// attempt is a start under way.
type attempt struct {
	p             *Process
	candidates    []string // where the program may be
	socket        int
	file          *os.File
	first, second int // 0: none, or reaped
}

// follow hears what the processes say until the program runs.
func (a *attempt) follow() error {
	for ready := false; ; {
		var m C.struct_join_message
		n, err := read(a.socket, unsafe.Slice((*byte)(unsafe.Pointer(&m)), int(unsafe.Sizeof(m))))
		switch {
		case err != nil:
			return os.NewSyscallError("read", err)
		case n == 0 && ready:
			return nil // execve has closed it
		case n == 0:
			return errors.New("the process was killed before it became the program")
		case n != int(unsafe.Sizeof(m)):
			return fmt.Errorf("a message of %d bytes", n)
		case m.step == C.JOIN_READY:
			ready = true
			err = a.release()
		case m.step == C.JOIN_EXECVE:
			// As with libcontainer, whose init has closed all else by then:
			// the process itself tells it.
			_, _ = fmt.Fprintln(a.p.Stdio[2], &os.PathError{Op: "exec", Path: a.candidates[m.what], Err: unix.Errno(m.err)})
		default:
			err = explain(a.p, &m)
		}
		if err != nil {
			return err
		}
	}
}

// release lets the second process go on.
func (a *attempt) release() error {
	if err := a.findSecond(); err != nil {
		return err
	}
	wait(a.first)
	a.first = 0
	// Here, because a user namespace has not the right to raise them.
	for _, r := range a.p.Rlimits {
		if err := unix.Prlimit(a.second, r.Which, &unix.Rlimit{Cur: r.Soft, Max: r.Hard}, nil); err != nil {
			return fmt.Errorf("error setting rlimits for ready process: error setting rlimit type %v: %w", r.Which, err)
		}
	}
	if _, err := unix.Write(a.socket, []byte{1}); err != nil && err != unix.EPIPE { // EPIPE: killed
		return os.NewSyscallError("write", err)
	}
	return nil
}

// findSecond reads what the kernel has written.
func (a *attempt) findSecond() error {
	var pid int32
	if _, err := unix.Pread(int(a.file.Fd()), unsafe.Slice((*byte)(unsafe.Pointer(&pid)), 4), 0); err != nil {
		return os.NewSyscallError("pread", err)
	}
	a.second = int(pid)
	return nil
}

// reap ends what is left of a start that failed.
func (a *attempt) reap() {
	if a.first != 0 {
		_ = unix.Kill(a.first, unix.SIGKILL)
		wait(a.first)
		_ = a.findSecond()
	}
	if a.second != 0 {
		_ = unix.Kill(a.second, unix.SIGKILL)
		wait(a.second)
	}
}

func wait(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
			return
		}
	}
}

func read(fd int, b []byte) (int, error) {
	for {
		n, err := unix.Read(fd, b)
		if err != unix.EINTR {
			return n, err
		}
	}
}
