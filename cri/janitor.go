package cri

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// janitor tries removals again that failed. The intent of each lasts until it
// succeeds, so a removal that never does is taken up by the next process.
type janitor struct {
	log  *slog.Logger
	wake chan struct{}

	mu   sync.Mutex // guards jobs
	jobs []chore
}

type chore struct {
	what, id string
	do       func(context.Context) error
	at       time.Time
	delay    time.Duration
}

const (
	janitorFirst = time.Second
	janitorMax   = 2 * time.Minute
)

func newJanitor(log *slog.Logger) *janitor {
	return &janitor{log: log, wake: make(chan struct{}, 1)}
}

// add has do called until it returns nil.
func (j *janitor) add(what, id string, do func(context.Context) error) {
	j.mu.Lock()
	j.jobs = append(j.jobs, chore{what, id, do, time.Now().Add(janitorFirst), janitorFirst})
	j.mu.Unlock()
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

func (j *janitor) run(ctx context.Context) {
	for {
		next := j.due(ctx)
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-j.wake:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// due does what is due and returns how long to sleep.
func (j *janitor) due(ctx context.Context) time.Duration {
	j.mu.Lock()
	jobs := j.jobs
	j.jobs = nil
	j.mu.Unlock()
	sleep := time.Hour
	var keep []chore
	for _, c := range jobs {
		if wait := time.Until(c.at); wait > 0 {
			sleep = min(sleep, wait)
			keep = append(keep, c)
			continue
		}
		tctx, cancel := context.WithTimeout(ctx, undoTimeout)
		err := c.do(tctx)
		cancel()
		if err == nil {
			j.log.Info("cleaned at last", "what", c.what, "id", c.id)
			continue
		}
		c.delay = min(2*c.delay, janitorMax)
		c.at = time.Now().Add(c.delay)
		j.log.Warn("cannot clean yet, will try again", "what", c.what, "id", c.id, "in", c.delay, "err", err)
		sleep = min(sleep, c.delay)
		keep = append(keep, c)
	}
	j.mu.Lock()
	j.jobs = append(keep, j.jobs...)
	j.mu.Unlock()
	return sleep
}
