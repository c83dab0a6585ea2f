//go:build linux

package server

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim/record"
)

const (
	// flushPatience bounds how long an exit waits for its last log lines,
	// which is long only when the log cannot be written.
	flushPatience = 5 * time.Second
	// statusPatience bounds how long the exit of an adopted container waits
	// for its status to appear.
	statusPatience = 2 * time.Second
	killPatience   = 30 * time.Second
)

// watch waits for the end of the container's first process and records it.
func (s *Server) watch(c *container) {
	if err := awaitPidfd(c.pidfd); err != nil {
		return // closed
	}
	var x record.Exit
	if c.adopted {
		x = s.adoptedStatus(c)
	} else {
		x = childStatus(c.facts.Pid)
	}
	s.finish(c, x)
	if !c.adopted {
		_ = s.cfg.Reaper.Unwatch(c.facts.Pid)
		reap(c.facts.Pid)
	}
}

// childStatus reads how our child ended, and leaves it a zombie: should we die
// before the record is on disk, the reaper finds the status again.
func childStatus(pid int) record.Exit {
	var info siginfo
	for {
		err := waitid(pid, &info, unix.WEXITED|unix.WNOWAIT)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return record.Exit{At: time.Now()}
		}
		return status(info.code, info.status, time.Now())
	}
}

// status translates si_code and si_status.
func status(code, st int32, at time.Time) record.Exit {
	x := record.Exit{Known: true, At: at}
	if code == cldExited {
		x.Code = int(st)
		return x
	}
	x.Signal = int(st & 0x7f)
	x.Code = 128 + x.Signal
	return x
}

// finish writes the exit down and tells the world.
func (s *Server) finish(c *container, x record.Exit) {
	x.Version, x.ID, x.SandboxID = record.Version, c.id, c.facts.SandboxID
	x.Pid, x.StartTime = c.facts.Pid, c.facts.StartTime
	x.CreatedAt, x.StartedAt = c.facts.CreatedAt, c.facts.StartedAt
	x.OOMKilled = s.oomKills(c) > 0 && (x.Code != 0 || !x.Known)
	c.ended.Store(true)
	s.flush(c)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		select {
		case <-c.gone:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := s.saveExit(ctx, x)
	cancel()
	c.mu.Lock()
	c.exit = &x
	c.mu.Unlock()
	if err == nil {
		s.publish(x)
	}
	s.oom.settle(c.unified())
	close(c.exited)
}

// oomKills is how many processes of c the OOM killer took, now that it has ended.
func (s *Server) oomKills(c *container) uint64 {
	if group := c.unified(); group != "" {
		return s.oom.judge(group)
	}
	n, err := c.cgroup.OOMKillCount()
	if err != nil {
		return 0
	}
	return n
}

// flush waits until all that the process wrote is in the log. Other processes
// may hold the pipes open, so it does not wait for their end.
func (s *Server) flush(c *container) {
	if c.log == nil {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if c.io.tty != nil || c.facts.PrivatePID {
			// The end of the output is near: nobody else has it.
			c.awaitPumps(time.Second)
		}
		s.drain(c)
	}()
	select {
	case <-done:
	case <-time.After(flushPatience):
		s.cfg.Log.Warn("last output is not in the log yet; the exit is reported", "container", c.id)
	}
}

func (c *container) awaitPumps(limit time.Duration) {
	done := make(chan struct{})
	go func() {
		c.pumps.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(limit):
	}
}

// delete ends the container and removes all of it but the exit record.
func (s *Server) delete(ctx context.Context, id string) (record.Exit, error) {
	s.mu.Lock()
	c := s.containers[id]
	x, known := s.exits[id]
	s.mu.Unlock()
	if c == nil {
		if known {
			return x, nil
		}
		return record.Exit{}, fmt.Errorf("delete container %q: %w", id, errdefs.ErrNotFound)
	}
	c.op.Lock()
	defer c.op.Unlock()
	if c.startErr != nil {
		return record.Exit{}, fmt.Errorf("delete container %q: %w", id, errdefs.ErrNotFound)
	}
	select {
	case <-c.gone:
		return *c.exitRecord(), nil
	default:
	}
	if err := s.destroy(ctx, c); err != nil {
		return record.Exit{}, fmt.Errorf("delete container %q: %w", id, err)
	}
	return *c.exitRecord(), nil
}

// destroy does the work of delete; after an error it can be called again.
func (s *Server) destroy(ctx context.Context, c *container) error {
	defer s.quiet.Reset(quietTime)
	deadline := time.Now().Add(killPatience)
	if d, ok := ctx.Deadline(); ok {
		deadline = d
	}
	s.oom.note(c.unified())
	if err := c.kill(deadline); err != nil {
		return err
	}
	t := time.NewTimer(time.Until(deadline))
	defer t.Stop()
	select {
	case <-c.exited:
	case <-ctx.Done():
		return fmt.Errorf("wait for its end and the record of it after SIGKILL: %w", ctx.Err())
	case <-t.C:
		if c.ended.Load() {
			return fmt.Errorf("its exit record cannot be written to %s: %w", s.cfg.ExitDir, errdefs.ErrUnavailable)
		}
		return fmt.Errorf("it does not end after SIGKILL: %w", errdefs.ErrUnavailable)
	}
	c.awaitPumps(time.Second)
	if err := c.lc.Destroy(); err != nil {
		return err
	}
	close(c.gone)
	s.sessions.endAll(c)
	s.dropKept(c)
	c.io.close()
	if c.log != nil {
		c.log.Close()
	}
	c.pidfd.Close()
	s.removeDir(c.dir)
	s.mu.Lock()
	delete(s.containers, c.id)
	s.mu.Unlock()
	return nil
}

// adoptedStatus finds out how a process ended whose parent we are not.
func (s *Server) adoptedStatus(c *container) record.Exit {
	at := time.Now()
	for deadline := at.Add(statusPatience); ; time.Sleep(5 * time.Millisecond) {
		if x, ok := c.zombieStatus(); ok {
			return x
		}
		o, ok, err := record.FindOrphan(filepath.Join(s.cfg.StateDir, "orphans"), c.facts.Pid, c.facts.StartTime)
		if err != nil {
			s.cfg.Log.Error("read the reaper's records", "container", c.id, "err", err)
		}
		if ok {
			return status(int32(o.Code), int32(o.Status), o.At)
		}
		if x, ok := pidfdStatus(c.pidfd); ok {
			x.At = at
			return x
		}
		if time.Now().After(deadline) {
			return record.Exit{At: at}
		}
	}
}

// zombieStatus reads the status of a process that nobody has reaped yet.
func (c *container) zombieStatus() (record.Exit, bool) {
	st, err := procStat(c.facts.Pid)
	if err != nil || st.state != 'Z' || st.startTime != c.facts.StartTime {
		return record.Exit{}, false
	}
	return waitStatus(st.exitCode), true
}

// waitStatus translates a status word of wait(2).
func waitStatus(word uint32) record.Exit {
	ws := unix.WaitStatus(word)
	if ws.Exited() {
		return status(cldExited, int32(ws.ExitStatus()), time.Now())
	}
	return status(cldKilled, int32(ws.Signal()), time.Now())
}
