//go:build linux

package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim/api"
	"github.com/nodeagent/nodeagent/shim/join"
)

const (
	// defaultMaxOutput bounds what ExecSync keeps of each stream when the
	// client does not say.
	defaultMaxOutput = 16 << 20
	// inlineOutput is what fits into one message beside the other stream.
	inlineOutput = 1536 << 10
	// outputPatience is how long an exec that has ended waits for the end of
	// its output, which other processes may hold open.
	outputPatience = 200 * time.Millisecond
)

// execution is a process that was put into a container.
type execution struct {
	c     *container
	pid   int
	pidfd *os.File
	group execGroup
}

// errNotBegun says that an exec did not even begin in its time.
var errNotBegun = errors.New("the process did not start in time")

// execWithin is exec with a deadline (zero: none). A container that gets hardly
// any CPU, or is frozen, can hold up even the beginning of an exec.
func (s *Server) execWithin(ctx context.Context, deadline time.Time, c *container, lp *libcontainer.Process) (*execution, error) {
	type result struct {
		e   *execution
		err error
	}
	group := s.newExecGroup(c)
	done := make(chan result, 1)
	go func() {
		e, err := s.exec(c, lp, group)
		done <- result{e, err}
	}()
	if !deadline.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline)
		defer cancel()
	}
	select {
	case r := <-done:
		return r.e, r.err
	case <-ctx.Done():
	}
	group.kill()
	end := func(r result) {
		if r.e != nil {
			r.e.kill()
		}
	}
	select {
	case r := <-done:
		end(r)
	case <-time.After(time.Second):
		go func() { end(<-done) }()
	}
	return nil, errNotBegun
}

// exec starts lp in the container. On error nothing is left.
func (s *Server) exec(c *container, lp *libcontainer.Process, group execGroup) (_ *execution, err error) {
	select {
	case <-c.exited:
		group.remove(c)
		return nil, fmt.Errorf("exec in container %q, which has exited: %w", c.id, errdefs.ErrFailedPrecondition)
	default:
	}
	s.quiet.Reset(quietTime)
	e := &execution{c: c, group: group}
	e.pid, err = s.join(c, lp, group)
	if errors.Is(err, join.ErrNotJoined) {
		lp.SubCgroupPaths = group.sub
		if err = c.lc.Start(lp); err == nil {
			e.pid, err = lp.Pid()
		}
	} else if err != nil {
		err = fmt.Errorf("unable to start container process: %w", err)
	}
	if err == nil {
		if e.pidfd, err = openPidfd(e.pid); err != nil {
			_ = unix.Kill(e.pid, unix.SIGKILL)
			reap(e.pid)
		}
	}
	if err != nil {
		e.group.remove(c)
		return nil, fmt.Errorf("exec in container %q: %w", c.id, startError(err))
	}
	return e, nil
}

