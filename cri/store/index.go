package store

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// Index finds live objects by ID. Kind names them in errors ("sandbox").
type Index[T any] struct {
	kind string

	mu   sync.RWMutex // guards byID
	byID map[string]entry[T]
	seq  uint64
}

type entry[T any] struct {
	value T
	seq   uint64
}

// NewIndex returns an empty index.
func NewIndex[T any](kind string) *Index[T] {
	return &Index[T]{kind: kind, byID: map[string]entry[T]{}}
}

// Add adds or replaces the object with this ID.
func (x *Index[T]) Add(id string, v T) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.seq++
	x.byID[id] = entry[T]{v, x.seq}
}

// Delete forgets the object.
func (x *Index[T]) Delete(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.byID, id)
}

// Len is the number of objects.
func (x *Index[T]) Len() int {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return len(x.byID)
}

// Get finds the object whose ID is id or, if there is exactly one, whose ID
// begins with id.
//
// Errors: ErrNotFound; ErrInvalidArgument if id is empty or the prefix of
// several.
func (x *Index[T]) Get(id string) (T, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	if e, ok := x.byID[id]; ok {
		return e.value, nil
	}
	var found T
	if id == "" {
		return found, fmt.Errorf("find %s: no ID given: %w", x.kind, errdefs.ErrInvalidArgument)
	}
	n := 0
	for key, e := range x.byID {
		if strings.HasPrefix(key, id) {
			found = e.value
			n++
		}
	}
	switch n {
	case 1:
		return found, nil
	case 0:
		return found, fmt.Errorf("%s %q: %w", x.kind, id, errdefs.ErrNotFound)
	}
	var none T
	return none, fmt.Errorf("find %s: %q is the beginning of %d IDs, give more of it: %w", x.kind, id, n, errdefs.ErrInvalidArgument)
}

// All returns the objects in the order in which they were added.
func (x *Index[T]) All() []T {
	x.mu.RLock()
	entries := make([]entry[T], 0, len(x.byID))
	for _, e := range x.byID {
		entries = append(entries, e)
	}
	x.mu.RUnlock()
	slices.SortFunc(entries, func(a, b entry[T]) int { return cmp.Compare(a.seq, b.seq) })
	out := make([]T, len(entries))
	for i, e := range entries {
		out[i] = e.value
	}
	return out
}
