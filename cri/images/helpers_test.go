package images

import (
	"io/fs"
	"path/filepath"
	"strings"
	"time"
)

// eventually waits for what the collector does in the background.
func (f *fixture) eventually(what string, ok func() bool) {
	f.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
		if time.Now().After(deadline) {
			f.Fatalf("never came true: %s", what)
		}
	}
}

// wantEmpty drops what failed pulls have left, and wants nothing at all on disk.
func (f *fixture) wantEmpty() {
	f.Helper()
	f.forgetPartial()
	var left []string
	f.eventually("store is empty", func() bool {
		if err := f.store.GC(f.Context()); err != nil {
			f.Fatal(err)
		}
		left = f.leftovers()
		return len(left) == 0 || f.Failed()
	})
	if u, err := f.store.FsInfo(f.Context()); err != nil || u.Bytes != 0 || u.Inodes != 0 {
		f.Errorf("empty store uses %+v %v", u, err)
	}
}

func (f *fixture) forgetPartial() {
	f.store.mu.Lock()
	defer f.store.mu.Unlock()
	for id := range f.store.partial {
		f.store.partial[id] = time.Time{}
	}
}

// leftovers are blobs, partial downloads and layers on disk.
func (f *fixture) leftovers() (out []string) {
	f.Helper()
	for _, dir := range []string{"content/blobs", "content/ingest", "snapshots/snapshots"} {
		root := filepath.Join(f.root, "images", dir)
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if rel := strings.TrimPrefix(path, root); err == nil && rel != "" && rel != "/sha256" {
				out = append(out, dir+rel)
			}
			return nil
		})
		if err != nil {
			f.Fatal(err)
		}
	}
	return out
}
