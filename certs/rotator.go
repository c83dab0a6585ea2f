package certs

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// lookAgain is how often files, clock and wants are looked at while nothing
// else happens, so that a change of any of them is noticed.
const lookAgain = 5 * time.Second

// rotator keeps one certificate. One goroutine, that of run, does everything;
// the others only ask and read.
type rotator struct {
	kind  kind
	store store
	now   func() time.Time
	base  time.Duration // of the pause after a failure
	log   *slog.Logger

	owner    identity         // what every certificate of this kind has to say here
	want     func() *identity // what to ask for; nil: not known yet
	waitFor  func() string    // what has to come first; "": nothing
	obtain   func(context.Context, identity) (*Pair, *Problem)
	onChange func(before, now *Pair) // a new one is in use; before may be nil
	onFail   func(*Problem)

	held atomic.Pointer[Pair]
	key  []byte        // of the request under way, if the disk did not take it; obtain's
	wake chan struct{} // capacity 1

	mu    sync.Mutex
	state state // guarded by mu
}

// state is what the loop knows besides files and wants.
type state struct {
	stamp       string // of the files when they were read last
	unsaved     bool   // held is not in the files
	asked       string
	failures    int // in a row
	notUntil    time.Time
	problem     *Problem // of the last attempt; nil: it went well
	problemAt   time.Time
	fileProblem *Problem // what is wrong with the files; nil: nothing
	clock       *Problem
	refused     Reason // why the API server and the certificate do not get on
	step        step
	renewals    int
	failed      map[Reason]int
	failedAll   int
	waiting     string        // name of the request that waits for approval
	attempt     chan struct{} // closed when the next attempt has ended
}

func newRotator(k kind, dir string) *rotator {
	return &rotator{
		kind: k, store: store{dir, k.prefix}, wake: make(chan struct{}, 1),
		state: state{failed: map[Reason]int{}, attempt: make(chan struct{})},
	}
}

// run keeps the certificate until ctx ends.
func (r *rotator) run(ctx context.Context) {
	for ctx.Err() == nil {
		switch s := r.next(); s.do {
		case save:
			r.save(r.held.Load())
		case request:
			r.renew(ctx)
		default:
			r.sleep(ctx, s)
		}
	}
}

// next looks at the files and decides.
func (r *rotator) next() step {
	r.observe()
	v := view{now: r.now(), held: r.held.Load(), want: r.want(), waitFor: r.waitFor()}
	r.mu.Lock()
	defer r.mu.Unlock()
	v.saved, v.asked, v.notUntil = !r.state.unsaved, r.state.asked, r.state.notUntil
	if v.asked == "" && r.state.refused != "" {
		v.asked = "the API server does not accept it: " + string(r.state.refused)
	}
	r.state.step = r.kind.decide(v)
	return r.state.step
}

// sleep ends when something may have changed.
func (r *rotator) sleep(ctx context.Context, s step) {
	d := lookAgain
	if until := s.at.Sub(r.now()); !s.at.IsZero() && until > 0 {
		d = min(d, until)
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-r.wake:
	case <-timer.C:
	}
}

// poke makes the loop look again.
func (r *rotator) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// observe reads the files if they have changed. A pair of ours that lives
// longer than the one in use is adopted, whoever wrote it; anything else is
// told and, when a good pair is in use, overwritten.
func (r *rotator) observe() {
	stamp := r.store.stamp()
	r.mu.Lock()
	same := stamp == r.state.stamp
	r.state.stamp = stamp
	r.mu.Unlock()
	if same {
		return
	}
	found, err := r.store.load()
	held := r.held.Load()
	var p *Problem
	unsaved := held != nil
	switch {
	case errors.Is(err, fs.ErrNotExist) && held == nil:
	case err != nil:
		p = &Problem{FilesUnusable, err, "a new certificate replaces it"}
	case r.kind.check(found.Leaf(), r.owner) != nil:
		p = problem(FilesUnusable, "a certificate for this node replaces it; see who else writes there", "%s holds a certificate of another: %v", r.store.current(), r.kind.check(found.Leaf(), r.owner))
	case found.same(held):
		unsaved = false
	case held == nil, held.expired(r.now()), found.newer(held):
		unsaved = false
		r.adopt(found)
	}
	r.mu.Lock()
	r.state.unsaved, r.state.fileProblem = unsaved, p
	r.mu.Unlock()
	if p != nil {
		r.log.Warn("files of the certificate cannot be used", "certificate", r.kind.name, "err", p)
	}
}

// adopt takes a pair into use.
func (r *rotator) adopt(p *Pair) {
	before := r.held.Swap(p)
	r.log.Info("certificate in use", "certificate", r.kind.name, "pair", p, "renewal", renewAt(p).UTC().Format(time.RFC3339))
	r.onChange(before, p)
}

