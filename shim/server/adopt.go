//go:build linux

package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim/record"
)

// Adopt takes over what earlier shims have left in StateDir: live containers
// go on under this one, dead ones get their exit record, starts that never
// ended are removed. Call it once, before Serve. Containers that cannot be
// taken over are left alone and said; they do not make it fail.
func (s *Server) Adopt(ctx context.Context) error {
	if err := s.loadExits(); err != nil {
		return fmt.Errorf("read exit records: %w", err)
	}
	same, err := s.sameBoot()
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(filepath.Join(s.cfg.StateDir, "c"))
	if err != nil {
		return fmt.Errorf("read containers of earlier shims: %w", err)
	}
	var ends []func()
	for _, e := range entries {
		if !record.ValidID(e.Name()) {
			continue
		}
		end, err := s.adopt(ctx, e.Name(), same)
		if err != nil {
			s.cfg.Log.Error("adopt container; it is left alone", "container", e.Name(), "err", err)
		}
		if end != nil {
			ends = append(ends, end)
		}
	}
	s.oom.balanceAll()
	for _, end := range ends {
		go end()
	}
	for name, fd := range s.cfg.Kept {
		s.cfg.Log.Warn("descriptor of a container that is gone", "name", name)
		unix.Close(fd)
		_ = s.cfg.Reaper.Drop(name)
	}
	return nil
}

// sameBoot says whether StateDir is of this boot, and makes it so.
func (s *Server) sameBoot() (bool, error) {
	now, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return false, err
	}
	path := filepath.Join(s.cfg.StateDir, "boot")
	then, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	if string(then) == string(now) {
		return true, nil
	}
	if err := os.WriteFile(path+".tmp", now, 0o600); err != nil {
		return false, err
	}
	// What the reaper wrote is about other processes with the same numbers.
	if err := os.Remove(filepath.Join(s.cfg.StateDir, "orphans")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	return then == nil, os.Rename(path+".tmp", path)
}

// adopt takes over one container. It returns what waits for its end and records
// it, to be run once all are taken over; nil if that is done.
func (s *Server) adopt(ctx context.Context, id string, sameBoot bool) (end func(), err error) {
	c := s.newContainer(id)
	lines, err := record.ReadJournal(c.journal())
	if err != nil {
		return nil, err
	}
	if len(lines) < 2 {
		return nil, s.abandon(c, lines) // facts come before the release
	}
	if c.facts, err = record.DecodeFacts(lines[1]); err != nil {
		return nil, err
	}
	if c.facts.ID != id {
		return nil, fmt.Errorf("its facts are of container %q", c.facts.ID)
	}
	if _, err := os.Stat(filepath.Join(c.dir, "exec.fifo")); err == nil {
		return nil, s.abandon(c, lines) // it was never released
	}
	c.adopted = true
	if c.lc, err = libcontainer.Load(s.root(), id); err != nil {
		return nil, err
	}
	cfg := c.lc.Config()
	s.useSeccomp(cfg.Seccomp)
	cg := *cfg.Cgroups
	if c.cgroup, err = manager.NewWithPaths(&cg, c.facts.CgroupPaths); err != nil {
		return nil, err
	}
	if err := s.adoptStdio(c); err != nil {
		return nil, err
	}
	if c.log, err = s.openLog(c); err != nil {
		return nil, err
	}
	alive := sameBoot && s.adoptProcess(c)
	s.mu.Lock()
	s.containers[id] = c
	x, ended := s.exits[id]
	s.mu.Unlock()
	close(c.started)
	s.runPumps(c)
	if ended {
		c.exit = &x
		close(c.exited)
		return nil, nil
	}
	if group := c.unified(); group != "" && sameBoot {
		s.oom.adopt(group)
	}
	if alive {
		_ = s.cfg.Reaper.Watch(c.facts.Pid)
		return func() { s.watch(c) }, nil
	}
	return func() {
		x := record.Exit{At: time.Now()}
		if sameBoot {
			x = s.adoptedStatus(c)
		}
		s.finish(c, x)
	}, nil
}

