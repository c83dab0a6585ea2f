//go:build linux

// Package shim is the daemon's side of the shim: it keeps one nodeagent-shim
// process running for the node and asks it to start, signal, exec in and delete
// containers. It must not import libcontainer and knows no image, network or
// pod. cri/ calls it through cmd/nodeagent.
//
// The shim process survives the daemon; so does every container. Run finds the
// shim that runs or starts one; while there is none, calls wait for it until
// their context ends. Calls may be made from any goroutine. Run owns the
// connection and one goroutine that follows the exits; Client.mu guards the
// current connection only.
//
// Errors carry the classes of github.com/containerd/errdefs.
//
// Linux 5.3 (pidfd); exit codes stay exact after the death of the shim alone on
// every kernel, after the death of shim and reaper together since 6.15.
package shim

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/nodeagent/nodeagent/shim/api"
)

// Config says which shim to run and where it keeps its files.
type Config struct {
	Binary        string // path of nodeagent-shim
	StateDir      string // State/shim; dies with the boot
	ExitDir       string // Root/shim/exits; survives it
	Log           *slog.Logger
	SystemdCgroup bool // the cgroup driver of the containers to start
}

// Client talks to the shim.
type Client struct {
	cfg   Config
	exits chan Exit

	mu    sync.Mutex
	conn  *connection   // nil: none
	ready chan struct{} // closed while conn is set
}

// Spec is a container to start.
type Spec struct {
	ID, SandboxID string
	// OCI is complete: Process, Root.Path (mounted), Mounts, Linux. It is not
	// changed.
	OCI        *specs.Spec
	LogPath    string // "": no log
	Terminal   bool
	Stdin      bool
	StdinOnce  bool // stdin ends with the first attach
	MaxLogLine int  // bytes, 0: 16384
	Pause      bool // holder of a pod's PID namespace: no stdio
}

// State is what the shim knows of a container.
type State struct {
	ID, SandboxID        string
	Pid                  int
	StartTime            uint64 // clock ticks since boot
	CreatedAt, StartedAt time.Time
	Exit                 *Exit             // nil while it runs
	CgroupPaths          map[string]string // by controller; cgroup v2 has the key ""
}

// Exit is how a container ended.
type Exit struct {
	ID        string
	Pid       int
	Code      int // 128 + Signal when a signal ended it
	Signal    int
	Known     bool // false: code and signal are not known
	OOMKilled bool
	At        time.Time
}

// ExecOptions is a command to run in a container.
type ExecOptions struct {
	Process   *specs.Process
	Timeout   time.Duration // 0: none
	MaxOutput int           // bytes kept of each stream, 0: 16 MiB; the rest is dropped
}

// ExecResult is what a command did.
type ExecResult struct {
	Stdout, Stderr []byte
	Code           int
	TimedOut       bool // it was killed, with all that it started
}

// StreamOptions is an exec or attach with streams. Exec and Attach take the
// files over: they are closed in this process in any case.
type StreamOptions struct {
	Process               *specs.Process // of an exec
	Stdin, Stdout, Stderr *os.File       // pipe ends; nil: not wanted
	Terminal              bool
	Width, Height         uint16
}

// New returns a client; Run makes it work.
func New(cfg Config) (*Client, error) {
	var errs []error
	for _, p := range []struct{ what, path string }{
		{"shim binary", cfg.Binary}, {"shim state directory", cfg.StateDir}, {"shim exit directory", cfg.ExitDir},
	} {
		if !filepath.IsAbs(p.path) {
			errs = append(errs, fmt.Errorf("%s %q must be an absolute path", p.what, p.path))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Client{cfg: cfg, exits: make(chan Exit, 64), ready: make(chan struct{})}, nil
}

// Exits delivers every exit at least once: when Run connects all that are not
// forgotten, then each when it happens. The receiver must keep receiving.
func (c *Client) Exits() <-chan Exit { return c.exits }

// PauseBinary is the path of a root filesystem with the program /pause: the
// first process of a PID namespace, which reaps orphans and ends on SIGTERM. The
// shim makes it at its start. Mount it read-only; it has the directories /proc,
// /dev and /sys.
func (c *Client) PauseBinary() string { return filepath.Join(c.cfg.StateDir, "pause") }

func exitOf(x *api.ContainerExit) *Exit {
	if x == nil {
		return nil
	}
	return &Exit{
		ID: x.Id, Pid: int(x.Pid), Code: int(x.Code), Signal: int(x.Signal),
		Known: x.Known, OOMKilled: x.OomKilled, At: time.Unix(0, x.At),
	}
}

func stateOf(s *api.ContainerState) State {
	return State{
		ID: s.Id, SandboxID: s.SandboxId, Pid: int(s.Pid), StartTime: s.StartTime,
		CreatedAt: time.Unix(0, s.CreatedAt), StartedAt: time.Unix(0, s.StartedAt),
		Exit: exitOf(s.Exit), CgroupPaths: s.CgroupPaths,
	}
}

// detached is how the reaper starts: in a session of its own, so that no
// terminal and no signal to the daemon's group reaches it.
func detached() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }
