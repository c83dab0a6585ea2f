//go:build linux

package server

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim/api"
	"github.com/nodeagent/nodeagent/shim/criolog"
	"github.com/nodeagent/nodeagent/shim/join"
	"github.com/nodeagent/nodeagent/shim/record"
)

// container is one container, from the beginning of its start to the end of
// its delete.
type container struct {
	id    string
	token string // of the Start that made it
	dir   string

	// op serializes start, update and delete.
	op sync.Mutex

	// Set by start or adopt, before started is closed; constant after it.
	started  chan struct{} // closed when the start is over
	startErr error
	facts    record.Facts
	lc       *libcontainer.Container
	cgroup   cgroups.Manager
	pidfd    *os.File
	adopted  bool // a child of the reaper, not ours
	log      *criolog.Log
	io       stdio

	exited chan struct{} // closed when the exit record is on disk
	gone   chan struct{} // closed when the container is deleted
	pumps  sync.WaitGroup
	taps   taps
	execs  atomic.Uint64               // names their cgroups
	filter atomic.Pointer[join.Filter] // for execs, once it is compiled
	ended  atomic.Bool                 // its end is seen, but not on disk yet

	mu          sync.Mutex
	exit        *record.Exit // set before exited is closed
	staleGroups []string     // cgroups of execs that left something running
}

func (c *container) isStarted() bool {
	select {
	case <-c.started:
		return c.startErr == nil
	default:
		return false
	}
}

func (c *container) exitRecord() *record.Exit {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.exit
}

func (c *container) state() *api.ContainerState {
	return &api.ContainerState{
		Id:          c.id,
		SandboxId:   c.facts.SandboxID,
		Pid:         int32(c.facts.Pid),
		StartTime:   c.facts.StartTime,
		CreatedAt:   c.facts.CreatedAt.UnixNano(),
		StartedAt:   c.facts.StartedAt.UnixNano(),
		Exit:        wireExit(c.exitRecord()),
		CgroupPaths: c.cgroupPaths(),
	}
}

// cgroupPaths are those with controllers: on a hybrid host libcontainer also
// names the unified group, which has none, by the key of cgroup v2.
func (c *container) cgroupPaths() map[string]string {
	if cgroups.IsCgroup2UnifiedMode() {
		return c.facts.CgroupPaths
	}
	paths := maps.Clone(c.facts.CgroupPaths)
	delete(paths, "")
	return paths
}

// unified is the container's group on cgroup v2, "" on other hosts.
func (c *container) unified() string {
	if !cgroups.IsCgroup2UnifiedMode() {
		return ""
	}
	return c.facts.CgroupPaths[""]
}

func wireExit(x *record.Exit) *api.ContainerExit {
	if x == nil {
		return nil
	}
	return &api.ContainerExit{
		Id: x.ID, Pid: int32(x.Pid), Code: int32(x.Code), Signal: int32(x.Signal),
		Known: x.Known, OomKilled: x.OOMKilled, At: x.At.UnixNano(),
	}
}

// signal sends sig to the first process, or with all to every process of the
// container.
func (c *container) signal(sig unix.Signal, all bool) error {
	if all {
		pids, err := c.cgroup.GetAllPids()
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("list processes of container %q: %w", c.id, err)
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, sig) // gone meanwhile: what was wanted
		}
		if len(pids) > 0 {
			return nil
		}
	}
	select {
	case <-c.exited:
		return fmt.Errorf("signal container %q, which has exited: %w", c.id, errdefs.ErrNotFound)
	default:
	}
	err := sendSignal(c.pidfd, sig)
	if err == unix.ESRCH {
		return fmt.Errorf("signal container %q, which has exited: %w", c.id, errdefs.ErrNotFound)
	}
	if err == unix.EINVAL {
		return fmt.Errorf("signal container %q: signal %d: %w", c.id, sig, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("signal container %q: %w", c.id, err)
	}
	return nil
}

func sendSignal(pidfd *os.File, sig unix.Signal) error {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := raw.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return err
	}
	return serr
}

// openPidfd opens pid so that the netpoller can wait for its end.
func openPidfd(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("pidfd of %d", pid)), nil
}

// awaitPidfd waits until the process is dead (a zombie or reaped), pidfd is
// closed or its read deadline passes.
func awaitPidfd(pidfd *os.File) error {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		return err == nil && n > 0
	})
}

// kill ends every process of the container and returns when its cgroup is
// empty.
func (c *container) kill(deadline time.Time) error {
	_ = sendSignal(c.pidfd, unix.SIGKILL)
	if c.facts.PrivatePID {
		// The kernel kills the rest before the first is reaped; but a
		// frozen process does not die in cgroup v1.
		if st, err := c.cgroup.GetFreezerState(); err == nil && st == cgroups.Frozen {
			return c.cgroup.Freeze(cgroups.Thawed)
		}
		return nil
	}
	return killCgroup(c.cgroup, deadline)
}

// killCgroup kills until nothing is left: processes may fork meanwhile.
func killCgroup(m cgroups.Manager, deadline time.Time) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		pids, err := m.GetAllPids()
		if errors.Is(err, os.ErrNotExist) || err == nil && len(pids) == 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("list processes of cgroup: %w", err)
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		// A frozen process does not die in cgroup v1.
		if st, err := m.GetFreezerState(); err == nil && st == cgroups.Frozen {
			_ = m.Freeze(cgroups.Thawed)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes do not end, first %d", len(pids), pids[0])
		}
		time.Sleep(wait)
	}
}
