//go:build linux

// Package server is the shim: the one process of a node that is the parent of
// every container. It starts containers through libcontainer, moves their
// output into their logs, records how they end, and serves exec and attach. It
// knows nothing of images, networks, gRPC or Kubernetes, and must stay small:
// libcontainer starts each container through this same binary (execs: join.go).
//
// cmd/nodeagent-shim runs it; the daemon reaches it through package shim.
//
// What it must remember is on disk before anybody can see it: the facts before
// the program of a container runs, the exit record (synced) before an exit is
// published, and the log (see criolog). So it may be killed at any instruction:
// the next one adopts the containers from their facts (adopt.go).
//
// Files of a container, in StateDir/c/<id>: libcontainer's state.json and
// exec.fifo, fifos, spools, and journal. That has a line with what to remove
// if the start never ends, from before the first kernel object is made, and a
// line with the facts.
//
// Goroutines, for each container: one that waits for its end, one for each
// output (two for a terminal), one for each attached client; all end when the
// container is deleted. Locks: Server.mu guards the maps and is held for
// moments; container.op is held through start, update and delete of that
// container; container.mu guards its few changing fields; oomBook.mu is held alone. Order:
// op, Server.mu, container.mu.
//
// Linux 5.3 (pidfd) or newer; cgroup v1, hybrid and v2.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/shim/join"
	"github.com/nodeagent/nodeagent/shim/reaper"
	"github.com/nodeagent/nodeagent/shim/record"
	"github.com/nodeagent/nodeagent/shim/seccomp"
)

// quietTime without a start, exec or delete is when memory goes back to the
// system: a start takes 2 MB for moments, and then often nothing happens for
// hours.
const quietTime = time.Second

// Config says where the shim keeps its files.
type Config struct {
	StateDir string // dies with the boot
	ExitDir  string // survives it
	Reaper   *reaper.Conn
	Kept     map[string]int // descriptors that the reaper kept
	Log      *slog.Logger
	Seccomp  *seccomp.Cache // hears of every profile in use; nil: none
	Joiner   *join.Joiner   // starts execs; nil: libcontainer starts all
}

// Server is the shim's state.
type Server struct {
	cfg      Config
	limits   limits
	profiles profiles
	sessions sessions
	oom      oomBook
	quiet    *time.Timer // gives memory back; set again by all that takes some

	cannotJoin atomic.Bool // the kernel is too old for Joiner

	mu         sync.Mutex
	containers map[string]*container
	exits      map[string]record.Exit // on disk and not forgotten
	followers  map[*follower]struct{}
	aborted    map[string]time.Time // tokens and sessions ended before they began
	stop       chan struct{}        // closed by Shutdown
}

// New returns a server that has not looked at anything yet; see Adopt.
func New(cfg Config) (*Server, error) {
	if !filepath.IsAbs(cfg.StateDir) || !filepath.IsAbs(cfg.ExitDir) {
		return nil, fmt.Errorf("state directory %q and exit directory %q must be absolute paths", cfg.StateDir, cfg.ExitDir)
	}
	s := &Server{
		cfg:        cfg,
		containers: map[string]*container{},
		exits:      map[string]record.Exit{},
		followers:  map[*follower]struct{}{},
		aborted:    map[string]time.Time{},
		stop:       make(chan struct{}),
	}
	s.quiet = time.AfterFunc(quietTime, debug.FreeOSMemory)
	s.oom.log = cfg.Log
	s.sessions.m = map[string]*session{}
	s.sessions.files = map[string]passed{}
	if err := s.limits.read(cfg.Log); err != nil {
		return nil, err
	}
	return s, nil
}

// root is what libcontainer calls so: the directory with one of each container.
func (s *Server) root() string              { return filepath.Join(s.cfg.StateDir, "c") }
func (s *Server) dir(id string) string      { return filepath.Join(s.root(), id) }
func (s *Server) exitPath(id string) string { return filepath.Join(s.cfg.ExitDir, id+".json") }

// get returns the container that is started.
func (s *Server) get(id string) (*container, error) {
	s.mu.Lock()
	c := s.containers[id]
	s.mu.Unlock()
	if c == nil || !c.isStarted() {
		return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// abortAhead notes that a call is to be undone that has not come yet: its
// request and the one to undo it may overtake each other. The caller holds mu.
func (s *Server) abortAhead(token string) {
	for t, at := range s.aborted {
		if time.Since(at) > time.Minute {
			delete(s.aborted, t)
		}
	}
	s.aborted[token] = time.Now()
}

// abortedAhead says whether abortAhead was called for it. The caller holds mu.
func (s *Server) abortedAhead(token string) bool {
	_, ok := s.aborted[token]
	delete(s.aborted, token)
	return ok
}

// loadExits reads the exit records. One that cannot be read stays and is said.
func (s *Server) loadExits() error {
	entries, err := os.ReadDir(s.cfg.ExitDir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || !record.ValidID(id) {
			continue
		}
		b, err := os.ReadFile(s.exitPath(id))
		if err == nil {
			var x record.Exit
			if x, err = record.DecodeExit(b); err == nil && x.ID == id {
				s.exits[id] = x
				continue
			}
		}
		s.cfg.Log.Error("read exit record; it is kept as it is", "container", id, "err", err)
	}
	return nil
}

// follower is a client that wants to know every exit.
type follower struct {
	wake  chan struct{} // has one token when queue may not be empty
	queue []record.Exit // guarded by Server.mu
}

// follow returns a follower who will hear of the exits there are and of those
// to come, and how many are there.
func (s *Server) follow() (*follower, int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := &follower{wake: make(chan struct{}, 1)}
	s.followers[f] = struct{}{}
	for _, x := range s.exits {
		f.add(x)
	}
	return f, len(f.queue)
}

func (s *Server) unfollow(f *follower) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.followers, f)
}

func (f *follower) add(x record.Exit) {
	f.queue = append(f.queue, x)
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// take returns what the follower has not heard yet.
func (s *Server) take(f *follower) []record.Exit {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := f.queue
	f.queue = nil
	return q
}

// publish tells all followers.
func (s *Server) publish(x record.Exit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exits[x.ID] = x
	for f := range s.followers {
		f.add(x)
	}
}

// forget removes the durable record of an exit.
func (s *Server) forget(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[id]; c != nil {
		return fmt.Errorf("forget exit of container %q, which is not deleted: %w", id, errdefs.ErrFailedPrecondition)
	}
	if err := os.Remove(s.exitPath(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("forget exit of container %q: %w", id, err)
	}
	delete(s.exits, id)
	return nil
}

// saveExit puts the record on disk, however long that takes; it gives up when
// ctx ends.
func (s *Server) saveExit(ctx context.Context, x record.Exit) error {
	for delay := 20 * time.Millisecond; ; delay = min(2*delay, time.Second) {
		err := record.WriteFile(s.exitPath(x.ID), x, true)
		if err == nil {
			return nil
		}
		if delay == 20*time.Millisecond {
			s.cfg.Log.Error("write exit record; the exit is not told before it is written", "container", x.ID, "err", err)
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(delay):
		}
	}
}
