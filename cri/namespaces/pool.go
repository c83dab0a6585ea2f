// Package namespaces makes and keeps the network, IPC, UTS and user namespaces
// of pods, so that no pause process is needed to hold them.
//
// A set of namespaces is pinned: it lives until [Pool.Release], through crashes
// and restarts of the daemon, with or without a process inside. A few sets are
// made ahead (Config.Warm), also wired to the network where the hook can, and
// [Pool.Get] hands one out in well under a millisecond.
//
// Pins are bind mounts. Each mount of the host's mount namespace is copied and
// torn down again for every container that starts (3.5 us a mount on Linux 6.18,
// 2 ms a container with 200 pods), so the pins are kept in a mount namespace of
// their own, which holds nothing else and is itself pinned at Dir/.mnt: one
// mount, which the kernel does not even copy. Dir/<id>/{net,ipc,uts,user} are
// links to the daemon's open descriptors of the namespaces (/proc/<pid>/fd/N);
// the links are renewed after a restart, by [Pool.Reconcile]. So the paths are
// good for records, CNI plugins and libcontainer, but nobody can open them while
// no daemon runs. Config.Visible puts the bind mounts at these paths instead,
// for network agents that look at them from a container of their own.
//
// It must not: configure interfaces (not even lo), know pods or the CRI.
// Callers: cri/ (Get, Release, Reconcile), main (Run).
//
// Goroutines: Run refills on its own goroutine, which ends with it. Namespace
// work runs on OS threads that are thrown away afterwards, never on the main
// thread. One mutex guards the maps, no kernel call is made under it.
//
// Kernel: 5.8 (statx with mount ids; open_tree and move_mount are 5.2).
package namespaces

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Config of a Pool.
type Config struct {
	Dir  string // holds the pins; created; must not be shared with another pool
	Warm int    // sets kept ready; 0: every Get makes its own

	// RefillDelay is how long no Get may have happened before a warm set is
	// made, so that the making does not compete with a pod that is starting.
	// 0: 50 ms.
	RefillDelay time.Duration
	// Visible pins by bind mounts in the host's mount namespace.
	Visible bool

	// Prewire prepares the network of a warm set, Unwire undoes it when the set
	// is thrown away unused. Both may be nil. A failing Prewire is logged, the
	// set is used as it is.
	Prewire, Unwire func(ctx context.Context, netns string) error

	Log *slog.Logger // nil: slog.Default
}

// Set names the namespaces of one pod by path; "" is the host's.
// It may be stored; the paths stay valid until Release.
type Set struct {
	ID   string `json:"id,omitempty"` // "" when nothing was made
	Net  string `json:"net,omitempty"`
	IPC  string `json:"ipc,omitempty"`
	UTS  string `json:"uts,omitempty"`
	User string `json:"user,omitempty"`
}

// Want says what a pod needs.
type Want struct {
	Net, IPC, UTS, User bool
	// UIDMap and GIDMap are the mappings of the user namespace. The other
	// namespaces then belong to it.
	UIDMap, GIDMap []specs.LinuxIDMapping
	// Hostname is set in the UTS namespace; "" leaves the host's name.
	Hostname string
	// Sysctls with dots ("net.core.somaxconn"); the caller has checked that each
	// belongs to a namespace of the set.
	Sysctls map[string]string
}

// Pool makes, keeps and removes sets.
type Pool struct {
	cfg  Config
	log  *slog.Logger
	pins pinner

	openOnce sync.Once
	openErr  error
	poke     chan struct{} // a Get happened; capacity 1

	mu     sync.Mutex
	sets   map[string]*held // by id, warm ones included
	warm   []*held          // oldest first
	closed bool             // nothing was left when Run ended
}

// held is a set whose namespaces this process has open.
type held struct {
	set   Set
	files map[kind]*os.File
	wired bool
}

