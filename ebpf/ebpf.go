//go:build linux

// Package ebpf enforces NetworkPolicy on the pods of a node.
//
// Engine joins what the packages below it do: objects from a Source and the
// local pods that the runtime names go into the compiler (ebpf/policy), whose
// plans the datapath (ebpf/datapath) writes. A pod's interface passes nothing
// until its rows are live: the runtime calls PodStarting before it brings the
// interface up. Programs, tables and links outlive the process; the next one
// builds its tables completely before it replaces the programs.
//
// The engine must not import other domains: cmd joins it with the runtime and
// the network. Run is one goroutine that owns compiler and datapath, one that
// reads events, and one that watches addresses and interfaces; the other
// methods send to it and wait. Kernel 5.16 or later; tcx links from 6.6.
package ebpf

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/ebpf/datapath"
	"github.com/nodeagent/nodeagent/ebpf/flows"
	"github.com/nodeagent/nodeagent/ebpf/objects"
	"github.com/nodeagent/nodeagent/ebpf/policy"
)

// Source tells the cluster's objects: all of each kind as soon as all are
// known, and then what changes. Pods may leave out those of this node: the
// runtime names them.
type Source interface {
	Run(ctx context.Context, set func(objects.Change)) error
}

// Config of an Engine. Zero fields take the defaults named.
type Config struct {
	BPFFS string // a BPF filesystem, mounted if it is none; "": /sys/fs/bpf
	Name  string // of the instance, a folder in BPFFS; "": nodeagent
	// Uplinks are patterns (path.Match) of the NICs' names; nil: those of the default routes.
	Uplinks  []string
	Services []netip.Prefix // where service addresses are taken from: egress to them is judged behind the translation
	Audit    []string       // namespaces whose pods' packets are judged and told, not dropped
	// StartWait is how long a pod's start waits for its rows; 0: 10 s. After that the start fails.
	StartWait time.Duration
	Source    Source // nil: there are no objects, nothing is isolated
	Datapath  datapath.Config
	Log       *slog.Logger
}

// Pod is one of this node's, as the runtime knows it.
type Pod struct {
	SandboxID string
	objects.PodKey
	UID       string
	Created   time.Time
	Labels    map[string]string // used until the source has the pod
	Interface int               // index of its host-side interface
	Netns     string            // path; its sockets tell flows from before it was watched. "": not known
	IPs       []netip.Addr
}

// Engine enforces.
type Engine struct {
	cfg   Config
	calls chan call
	ended chan struct{}

	mu          sync.Mutex // guards what follows
	subscribers map[chan Flow]bool
	names       map[uint32]objects.PodKey // of endpoints
	lost        uint64                    // flows not told: a subscriber was slow
	recent      []Flow                    // a ring when it is full
	told        int                       // flows that came
	drawn       flows.Event               // one of the checkable flows since the last check
	drawnOf     int                       // of so many

	enforced *prometheus.HistogramVec // by what changed, in seconds

	loaded *datapath.Datapath // by Load, until Run has it
}

// call is work for Run's goroutine. done gets what came of it once it is in
// the kernel.
type call struct {
	do   func(*state) error
	done chan error
	late bool // needs the first complete state
}

