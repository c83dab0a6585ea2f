package cri

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	"github.com/containerd/errdefs"
)

// names makes creation idempotent. A key (what the caller asked to have) has
// at most one object; callers that ask for the same thing at the same time
// share one creation.
type names struct {
	kind string // for errors
	log  *slog.Logger

	mu      sync.Mutex // guards what follows and the fields of flights
	taken   map[string]owner
	flights map[string]*flight
	wg      sync.WaitGroup
}

type owner struct {
	id, digest string
	usable     func() error // nil result: the object may be handed out again
}

type flight struct {
	digest  string
	waiters int
	cancel  context.CancelFunc
	done    chan struct{} // closed when the creation, or its rollback, is over
	id      string
	err     error
}

func newNames(kind string, log *slog.Logger) *names {
	return &names{kind: kind, log: log, taken: map[string]owner{}, flights: map[string]*flight{}}
}

// made is a finished creation. Abandon takes it all back: it is called when
// everybody who asked for it has gone away meanwhile.
type made struct {
	id      string
	usable  func() error
	abandon func()
}

// create returns the ID of the object under key, making it if there is none.
//
// A caller whose request (digest) equals that of a creation in flight joins
// it; an existing object with the same digest that is usable is returned. The
// creation runs on its own context, cancelled when the last caller has left;
// whoever comes then waits for the rollback and starts anew.
//
// Errors: ErrAlreadyExists if the key is taken by a different request or an
// object that cannot be used any more; ctx's; what make returns.
func (n *names) create(ctx context.Context, key, digest string, make func(context.Context) (made, error)) (string, error) {
	for {
		n.mu.Lock()
		if o, ok := n.taken[key]; ok {
			n.mu.Unlock()
			if o.digest != digest {
				return "", fmt.Errorf("%s %s exists already with a different configuration as %s; remove it first or use another attempt number: %w",
					n.kind, key, o.id, errdefs.ErrAlreadyExists)
			}
			if err := o.usable(); err != nil {
				return "", fmt.Errorf("%s %s exists already as %s: %v; remove it first or use another attempt number: %w",
					n.kind, key, o.id, err, errdefs.ErrAlreadyExists)
			}
			return o.id, nil
		}
		f := n.flights[key]
		switch {
		case f == nil:
			if err := ctx.Err(); err != nil {
				n.mu.Unlock()
				return "", err
			}
			f = n.launchLocked(ctx, key, digest, make)
		case f.digest == digest && f.waiters > 0:
			f.waiters++
		default: // something else under this key, or being rolled back
			n.mu.Unlock()
			select {
			case <-f.done:
				continue
			case <-ctx.Done():
				return "", fmt.Errorf("wait for the end of another creation of %s %s: %w", n.kind, key, ctx.Err())
			}
		}
		n.mu.Unlock()

		select {
		case <-f.done:
			return f.id, f.err
		case <-ctx.Done():
		}
		n.mu.Lock()
		select {
		case <-f.done: // it was faster
			n.mu.Unlock()
			return f.id, f.err
		default:
		}
		f.waiters--
		if f.waiters == 0 {
			f.cancel()
		}
		n.mu.Unlock()
		return "", fmt.Errorf("create %s %s: the caller went away: %w", n.kind, key, ctx.Err())
	}
}

func (n *names) launchLocked(ctx context.Context, key, digest string, make func(context.Context) (made, error)) *flight {
	fctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	f := &flight{digest: digest, waiters: 1, cancel: cancel, done: newDone()}
	n.flights[key] = f
	n.wg.Add(1)
	go func() {
		defer n.wg.Done()
		defer cancel()
		m, err := n.guarded(fctx, key, make)
		n.mu.Lock()
		if err == nil && f.waiters == 0 {
			n.mu.Unlock()
			m.abandon()
			n.mu.Lock()
			err = fmt.Errorf("create %s %s: abandoned by the caller: %w", n.kind, key, context.Canceled)
		}
		f.id, f.err = m.id, err
		if err == nil {
			n.taken[key] = owner{m.id, digest, m.usable}
		} else {
			f.id = ""
		}
		delete(n.flights, key)
		close(f.done)
		n.mu.Unlock()
	}()
	return f
}

func (n *names) guarded(ctx context.Context, key string, make func(context.Context) (made, error)) (m made, err error) {
	defer recovered(n.log, "create "+n.kind+" "+key, &err)
	return make(ctx)
}

// take records an object found at start.
func (n *names) take(key, id, digest string, usable func() error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.taken[key] = owner{id, digest, usable}
}

// free gives the key back if id owns it.
func (n *names) free(key, id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.taken[key].id == id {
		delete(n.taken, key)
	}
}

// wait returns when no creation is in flight.
func (n *names) wait() { n.wg.Wait() }

func newDone() chan struct{} { return make(chan struct{}) }
