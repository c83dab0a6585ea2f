package cri

import (
	"context"
	"fmt"

	"golang.org/x/sync/semaphore"
)

// opLock serialises operations on one object. Waiting ends with the context;
// waiters are served in order of arrival.
type opLock struct{ sem *semaphore.Weighted }

const exclusive = 1 << 30

func newOpLock() opLock { return opLock{semaphore.NewWeighted(exclusive)} }

// share takes the lock together with other sharers.
func (l opLock) share(ctx context.Context, what string) (unlock func(), err error) {
	return l.acquire(ctx, what, 1)
}

// alone takes the lock exclusively.
func (l opLock) alone(ctx context.Context, what string) (unlock func(), err error) {
	return l.acquire(ctx, what, exclusive)
}

func (l opLock) acquire(ctx context.Context, what string, n int64) (func(), error) {
	if err := l.sem.Acquire(ctx, n); err != nil {
		return nil, fmt.Errorf("%s: wait for operations in flight: %w", what, err)
	}
	return func() { l.sem.Release(n) }, nil
}
