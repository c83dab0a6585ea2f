package images

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// stateVersion of state.json.
const stateVersion = 1

// stateFile remembers which images were unpacked in this boot without their
// files having been synced: after a crash of the host these may be torn.
type stateFile struct {
	path string
	boot string

	mu  sync.Mutex // guards rec and the file
	rec stateRecord
}

type stateRecord struct {
	Version int    `json:"version"`
	Boot    string `json:"boot"`
	// Unsynced are image IDs unpacked during Boot and not yet on disk.
	Unsynced map[string]bool `json:"unsynced,omitempty"`
	// Torn are image IDs to unpack again, from an earlier boot.
	Torn map[string]bool `json:"torn,omitempty"`
}

func openState(root, bootIDPath string) (*stateFile, error) {
	boot, err := os.ReadFile(bootIDPath)
	if err != nil {
		return nil, fmt.Errorf("read boot id: %w", err)
	}
	f := &stateFile{path: filepath.Join(root, "state.json"), boot: strings.TrimSpace(string(boot))}
	raw, err := os.ReadFile(f.path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		f.rec = stateRecord{Version: stateVersion}
	case err != nil:
		return nil, fmt.Errorf("read image store state: %w", err)
	default:
		if err := json.Unmarshal(raw, &f.rec); err != nil {
			return nil, fmt.Errorf("parse %q: %w", f.path, err)
		}
		if f.rec.Version != stateVersion {
			return nil, fmt.Errorf("%q has version %d, this program knows %d: %w", f.path, f.rec.Version, stateVersion, errdefs.ErrFailedPrecondition)
		}
	}
	if f.rec.Unsynced == nil {
		f.rec.Unsynced = map[string]bool{}
	}
	if f.rec.Torn == nil {
		f.rec.Torn = map[string]bool{}
	}
	if f.rec.Boot != f.boot {
		for id := range f.rec.Unsynced {
			f.rec.Torn[id] = true
		}
		clear(f.rec.Unsynced)
		f.rec.Boot = f.boot
	}
	return f, nil
}

// unsynced notes durably that the layers of id are about to be relied on
// without being on disk. One small synced write.
func (f *stateFile) unsynced(id string) error {
	return f.change(func() { f.rec.Unsynced[id] = true; delete(f.rec.Torn, id) })
}

// synced notes that the layers of id are on disk, or gone.
func (f *stateFile) synced(id string) error {
	f.mu.Lock()
	known := f.rec.Unsynced[id] || f.rec.Torn[id]
	f.mu.Unlock()
	if !known {
		return nil
	}
	return f.change(func() { delete(f.rec.Unsynced, id); delete(f.rec.Torn, id) })
}

// tornImages are those to unpack again.
func (f *stateFile) tornImages() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.rec.Torn))
}

func (f *stateFile) change(fn func()) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn()
	raw, err := json.Marshal(f.rec)
	if err != nil {
		return err
	}
	if err := writeDurably(f.path, raw); err != nil {
		return fmt.Errorf("write image store state: %w", err)
	}
	return nil
}

// writeDurably replaces path: temp, fsync, rename, fsync of the directory.
func writeDurably(path string, data []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(data)
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// syncFilesystem flushes the filesystem that holds path.
func syncFilesystem(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}
