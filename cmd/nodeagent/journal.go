package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"strings"
	"sync"

	"github.com/coreos/go-systemd/v22/journal"
)

// journalSend hands a record to the journal (systemd.journal-fields(7)).
type journalSend func(message string, p journal.Priority, fields map[string]string) error

// journalOfService is the journal if standard error leads there, nil otherwise.
func journalOfService() journalSend {
	if is, err := journal.StderrIsJournalStream(); err != nil || !is || !journal.Enabled() {
		return nil
	}
	return journal.Send
}

// journalField begins the names of our fields: PATH, UNIT and others have a
// meaning already.
const journalField = "NODEAGENT_"

// journalHandler sends each record with its level as PRIORITY, its attributes
// as fields ("pod" is NODEAGENT_POD), and all of it in words as MESSAGE.
type journalHandler struct {
	send   journalSend
	words  slog.Handler // the attributes as text, into line
	line   *journalLine
	fields map[string]string // of WithAttrs; never changed
	prefix string            // of WithGroup
}

// journalLine is where the words of the record in hand are put together.
type journalLine struct {
	mu    sync.Mutex // held by Handle
	attrs bytes.Buffer
	other io.Writer // for what the journal does not take
}

func newJournalHandler(other io.Writer, send journalSend, level slog.Leveler) journalHandler {
	line := &journalLine{other: other}
	words := slog.NewTextHandler(&line.attrs, &slog.HandlerOptions{Level: level, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey) {
			return slog.Attr{}
		}
		return a
	}})
	return journalHandler{send: send, words: words, line: line, fields: map[string]string{"SYSLOG_IDENTIFIER": "nodeagent"}, prefix: journalField}
}

func (h journalHandler) Enabled(ctx context.Context, l slog.Level) bool {
	return h.words.Enabled(ctx, l)
}

func (h journalHandler) Handle(ctx context.Context, r slog.Record) error {
	fields := maps.Clone(h.fields)
	r.Attrs(func(a slog.Attr) bool {
		addField(fields, h.prefix, a)
		return true
	})
	h.line.mu.Lock()
	defer h.line.mu.Unlock()
	h.line.attrs.Reset()
	if err := h.words.Handle(ctx, r); err != nil {
		return err
	}
	message := strings.TrimSpace(r.Message + " " + h.line.attrs.String())
	if h.send(message, priority(r.Level), fields) == nil {
		return nil
	}
	_, err := fmt.Fprintf(h.line.other, "<%d>%s\n", priority(r.Level), message)
	return err
}

func (h journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	h.words, h.fields = h.words.WithAttrs(attrs), maps.Clone(h.fields)
	for _, a := range attrs {
		addField(h.fields, h.prefix, a)
	}
	return h
}

func (h journalHandler) WithGroup(name string) slog.Handler {
	h.words, h.prefix = h.words.WithGroup(name), h.prefix+fieldName(name)+"_"
	return h
}

func addField(fields map[string]string, prefix string, a slog.Attr) {
	v := a.Value.Resolve()
	if v.Kind() != slog.KindGroup {
		fields[prefix+fieldName(a.Key)] = v.String()
		return
	}
	if a.Key != "" {
		prefix += fieldName(a.Key) + "_"
	}
	for _, inner := range v.Group() {
		addField(fields, prefix, inner)
	}
}

// fieldName makes of a key what the journal allows.
func fieldName(key string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, key)
}

func priority(l slog.Level) journal.Priority {
	switch {
	case l >= slog.LevelError:
		return journal.PriErr
	case l >= slog.LevelWarn:
		return journal.PriWarning
	case l >= slog.LevelInfo:
		return journal.PriInfo
	}
	return journal.PriDebug
}
