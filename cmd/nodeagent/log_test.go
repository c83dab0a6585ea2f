package main

import (
	"bytes"
	"errors"
	"log/slog"
	"reflect"
	"strings"
	"testing"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/sirupsen/logrus"

	"github.com/nodeagent/nodeagent/config"
)

// entry is what a journal has got.
type entry struct {
	message  string
	priority journal.Priority
	fields   map[string]string
}

type fakeJournal struct {
	entries []entry
	refuses bool
}

func (j *fakeJournal) send(message string, p journal.Priority, fields map[string]string) error {
	if j.refuses {
		return errors.New("no journal")
	}
	delete(fields, "SYSLOG_IDENTIFIER")
	j.entries = append(j.entries, entry{message, p, fields})
	return nil
}

func TestJournalFields(t *testing.T) {
	var j fakeJournal
	log := newLogging(&bytes.Buffer{}, config.Log{Level: "debug", Format: "auto"}, j.send).With("pod", "a")
	log.Debug("d")
	log.Info("two\nlines", "level", "inner", slog.Group("peer", "ip", "::1"))
	log.WithGroup("g").Warn("w", "k-1", 1)
	log.Error("cannot", "err", errors.New("no space"))
	want := []entry{
		{"d pod=a", journal.PriDebug, map[string]string{"NODEAGENT_POD": "a"}},
		{"two\nlines pod=a peer.ip=::1", journal.PriInfo, map[string]string{"NODEAGENT_POD": "a", "NODEAGENT_LEVEL": "inner", "NODEAGENT_PEER_IP": "::1"}},
		{"w pod=a g.k-1=1", journal.PriWarning, map[string]string{"NODEAGENT_POD": "a", "NODEAGENT_G_K_1": "1"}},
		{`cannot pod=a err="no space"`, journal.PriErr, map[string]string{"NODEAGENT_POD": "a", "NODEAGENT_ERR": "no space"}},
	}
	// An attribute named as slog's own is a field, not a word.
	if !reflect.DeepEqual(j.entries, want) {
		t.Errorf("got\n%+v\nwant\n%+v", j.entries, want)
	}
}

// TestJournalGone: what the journal does not take goes to standard error.
func TestJournalGone(t *testing.T) {
	var b bytes.Buffer
	log := newLogging(&b, config.Log{Level: "info", Format: "auto"}, (&fakeJournal{refuses: true}).send)
	log.Warn("w", "k", 1)
	if got, want := b.String(), "<4>w k=1\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestLibraryLogs(t *testing.T) {
	var j fakeJournal
	log := newLogging(&bytes.Buffer{}, config.Log{Level: "info", Format: "auto"}, j.send)
	e := logrus.NewEntry(logrus.New()).WithError(errors.New("no space")).WithField("path", "/x")
	e.Level, e.Message = logrus.WarnLevel, "cannot sync"
	if err := (logrusHook{log.Logger}).Fire(e); err != nil {
		t.Fatal(err)
	}
	want := []entry{{`cannot sync err="no space" path=/x`, journal.PriWarning, map[string]string{"NODEAGENT_ERR": "no space", "NODEAGENT_PATH": "/x"}}}
	if !reflect.DeepEqual(j.entries, want) {
		t.Errorf("got %+v want %+v", j.entries, want)
	}
}

func TestFormats(t *testing.T) {
	for format, want := range map[string]string{"text": " level=INFO msg=m k=v\n", "json": `,"level":"INFO","msg":"m","k":"v"}` + "\n"} {
		var b bytes.Buffer
		var j fakeJournal
		newLogging(&b, config.Log{Level: "info", Format: format}, j.send).Info("m", "k", "v")
		if !strings.HasSuffix(b.String(), want) || len(j.entries) != 0 {
			t.Errorf("%s: %q, and %d in the journal", format, b.String(), len(j.entries))
		}
	}
}

func TestLastError(t *testing.T) {
	log := newLogging(&bytes.Buffer{}, config.Log{Level: "error", Format: "text"}, nil)
	log.Warn("w", "err", "x")
	if text, _ := log.last.get(); text != "" {
		t.Errorf("a warning is no error: %q", text)
	}
	log.With("pod", "a").Error("cannot unmount", "path", "/x", "err", errors.New("busy"))
	if text, at := log.last.get(); text != "cannot unmount: busy" || at.IsZero() {
		t.Errorf("%q at %v", text, at)
	}
}
