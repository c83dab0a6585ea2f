package images

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"

	testimages "github.com/nodeagent/nodeagent/test/images"
)

// file writes what fn writes, through wrap, and returns its path.
func file(t *testing.T, wrap func(io.Writer) io.WriteCloser, fn func(io.Writer) error) string {
	t.Helper()
	var buf bytes.Buffer
	w := wrap(&buf)
	if err := fn(w); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "archive")
	if err := os.WriteFile(path, buf.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

var wraps = map[string]func(io.Writer) io.WriteCloser{
	"plain": func(w io.Writer) io.WriteCloser { return nopCloser{w} },
	"gzip":  func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) },
	"zstd": func(w io.Writer) io.WriteCloser {
		e, err := zstd.NewWriter(w)
		if err != nil {
			panic(err)
		}
		return e
	},
}

func TestImport(t *testing.T) {
	img := small(t, "imported")
	other := must(testimages.New(testimages.Config{Architecture: "s390x"}, img.Layers...))(t)
	index := must(testimages.NewIndex(other, img))(t)
	docker := func(w io.Writer) error {
		return testimages.WriteDockerArchive(w, map[string]testimages.Image{"app:v1": img})
	}
	oci := func(w io.Writer) error {
		return testimages.WriteArchive(w, map[string]testimages.Artifact{"example.com/app:v1": index})
	}
	sources := map[string]func(t *testing.T) string{
		"layout": func(t *testing.T) string {
			dir := t.TempDir()
			if err := testimages.WriteLayout(dir, map[string]testimages.Artifact{"example.com/app:v1": index}); err != nil {
				t.Fatal(err)
			}
			return dir
		},
	}
	for name, wrap := range wraps {
		sources["docker "+name] = func(t *testing.T) string { return file(t, wrap, docker) }
		sources["oci "+name] = func(t *testing.T) string { return file(t, wrap, oci) }
	}
	for name, source := range sources {
		t.Run(name, func(t *testing.T) {
			f := setup(t)
			got, err := f.store.Import(t.Context(), source(t), ImportOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if len(got) != 1 || got[0].ID != img.ID() {
				t.Fatalf("imported %+v, want one image %s", got, img.ID())
			}
			wantTag, wantDigests := "example.com/app:v1", []string{"example.com/app@" + index.Index.Desc.Digest.String()}
			if strings.HasPrefix(name, "docker") {
				wantTag, wantDigests = "docker.io/library/app:v1", nil
			}
			if !slices.Equal(got[0].RepoTags, []string{wantTag}) || !slices.Equal(got[0].RepoDigests, wantDigests) {
				t.Errorf("names %v %v", got[0].RepoTags, got[0].RepoDigests)
			}
			if b, err := os.ReadFile(filepath.Join(f.layers(img.ID())[1], "etc/base")); err != nil || string(b) != "imported" {
				t.Errorf("layer content %q %v", b, err)
			}
		})
	}
}

func TestImportNames(t *testing.T) {
	f := setup(t)
	img := small(t, "x")
	layout := func(name string) string {
		dir := t.TempDir()
		if err := testimages.WriteLayout(dir, map[string]testimages.Artifact{name: img}); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	for _, c := range []struct {
		in, base string
		tags     []string
		err      func(error) bool
	}{
		{"", "", nil, nil},
		{"", "example.com/a", []string{"example.com/a:latest"}, nil},
		{"", "example.com:5000/a:b", []string{"example.com:5000/a:b"}, nil},
		{"v2", "example.com/a", []string{"example.com/a:v2"}, nil},
		{"v2", "", nil, errdefs.IsInvalidArgument},
		{"BAD//name", "", nil, errdefs.IsInvalidArgument},
	} {
		got, err := f.store.Import(t.Context(), layout(c.in), ImportOptions{Name: c.base})
		if c.err != nil {
			if !c.err(err) {
				t.Errorf("%q %q: %v", c.in, c.base, err)
			}
			continue
		}
		if err != nil || len(got) != 1 || !slices.Equal(got[0].RepoTags, c.tags) {
			t.Errorf("%q %q: %+v %v, want tags %v", c.in, c.base, got, err, c.tags)
		}
		if err := f.store.Remove(t.Context(), img.ID()); err != nil {
			t.Error(err)
		}
	}
}

// TestImportOfOneImageWithSeveralNames: it is told of once.
func TestImportOfOneImageWithSeveralNames(t *testing.T) {
	f := setup(t)
	img, dir := small(t, "x"), t.TempDir()
	if err := testimages.WriteLayout(dir, map[string]testimages.Artifact{"example.com/a:1": img, "example.com/b:2": img}); err != nil {
		t.Fatal(err)
	}
	got, err := f.store.Import(t.Context(), dir, ImportOptions{})
	if err != nil || len(got) != 1 || !slices.Equal(got[0].RepoTags, []string{"example.com/a:1", "example.com/b:2"}) {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestImportFaults(t *testing.T) {
	f := setup(t, func(c *Config) { c.KeepPartial = -1 })
	img := small(t, "x")
	named := map[string]testimages.Artifact{"example.com/a:b": img}
	dir := func(change func(dir string)) string {
		d := t.TempDir()
		if err := testimages.WriteLayout(d, named); err != nil {
			t.Fatal(err)
		}
		change(d)
		return d
	}
	blob := func(d string) string { return filepath.Join(d, "blobs/sha256", img.Layers[0].Desc.Digest.Encoded()) }
	write := func(path string, b []byte) {
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	random := filepath.Join(t.TempDir(), "random")
	write(random, bytes.Repeat([]byte("random"), 1000))
	var archive bytes.Buffer
	if err := testimages.WriteArchive(&archive, named); err != nil {
		t.Fatal(err)
	}
	cut := filepath.Join(t.TempDir(), "cut")
	write(cut, archive.Bytes()[:archive.Len()/2])

	for name, c := range map[string]struct {
		path  string
		class func(error) bool
	}{
		"nothing there": {filepath.Join(t.TempDir(), "none"), errdefs.IsNotFound},
		"no layout":     {t.TempDir(), errdefs.IsInvalidArgument},
		"no archive":    {random, errdefs.IsInvalidArgument},
		"cut archive":   {cut, errdefs.IsInvalidArgument},
		"blob missing":  {dir(func(d string) { os.Remove(blob(d)) }), errdefs.IsNotFound},
		"blob changed":  {dir(func(d string) { b := bytes.Clone(img.Layers[0].Data); b[len(b)/2] ^= 1; write(blob(d), b) }), errdefs.IsDataLoss},
		"blob short":    {dir(func(d string) { write(blob(d), img.Layers[0].Data[:10]) }), func(err error) bool { return err != nil }},
		"index garbage": {dir(func(d string) { write(filepath.Join(d, "index.json"), []byte("{]")) }), errdefs.IsInvalidArgument},
		"digest leaves": {dir(func(d string) {
			write(filepath.Join(d, "index.json"), []byte(`{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":5,"digest":"sha256:../../../../etc/passwd"}]}`))
		}), errdefs.IsInvalidArgument},
	} {
		if got, err := f.store.Import(t.Context(), c.path, ImportOptions{}); !c.class(err) || len(got) > 0 {
			t.Errorf("%s: %v %v", name, got, err)
		}
		f.wantEmpty()
	}
}
