package images

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	testimages "github.com/nodeagent/nodeagent/test/images"
	"github.com/nodeagent/nodeagent/test/registry"
)

var (
	anyBlob     = regexp.MustCompile(`/blobs/`)
	anyManifest = regexp.MustCompile(`/manifests/`)
)

// noise is data that does not compress.
func noise(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// big is an image of one uncompressible layer of n bytes and a small one.
func big(t testing.TB, seed uint64, n int) testimages.Image {
	t.Helper()
	a := must(testimages.NewLayer(testimages.Gzip, testimages.Entry{Name: "big", Data: noise(seed, n)}))(t)
	b := must(testimages.NewLayer(testimages.Gzip, testimages.File("small", fmt.Sprint(seed))))(t)
	return must(testimages.New(testimages.Config{}, a, b))(t)
}

func onPath(digest fmt.Stringer) *regexp.Regexp {
	return regexp.MustCompile(regexp.QuoteMeta(digest.String()))
}

func TestPullByDigestAndIndex(t *testing.T) {
	f := setup(t)
	mine := small(t, "mine")
	cfg := testimages.Config{Architecture: "s390x"}
	other := must(testimages.New(cfg, mine.Layers[0]))(t)
	index := must(testimages.NewIndex(other, mine))(t)
	nested := must(testimages.NewIndex(index))(t)
	f.push("app:index", index)
	f.push("app:nested", nested)
	digest := f.ref("app@") + index.Index.Desc.Digest.String()
	for _, ref := range []string{f.ref("app:index"), digest, f.ref("app:ignored@") + index.Index.Desc.Digest.String(), f.ref("app:nested")} {
		if img := f.pull(ref); img.ID != mine.ID() {
			t.Errorf("pull %s: %s, want %s", ref, img.ID, mine.ID())
		}
	}
	only := must(testimages.NewIndex(other))(t)
	err := f.pullErr(f.push("app:foreign", only), errdefs.ErrNotFound)
	if !strings.Contains(err.Error(), "linux/") {
		t.Errorf("error does not name the platform: %v", err)
	}
	f.pullErr(f.ref("app@sha256:")+strings.Repeat("0", 64), errdefs.ErrNotFound)
	f.pullErr(f.ref("app:none"), errdefs.ErrNotFound)
	f.pullErr("Not A Name", errdefs.ErrInvalidArgument)
}

func TestPullOfWhatIsNoImage(t *testing.T) {
	f := setup(t)
	img := small(t, "x")
	artifact := img
	artifact.Manifest = testimages.NewBlob(img.Manifest.Desc.MediaType,
		[]byte(strings.ReplaceAll(string(img.Manifest.Data), "application/vnd.oci.image.config.v1+json", "application/vnd.example.thing")))
	f.pullErr(f.push("x:artifact", artifact), errdefs.ErrInvalidArgument)

	lying := img // the config's diffIDs are of other layers
	lying.Manifest = must(testimages.New(testimages.Config{}, img.Layers[1], img.Layers[0]))(t).Manifest
	lying.Manifest = testimages.NewBlob(img.Manifest.Desc.MediaType,
		[]byte(strings.ReplaceAll(string(lying.Manifest.Data), must(testimages.New(testimages.Config{}, img.Layers[1], img.Layers[0]))(t).ID(), img.ID())))
	lying.Manifest = testimages.NewBlob(img.Manifest.Desc.MediaType, fixSize(lying.Manifest.Data, img))
	_, err := f.store.Pull(t.Context(), PullOptions{Ref: f.push("x:diffid", lying)})
	if err == nil || !strings.Contains(err.Error(), "wrong diff id") {
		t.Errorf("wrong diffID: %v", err)
	}
	f.wantEmpty()
}

// fixSize gives the manifest the right size for img's config.
func fixSize(manifest []byte, img testimages.Image) []byte {
	return regexp.MustCompile(`("config":\{[^}]*"size":)\d+`).ReplaceAll(manifest, fmt.Appendf(nil, "${1}%d", img.Config.Desc.Size))
}

func TestPullEmptyImage(t *testing.T) {
	f := setup(t)
	empty := must(testimages.New(testimages.Config{Cmd: []string{"x"}}))(t)
	img := f.pull(f.push("empty:v1", empty))
	if lower := f.layers(img.ID); len(lower) != 1 {
		t.Errorf("layers %v, want one empty directory", lower)
	}
}

func TestPullFaults(t *testing.T) {
	img := big(t, 7, 1<<20)
	layer := onPath(img.Layers[0].Desc.Digest)
	for name, c := range map[string]struct {
		fault registry.Fault
		class error
		text  string
	}{
		"corrupted layer":         {registry.Fault{Path: layer, Corrupt: true}, errdefs.ErrDataLoss, img.Layers[0].Desc.Digest.String()},
		"truncated layer":         {registry.Fault{Path: layer, Truncate: true}, errdefs.ErrUnavailable, img.Layers[0].Desc.Digest.String()},
		"garbage layer":           {registry.Fault{Path: layer, Garbage: true}, nil, img.Layers[0].Desc.Digest.String()},
		"garbage config":          {registry.Fault{Path: onPath(img.Config.Desc.Digest), Garbage: true}, nil, "config"},
		"garbage manifest":        {registry.Fault{Path: anyManifest, Garbage: true}, nil, "manifest"},
		"corrupted manifest":      {registry.Fault{Path: anyManifest, Corrupt: true}, nil, ""},
		"everything fails":        {registry.Fault{Path: regexp.MustCompile("."), Method: "HEAD", Status: 503}, errdefs.ErrUnavailable, "503"},
		"layer gone":              {registry.Fault{Path: layer, Status: 404}, errdefs.ErrNotFound, ""},
		"layer forbidden":         {registry.Fault{Path: layer, Status: 403}, errdefs.ErrPermissionDenied, ""},
		"resolve hangs":           {registry.Fault{Path: anyManifest, Method: "HEAD", Hang: true}, errdefs.ErrUnavailable, "sent nothing for 300ms"},
		"layer hangs":             {registry.Fault{Path: layer, Hang: true}, errdefs.ErrUnavailable, "sent nothing for 300ms"},
		"layer hangs midway":      {registry.Fault{Path: layer, HangAfter: 100_000}, errdefs.ErrUnavailable, "sent nothing for 300ms"},
		"layer is dropped always": {registry.Fault{Path: layer, Drop: true}, errdefs.ErrUnavailable, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := setup(t, func(c *Config) { c.ProgressTimeout = 300 * time.Millisecond })
			ref := f.push("app:v1", img)
			f.reg.Inject(c.fault)
			_, err := f.store.Pull(t.Context(), PullOptions{Ref: ref})
			if err == nil || c.class != nil && !errors.Is(err, c.class) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), ref) {
				t.Fatalf("got %v, want %v with %q", err, c.class, c.text)
			}
			t.Log(err)
			if list, _ := f.store.List(t.Context()); len(list) > 0 {
				t.Errorf("an image is listed: %v", list)
			}
			f.reg.Heal()
			if got := f.pull(ref); got.ID != img.ID() {
				t.Errorf("pull after healing: %s", got.ID)
			}
			if err := f.store.Remove(t.Context(), ref); err != nil {
				t.Fatal(err)
			}
			f.wantEmpty()
		})
	}
}

