package images

import (
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/nodeagent/nodeagent/cri/rootfs"
	"github.com/nodeagent/nodeagent/test/registry"
)

func (f *fixture) descriptors() int {
	f.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		f.Fatal(err)
	}
	return len(entries)
}

// Pulls, good and failing, leave neither descriptors nor goroutines behind.
func TestPullsLeakNothing(t *testing.T) {
	f := setup(t, func(c *Config) { c.ProgressTimeout = 100 * time.Millisecond; c.KeepPartial = -1 })
	img := big(t, 70, 200_000)
	ref := f.push("a:v1", img)
	round := func() {
		for _, fault := range []registry.Fault{
			{Path: onPath(img.Layers[0].Desc.Digest), HangAfter: 1000},
			{Path: onPath(img.Layers[0].Desc.Digest), Corrupt: true},
			{Path: anyManifest, Method: "HEAD", Hang: true},
			{Path: regexp.MustCompile("nothing")},
		} {
			f.reg.Inject(fault)
			_, _ = f.store.Pull(t.Context(), PullOptions{Ref: ref})
			f.reg.Heal()
		}
		if err := f.store.Remove(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
		f.gc()
	}
	round()
	fds, goroutines := f.descriptors(), runtime.NumGoroutine()
	for range 5 {
		round()
	}
	f.eventually("descriptors and goroutines are as before", func() bool {
		return f.descriptors() <= fds && runtime.NumGoroutine() <= goroutines
	})
}

// The way of a container start writes nothing to the databases.
func TestRootfsWritesNothing(t *testing.T) {
	f := setup(t)
	img := f.pull(f.push("a:v1", small(t, "x")))
	f.gc()
	f.close()
	f.open() // nothing is cached
	before := f.databaseTimes()
	m := rootfs.New(rootfs.Config{Root: filepath.Join(f.root, "r"), State: filepath.Join(f.root, "s")})
	for _, id := range []string{"one", "two"} {
		l, err := f.store.Rootfs(t.Context(), id, img.ID)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Mount(t.Context(), id, l, rootfs.Options{}); err != nil {
			t.Fatal(err)
		}
		if err := m.Unmount(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		f.store.Release(id)
	}
	if after := f.databaseTimes(); !slices.Equal(before, after) {
		t.Errorf("written at %v, before at %v", after, before)
	}
}

func (f *fixture) databaseTimes() (out []time.Time) {
	f.Helper()
	for _, name := range []string{"metadata.db", "snapshots/metadata.db", "state.json"} {
		st, err := os.Stat(filepath.Join(f.root, "images", name))
		if err != nil {
			f.Fatal(err)
		}
		out = append(out, st.ModTime())
	}
	return out
}