// wait waits for the end of the process, at most until deadline (zero: none)
// or the end of ctx. It returns the exit code, or false when it still runs.
func (e *execution) wait(ctx context.Context, deadline time.Time) (int, bool) {
	_ = e.pidfd.SetReadDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { _ = e.pidfd.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := awaitPidfd(e.pidfd); err != nil {
		return 0, false
	}
	return e.reap(), true
}

// reap takes the exit code of the dead process and gives up what we hold.
func (e *execution) reap() int {
	x := childStatus(e.pid)
	reap(e.pid)
	e.pidfd.Close()
	e.group.remove(e.c)
	return x.Code
}

// kill ends the process and all that it has started, and reaps it.
func (e *execution) kill() int {
	if !e.group.kill() {
		_ = sendSignal(e.pidfd, unix.SIGSTOP) // no new children while we look
		killSession(e.c, e.pid)
	}
	_ = sendSignal(e.pidfd, unix.SIGKILL)
	_ = e.pidfd.SetReadDeadline(time.Now().Add(killPatience))
	if awaitPidfd(e.pidfd) != nil {
		go func() { // in the kernel, and not to be killed now
			_ = e.pidfd.SetReadDeadline(time.Time{})
			_ = awaitPidfd(e.pidfd)
			e.reap()
		}()
		return 128 + int(unix.SIGKILL)
	}
	return e.reap()
}

// execGroup is a group of its own for an exec in cgroup v1's freezer hierarchy,
// below the container's: what the exec starts stays in it, however it
// daemonizes. Cgroup v2 has one hierarchy for all: there a process below the
// container's group would look for its memory and CPU limits in the wrong place
// (JVMs and Go size themselves by them), so it stays in the container's own.
type execGroup struct {
	path string            // "": none
	sub  map[string]string // for libcontainer
}

func (s *Server) newExecGroup(c *container) execGroup {
	c.removeStale()
	g, err := c.newExecGroup()
	if err != nil && !errors.Is(err, os.ErrNotExist) { // gone with its container
		s.cfg.Log.Warn("make cgroup for exec; a timeout kills by session only", "container", c.id, "err", err)
	}
	return g
}

func (c *container) newExecGroup() (execGroup, error) {
	base, ok := c.facts.CgroupPaths["freezer"]
	if !ok || cgroups.IsCgroup2UnifiedMode() {
		return execGroup{}, nil
	}
	for {
		name := "exec-" + strconv.FormatUint(c.execs.Add(1), 10)
		g := execGroup{path: filepath.Join(base, name), sub: map[string]string{"freezer": name}}
		switch err := unix.Mkdir(g.path, 0o755); err {
		case nil:
			return g, nil
		case unix.EEXIST: // of a shim before us
		default:
			return execGroup{}, fmt.Errorf("make %s: %w", g.path, err)
		}
	}
}

// remove removes the group if nothing is in it; otherwise a later exec does, or
// the delete of the container.
func (g execGroup) remove(c *container) {
	if g.path != "" && unix.Rmdir(g.path) == unix.EBUSY {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.staleGroups = append(c.staleGroups, g.path)
	}
}

// removeStale removes the groups that have become empty.
func (c *container) removeStale() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.staleGroups = slices.DeleteFunc(c.staleGroups, func(path string) bool { return unix.Rmdir(path) != unix.EBUSY })
}