// New checks c and starts nothing.
func New(c Config) (*Pool, error) {
	if c.Dir == "" || c.Dir[0] != '/' {
		return nil, fmt.Errorf("namespaces directory %q: allowed is an absolute path: %w", c.Dir, errdefs.ErrInvalidArgument)
	}
	if c.Warm < 0 {
		return nil, fmt.Errorf("warm namespaces %d: allowed is 0 or more: %w", c.Warm, errdefs.ErrInvalidArgument)
	}
	if c.RefillDelay == 0 {
		c.RefillDelay = 50 * time.Millisecond
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	p := &Pool{cfg: c, log: c.Log, poke: make(chan struct{}, 1), sets: map[string]*held{}}
	p.pins = &hiddenPins{dir: c.Dir}
	if c.Visible {
		p.pins = &visiblePins{dir: c.Dir}
	}
	return p, nil
}

// open prepares the directory once.
func (p *Pool) open() error {
	p.openOnce.Do(func() { p.openErr = p.pins.Open() })
	return p.openErr
}

// Run keeps Warm sets ready until ctx ends, then throws the warm ones away and,
// when no set is left at all, everything else it made.
func (p *Pool) Run(ctx context.Context) error {
	if err := p.open(); err != nil {
		return fmt.Errorf("open namespaces directory %q: %w", p.cfg.Dir, err)
	}
	delay := time.Duration(0)
	for {
		if err := p.quiet(ctx, delay); err != nil {
			break
		}
		delay = p.cfg.RefillDelay
		made, err := p.refill(ctx)
		if err != nil {
			p.log.Warn("make warm namespaces", "err", err)
			delay = max(delay, time.Second)
		}
		if made {
			delay = 0 // the next one, unless a Get came in between
			continue
		}
		select {
		case <-ctx.Done():
		case <-p.poke:
			delay = p.cfg.RefillDelay
		case <-p.retry(err):
		}
	}
	p.close()
	return nil
}

// retry wakes after a failure without any Get.
func (p *Pool) retry(err error) <-chan time.Time {
	if err == nil {
		return nil
	}
	return time.After(time.Second)
}

// quiet waits until no Get has happened for d.
func (p *Pool) quiet(ctx context.Context, d time.Duration) error {
	if d == 0 {
		select {
		case <-p.poke:
			d = p.cfg.RefillDelay
		default:
			return ctx.Err()
		}
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.poke:
		case <-time.After(d):
			return nil
		}
	}
}

// refill makes one warm set, if one is missing.
func (p *Pool) refill(ctx context.Context) (made bool, err error) {
	p.mu.Lock()
	enough := len(p.warm) >= p.cfg.Warm
	p.mu.Unlock()
	if enough {
		return false, nil
	}
	h, err := p.create(Want{Net: true, IPC: true, UTS: true})
	if err != nil {
		return false, err
	}
	if p.cfg.Prewire != nil {
		if err := p.cfg.Prewire(ctx, h.set.Net); err != nil {
			p.log.Warn("prewire warm namespace", "path", h.set.Net, "err", err)
		} else {
			h.wired = true
		}
	}
	p.mu.Lock()
	p.warm = append(p.warm, h)
	p.mu.Unlock()
	return true, nil
}

// close throws the warm sets away; those in use stay.
func (p *Pool) close() {
	p.mu.Lock()
	warm := p.warm
	p.warm = nil
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, h := range warm {
		if err := p.discard(ctx, h); err != nil {
			p.log.Warn("remove warm namespaces", "path", h.set.Net, "err", err)
		}
	}
	p.mu.Lock()
	p.closed = len(p.sets) == 0
	closed := p.closed
	p.mu.Unlock()
	if !closed {
		return
	}
	if err := p.pins.Close(); err != nil {
		p.log.Warn("close namespaces directory", "path", p.cfg.Dir, "err", err)
	}
}

