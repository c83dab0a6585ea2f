package images

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	testimages "github.com/nodeagent/nodeagent/test/images"
	"github.com/nodeagent/nodeagent/test/registry"
)

// fixture is a store with its collector running and a registry.
type fixture struct {
	*testing.T
	store *Store
	reg   *registry.Server
	root  string
	close func() // stops the collector and closes the store; once
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

func needRoot(t testing.TB) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
}

func setup(t *testing.T, change ...func(*Config)) *fixture {
	t.Helper()
	needRoot(t)
	f := &fixture{T: t, root: t.TempDir()}
	f.reg = f.registry(registry.Config{})
	f.open(change...)
	if err := f.store.Restore(nil); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fixture) registry(cfg registry.Config) *registry.Server {
	f.Helper()
	r, err := registry.Start(cfg)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { r.Close() })
	return r
}

// open opens the store and runs its collector for the rest of the test.
func (f *fixture) open(change ...func(*Config)) {
	f.Helper()
	cfg := Config{Root: filepath.Join(f.root, "images"), Settings: Settings{ProgressTimeout: 10 * time.Second}, KeepPartial: time.Hour,
		Log: slog.New(slog.NewTextHandler(testWriter{f.T}, &slog.HandlerOptions{Level: slog.LevelError}))}
	for _, c := range change {
		c(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		f.Fatal(err)
	}
	f.store = s
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	f.close = sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-done, s.Close()); err != nil {
			f.Errorf("close store: %v", err)
		}
	})
	f.Cleanup(f.close)
}

func (f *fixture) ref(name string) string { return f.reg.Addr + "/" + name }

func (f *fixture) push(name string, a testimages.Artifact) string {
	f.Helper()
	if err := testimages.Push(f.Context(), f.ref(name), a); err != nil {
		f.Fatal(err)
	}
	return f.ref(name)
}

func (f *fixture) pull(ref string) Image {
	f.Helper()
	img, err := f.store.Pull(f.Context(), PullOptions{Ref: ref})
	if err != nil {
		f.Fatal(err)
	}
	return img
}

// pullErr pulls and wants an error of a class.
func (f *fixture) pullErr(ref string, class error) error {
	f.Helper()
	_, err := f.store.Pull(f.Context(), PullOptions{Ref: ref})
	if !errors.Is(err, class) {
		f.Fatalf("pull %s: got %v, want %v", ref, err, class)
	}
	return err
}

func (f *fixture) layers(id string) []string {
	f.Helper()
	l, err := f.store.Rootfs(f.Context(), "test", id)
	if err != nil {
		f.Fatal(err)
	}
	return l.Lower
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// small is an image of two layers.
func small(t testing.TB, marker string) testimages.Image {
	t.Helper()
	a := must(testimages.NewLayer(testimages.Gzip, testimages.Dir("etc"), testimages.File("etc/base", marker)))(t)
	b := must(testimages.NewLayer(testimages.Zstd, testimages.File("etc/top", marker)))(t)
	return must(testimages.New(testimages.Config{Env: []string{"A=b"}, Cmd: []string{"/x"}, User: "1000:10"}, a, b))(t)
}

func TestPull(t *testing.T) {
	f := setup(t)
	src := small(t, "one")
	ref := f.push("team/app:v1", src)
	img := f.pull(ref)

	if img.ID != src.ID() {
		t.Errorf("id %s, want the config's digest %s", img.ID, src.ID())
	}
	if want := []string{ref}; !slices.Equal(img.RepoTags, want) {
		t.Errorf("tags %v, want %v", img.RepoTags, want)
	}
	digest := f.ref("team/app@") + src.Manifest.Desc.Digest.String()
	if want := []string{digest}; !slices.Equal(img.RepoDigests, want) {
		t.Errorf("digests %v, want %v", img.RepoDigests, want)
	}
	if img.UID == nil || *img.UID != 1000 || img.Username != "" {
		t.Errorf("user %v %q, want uid 1000", img.UID, img.Username)
	}
	want := src.Manifest.Desc.Size + src.Config.Desc.Size + src.Layers[0].Desc.Size + src.Layers[1].Desc.Size
	if img.Size != uint64(want) {
		t.Errorf("size %d, want %d", img.Size, want)
	}
	lower := f.layers(img.ID)
	if len(lower) != 2 {
		t.Fatalf("layers %v", lower)
	}
	for i, name := range []string{"etc/top", "etc/base"} {
		if b, err := os.ReadFile(filepath.Join(lower[i], name)); err != nil || string(b) != "one" {
			t.Errorf("layer %d: %s: %q %v", i, name, b, err)
		}
	}
	for _, name := range []string{ref, digest, img.ID, img.ID[7:], img.ID[7:19], img.ID[:16]} {
		got, err := f.store.Get(t.Context(), name)
		if err != nil || got.ID != img.ID {
			t.Errorf("get %q: %v %v", name, got.ID, err)
		}
	}
	if _, err := f.store.Get(t.Context(), "nothing"); !errdefs.IsNotFound(err) {
		t.Errorf("get of nothing: %v", err)
	}
}
