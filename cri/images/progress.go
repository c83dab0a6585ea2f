package images

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Phase is where a blob of a pull stands.
type Phase string

// Phases, in the order in which a blob passes through them. Manifests and
// configurations end at Downloaded, layers at Unpacked.
const (
	Downloading Phase = "downloading"
	Downloaded  Phase = "downloaded"
	Unpacking   Phase = "unpacking"
	Unpacked    Phase = "unpacked"
)

// Progress tells of one blob of a pull.
type Progress struct {
	Ref    string
	Digest digest.Digest
	// Kind is "manifest", "index", "config" or "layer".
	Kind  string
	Phase Phase
	// Offset and Total are bytes of the blob as distributed: received while
	// downloading, read while unpacking. What a former attempt has left counts.
	Offset, Total int64
}

// reporter passes progress on to whoever waits for a pull: every change of
// phase, and offsets at most every interval per blob. Calls are serialised.
type reporter struct {
	ref string
	mu  sync.Mutex
	// fns are the callbacks of those who wait, by an arbitrary key.
	fns  map[int]func(Progress)
	last map[digest.Digest]time.Time
	now  map[digest.Digest]Progress // the latest of each blob, for late joiners
}

const reportInterval = 100 * time.Millisecond

func newReporter(ref string) *reporter {
	return &reporter{ref: ref, fns: map[int]func(Progress){}, last: map[digest.Digest]time.Time{}, now: map[digest.Digest]Progress{}}
}

func (r *reporter) add(key int, fn func(Progress)) {
	if fn == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fns[key] = fn
	for _, p := range r.now {
		fn(p)
	}
}

func (r *reporter) remove(key int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.fns, key)
}

// jump reports even if the last word on the blob is fresh.
func (r *reporter) jump(p Progress) {
	r.mu.Lock()
	delete(r.last, p.Digest)
	r.mu.Unlock()
	r.report(p)
}

func (r *reporter) report(p Progress) {
	p.Ref = r.ref
	r.mu.Lock()
	defer r.mu.Unlock()
	old, seen := r.now[p.Digest]
	r.now[p.Digest] = p
	now := time.Now()
	if seen && old.Phase == p.Phase && now.Sub(r.last[p.Digest]) < reportInterval {
		return
	}
	r.last[p.Digest] = now
	for _, fn := range r.fns {
		fn(p)
	}
}

// watchdog ends a pull whose registry is asked but sends nothing.
type watchdog struct {
	timeout time.Duration
	cancel  context.CancelCauseFunc
	active  atomic.Int64 // requests without an answer, bodies not read to the end
	moved   atomic.Int64 // unix nanoseconds of the last sign of life

	mu   sync.Mutex          // guards base
	base []http.RoundTripper // of the pull's clients, below all that wraps them
}

// errStalled is the cause of a pull ended by its watchdog.
type errStalled struct{ after time.Duration }

func (e errStalled) Error() string {
	return fmt.Sprintf("the registry sent nothing for %s", e.after)
}
func (errStalled) Unwrap() error { return errdefs.ErrUnavailable }

// run looks after the pull until its context ends.
func (w *watchdog) run(ctx context.Context) {
	tick := time.NewTicker(max(w.timeout/8, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			if w.active.Load() == 0 {
				w.moved.Store(now.UnixNano())
			} else if now.Sub(time.Unix(0, w.moved.Load())) > w.timeout {
				w.cancel(errStalled{w.timeout})
				return
			}
		}
	}
}

func (w *watchdog) alive() { w.moved.Store(time.Now().UnixNano()) }

// watch puts the watchdog between a client and its transport.
func (w *watchdog) watch(c *http.Client) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.base = append(w.base, c.Transport)
	c.Transport = &watchedTransport{next: c.Transport, dog: w}
	return nil
}

// closeIdle closes the kept-alive connections of the pull's clients.
// (http.Client cannot: not all that wraps the transport passes it on.)
func (w *watchdog) closeIdle() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, t := range w.base {
		if c, ok := t.(interface{ CloseIdleConnections() }); ok {
			c.CloseIdleConnections()
		}
	}
}

type watchedTransport struct {
	next http.RoundTripper
	dog  *watchdog
}

func (t *watchedTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	t.dog.alive()
	t.dog.active.Add(1)
	resp, err := t.next.RoundTrip(req)
	if err != nil {
		t.dog.active.Add(-1)
		return nil, err
	}
	t.dog.alive()
	resp.Body = &watchedBody{ReadCloser: resp.Body, dog: t.dog}
	return resp, nil
}

type watchedBody struct {
	io.ReadCloser
	dog  *watchdog
	done sync.Once
}

func (b *watchedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.dog.alive()
	}
	return n, err
}

func (b *watchedBody) Close() error {
	b.done.Do(func() { b.dog.active.Add(-1) })
	return b.ReadCloser.Close()
}
