package metrics

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

// writables measures writable layers. That walks a directory tree, which may
// take milliseconds or minutes, so a sample never waits for it longer than
// firstWait and otherwise carries the last figure with its time; the next one
// has the new figure. At most one layer is measured at a time.
type writables struct {
	usage  func(ctx context.Context, id string) (bytes, inodes uint64, err error)
	dir    string
	maxAge time.Duration

	ctx    context.Context // of the measuring; ended by close
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu      sync.Mutex // guards all below
	layers  map[string]*layer
	queue   []string
	running bool
	closed  bool
}

type layer struct {
	last   *sample.Filesystem // nil before the first
	queued bool
	used   time.Time
	first  chan struct{} // closed after the first measurement, good or bad
	done   bool
}

// want asks for a layer and returns the last figure (nil if none yet) and a
// channel that is closed when the first measurement is over.
func (w *writables) want(id string, now time.Time) (*sample.Filesystem, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.layers[id]
	if l == nil {
		l = &layer{first: make(chan struct{})}
		w.layers[id] = l
	}
	l.used = now
	fresh := l.last != nil && now.Sub(l.last.Time) < w.maxAge
	if !fresh && !l.queued && !w.closed {
		l.queued = true
		w.queue = append(w.queue, id)
		if !w.running {
			w.running = true
			w.work.Go(w.run)
		}
	}
	return l.last, l.first
}

// get returns the last figure.
func (w *writables) get(id string) *sample.Filesystem {
	w.mu.Lock()
	defer w.mu.Unlock()
	if l := w.layers[id]; l != nil {
		return l.last
	}
	return nil
}

// run measures what is queued and ends.
func (w *writables) run() {
	for {
		w.mu.Lock()
		if len(w.queue) == 0 || w.closed {
			w.running = false
			w.mu.Unlock()
			return
		}
		id := w.queue[0]
		w.queue = w.queue[1:]
		w.mu.Unlock()
		fs, err := w.measure(id)
		w.mu.Lock()
		if l := w.layers[id]; l != nil {
			l.queued = false
			if err == nil {
				l.last = fs
			}
			if !l.done {
				l.done = true
				close(l.first)
			}
		}
		w.mu.Unlock()
	}
}

func (w *writables) measure(id string) (*sample.Filesystem, error) {
	bytes, inodes, err := w.usage(w.ctx, id)
	if err != nil {
		return nil, err
	}
	fs := &sample.Filesystem{Time: time.Now(), Mountpoint: w.dir, Device: deviceOf(w.dir), UsedBytes: bytes, UsedInodes: inodes}
	var st unix.Statfs_t
	if err := unix.Statfs(w.dir, &st); err != nil {
		return nil, fmt.Errorf("statfs %s: %w", w.dir, err)
	}
	fs.LimitBytes = st.Blocks * uint64(st.Bsize)
	fs.TotalInodes, fs.FreeInodes = st.Files, st.Ffree
	return fs, nil
}

// prune forgets layers that were not asked for since before.
func (w *writables) prune(before time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for id, l := range w.layers {
		if l.used.Before(before) && !l.queued {
			delete(w.layers, id)
		}
	}
}

func (w *writables) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.cancel()
	w.work.Wait()
}