// save writes p to the files. A failure is told and tried again; p is used from
// memory meanwhile.
func (r *rotator) save(p *Pair) {
	err := r.store.save(p)
	r.mu.Lock()
	r.state.unsaved = err != nil
	r.state.stamp = r.store.stamp()
	if err == nil {
		r.state.fileProblem = nil
		if p := r.state.problem; p != nil && p.Reason == FilesNotWritten {
			r.state.problem, r.state.failures = nil, 0
		}
	}
	r.mu.Unlock()
	if err != nil {
		r.fail(explainWrite(err, r.store.dir))
	}
}

// renew asks for a new certificate and takes it into use. It gives up when
// something else is wanted by now, or a good pair has come another way.
func (r *rotator) renew(ctx context.Context) {
	wanted := r.want()
	if wanted == nil {
		return // the addresses have gone since
	}
	w := *wanted
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type outcome struct {
		pair *Pair
		err  *Problem
	}
	done := make(chan outcome, 1)
	go func() {
		p, err := r.obtain(ctx, w)
		done <- outcome{p, err}
	}()
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	for {
		select {
		case o := <-done:
			r.finish(ctx, o.pair, o.err)
			return
		case <-r.wake:
		case <-tick.C:
		}
		if now := r.want(); r.next().do != request || now == nil || !now.equal(w) {
			cancel(errors.New("something else is wanted by now"))
		}
	}
}

func (r *rotator) finish(ctx context.Context, p *Pair, err *Problem) {
	r.setWaiting("")
	switch {
	case err != nil && ctx.Err() != nil: // given up, or the daemon ends
	case err != nil:
		r.fail(err)
	default:
		r.succeed(p)
	}
	r.mu.Lock()
	close(r.state.attempt)
	r.state.attempt = make(chan struct{})
	r.mu.Unlock()
}

func (r *rotator) succeed(p *Pair) {
	r.mu.Lock()
	r.state.renewals++
	r.state.failures, r.state.problem, r.state.notUntil = 0, nil, time.Time{}
	r.state.asked, r.state.refused = "", ""
	if p.expired(r.now()) {
		r.state.notUntil = r.now().Add(16 * r.base) // by this node's clock; clockProblem tells
	}
	r.mu.Unlock()
	r.save(p)
	r.adopt(p)
}

// fail notes a failure and when to try again.
func (r *rotator) fail(p *Problem) {
	r.mu.Lock()
	s := &r.state
	s.failures++
	s.failedAll++
	s.failed[p.Reason]++
	pause := backoff(s.failures, p.Reason, r.base)
	s.problem, s.problemAt, s.notUntil = p, r.now(), r.now().Add(pause)
	r.mu.Unlock()
	r.log.Warn("certificate not renewed", "certificate", r.kind.name, "reason", p.Reason, "err", p, "again", pause)
	r.onFail(p)
}

// dropKey makes the next request a new one.
func (r *rotator) dropKey() {
	r.key = nil
	r.store.dropPendingKey()
}

func (r *rotator) setWaiting(name string) {
	r.mu.Lock()
	r.state.waiting = name
	r.mu.Unlock()
}

func (r *rotator) setClock(p *Problem) {
	r.mu.Lock()
	r.state.clock = p
	r.mu.Unlock()
	if p != nil {
		r.log.Warn("clock and certificate disagree", "certificate", r.kind.name, "err", p)
	}
}

// refuse notes what a call with the certificate ended with. When the API server
// no longer accepts it a new one is needed, and the bootstrap credential to get it.
func (r *rotator) refuse(p *Problem) {
	if p.Reason != CredentialRefused && p.Reason != ServerNotTrusted {
		return
	}
	r.mu.Lock()
	first := r.state.refused == ""
	r.state.refused = p.Reason
	r.mu.Unlock()
	if first {
		r.poke()
	}
}

// renewSoon has the certificate renewed before its time.
func (r *rotator) renewSoon(why string) {
	r.mu.Lock()
	r.state.asked = why
	r.mu.Unlock()
	r.poke()
}

// accepted notes that a call with the certificate went well, or that the
// bootstrap credential is worse: the next attempt uses the certificate.
func (r *rotator) accepted() {
	r.mu.Lock()
	r.state.refused = ""
	r.mu.Unlock()
}

func (r *rotator) refused() Reason {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state.refused
}

// ask has the certificate renewed now, whatever its age and whatever failed
// before, and waits for the outcome of an attempt that ends from here on.
func (r *rotator) ask(ctx context.Context, why string) error {
	r.mu.Lock()
	r.state.asked, r.state.notUntil = why, time.Time{}
	renewals, failed := r.state.renewals, r.state.failedAll
	attempt := r.state.attempt
	r.mu.Unlock()
	r.poke()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-attempt:
		}
		r.mu.Lock()
		p := r.state.problem
		renewed, worse := r.state.renewals > renewals, r.state.failedAll > failed
		if worse && !renewed {
			r.state.asked = ""
		}
		attempt = r.state.attempt
		r.mu.Unlock()
		switch {
		case renewed:
			return nil
		case worse && p != nil:
			return p
		}
	}
}
