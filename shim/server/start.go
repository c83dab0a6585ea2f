//go:build linux

package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // device rules, which the manager lacks without
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/system"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim/api"
	"github.com/nodeagent/nodeagent/shim/record"
)

// intent is the first line of the journal: what has to be removed when a start
// never ends.
type intent struct {
	Version int             `json:"version"`
	Cgroup  *cgroups.Cgroup `json:"cgroup"`
}

// start makes a container or returns the one that is there.
func (s *Server) start(ctx context.Context, req *api.StartRequest) (*container, error) {
	if !record.ValidID(req.Id) {
		return nil, fmt.Errorf("start container %q: the id must be 1 to 200 of A-Z a-z 0-9 _ + - . : %w", req.Id, errdefs.ErrInvalidArgument)
	}
	defer s.quiet.Reset(quietTime)
	s.mu.Lock()
	if s.abortedAhead(req.Token) {
		s.mu.Unlock()
		return nil, fmt.Errorf("start container %q: %w", req.Id, context.Canceled)
	}
	c, found := s.containers[req.Id]
	if !found {
		if _, ok := s.exits[req.Id]; ok {
			s.mu.Unlock()
			return nil, fmt.Errorf("start container %q: it was there and is deleted: %w", req.Id, errdefs.ErrAlreadyExists)
		}
		c = s.newContainer(req.Id)
		c.token = req.Token
		c.op.Lock()
		s.containers[req.Id] = c
	}
	s.mu.Unlock()
	if found {
		select {
		case <-c.started:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return c, c.startErr
	}
	defer c.op.Unlock()
	if err := s.create(ctx, c, req); err != nil {
		c.startErr = fmt.Errorf("start container %q: %w", req.Id, err)
		s.mu.Lock()
		delete(s.containers, req.Id)
		s.mu.Unlock()
	}
	close(c.started)
	return c, c.startErr
}

func (s *Server) newContainer(id string) *container {
	return &container{
		id:      id,
		dir:     s.dir(id),
		started: make(chan struct{}),
		exited:  make(chan struct{}),
		gone:    make(chan struct{}),
	}
}

// undo is what to do when a later step fails, last first.
type undo []func()

func (u *undo) push(f func()) { *u = append(*u, f) }

func (u undo) run() {
	for i := len(u) - 1; i >= 0; i-- {
		u[i]()
	}
}

// create does the start: all of it or nothing.
func (s *Server) create(ctx context.Context, c *container, req *api.StartRequest) (err error) {
	var back undo
	defer func() {
		if err != nil {
			back.run()
		}
	}()
	cfg, spec, err := s.config(req)
	if err != nil {
		return err
	}
	c.facts = record.Facts{
		Version: record.Version, ID: req.Id, SandboxID: req.SandboxId, CreatedAt: time.Now(),
		LogPath: req.LogPath, MaxLogLine: int(req.MaxLogLine), Terminal: req.Terminal,
		Stdin: req.Stdin, StdinOnce: req.StdinOnce, Pause: req.Pause,
		PrivatePID: cfg.Namespaces.IsPrivate(configs.NEWPID),
	}
	lp, err := process(spec)
	if err != nil {
		return err
	}
	lp.Init = true

	if c.lc, err = libcontainer.Create(s.root(), c.id, cfg); err != nil {
		return startError(err)
	}
	back.push(func() {
		if err := c.lc.Destroy(); err != nil {
			s.cfg.Log.Error("undo start: remove container; trying again", "container", c.id, "err", err)
			go s.destroyLater(c)
		}
	})
	journal, err := record.NewJournal(c.journal())
	if err != nil {
		return err
	}
	defer journal.Close()
	bare := *cfg.Cgroups
	bare.Resources = nil
	if err := journal.Append(intent{record.Version, &bare}); err != nil {
		return err
	}
	if c.log, err = s.openLog(c); err != nil {
		return err
	}
	back.push(func() { c.log.Close() })
	child, err := c.openStdio(cfg, lp)
	if err != nil {
		return err
	}
	back.push(c.io.close)
	defer child.close()

	if err := ctx.Err(); err != nil {
		return err
	}
	if err := c.lc.Start(lp); err != nil {
		return startError(err)
	}
	pid, err := lp.Pid()
	if err != nil {
		return err
	}
	back.push(func() {
		_ = unix.Kill(pid, unix.SIGKILL)
		reap(pid)
	})
	if err := s.noteStarted(c, pid, child, journal); err != nil {
		return err
	}
	child.close()
	back.push(func() {
		s.oom.settle(c.unified())
		_ = s.cfg.Reaper.Unwatch(pid)
		s.dropKept(c)
		c.pidfd.Close()
	})
	// Nothing of the container has run so far. From here on it lives, whoever
	// dies.
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := c.lc.Exec(); err != nil {
		return startError(err)
	}
	s.runPumps(c)
	go s.watch(c)
	return nil
}

func (c *container) journal() string { return filepath.Join(c.dir, "journal") }

// noteStarted writes the facts of the process that waits for its release.
func (s *Server) noteStarted(c *container, pid int, child *childIO, journal record.Journal) (err error) {
	if c.pidfd, err = openPidfd(pid); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			c.pidfd.Close()
		}
	}()
	st, err := system.Stat(pid)
	if err != nil {
		return err
	}
	state, err := c.lc.State()
	if err != nil {
		return err
	}
	c.facts.Pid, c.facts.StartTime, c.facts.CgroupPaths = pid, st.StartTime, state.CgroupPaths
	cg := *state.Config.Cgroups
	if c.cgroup, err = manager.NewWithPaths(&cg, state.CgroupPaths); err != nil {
		return err
	}
	if group := c.unified(); group != "" {
		s.oom.open(group)
		defer func() {
			if err != nil {
				s.oom.settle(group)
			}
		}()
	}
	if err := s.cfg.Reaper.Watch(pid); err != nil {
		s.cfg.Log.Error("ask reaper to watch; the exit is unknown should this shim die", "container", c.id, "err", err)
	}
	if err := c.takeTerminal(child); err != nil {
		return err
	}
	s.keep(c)
	c.facts.StartedAt = time.Now()
	return journal.Append(c.facts)
}

