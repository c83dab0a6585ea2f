package metrics

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

// Group reads one control group; cgroups.Group is one.
type Group interface {
	Read(s *sample.Cgroup, want sample.Set) error
	Pids(pids []int) ([]int, error)
	Processes() (uint64, error)
}

// Config of a Sampler.
type Config struct {
	// Group resolves the group of a container in a pod's group, or the pod's
	// own for an empty id. Required.
	Group func(parent, id string) (Group, error)
	// Writable measures a container's writable layer; it may be slow. nil: the
	// layers are not measured.
	Writable func(ctx context.Context, containerID string) (bytes, inodes uint64, err error)
	// WritableDir is a directory on the filesystem of the writable layers.
	WritableDir string

	MaxAge         time.Duration // of a sample that is handed out again; 0: 200 ms
	WritableMaxAge time.Duration // of a writable layer's figure; 0: 10 s
	Log            *slog.Logger
}

// Sampler takes samples of pods and containers. Its methods may be called from
// several goroutines.
type Sampler struct {
	cfg       Config
	network   network
	writables *writables // nil: not measured

	taken, reused atomic.Uint64 // samples of groups, for the exposition

	entering sync.Mutex // one caller at a time enters namespaces

	mu     sync.Mutex // guards all below
	groups map[groupKey]*entry
	nets   map[string]*netEntry // by pod
	pruned time.Time
}

type groupKey struct{ parent, id string }

// entry keeps the last sample of one group and what rates are made of.
type entry struct {
	used atomic.Int64 // unix ns

	mu    sync.Mutex // guards all below
	group Group
	meter meter
	last  *reading
}

// reading is immutable once published.
type reading struct {
	at        time.Time
	want      sample.Set
	cgroup    sample.Cgroup
	rate      sample.Rate
	process   sample.Process
	processes uint64
}

type netEntry struct {
	used atomic.Int64

	mu    sync.Mutex // guards all below
	index int        // of the host's end; 0 is not known
	last  *sample.Network
}

// New returns a Sampler; nothing runs until the first sample.
func New(cfg Config) (*Sampler, error) {
	if cfg.Group == nil {
		return nil, fmt.Errorf("metrics: Config.Group is missing: %w", errdefs.ErrInvalidArgument)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxAge == 0 {
		cfg.MaxAge = 200 * time.Millisecond
	}
	if cfg.WritableMaxAge == 0 {
		cfg.WritableMaxAge = 10 * time.Second
	}
	s := &Sampler{cfg: cfg, groups: map[groupKey]*entry{}, nets: map[string]*netEntry{}}
	if cfg.Writable != nil {
		w := &writables{usage: cfg.Writable, dir: cfg.WritableDir, maxAge: cfg.WritableMaxAge, layers: map[string]*layer{}}
		w.ctx, w.cancel = context.WithCancel(context.Background())
		s.writables = w
	}
	return s, nil
}

// Close ends what runs in the background and waits for it.
func (s *Sampler) Close() error {
	if s.writables != nil {
		s.writables.close()
	}
	s.network.close()
	return nil
}

// firstWait is how long a sample waits for writable layers that were never
// measured, all of them together.
const firstWait = 50 * time.Millisecond

// Sample reads the targets. What cannot be read of one of them (it ended
// meanwhile) is left empty in its sample; see sample.Pod.
//
// Errors: only that of ctx.
func (s *Sampler) Sample(ctx context.Context, targets []sample.PodTarget, depth sample.Depth) ([]sample.Pod, error) {
	now := time.Now()
	s.prune(now)
	s.startLayers(targets, now)
	pods := make([]sample.Pod, len(targets))
	for i, t := range targets {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("sample %d pods: %w", len(targets), err)
		}
		s.pod(&pods[i], t, depth)
	}
	if depth >= sample.Pods {
		s.networks(pods)
	}
	s.addLayers(ctx, pods, now)
	return pods, nil
}

// pod reads the groups of one pod.
func (s *Sampler) pod(p *sample.Pod, t sample.PodTarget, depth sample.Depth) {
	p.Target = t
	p.Containers = make([]*sample.Container, len(t.Containers))
	for i, ct := range t.Containers {
		c := &sample.Container{Target: ct}
		if r := s.read(groupKey{t.CgroupParent, ct.ID}, depth.Parts(), ct.StartedAt, ct.Pid, depth == sample.Everything); r != nil {
			c.Cgroup, c.Rate, c.Process = r.cgroup, r.rate, r.process
		}
		p.Containers[i] = c
	}
	if depth < sample.Pods || t.CgroupParent == "" {
		return
	}
	if r := s.read(groupKey{t.CgroupParent, ""}, sample.Basic, t.CreatedAt, 0, false); r != nil {
		p.Cgroup, p.Rate, p.Processes = r.cgroup, r.rate, r.processes
	}
}

// read returns a reading of a group that is young enough, or nil if the group
// is gone. processes: count descriptors too.
func (s *Sampler) read(key groupKey, want sample.Set, started time.Time, init int, processes bool) *reading {
	e := s.entry(key)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.last != nil && e.last.want&want == want && time.Since(e.last.at) < s.cfg.MaxAge {
		s.reused.Add(1)
		return e.last
	}
	r, err := e.read(s.cfg.Group, key, want, started, init, processes)
	if err != nil {
		if !errdefs.IsNotFound(err) {
			s.cfg.Log.Warn("read cgroup for a sample", "container", key.id, "path", key.parent, "err", err)
		}
		// What comes back under this name begins anew.
		e.last, e.meter = nil, meter{}
		return nil
	}
	s.taken.Add(1)
	e.last = r
	return r
}

