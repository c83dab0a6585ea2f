//go:build linux

package ebpf

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"github.com/nodeagent/nodeagent/ebpf/datapath"
	"github.com/nodeagent/nodeagent/ebpf/objects"
	"github.com/nodeagent/nodeagent/ebpf/policy"
	"github.com/nodeagent/nodeagent/ebpf/sockets"
)

// state belongs to Run's goroutine.
type state struct {
	cfg      Config
	name     func(uint32, objects.PodKey)
	compiler *policy.Compiler
	d        *datapath.Datapath

	known      known
	host       host
	synced     bool // the source's first state is here
	reconciled bool // so are the live pods
	ready      bool // both were enforced
	dirty      bool // something was told to the compiler

	pods    map[string]*local         // by sandbox
	here    map[objects.PodKey]*local // of several with one name the youngest
	free    []uint32                  // numbers of endpoints
	next    uint32
	uplinks map[int]*uplink

	unsettled      bool
	checked, drift uint64
	rest           time.Time // no flow is checked before
	problems       []string
}

type local struct {
	Pod
	id       uint32
	attached *datapath.Attached
}

type uplink struct {
	name     string
	attached *datapath.Attached
}

func newState(cfg Config, d *datapath.Datapath, name func(uint32, objects.PodKey)) *state {
	s := &state{
		cfg: cfg, name: name, d: d, compiler: policy.New(policy.Limits{}), next: 1, dirty: true,
		pods: map[string]*local{}, here: map[objects.PodKey]*local{}, uplinks: map[int]*uplink{},
	}
	s.compiler.SetServices(cfg.Services)
	return s
}

func (s *state) close() {
	for _, p := range s.pods {
		if p.attached != nil {
			p.attached.Close()
		}
	}
	for _, u := range s.uplinks {
		u.attached.Close()
	}
	s.d.Close()
}

// perform does the calls, brings the kernel up to date and answers. It returns
// the calls that have to wait for the first complete state.
func (s *state) perform(batch []call) (waiting []call) {
	errs := make([]error, len(batch))
	held := make([]bool, len(batch))
	run := func(late bool) {
		for i, c := range batch {
			if c.late == late && !held[i] {
				errs[i] = c.do(s)
			}
		}
	}
	run(false)
	becomes := !s.ready && s.synced && s.reconciled
	for i, c := range batch {
		if c.late && !s.ready && !becomes {
			held[i] = true
			waiting = append(waiting, c)
		}
	}
	err := s.update(becomes)
	run(true)
	err = errors.Join(err, s.update(false))
	for i, c := range batch {
		if !held[i] {
			if c.late {
				errs[i] = errors.Join(errs[i], err)
			}
			c.done <- errs[i]
		}
	}
	return waiting
}

// update enforces what is known. Its error is that of the tables' writing.
func (s *state) update(becomes bool) error {
	if !s.ready && !becomes {
		return nil
	}
	if !s.dirty {
		return nil
	}
	s.dirty = false
	plan := s.compiler.Update()
	err := s.d.Apply(plan)
	s.unsettled = s.unsettled || !plan.Empty()
	s.note(plan, err)
	if becomes {
		s.ready = true
		s.attachAll()
	}
	return err
}

func (s *state) note(plan *policy.Plan, err error) {
	problems := slices.Clone(plan.Problems)
	if err != nil {
		problems = append(problems, err.Error())
	}
	if len(problems) > 0 && !slices.Equal(problems, s.problems) {
		s.cfg.Log.Error("network policy denies more than it should: tables are full", "err", errors.Join(stringErrors(problems)...))
	}
	s.problems = problems
}

func stringErrors(list []string) []error {
	out := make([]error, len(list))
	for i, t := range list {
		out[i] = errors.New(t)
	}
	return out
}

// settle lets numbers be used again, and what had no room find it.
func (s *state) settle() {
	if !s.ready {
		return
	}
	if s.unsettled {
		s.d.Settle()
		s.compiler.Graced()
		s.unsettled = false
	}
	if len(s.problems) == 0 {
		return
	}
	for _, id := range s.d.Recover() {
		s.compiler.Rewrite(id)
	}
	s.dirty = true
	_ = s.update(false) // noted
}

// add gives a pod an endpoint. Its interface passes nothing until the update
// that follows.
func (s *state) add(p Pod) error {
	if p.SandboxID == "" || p.Interface <= 0 {
		return fmt.Errorf("pod %s: neither sandbox nor interface: %w", p.PodKey, errdefs.ErrInvalidArgument)
	}
	if err := s.remove(p.SandboxID); err != nil {
		return err
	}
	for id, q := range s.pods { // an interface number comes back when the former owner is gone
		if q.Interface == p.Interface {
			if err := s.remove(id); err != nil {
				return err
			}
		}
	}
	for i, ip := range p.IPs {
		p.IPs[i] = ip.Unmap()
	}
	l := &local{Pod: p, id: s.number()}
	if err := s.d.Insert(l.id, p.Interface, p.IPs); err != nil {
		s.free = append(s.free, l.id)
		return fmt.Errorf("pod %s: %w", p.PodKey, errors.Join(err, errdefs.ErrResourceExhausted))
	}
	if s.ready {
		a, err := s.d.AttachPod(p.Interface)
		if err != nil {
			err = errors.Join(err, s.d.Remove(l.id))
			s.free = append(s.free, l.id)
			return fmt.Errorf("pod %s: %w", p.PodKey, err)
		}
		l.attached = a
	}
	s.pods[p.SandboxID] = l
	s.name(l.id, p.PodKey)
	s.compiler.SetEndpoint(l.id, p.PodKey, p.IPs, s.cfg.audited(p.Namespace))
	s.moved(p.PodKey)
	return nil
}