// destroyLater removes what could not be removed at once, for want of
// descriptors for example. What it cannot remove in a minute, the next shim
// does.
func (s *Server) destroyLater(c *container) {
	for range 60 {
		time.Sleep(time.Second)
		if c.lc.Destroy() == nil {
			return
		}
	}
	s.cfg.Log.Error("undo start: gave up", "container", c.id)
}

// reap takes the exit status of a dead child.
func reap(pid int) {
	for {
		_, err := unix.Wait4(pid, nil, 0, nil)
		if err != unix.EINTR {
			return
		}
	}
}

// removeDir removes what a container left in StateDir.
func (s *Server) removeDir(dir string) {
	if err := os.RemoveAll(dir); err != nil {
		s.cfg.Log.Error("remove directory of container", "path", dir, "err", err)
	}
}

// startError gives a class to an error of libcontainer, of a start, an exec or
// an update. What happens in the init process comes back as text only.
func startError(err error) error {
	text := err.Error()
	for _, c := range []struct {
		text  string
		class error
	}{
		{"executable file not found", errdefs.ErrNotFound},
		{"no such file or directory", errdefs.ErrNotFound},
		{"permission denied", errdefs.ErrInvalidArgument},
		{"is a directory", errdefs.ErrInvalidArgument},
		{"not a directory", errdefs.ErrInvalidArgument},
		{"exec format error", errdefs.ErrInvalidArgument},
		{"invalid", errdefs.ErrInvalidArgument},
		{"numerical result out of range", errdefs.ErrInvalidArgument}, // CPUs, nodes
		{"unable to set memory limit", errdefs.ErrInvalidArgument},    // less than is in use
		{"resource temporarily unavailable", errdefs.ErrResourceExhausted},
		{"cannot allocate memory", errdefs.ErrResourceExhausted},
		{"too many open files", errdefs.ErrResourceExhausted},
		{"no space left on device", errdefs.ErrResourceExhausted},
	} {
		if strings.Contains(text, c.text) {
			return fmt.Errorf("%w: %w", err, c.class)
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}