func TestPullNobodyListens(t *testing.T) {
	f := setup(t)
	ref := f.ref("app:v1")
	f.reg.Close()
	f.pullErr(ref, errdefs.ErrUnavailable)
}

// A connection that drops again and again costs no bytes twice.
func TestPullSurvivesDrops(t *testing.T) {
	f := setup(t)
	img := big(t, 8, 2<<20)
	ref := f.push("app:v1", img)
	f.reg.Inject(registry.Fault{Path: onPath(img.Layers[0].Desc.Digest), DropAfter: 600_000, Times: 3})
	f.pull(ref)
	if sent, want := f.reg.BytesSent(), img.Layers[0].Desc.Size; sent > want+want/2 {
		t.Errorf("%d bytes were sent for a layer of %d", sent, want)
	}
}

// What a cancelled pull has received is not fetched again.
func TestPullCancelAndResume(t *testing.T) {
	f := setup(t)
	img := big(t, 9, 4<<20)
	layer := img.Layers[0].Desc
	ref := f.push("app:v1", img)
	f.reg.Inject(registry.Fault{Path: onPath(layer.Digest), HangAfter: 3 << 20, Rate: 8 << 20, Times: 1})
	ctx, cancel := context.WithCancel(t.Context())
	_, err := f.store.Pull(ctx, PullOptions{Ref: ref, Progress: func(p Progress) {
		if p.Digest == layer.Digest && p.Offset > 2<<20 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	f.eventually("pull has ended", func() bool { f.store.mu.Lock(); defer f.store.mu.Unlock(); return len(f.store.partial) == 1 })
	before := f.reg.BytesSent()
	var first int64 = -1
	_, err = f.store.Pull(t.Context(), PullOptions{Ref: ref, Progress: func(p Progress) {
		if p.Digest == layer.Digest && p.Phase == Downloading && p.Offset > 0 && first < 0 {
			first = p.Offset
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if sent := f.reg.BytesSent() - before; sent > 2<<20 {
		t.Errorf("%d bytes were sent again of %d", sent, layer.Size)
	}
	if first < 2<<20 { // the jump to where it was is told at once
		t.Errorf("progress began at %d", first)
	}
}

// A restart of the daemon does not lose the partial download either, but it
// goes when its time is up.
func TestPartialSurvivesRestartAndExpires(t *testing.T) {
	f := setup(t)
	img := big(t, 10, 4<<20)
	layer := img.Layers[0].Desc
	ref := f.push("app:v1", img)
	f.reg.Inject(registry.Fault{Path: onPath(layer.Digest), HangAfter: 3 << 20})
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := f.store.Pull(ctx, PullOptions{Ref: ref}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	f.close()
	f.reg.Heal()
	f.open()
	if err := errors.Join(f.store.Restore(nil), f.store.GC(t.Context())); err != nil {
		t.Fatal(err)
	}
	before := f.reg.BytesSent()
	f.pull(ref)
	if sent := f.reg.BytesSent() - before; sent > 2<<20 {
		t.Errorf("%d bytes were sent again of %d", sent, layer.Size)
	}
	if err := f.store.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	f.wantEmpty()
}

func TestSameImagePulledTwiceAtOnce(t *testing.T) {
	f := setup(t)
	img := big(t, 11, 1<<20)
	ref := f.push("app:v1", img)
	hold := make(chan struct{})
	f.reg.Inject(registry.Fault{Path: onPath(img.Layers[0].Desc.Digest), Wait: hold})
	var wg sync.WaitGroup
	errs := make([]error, 5)
	leave, cancel := context.WithCancel(t.Context())
	for i := range errs {
		ctx := t.Context()
		if i == 0 {
			ctx = leave // the first goes away, the others still get the image
		}
		wg.Go(func() { _, errs[i] = f.store.Pull(ctx, PullOptions{Ref: ref}) })
	}
	f.eventually("all wait", func() bool {
		f.store.mu.Lock()
		defer f.store.mu.Unlock()
		for _, fl := range f.store.flights {
			return fl.waiters == len(errs)
		}
		return false
	})
	cancel()
	f.eventually("one has left", func() bool {
		f.store.mu.Lock()
		defer f.store.mu.Unlock()
		for _, fl := range f.store.flights {
			return fl.waiters == len(errs)-1
		}
		return false
	})
	close(hold)
	wg.Wait()
	if !errors.Is(errs[0], context.Canceled) {
		t.Errorf("the one that left: %v", errs[0])
	}
	if err := errors.Join(errs[1:]...); err != nil {
		t.Error(err)
	}
	if n := f.reg.Requests("GET", img.Layers[0].Desc.Digest.String()); n != 1 {
		t.Errorf("layer was fetched %d times", n)
	}
}

// Two images that share a layer, pulled at once: the layer comes once.
func TestSharedLayerIsFetchedOnce(t *testing.T) {
	f := setup(t)
	shared := must(testimages.NewLayer(testimages.Gzip, testimages.Entry{Name: "big", Data: noise(12, 1<<20)}))(t)
	hold := make(chan struct{})
	f.reg.Inject(registry.Fault{Path: onPath(shared.Desc.Digest), Wait: hold})
	var wg sync.WaitGroup
	errs := make([]error, 4)
	for i := range errs {
		own := must(testimages.NewLayer(testimages.Zstd, testimages.File("own", fmt.Sprint(i))))(t)
		ref := f.push(fmt.Sprintf("app%d:v1", i), must(testimages.New(testimages.Config{}, shared, own))(t))
		wg.Go(func() { _, errs[i] = f.store.Pull(t.Context(), PullOptions{Ref: ref}) })
	}
	time.Sleep(200 * time.Millisecond)
	close(hold)
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
	if n := f.reg.Requests("GET", shared.Desc.Digest.String()); n != 1 {
		t.Errorf("layer was fetched %d times", n)
	}
}

func TestCredentials(t *testing.T) {
	f := setup(t)
	img := small(t, "secret")
	for name, cfg := range map[string]registry.Config{
		"basic":  {User: "me", Password: "pa:ss"},
		"bearer": {User: "me", Password: "pa:ss", Bearer: true},
	} {
		reg := f.registry(cfg)
		ref := reg.Addr + "/app:v1"
		if err := testimages.Push(t.Context(), ref, img, "me", "pa:ss"); err != nil {
			t.Fatal(err)
		}
		good := map[string]Auth{
			"user and password": {Username: "me", Password: "pa:ss"},
			"auth":              {Auth: registry.BasicAuth("me", "pa:ss")},
			"server":            {Username: "me", Password: "pa:ss", ServerAddress: "http://" + reg.Addr + "/v1/"},
			"server host":       {Username: "me", Password: "pa:ss", ServerAddress: reg.Addr},
		}
		bad := map[string]Auth{
			"anonymous":      {},
			"wrong":          {Username: "me", Password: "pass"},
			"another server": {Username: "me", Password: "pa:ss", ServerAddress: "example.com"},
			"broken auth":    {Auth: "!"},
			"no colon":       {Auth: "bWU="},
			"wrong token":    {RegistryToken: "x"},
		}
		if cfg.Bearer {
			good["identity token"] = Auth{IdentityToken: registry.RefreshToken}
			good["registry token"] = Auth{RegistryToken: registry.Token}
			bad["wrong identity"] = Auth{IdentityToken: "x"}
		}
		for what, auth := range good {
			if _, err := f.store.Pull(t.Context(), PullOptions{Ref: ref, Auth: auth}); err != nil {
				t.Errorf("%s, %s: %v", name, what, err)
			}
			if err := f.store.Remove(t.Context(), ref); err != nil {
				t.Fatal(err)
			}
		}
		for what, auth := range bad {
			_, err := f.store.Pull(t.Context(), PullOptions{Ref: ref, Auth: auth})
			if err == nil {
				t.Errorf("%s, %s: pulled", name, what)
				continue
			}
			if !errdefs.IsUnauthorized(err) && !errdefs.IsPermissionDenied(err) && !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s, %s: class of %v", name, what, err)
			}
			if strings.Contains(err.Error(), "pa:ss") {
				t.Errorf("%s, %s: the error tells the password: %v", name, what, err)
			}
		}
	}
}

// hosts.toml is read for each pull, from the first directory that has the host.
func TestMirrors(t *testing.T) {
	dirs := []string{t.TempDir(), t.TempDir()}
	f := setup(t, func(c *Config) { c.RegistryConfigDirs = dirs })
	img := small(t, "mirrored")
	f.push("app:v1", img)
	ref := "registry.example.test/app:v1"
	f.pullErr(ref, errdefs.ErrUnavailable)
	host := filepath.Join(dirs[1], "registry.example.test")
	toml := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", "http://"+f.reg.Addr+"/none", "http://"+f.reg.Addr)
	if err := errors.Join(os.Mkdir(host, 0o755), os.WriteFile(filepath.Join(host, "hosts.toml"), []byte(toml), 0o644)); err != nil {
		t.Fatal(err)
	}
	got := f.pull(ref)
	if got.ID != img.ID() || got.RepoTags[0] != ref {
		t.Errorf("pulled %s %v", got.ID, got.RepoTags)
	}
	if err := os.Mkdir(filepath.Join(dirs[0], "registry.example.test"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dirs[0], "registry.example.test", "hosts.toml"), []byte("server = 7"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := f.store.Pull(t.Context(), PullOptions{Ref: ref}); err == nil {
		t.Error("a broken hosts.toml went unnoticed")
	}
}

func TestProgress(t *testing.T) {
	f := setup(t)
	img := big(t, 13, 3<<20)
	ref := f.push("app:v1", img)
	f.reg.Inject(registry.Fault{Path: onPath(img.Layers[0].Desc.Digest), Rate: 8 << 20})
	last := map[string]Progress{}
	calls := 0
	if _, err := f.store.Pull(t.Context(), PullOptions{Ref: ref, Progress: func(p Progress) {
		calls++
		if was := last[p.Digest.String()]; p.Phase == was.Phase && p.Offset < was.Offset {
			t.Errorf("progress goes back: %+v after %+v", p, was)
		}
		last[p.Digest.String()] = p
	}}); err != nil {
		t.Fatal(err)
	}
	for _, l := range img.Layers {
		p := last[l.Desc.Digest.String()]
		if p.Phase != Unpacked || p.Offset != l.Desc.Size || p.Kind != "layer" || p.Ref != ref {
			t.Errorf("last word on layer: %+v", p)
		}
	}
	if p := last[img.Config.Desc.Digest.String()]; p.Phase != Downloaded || p.Kind != "config" {
		t.Errorf("last word on config: %+v", p)
	}
	if calls < 10 || calls > 60 {
		t.Errorf("%d calls", calls)
	}
}