// New checks the configuration. It starts nothing.
func New(cfg Config) (*Engine, error) {
	cfg.BPFFS = cmp.Or(cfg.BPFFS, "/sys/fs/bpf")
	cfg.Name = cmp.Or(cfg.Name, "nodeagent")
	cfg.StartWait = cmp.Or(cfg.StartWait, 10*time.Second)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	var errs []error
	if !filepath.IsAbs(cfg.BPFFS) {
		errs = append(errs, fmt.Errorf("BPF filesystem %q: not an absolute path: %w", cfg.BPFFS, errdefs.ErrInvalidArgument))
	}
	if filepath.Base(cfg.Name) != cfg.Name {
		errs = append(errs, fmt.Errorf("name %q: not a file's name: %w", cfg.Name, errdefs.ErrInvalidArgument))
	}
	errs = append(errs, checkUplinks(cfg.Uplinks))
	for _, s := range cfg.Services {
		if !s.IsValid() {
			errs = append(errs, fmt.Errorf("service range %q: %w", s, errdefs.ErrInvalidArgument))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	cfg.Datapath.Log = cfg.Log
	return &Engine{
		cfg: cfg, calls: make(chan call), ended: make(chan struct{}),
		subscribers: map[chan Flow]bool{}, names: map[uint32]objects.PodKey{}, enforced: newEnforced(),
	}, nil
}

func checkUplinks(patterns []string) error {
	var errs []error
	for _, p := range patterns {
		if _, err := filepath.Match(p, ""); err != nil {
			errs = append(errs, fmt.Errorf("uplink %q: %w", p, errors.Join(err, errdefs.ErrInvalidArgument)))
		}
	}
	return errors.Join(errs...)
}

// Load loads the programs, which tells whether this host can enforce. Run does it
// unless it was done. Nothing is attached. Not beside Run.
func (e *Engine) Load() (err error) {
	if e.loaded != nil {
		return nil
	}
	if err := datapath.Mount(e.cfg.BPFFS); err != nil {
		return err
	}
	dcfg := e.cfg.Datapath
	dcfg.Dir = filepath.Join(e.cfg.BPFFS, e.cfg.Name)
	e.loaded, err = datapath.Open(dcfg)
	return err
}

// Run loads the programs and enforces until ctx ends. What is attached stays.
func (e *Engine) Run(ctx context.Context) error {
	defer close(e.ended)
	if err := e.Load(); err != nil {
		return err
	}
	d := e.loaded
	e.loaded = nil
	s := newState(e.cfg, d, e.name)
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer func() {
		cancel()
		wg.Wait()
		s.close()
	}()
	failed := make(chan error, 3)
	start := func(what string, run func(context.Context) error) {
		wg.Go(func() {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				failed <- fmt.Errorf("%s: %w", what, err)
			}
		})
	}
	start("flow events", func(ctx context.Context) error { return d.Events(ctx, e.tell) })
	start("host's interfaces", func(ctx context.Context) error { return watchHost(ctx, func(h host) { e.hostChanged(ctx, h) }) })
	if e.cfg.Source != nil {
		start("source of policies", func(ctx context.Context) error {
			return e.cfg.Source.Run(ctx, func(c objects.Change) { _ = e.Change(ctx, c) })
		})
	} else {
		s.synced = true
	}
	return e.loop(ctx, s, failed)
}

func (e *Engine) loop(ctx context.Context, s *state, failed <-chan error) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var waiting []call
	for {
		var batch []call
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-tick.C:
			s.settle()
			s.collect()
			s.selfCheck(e.draw)
			continue
		case c := <-e.calls:
			batch = append(batch, c)
		}
		batch = append(batch, e.more()...)
		batch = append(waiting, batch...)
		waiting = s.perform(batch)
	}
}

// more takes what else is there to be done, so that one update serves all.
func (e *Engine) more() []call {
	var out []call
	for len(out) < 256 {
		select {
		case c := <-e.calls:
			out = append(out, c)
		default:
			return out
		}
	}
	return out
}

func (e *Engine) call(ctx context.Context, late bool, do func(*state) error) error {
	c := call{do: do, done: make(chan error, 1), late: late}
	select {
	case e.calls <- c:
	case <-e.ended:
		return fmt.Errorf("policy engine has ended: %w", errdefs.ErrUnavailable)
	case <-ctx.Done():
		return fmt.Errorf("wait for the policy engine: %w", context.Cause(ctx))
	}
	select {
	case err := <-c.done:
		return err
	case <-e.ended:
		return fmt.Errorf("policy engine has ended: %w", errdefs.ErrUnavailable)
	case <-ctx.Done():
		return fmt.Errorf("wait for the policy engine: %w", context.Cause(ctx))
	}
}

// Change tells what became of the cluster's objects and returns when that is
// enforced, or, before the first Reconcile, noted. The first must be whole.
func (e *Engine) Change(ctx context.Context, c objects.Change) error {
	if c.Seen.IsZero() {
		c.Seen = time.Now()
	}
	defer func() { e.enforced.WithLabelValues("objects").Observe(time.Since(c.Seen).Seconds()) }()
	return e.call(ctx, false, func(s *state) error {
		s.change(&c)
		return nil
	})
}

// PodStarting is to be called before a pod's interface goes up. When it returns
// nil the pod's rows are live. An error means that nothing passes.
func (e *Engine) PodStarting(ctx context.Context, p Pod) error {
	ctx, cancel := context.WithTimeoutCause(ctx, e.cfg.StartWait, fmt.Errorf("no policy for pod %s after %s: %w", p.PodKey, e.cfg.StartWait, errdefs.ErrUnavailable))
	defer cancel()
	began := time.Now()
	defer func() { e.enforced.WithLabelValues("pod").Observe(time.Since(began).Seconds()) }()
	return e.call(ctx, true, func(s *state) error {
		if err := ctx.Err(); err != nil {
			return err // nobody waits for it any more
		}
		return s.add(p)
	})
}

// PodGone is to be called when a pod's interface is gone or about to go. It is
// idempotent.
func (e *Engine) PodGone(ctx context.Context, sandboxID string) error {
	return e.call(ctx, false, func(s *state) error { return s.remove(sandboxID) })
}

