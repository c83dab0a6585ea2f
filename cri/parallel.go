package cri

import (
	"context"
	"errors"
	"log/slog"
	"sync"
)

// parallel runs all functions at once and returns when all have. The first
// error cancels the context of the others; panics become errors.
func parallel(ctx context.Context, log *slog.Logger, what string, fns ...func(context.Context) error) error {
	if len(fns) == 0 {
		return nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	errs := make([]error, len(fns))
	var wg sync.WaitGroup
	run := func(i int, fn func(context.Context) error) {
		err := func() (err error) {
			defer recovered(log, what, &err)
			return fn(ctx)
		}()
		if err != nil {
			errs[i] = err
			cancel(err)
		}
	}
	for i, fn := range fns[1:] {
		wg.Go(func() { run(i+1, fn) })
	}
	run(0, fns[0])
	wg.Wait()
	// What failed because another one had failed is noise.
	first := context.Cause(ctx)
	if first == nil {
		return nil
	}
	var out []error
	for _, err := range errs {
		if err != nil && (errors.Is(err, first) || !errors.Is(err, context.Canceled)) {
			out = append(out, err)
		}
	}
	if len(out) == 0 {
		return first
	}
	return errors.Join(out...)
}
