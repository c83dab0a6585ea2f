package cri

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/nodeagent/nodeagent/cri/store"
)

// intent is the note about an object whose parts exist in the kernel, or are
// about to. It lives in State, is not synced, and lasts as long as the object.
type intent struct {
	Version   int        `json:"version"`
	Kind      string     `json:"kind"` // "sandbox" or "container"
	ID        string     `json:"id"`
	SandboxID string     `json:"sandbox,omitempty"`
	Cgroup    string     `json:"cgroup,omitempty"`
	Network   *intentPod `json:"network,omitempty"`
}

// intentPod is what tearing a network down needs to know when there is no
// record.
type intentPod struct {
	Namespace   string            `json:"namespace"`
	Name        string            `json:"name"`
	UID         string            `json:"uid"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

const (
	kindSandbox   = "sandbox"
	kindContainer = "container"

	markRemoving = ".removing" // a removal was begun and has to be finished
	markStopped  = ".stopped"  // a sandbox was stopped, or is being stopped
)

func (s *Server) intentDir() string           { return filepath.Join(s.cfg.State, "intents") }
func (s *Server) intentPath(id string) string { return filepath.Join(s.intentDir(), id) }

func (s *Server) writeIntent(in intent) error {
	in.Version = store.Version
	data, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("note intent for %s %s: %w", in.Kind, in.ID, err)
	}
	// Renamed into place: a reader after a crash sees all of it or nothing.
	tmp := s.intentPath("." + in.ID + ".tmp")
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return fmt.Errorf("note intent for %s %s: %w", in.Kind, in.ID, err)
	}
	if err := os.Rename(tmp, s.intentPath(in.ID)); err != nil {
		return fmt.Errorf("note intent for %s %s: %w", in.Kind, in.ID, err)
	}
	return nil
}

func (s *Server) mark(id, suffix string) error {
	f, err := os.OpenFile(s.intentPath(id+suffix), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("mark %s as%s: %w", id, " "+suffix[1:], err)
	}
	return f.Close()
}

func (s *Server) marked(id, suffix string) bool {
	_, err := os.Lstat(s.intentPath(id + suffix))
	return err == nil
}

// dropIntent forgets the intent and its marks, the intent last.
func (s *Server) dropIntent(id string) error {
	var errs []error
	for _, suffix := range []string{markStopped, markRemoving, ""} {
		if err := os.Remove(s.intentPath(id + suffix)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("drop intent for %s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

// readIntents returns all intents of this boot. Files that are none of ours or
// broken are returned by name, to be removed.
func (s *Server) readIntents() (found []intent, junk []string, err error) {
	entries, err := os.ReadDir(s.intentDir())
	if err != nil {
		return nil, nil, fmt.Errorf("read intents: %w", err)
	}
	for _, e := range entries {
		name := e.Name()
		if filepath.Ext(name) != "" { // marks and temporary files
			if name[0] == '.' {
				junk = append(junk, name)
			}
			continue
		}
		data, err := os.ReadFile(filepath.Join(s.intentDir(), name))
		var in intent
		if err == nil {
			in, err = decodeIntent(name, data)
		}
		if err != nil {
			s.log.Warn("an intent cannot be read; the object is cleaned by its name", "path", name, "err", err)
			in = intent{ID: name}
		}
		found = append(found, in)
	}
	return found, junk, nil
}

// decodeIntent reads the intent in the file of that name.
func decodeIntent(name string, data []byte) (intent, error) {
	var in intent
	if err := json.Unmarshal(data, &in); err != nil {
		return intent{}, fmt.Errorf("decode intent: %w", err)
	}
	if in.ID != name || in.Version != store.Version {
		return intent{}, fmt.Errorf("intent of %q, version %d: want %q, %d", in.ID, in.Version, name, store.Version)
	}
	return in, nil
}
