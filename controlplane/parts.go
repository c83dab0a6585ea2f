package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// parts are the components that run in goroutines of their own, in the order of
// their start. One goroutine starts and stops them.
type parts struct {
	running []part
	failed  chan error // the first that ends by itself
}

type part struct {
	name   string
	cancel context.CancelFunc
	done   chan struct{}
}

func newParts() *parts { return &parts{failed: make(chan error, 1)} }

// start runs a component until stop. Ending earlier, even without an error, is
// a failure.
func (p *parts) start(name string, run func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	one := part{name, cancel, make(chan struct{})}
	p.running = append(p.running, one)
	go func() {
		defer close(one.done)
		err := run(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = errors.New("ended by itself")
		}
		select {
		case p.failed <- failure{fmt.Errorf("%s (see controlplane.log): %w", name, err)}:
		default:
		}
	}()
}

// failure is the cause of a context that ended with a component.
type failure struct{ error }

// orFailed returns a context that also ends when a component fails.
func (p *parts) orFailed(ctx context.Context) context.Context {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case err := <-p.failed:
			cancel(err)
		case <-ctx.Done():
		}
	}()
	return ctx
}

// stop ends the components in reverse. It names the one that does not end.
func (p *parts) stop() error {
	deadline := time.After(stopTimeout)
	for _, one := range slices.Backward(p.running) {
		one.cancel()
		select {
		case <-one.done:
		case <-deadline:
			return fmt.Errorf("%s did not stop within %v", one.name, stopTimeout)
		}
	}
	return nil
}