// kill ends everything in the group. Frozen, nothing forks meanwhile; but a
// fork that was under way shows in the next round only.
func (g execGroup) kill() bool {
	if g.path == "" {
		return false
	}
	state := filepath.Join(g.path, "freezer.state")
	for range 50 {
		_ = os.WriteFile(state, []byte("FROZEN"), 0)
		pids := procs(g.path)
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		_ = os.WriteFile(state, []byte("THAWED"), 0)
		if len(pids) == 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	return true
}

func procs(group string) []int {
	b, err := os.ReadFile(filepath.Join(group, "cgroup.procs"))
	if err != nil {
		return nil
	}
	var pids []int
	for n, i := 0, 0; i < len(b); i++ {
		if b[i] == '\n' {
			pids, n = append(pids, n), 0
			continue
		}
		n = n*10 + int(b[i]-'0')
	}
	return pids
}

// killSession ends what descends from pid or is in its session. A process that
// has left both (a daemon whose parent has ended) cannot be told from the
// container's own.
func killSession(c *container, pid int) {
	for range 100 {
		pids, err := c.cgroup.GetAllPids()
		if err != nil {
			return
		}
		mine := map[int]bool{pid: true}
		for grown := true; grown; {
			grown = false
			for _, p := range pids {
				if mine[p] {
					continue
				}
				if st, err := procStat(p); err == nil && st.state != 'Z' && (mine[st.ppid] || st.session == pid) {
					mine[p], grown = true, true
				}
			}
		}
		delete(mine, pid)
		if len(mine) == 0 {
			return
		}
		for p := range mine {
			_ = unix.Kill(p, unix.SIGKILL)
		}
		time.Sleep(time.Millisecond)
	}
}

// capture reads one output of an exec, keeps the first max bytes and drops the
// rest.
type capture struct {
	file *os.File
	max  int
	buf  []byte
	done chan struct{}
}

// newCapture returns the pipe's write end too, which blocks, for the exec.
func newCapture(max int) (*capture, *os.File, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	_ = unix.SetNonblock(p[0], true)
	return &capture{file: os.NewFile(uintptr(p[0]), "exec output"), max: max, done: make(chan struct{})},
		os.NewFile(uintptr(p[1]), "exec output"), nil
}

var scratch = sync.Pool{New: func() any { return new([16 << 10]byte) }}

func (c *capture) run() {
	defer close(c.done)
	raw, err := c.file.SyscallConn()
	if err != nil {
		return
	}
	for {
		var n int
		var rerr error
		perr := raw.Read(func(fd uintptr) bool {
			b := scratch.Get().(*[16 << 10]byte)
			defer scratch.Put(b)
			n, rerr = unix.Read(int(fd), b[:])
			if rerr == unix.EAGAIN {
				return false
			}
			if n > 0 {
				c.buf = append(c.buf, b[:min(n, c.max-len(c.buf))]...)
			}
			return true
		})
		if perr != nil || n == 0 || rerr != nil && rerr != unix.EINTR {
			return
		}
	}
}

// finish returns what was captured.
func (c *capture) finish(patience time.Duration) []byte {
	_ = c.file.SetReadDeadline(time.Now().Add(patience))
	<-c.done
	c.file.Close()
	return c.buf
}

// execSync runs a process to its end and returns its output.
func (s *Server) execSync(ctx context.Context, req *api.ExecSyncRequest) (*api.ExecSyncResponse, error) {
	c, err := s.get(req.Id)
	if err != nil {
		return nil, err
	}
	lp, err := s.execProcess(req.Process)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	x := &session{id: req.Session, c: c, close: cancel, done: make(chan struct{})}
	if err := s.begin(x); err != nil {
		return nil, err
	}
	keep := false
	defer func() {
		close(x.done)
		if !keep {
			s.sessions.remove(x)
		}
	}()

	limit := int(req.MaxOutput)
	if limit <= 0 {
		limit = defaultMaxOutput
	}
	out, outW, err := newCapture(limit)
	if err != nil {
		return nil, err
	}
	defer out.file.Close()
	errs, errW, err := newCapture(limit)
	if err != nil {
		outW.Close()
		return nil, err
	}
	defer errs.file.Close()
	lp.Stdout, lp.Stderr = outW, errW
	var deadline time.Time
	if req.Timeout > 0 {
		deadline = time.Now().Add(time.Duration(req.Timeout))
	}
	e, err := s.execWithin(ctx, deadline, c, lp)
	outW.Close()
	errW.Close()
	if err == errNotBegun {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("exec in container %q: %w", c.id, err)
		}
		return &api.ExecSyncResponse{Code: 128 + int32(unix.SIGKILL), TimedOut: true}, nil
	}
	if err != nil {
		return nil, err
	}
	go out.run()
	go errs.run()
	resp := &api.ExecSyncResponse{}
	code, ended := e.wait(ctx, deadline)
	if !ended {
		code = e.kill()
		resp.TimedOut = true
	}
	resp.Code = int32(code)
	resp.Stdout, resp.Stderr = out.finish(outputPatience), errs.finish(outputPatience)
	if err := ctx.Err(); err != nil && !ended {
		return nil, fmt.Errorf("exec in container %q: %w", c.id, err)
	}
	for _, o := range []struct {
		b    *[]byte
		more *int64
		rest *[]byte
	}{{&resp.Stdout, &resp.MoreStdout, &x.output[0]}, {&resp.Stderr, &resp.MoreStderr, &x.output[1]}} {
		if len(*o.b) > inlineOutput {
			*o.rest = *o.b
			*o.more = int64(len(*o.b) - inlineOutput)
			*o.b = (*o.b)[:inlineOutput]
			keep = true
		}
	}
	if keep {
		time.AfterFunc(30*time.Second, func() { s.sessions.remove(x) })
	}
	return resp, nil
}

func (s *Server) execProcess(text []byte) (*libcontainer.Process, error) {
	var p specs.Process
	if err := json.Unmarshal(text, &p); err != nil {
		return nil, fmt.Errorf("decode process: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(p.Args) == 0 {
		return nil, fmt.Errorf("process has no arguments: %w", errdefs.ErrInvalidArgument)
	}
	s.limits.clamp(&p)
	return process(&p)
}
