package main

import (
	"context"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/nodeagent/nodeagent/config"
)

// logging is the daemon's log, and what of it may be changed and asked for
// while it runs.
type logging struct {
	*slog.Logger
	level *slog.LevelVar
	last  *lastError
}

// newLogging builds the daemon's log. With a journal, and unless c asks for a
// format, records go there as fields; w gets what it does not take.
func newLogging(w io.Writer, c config.Log, journal journalSend) logging {
	l := logging{level: &slog.LevelVar{}, last: &lastError{}}
	l.level.Set(logLevel(c.Level))
	opts := &slog.HandlerOptions{Level: l.level}
	var h slog.Handler
	switch {
	case c.Format == "json":
		h = slog.NewJSONHandler(w, opts)
	case c.Format == "auto" && journal != nil:
		h = newJournalHandler(w, journal, l.level)
	default:
		h = slog.NewTextHandler(w, opts)
	}
	l.Logger = slog.New(errorKeeper{h, l.last})
	return l
}

func logLevel(name string) slog.Level {
	var l slog.Level
	if err := l.UnmarshalText([]byte(name)); err != nil {
		return slog.LevelInfo
	}
	return l
}

// lastError is the last record of level error or above.
type lastError struct {
	mu   sync.Mutex // guards what follows
	text string     // "": there was none
	at   time.Time
}

func (l *lastError) set(r slog.Record) {
	text := r.Message
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "err" {
			text += ": " + a.Value.String()
		}
		return true
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text, l.at = text, r.Time
}

func (l *lastError) get() (text string, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text, l.at
}

// errorKeeper notes errors on their way to the handler.
type errorKeeper struct {
	slog.Handler
	last *lastError
}

func (k errorKeeper) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelError {
		k.last.set(r)
	}
	return k.Handler.Handle(ctx, r)
}

func (k errorKeeper) WithAttrs(attrs []slog.Attr) slog.Handler {
	return errorKeeper{k.Handler.WithAttrs(attrs), k.last}
}

func (k errorKeeper) WithGroup(name string) slog.Handler {
	return errorKeeper{k.Handler.WithGroup(name), k.last}
}
