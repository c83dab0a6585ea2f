package cri

import (
	"context"
	"errors"
	"sync"
	"time"
)

// undoTimeout bounds a rollback; what is not undone by then is left to the
// janitor, and to the next start.
const undoTimeout = 30 * time.Second

// undo is a stack of steps that take back what was done. Steps may be pushed
// by concurrent goroutines.
type undo struct {
	mu    sync.Mutex // guards steps
	steps []undoStep
}

type undoStep struct {
	what string
	do   func(context.Context) error
}

// push adds a step; it must be idempotent.
func (u *undo) push(what string, do func(context.Context) error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.steps = append(u.steps, undoStep{what, do})
}

// run performs all steps, last first, on a context that outlives ctx. All are
// tried; the steps that failed stay on the stack, so that run may be called
// again.
func (u *undo) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	u.mu.Lock()
	defer u.mu.Unlock()
	var errs []error
	var left []undoStep
	for i := len(u.steps) - 1; i >= 0; i-- {
		if err := u.steps[i].do(ctx); err != nil {
			errs = append(errs, errors.New(u.steps[i].what+": "+err.Error()))
			left = append([]undoStep{u.steps[i]}, left...)
		}
	}
	u.steps = left
	return errors.Join(errs...)
}
