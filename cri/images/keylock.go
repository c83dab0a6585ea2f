package images

import (
	"context"
	"sync"
)

// keyLock is a mutex per key that gives up when the context ends. It keeps two
// pulls from fetching the same blob or unpacking the same layer at once.
type keyLock struct {
	mu   sync.Mutex
	held map[string]*keyWait
}

type keyWait struct {
	sem  chan struct{} // capacity 1: full while the key is locked
	refs int           // holder and waiters
}

func newKeyLock() *keyLock { return &keyLock{held: map[string]*keyWait{}} }

// Lock waits for the key or the end of ctx.
func (k *keyLock) Lock(ctx context.Context, key string) error {
	k.mu.Lock()
	w := k.held[key]
	if w == nil {
		w = &keyWait{sem: make(chan struct{}, 1)}
		k.held[key] = w
	}
	w.refs++
	k.mu.Unlock()
	select {
	case w.sem <- struct{}{}:
		return nil
	case <-ctx.Done():
		k.drop(key, w)
		return context.Cause(ctx)
	}
}

// Unlock releases the key, which the caller must hold.
func (k *keyLock) Unlock(key string) {
	k.mu.Lock()
	w := k.held[key]
	k.mu.Unlock()
	<-w.sem
	k.drop(key, w)
}

func (k *keyLock) drop(key string, w *keyWait) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if w.refs--; w.refs == 0 {
		delete(k.held, key)
	}
}