// discard removes a warm set that nobody used.
func (p *Pool) discard(ctx context.Context, h *held) error {
	var err error
	if h.wired && p.cfg.Unwire != nil {
		err = p.cfg.Unwire(ctx, h.set.Net)
	}
	return errors.Join(err, p.Release(ctx, h.set))
}

// Get returns a set for one pod: a warm one when it fits, else a new one. With
// nothing wanted it returns the zero Set. On an error nothing is left behind.
//
// Errors: InvalidArgument for a hostname or sysctl that the kernel refuses and
// for mappings without User; ResourceExhausted for the kernel's limits;
// Unavailable when Run has ended and closed the pool.
func (p *Pool) Get(ctx context.Context, w Want) (Set, error) {
	if err := w.check(); err != nil {
		return Set{}, err
	}
	if !w.Net && !w.IPC && !w.UTS && !w.User {
		return Set{}, nil
	}
	if err := p.open(); err != nil {
		return Set{}, fmt.Errorf("open namespaces directory %q: %w", p.cfg.Dir, err)
	}
	if err := ctx.Err(); err != nil {
		return Set{}, err
	}
	h := p.takeWarm(w)
	if h == nil {
		var err error
		if h, err = p.create(w); err != nil {
			return Set{}, fmt.Errorf("make namespaces: %w", err)
		}
	}
	if err := h.configure(w); err != nil {
		return Set{}, errors.Join(err, p.discard(context.WithoutCancel(ctx), h))
	}
	return h.set, nil
}

func (w Want) check() error {
	if w.User && (len(w.UIDMap) == 0 || len(w.GIDMap) == 0) {
		return fmt.Errorf("user namespace without uid and gid mappings: %w", errdefs.ErrInvalidArgument)
	}
	if !w.User && len(w.UIDMap)+len(w.GIDMap) > 0 {
		return fmt.Errorf("mappings without a user namespace: %w", errdefs.ErrInvalidArgument)
	}
	if len(w.Hostname) > 64 {
		return fmt.Errorf("hostname %q: allowed are 64 bytes: %w", w.Hostname, errdefs.ErrInvalidArgument)
	}
	return nil
}

// takeWarm pops the oldest warm set when w is what they are made for.
func (p *Pool) takeWarm(w Want) *held {
	if p.cfg.Warm == 0 {
		return nil
	}
	select {
	case p.poke <- struct{}{}:
	default:
	}
	if !w.Net || !w.IPC || !w.UTS || w.User {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.warm) == 0 {
		return nil
	}
	h := p.warm[0]
	p.warm = append([]*held(nil), p.warm[1:]...)
	return h
}

// create makes and pins a new set.
func (p *Pool) create(w Want) (*held, error) {
	files, err := makeNamespaces(w)
	if err != nil {
		return nil, err
	}
	id := newID()
	h := &held{set: p.pathSet(id, files), files: files}
	// Known before it is pinned, or Reconcile would take it for a stale one.
	if !p.add(h) {
		closeFiles(files)
		return nil, errClosed()
	}
	if err := p.pins.Pin(id, files); err != nil {
		return nil, errors.Join(fmt.Errorf("pin namespaces %q: %w", id, err), p.Release(context.Background(), h.set))
	}
	return h, nil
}

// add makes a set known; false after close.
func (p *Pool) add(h *held) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		p.sets[h.set.ID] = h
	}
	return !p.closed
}

func errClosed() error {
	return fmt.Errorf("namespace pool is closed: %w", errdefs.ErrUnavailable)
}

func (p *Pool) pathSet(id string, files map[kind]*os.File) Set {
	path := func(k kind) string {
		if files[k] == nil {
			return ""
		}
		return pinPath(p.cfg.Dir, id, k)
	}
	return Set{ID: id, Net: path(kindNet), IPC: path(kindIPC), UTS: path(kindUTS), User: path(kindUser)}
}

