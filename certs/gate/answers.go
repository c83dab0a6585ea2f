package gate

import (
	"sync"
	"time"
)

// answers keeps what the API server has said until it is too old. It is
// bounded: when it is full what is too old goes, and if that is nothing, all.
type answers[K comparable, V any] struct {
	mu   sync.Mutex
	kept map[K]answer[V] // guarded by mu
}

type answer[V any] struct {
	value V
	until time.Time
}

func (a *answers[K, V]) get(k K, now time.Time) (v V, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	e, ok := a.kept[k]
	if !ok || !now.Before(e.until) {
		return v, false
	}
	return e.value, true
}

func (a *answers[K, V]) put(k K, v V, until, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.kept == nil {
		a.kept = map[K]answer[V]{}
	}
	if len(a.kept) >= answersKept {
		for k, e := range a.kept {
			if !now.Before(e.until) {
				delete(a.kept, k)
			}
		}
	}
	if len(a.kept) >= answersKept {
		clear(a.kept)
	}
	a.kept[k] = answer[V]{v, until}
}