func (s *state) number() uint32 {
	if n := len(s.free); n > 0 {
		id := s.free[n-1]
		s.free = s.free[:n-1]
		return id
	}
	s.next++
	return s.next - 1
}

func (s *state) remove(sandbox string) error {
	p := s.pods[sandbox]
	if p == nil {
		return nil
	}
	delete(s.pods, sandbox)
	s.name(p.id, objects.PodKey{})
	s.compiler.DeleteEndpoint(p.id)
	s.moved(p.PodKey)
	err := s.d.Remove(p.id) // before the number is given again
	if p.attached != nil {
		err = errors.Join(err, s.d.Detach(p.Interface, p.attached))
	}
	s.free = append(s.free, p.id)
	if err != nil {
		return fmt.Errorf("remove pod %s: %w", p.PodKey, err)
	}
	return nil
}

func (s *state) reconcile(live []Pod) error {
	keep := map[string]bool{}
	var errs []error
	for _, p := range live {
		keep[p.SandboxID] = true
		if q := s.pods[p.SandboxID]; q != nil && q.Interface == p.Interface {
			continue
		}
		errs = append(errs, s.add(p))
	}
	for _, id := range slices.Collect(maps.Keys(s.pods)) {
		if !keep[id] {
			errs = append(errs, s.remove(id))
		}
	}
	s.reconciled = true
	return errors.Join(errs...)
}

// attachAll puts the programs, whose tables are complete, on all interfaces and
// drops the pins of those that are gone.
func (s *state) attachAll() {
	keep := map[int]bool{}
	for _, p := range s.pods {
		keep[p.Interface] = true
		if p.attached != nil {
			continue
		}
		s.seed(p)
		a, err := s.d.AttachPod(p.Interface)
		if err != nil {
			s.cfg.Log.Error("network policy is not enforced on a pod", "pod", p.PodKey.String(), "sandbox", p.SandboxID, "err", err)
			continue
		}
		p.attached = a
	}
	s.attachUplinks()
	for i := range s.uplinks {
		keep[i] = true
	}
	if err := s.d.Sweep(keep); err != nil {
		s.cfg.Log.Warn("pins of interfaces that are gone stay", "err", err)
	}
}

// seed tells conntrack the flows that a pod already has: all of them when it is
// watched for the first time, those that an earlier process' conntrack had no
// room for, else none.
func (s *state) seed(p *local) {
	if p.Netns == "" {
		return
	}
	list, err := sockets.List(p.Netns)
	if err == nil {
		err = s.d.Seed(p.Interface, list)
	}
	if err != nil {
		s.cfg.Log.Warn("flows that a pod had before are judged by their packets", "pod", p.PodKey.String(), "err", err)
	}
}

// collect makes room in conntrack.
func (s *state) collect() {
	if err := s.d.Collect(); err != nil {
		s.cfg.Log.Warn("dead flows stay in conntrack", "err", err)
	}
}

func (s *state) setHost(h host) error {
	s.host = h
	s.compiler.SetNode(h.addrs)
	s.dirty = true
	if s.ready {
		s.attachUplinks()
	}
	return nil
}

func (s *state) isUplink(l hostLink) bool {
	if !l.ethernet || slices.ContainsFunc(slices.Collect(maps.Values(s.pods)), func(p *local) bool { return p.Interface == l.index }) {
		return false
	}
	if s.cfg.Uplinks == nil {
		return l.defaultRoute
	}
	return slices.ContainsFunc(s.cfg.Uplinks, func(pattern string) bool {
		ok, _ := filepath.Match(pattern, l.name)
		return ok
	})
}

func (s *state) attachUplinks() {
	now := map[int]bool{}
	for _, l := range s.host.links {
		if !s.isUplink(l) {
			continue
		}
		now[l.index] = true
		if s.uplinks[l.index] != nil {
			continue
		}
		a, err := s.d.AttachUplink(l.index)
		if err != nil {
			s.cfg.Log.Error("network policy is not enforced on a NIC", "interface", l.name, "err", err)
			continue
		}
		s.uplinks[l.index] = &uplink{l.name, a}
	}
	for i, u := range s.uplinks {
		if !now[i] {
			if err := s.d.Detach(i, u.attached); err != nil {
				s.cfg.Log.Warn("programs stay on a NIC", "interface", u.name, "err", err)
			}
			delete(s.uplinks, i)
		}
	}
}

func (s *state) status() (Status, error) {
	out := Status{Ready: s.ready, Pods: len(s.pods), Faults: s.compiler.Faults(), Problems: s.problems, Tables: s.compiler.Stats(), Rows: s.d.Rows(), Conntrack: s.d.Conntrack(), Limits: s.compiler.Limits(), Checked: s.checked, Drift: s.drift}
	for _, u := range s.uplinks {
		out.Uplinks = append(out.Uplinks, u.name)
	}
	slices.Sort(out.Uplinks)
	var err error
	out.Counters, err = s.d.Counters()
	return out, err
}