func (s *Sampler) entry(key groupKey) *entry {
	s.mu.Lock()
	e := s.groups[key]
	if e == nil {
		e = &entry{}
		s.groups[key] = e
	}
	s.mu.Unlock()
	e.used.Store(time.Now().UnixNano())
	return e
}

// read reads the kernel. Caller holds mu.
func (e *entry) read(resolve func(parent, id string) (Group, error), key groupKey, want sample.Set, started time.Time, init int, processes bool) (*reading, error) {
	if e.group == nil {
		g, err := resolve(key.parent, key.id)
		if err != nil {
			return nil, err
		}
		e.group = g
	}
	r := &reading{at: time.Now(), want: want}
	if err := e.group.Read(&r.cgroup, want); err != nil {
		return nil, err
	}
	if r.cgroup.Have&sample.CPU != 0 {
		r.rate = e.meter.add(point{r.cgroup.Time, r.cgroup.CPU.Usage}, started)
	}
	var err error
	for i := range r.cgroup.IO {
		d := &r.cgroup.IO[i]
		d.Device = deviceName(d.Major, d.Minor)
	}
	if processes {
		c := counters.Get().(*counter)
		defer counters.Put(c)
		err = c.count(e.group, init, &r.process)
	} else if key.id == "" {
		r.processes, err = e.group.Processes()
	}
	return r, err
}

// networks fills in the counters of the pods' interfaces.
func (s *Sampler) networks(pods []sample.Pod) {
	var foreign []int // pods whose namespace has to be entered
	for i := range pods {
		t := &pods[i].Target
		if t.Netns == "" {
			continue
		}
		e := s.netEntry(t.ID)
		e.mu.Lock()
		switch {
		case e.last != nil && time.Since(e.last.Time) < s.cfg.MaxAge:
			pods[i].Network = e.last
		case t.HostInterface != "":
			net, err := s.network.hostSide(t.HostInterface, &e.index)
			if err != nil {
				s.cfg.Log.Debug("read network counters", "sandbox", t.ID, "err", err)
				foreign = append(foreign, i) // the link may have another name by now
			}
			e.last, pods[i].Network = net, net
		default:
			foreign = append(foreign, i)
		}
		e.mu.Unlock()
	}
	s.enterNamespaces(pods, foreign)
}

func (s *Sampler) enterNamespaces(pods []sample.Pod, which []int) {
	if len(which) == 0 {
		return
	}
	s.entering.Lock()
	defer s.entering.Unlock()
	// Whoever held the lock may have done the work.
	which = slices.DeleteFunc(which, func(p int) bool {
		pods[p].Network = s.netEntry(pods[p].Target.ID).fresh(s.cfg.MaxAge)
		return pods[p].Network != nil
	})
	paths := make([]string, len(which))
	for i, p := range which {
		paths[i] = pods[p].Target.Netns
	}
	nets, errs := inNamespaces(paths)
	for i, p := range which {
		if errs[i] != nil {
			s.cfg.Log.Debug("read network counters", "sandbox", pods[p].Target.ID, "err", errs[i])
			continue
		}
		pods[p].Network = nets[i]
		e := s.netEntry(pods[p].Target.ID)
		e.mu.Lock()
		e.last = nets[i]
		e.mu.Unlock()
	}
}

// fresh returns the last counters if they are younger than maxAge.
func (e *netEntry) fresh(maxAge time.Duration) *sample.Network {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.last != nil && time.Since(e.last.Time) < maxAge {
		return e.last
	}
	return nil
}

func (s *Sampler) netEntry(pod string) *netEntry {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.nets[pod]
	if e == nil {
		e = &netEntry{}
		s.nets[pod] = e
	}
	e.used.Store(time.Now().UnixNano())
	return e
}

// startLayers asks for all writable layers, so that they are measured while
// the groups are read.
func (s *Sampler) startLayers(targets []sample.PodTarget, now time.Time) {
	if s.writables == nil {
		return
	}
	for _, t := range targets {
		for _, c := range t.Containers {
			s.writables.want(c.ID, now)
		}
	}
}

// addLayers fills in the writable layers' figures.
func (s *Sampler) addLayers(ctx context.Context, pods []sample.Pod, now time.Time) {
	if s.writables == nil {
		return
	}
	timeout := time.NewTimer(firstWait)
	defer timeout.Stop()
	expired := false
	for i := range pods {
		for _, c := range pods[i].Containers {
			last, first := s.writables.want(c.Target.ID, now)
			if last == nil && !expired {
				select {
				case <-first:
				case <-ctx.Done():
					expired = true
				case <-timeout.C:
					expired = true
				}
				last = s.writables.get(c.Target.ID)
			}
			c.Writable = last
		}
	}
}

// keepFor is how long a target is remembered that nobody asks for.
const keepFor = 10 * time.Minute

// prune forgets what was not asked for in a long time.
func (s *Sampler) prune(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.pruned) < keepFor/10 {
		return
	}
	s.pruned = now
	before := now.Add(-keepFor)
	for key, e := range s.groups {
		if e.used.Load() < before.UnixNano() {
			delete(s.groups, key)
		}
	}
	for id, e := range s.nets {
		if e.used.Load() < before.UnixNano() {
			delete(s.nets, id)
		}
	}
	if s.writables != nil {
		s.writables.prune(before)
	}
}
