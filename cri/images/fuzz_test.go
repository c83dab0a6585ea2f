package images

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FuzzState feeds our own record: it is read, or refused and kept.
func FuzzState(f *testing.F) {
	f.Add([]byte(`{"version":1,"boot":"x","unsynced":{"sha256:a":true}}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`{"version":1,"boot":"other","torn":null}`))
	f.Add([]byte(``))
	f.Fuzz(func(t *testing.T, raw []byte) {
		dir := t.TempDir()
		path, boot := filepath.Join(dir, "state.json"), filepath.Join(dir, "boot")
		for p, b := range map[string][]byte{path: raw, boot: []byte("now\n")} {
			if err := os.WriteFile(p, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s, err := openState(dir, boot)
		if err != nil {
			if kept, _ := os.ReadFile(path); string(kept) != string(raw) {
				t.Errorf("a refused record was changed to %q", kept)
			}
			return
		}
		if len(s.rec.Unsynced) > 0 && s.rec.Boot != "now" {
			t.Errorf("boot %q", s.rec.Boot)
		}
		if err := s.unsynced("sha256:b"); err != nil {
			t.Fatal(err)
		}
		again, err := openState(dir, boot)
		if err != nil || !again.rec.Unsynced["sha256:b"] {
			t.Errorf("what was written is not read: %v", err)
		}
	})
}

// FuzzNames feeds names as users and archives give them: found, or an error of
// the right class, never a panic.
func FuzzNames(f *testing.F) {
	for _, s := range []string{"busybox", "a/b:c", "x@sha256:" + strings.Repeat("a", 64), "sha256:abcd", "ABCD", "", ":", "a:b@c", "[::1]:5000/x", "\x00", strings.Repeat("a", 300)} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, ref, base string) {
		s := &Store{byID: map[string]*entry{}, byRef: map[string]string{}}
		if err := s.Configure(Settings{Pinned: []string{base}}); err != nil {
			s.live.Store(&settings{pins: &pinSet{}})
		}
		id := "sha256:" + strings.Repeat("abcdef01", 8)
		s.index(Image{ID: id}, "docker.io/library/busybox:latest", "sha256:x")
		got, err := s.Get(t.Context(), ref)
		if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("class of %v", err)
		}
		if err == nil && got.ID != id {
			t.Errorf("found %q", got.ID)
		}
		names, err := importNames(archived{desc: ocispec.Descriptor{Digest: "sha256:x", Annotations: map[string]string{ocispec.AnnotationRefName: ref}}}, base)
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("class of %v", err)
		}
		for _, n := range names {
			if n == "" || strings.ContainsAny(n, "\x00 \n") {
				t.Errorf("name %q", n)
			}
		}
		parseUser(ref)
		_, _, _ = Auth{Auth: ref, ServerAddress: base}.credentials(ref)
	})
}

// FuzzDescriptors feeds what a registry or archive may say of its contents.
func FuzzDescriptors(f *testing.F) {
	f.Add([]byte(`{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:1","size":-1,"platform":{"os":"linux"}}]}`))
	f.Add([]byte(`{"manifests":[{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"md5:1","size":99999999999}]}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		found, err := parseIndex(raw, dirFetcher{})
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("class of %v", err)
			}
			return
		}
		var index ocispec.Index
		if err := json.Unmarshal(raw, &index); err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			if f.desc.Digest.Validate() != nil || f.desc.Size <= 0 || f.desc.Size > maxManifest {
				t.Errorf("accepted %+v", f.desc)
			}
		}
		bestMatch(index.Manifests, platforms.Default())
	})
}