// Release unpins a set: the kernel frees the namespaces as soon as the last
// process inside is gone (a network namespace some time later, on a worker of
// its own). A set that is gone already, or the zero Set, is no error.
func (p *Pool) Release(_ context.Context, s Set) error {
	if s.ID == "" {
		return nil
	}
	if !validID(s.ID) {
		return fmt.Errorf("namespace set %q: not an id of ours: %w", s.ID, errdefs.ErrInvalidArgument)
	}
	if err := p.open(); err != nil {
		return fmt.Errorf("open namespaces directory %q: %w", p.cfg.Dir, err)
	}
	p.mu.Lock()
	h, closed := p.sets[s.ID], p.closed
	p.mu.Unlock()
	if closed {
		return nil // nothing was left
	}
	// Forgotten only when it is gone: Run closes the pool when it knows of none.
	defer p.forget(s.ID)
	if h != nil {
		closeFiles(h.files)
	}
	if err := p.pins.Unpin(s.ID); err != nil {
		return fmt.Errorf("release namespaces %q: %w", s.ID, err)
	}
	return nil
}

func (p *Pool) forget(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.sets, id)
}

// Reconcile makes the world after a restart: the sets in live get valid paths
// again, every other set that an earlier daemon pinned is removed, half-made
// ones too (their network through Unwire first). Sets that this process has
// made itself are left alone. Call it before anything opens a path of a Set.
//
// Errors: NotFound for a live set whose pins are gone (after a reboot); the
// others are served all the same.
func (p *Pool) Reconcile(ctx context.Context, live []string) error {
	if err := p.open(); err != nil {
		return fmt.Errorf("open namespaces directory %q: %w", p.cfg.Dir, err)
	}
	pinned, err := p.pins.List()
	if err != nil {
		return fmt.Errorf("list pinned namespaces in %q: %w", p.cfg.Dir, err)
	}
	want := map[string]bool{}
	for _, id := range live {
		if id != "" {
			want[id] = true
		}
	}
	var errs []error
	for _, id := range pinned {
		if p.has(id) {
			delete(want, id)
			continue
		}
		if !want[id] {
			errs = append(errs, p.removeStale(ctx, id))
			continue
		}
		delete(want, id)
		errs = append(errs, p.adopt(id))
	}
	for id := range want {
		if !p.has(id) {
			errs = append(errs, fmt.Errorf("namespaces %q are no longer pinned: %w", id, errdefs.ErrNotFound))
		}
	}
	return errors.Join(errs...)
}

func (p *Pool) has(id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sets[id] != nil
}

// adopt opens the pins of a live set and renews its paths.
func (p *Pool) adopt(id string) error {
	files, err := p.pins.Adopt(id)
	if err != nil {
		return fmt.Errorf("adopt namespaces %q: %w", id, err)
	}
	if len(files) == 0 {
		return errors.Join(fmt.Errorf("namespaces %q are no longer pinned: %w", id, errdefs.ErrNotFound), p.pins.Unpin(id))
	}
	p.add(&held{set: p.pathSet(id, files), files: files})
	return nil
}

// removeStale removes a set of an earlier daemon that no pod owns.
func (p *Pool) removeStale(ctx context.Context, id string) error {
	if p.cfg.Unwire != nil {
		if err := p.adopt(id); err == nil {
			if err := p.cfg.Unwire(ctx, pinPath(p.cfg.Dir, id, kindNet)); err != nil {
				p.log.Warn("unwire stale namespace", "path", pinPath(p.cfg.Dir, id, kindNet), "err", err)
			}
		}
	}
	return p.Release(ctx, Set{ID: id})
}

// newID is 16 hex digits.
func newID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return hex.EncodeToString(b[:])
}

func validID(id string) bool {
	b, err := hex.DecodeString(id)
	return err == nil && len(b) == 8
}

func closeFiles(files map[kind]*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// ignore turns the errors in these into none.
func ignore(err error, these ...error) error {
	for _, t := range these {
		if errors.Is(err, t) {
			return nil
		}
	}
	return err
}