// adoptProcess opens the container's process if it is still that one.
func (s *Server) adoptProcess(c *container) bool {
	f, err := openPidfd(c.facts.Pid)
	if err == nil {
		if st, serr := procStat(c.facts.Pid); serr == nil && st.startTime == c.facts.StartTime {
			c.pidfd = f
			return true
		}
		f.Close()
	}
	// It stands in for a process that is gone: signals find nobody.
	c.pidfd, _ = os.Open(os.DevNull)
	return false
}

// adoptStdio opens the container's fifos again and takes what the reaper kept.
func (s *Server) adoptStdio(c *container) error {
	take := func(name string) *os.File {
		fd, ok := s.cfg.Kept[name+"/"+c.id]
		if !ok {
			return nil
		}
		delete(s.cfg.Kept, name+"/"+c.id)
		if unix.SetNonblock(fd, true) != nil {
			unix.Close(fd)
			return nil
		}
		return os.NewFile(uintptr(fd), name)
	}
	c.io.tty, c.io.via, c.io.in = take("tty"), take("via"), take("stdin")
	if c.io.tty != nil && c.io.via == nil {
		var err error
		if c.io.via, err = openFd(c.fifo("stdout"), unix.O_RDWR|unix.O_NONBLOCK); err != nil {
			return err
		}
	}
	c.io.out = [2]*os.File{take("out"), take("err")}
	for i, name := range []string{"stdout", "stderr"} {
		if c.io.out[i] != nil {
			continue
		}
		f, err := openFd(c.fifo(name), unix.O_RDONLY|unix.O_NONBLOCK)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		c.io.out[i] = f
	}
	if !c.facts.Stdin || c.facts.Terminal || c.io.in != nil {
		return nil
	}
	if _, err := os.Stat(filepath.Join(c.dir, "stdin.closed")); err == nil {
		c.io.inDone = true
		return nil
	}
	f, err := openFd(c.fifo("stdin"), unix.O_WRONLY|unix.O_NONBLOCK)
	if err != nil && !errors.Is(err, unix.ENXIO) { // ENXIO: the container does not read any more
		return err
	}
	c.io.in = f
	return nil
}

// abandon removes what a start has left that never ended.
func (s *Server) abandon(c *container, journal [][]byte) error {
	var in intent
	if len(journal) > 0 { // otherwise nothing was made yet
		if err := json.Unmarshal(journal[0], &in); err != nil {
			return fmt.Errorf("decode intent: %w", err)
		}
		if in.Version != record.Version {
			return fmt.Errorf("intent: %w: %d", record.ErrVersion, in.Version)
		}
	}
	if in.Cgroup != nil {
		in.Cgroup.Resources = &cgroups.Resources{}
		m, err := manager.New(in.Cgroup)
		if err != nil {
			return err
		}
		if err := s.killAbandoned(c, m); err != nil {
			return err
		}
		if err := m.Destroy(); err != nil {
			return err
		}
	}
	s.cfg.Log.Info("removed a start that never ended", "container", c.id)
	s.removeDir(c.dir)
	for name := range s.cfg.Kept {
		if strings.HasSuffix(name, "/"+c.id) {
			unix.Close(s.cfg.Kept[name])
			delete(s.cfg.Kept, name)
			_ = s.cfg.Reaper.Drop(name)
		}
	}
	return nil
}

func (s *Server) killAbandoned(c *container, m cgroups.Manager) error {
	// The process may not be in all its groups yet.
	if lc, err := libcontainer.Load(s.root(), c.id); err == nil {
		_ = lc.Signal(unix.SIGKILL)
	}
	if !m.Exists() {
		return nil
	}
	return killCgroup(m, time.Now().Add(killPatience))
}