// Reconcile tells the pods that live, once after start: the engine begins to
// enforce when it has them and the source's first state.
func (e *Engine) Reconcile(ctx context.Context, live []Pod) error {
	return e.call(ctx, false, func(s *state) error { return s.reconcile(live) })
}

func (e *Engine) hostChanged(ctx context.Context, h host) {
	_ = e.call(ctx, false, func(s *state) error { return s.setHost(h) })
}

// Status is what the engine is doing.
type Status struct {
	Ready          bool // enforces: it knows the objects and the live pods
	Pods           int
	Uplinks        []string
	Faults         map[objects.PodKey][]string // what of a policy cannot be used
	Problems       []string                    // what is denied for want of room
	Tables         policy.Stats
	Rows           datapath.Room // blocks of 128 bytes
	Conntrack      datapath.Conntrack
	Limits         policy.Limits
	Counters       []datapath.Counter
	Checked, Drift uint64 // flows that the self-check judged, and on which program and reference differed
	Lost           uint64 // flow events that a reader was too slow for
}

// Status asks.
func (e *Engine) Status(ctx context.Context) (Status, error) {
	var out Status
	err := e.call(ctx, false, func(s *state) error {
		var err error
		out, err = s.status()
		return err
	})
	e.mu.Lock()
	defer e.mu.Unlock()
	out.Lost = e.lost
	return out, err
}

// SetUplinks replaces Config.Uplinks and returns when the programs are on the
// NICs that match. Those that match no longer pass everything.
//
// Errors: InvalidArgument for a pattern; nothing is changed.
func (e *Engine) SetUplinks(ctx context.Context, patterns []string) error {
	if err := checkUplinks(patterns); err != nil {
		return err
	}
	return e.call(ctx, false, func(s *state) error {
		s.cfg.Uplinks = patterns
		if s.ready {
			s.attachUplinks()
		}
		return nil
	})
}

// Alive returns once Run's goroutine has come round. An error means that it
// did not before ctx ended.
func (e *Engine) Alive(ctx context.Context) error {
	return e.call(ctx, false, func(*state) error { return nil })
}

// Flow is an event and the local pod that it is about.
type Flow struct {
	flows.Event
	Pod  objects.PodKey
	When time.Time
}

// remembered is how many flows Recent knows at most.
const remembered = 1024

// Recent returns the latest flows, oldest first.
func (e *Engine) Recent() []Flow {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.recentLocked()
}

func (e *Engine) recentLocked() []Flow {
	if len(e.recent) < remembered {
		return slices.Clone(e.recent)
	}
	at := e.told % remembered // the oldest
	return slices.Concat(e.recent[at:], e.recent[:at])
}

// Subscribe returns the latest flows, and then flows as they happen until ctx
// ends. Who is slow misses some.
func (e *Engine) Subscribe(ctx context.Context) <-chan Flow {
	in, out := make(chan Flow, 2*remembered), make(chan Flow)
	e.mu.Lock()
	for _, f := range e.recentLocked() {
		in <- f
	}
	e.subscribers[in] = true
	e.mu.Unlock()
	go func() { // ends with ctx
		defer close(out)
		defer func() {
			e.mu.Lock()
			delete(e.subscribers, in)
			e.mu.Unlock()
		}()
		for {
			select {
			case <-ctx.Done():
				return
			case f := <-in:
				select {
				case out <- f:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return out
}

func (e *Engine) tell(ev flows.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if checkable(&ev) { // each with the same chance, not always the first of a second
		if e.drawnOf++; rand.N(e.drawnOf) == 0 {
			e.drawn = ev
		}
	}
	f := Flow{ev, e.names[ev.Endpoint], wall(ev.Time)}
	if len(e.recent) < remembered {
		e.recent = append(e.recent, f)
	} else {
		e.recent[e.told%remembered] = f
	}
	e.told++
	for ch := range e.subscribers {
		select {
		case ch <- f:
		default:
			e.lost++
		}
	}
}

// draw returns one of the flows that came since the last call; false: none.
func (e *Engine) draw() (flows.Event, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	any := e.drawnOf > 0
	e.drawnOf = 0
	return e.drawn, any
}

// wall is the time of day at a time of the monotonic clock.
func wall(since time.Duration) time.Time {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return time.Now()
	}
	return time.Now().Add(since - time.Duration(now.Nano()))
}

// name notes which pod an endpoint is; the zero key: none any more.
func (e *Engine) name(id uint32, key objects.PodKey) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.names[id] = key; key == (objects.PodKey{}) {
		delete(e.names, id)
	}
}

// audited says whether a namespace is only watched.
func (c *Config) audited(ns string) bool { return slices.Contains(c.Audit, ns) }
