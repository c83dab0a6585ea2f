package main

import (
	"context"
	"io"
	"log/slog"
	"sync"

	"github.com/nodeagent/nodeagent/config"
)

// newLogger builds the daemon's logger. Under the journal, text lines carry a
// priority (sd-daemon(3), "<4>") and no time, which the journal has itself.
func newLogger(w io.Writer, c config.Log, journal bool) *slog.Logger {
	opts := &slog.HandlerOptions{Level: logLevel(c.Level)}
	switch {
	case c.Format == "json":
		return slog.New(slog.NewJSONHandler(w, opts))
	case c.Format == "auto" && journal:
		return slog.New(newJournalHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

func logLevel(name string) slog.Level {
	var l slog.Level
	if err := l.UnmarshalText([]byte(name)); err != nil {
		return slog.LevelInfo
	}
	return l
}

// journalHandler writes slog's text format after a priority.
type journalHandler struct {
	text slog.Handler
	out  *priorityWriter
}

func newJournalHandler(w io.Writer, opts *slog.HandlerOptions) journalHandler {
	opts.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
			return slog.Attr{}
		}
		return a
	}
	out := &priorityWriter{w: w}
	return journalHandler{text: slog.NewTextHandler(out, opts), out: out}
}

func (h journalHandler) Enabled(ctx context.Context, l slog.Level) bool {
	return h.text.Enabled(ctx, l)
}

func (h journalHandler) Handle(ctx context.Context, r slog.Record) error {
	h.out.mu.Lock()
	defer h.out.mu.Unlock()
	h.out.priority = priority(r.Level)
	return h.text.Handle(ctx, r)
}

func (h journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return journalHandler{text: h.text.WithAttrs(attrs), out: h.out}
}

func (h journalHandler) WithGroup(name string) slog.Handler {
	return journalHandler{text: h.text.WithGroup(name), out: h.out}
}

// priorityWriter puts the priority of the record in hand before its line;
// slog's text handler writes each record with one call.
type priorityWriter struct {
	w        io.Writer
	mu       sync.Mutex // held by Handle around the write
	priority string     // guarded by mu
}

func (p *priorityWriter) Write(line []byte) (int, error) {
	if _, err := p.w.Write(append([]byte(p.priority), line...)); err != nil {
		return 0, err
	}
	return len(line), nil
}

func priority(l slog.Level) string {
	switch {
	case l >= slog.LevelError:
		return "<3>"
	case l >= slog.LevelWarn:
		return "<4>"
	case l >= slog.LevelInfo:
		return "<6>"
	}
	return "<7>"
}
