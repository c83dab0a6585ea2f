package images

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	testimages "github.com/nodeagent/nodeagent/test/images"
)

func (f *fixture) gc() {
	f.Helper()
	f.forgetPartial()
	if err := f.store.GC(f.Context()); err != nil {
		f.Fatal(err)
	}
}

func (f *fixture) gone(ref string) {
	f.Helper()
	if _, err := f.store.Get(f.Context(), ref); !errdefs.IsNotFound(err) {
		f.Errorf("get %s: %v, want NotFound", ref, err)
	}
}

// The CRI's rule: whatever an image is removed by, all its names go.
func TestRemove(t *testing.T) {
	f := setup(t)
	img := small(t, "x")
	a, b := f.push("a:v1", img), f.push("b:v2", img)
	for _, by := range []string{a, img.ID(), f.ref("b@") + img.Manifest.Desc.Digest.String(), img.ID()[7:20]} {
		f.pull(a)
		if got := f.pull(b); !slices.Equal(got.RepoTags, []string{a, b}) || len(got.RepoDigests) != 2 {
			t.Fatalf("names %v %v", got.RepoTags, got.RepoDigests)
		}
		if err := f.store.Remove(t.Context(), by); err != nil {
			t.Fatal(err)
		}
		f.gone(a)
		f.gone(b)
		f.gone(img.ID())
		if list, _ := f.store.List(t.Context()); len(list) > 0 {
			t.Errorf("listed after removal by %s: %v", by, list)
		}
	}
	if err := f.store.Remove(t.Context(), a); err != nil {
		t.Errorf("second removal: %v", err)
	}
	f.eventually("removed images are collected without being asked", func() bool { return len(f.leftovers()) == 0 })
	f.wantEmpty()
}

func TestUntag(t *testing.T) {
	f := setup(t)
	img := small(t, "x")
	a, b := f.push("a:v1", img), f.push("a:v2", img)
	f.pull(a)
	f.pull(b)
	if err := f.store.Untag(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	f.gone(a)
	if got, err := f.store.Get(t.Context(), b); err != nil || !slices.Equal(got.RepoTags, []string{b}) {
		t.Errorf("other tag: %v %v", got.RepoTags, err)
	}
	if err := f.store.Untag(t.Context(), a); !errdefs.IsNotFound(err) {
		t.Errorf("second untag: %v", err)
	}
	if err := f.store.Untag(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	f.gone(img.ID())
	f.wantEmpty()
}

// A tag that moves leaves the old image with its digest name only.
func TestTagMoves(t *testing.T) {
	f := setup(t)
	one, two := small(t, "one"), small(t, "two")
	ref := f.push("a:latest", one)
	f.pull(ref)
	f.push("a:latest", two)
	f.pull(ref)
	if got, err := f.store.Get(t.Context(), ref); err != nil || got.ID != two.ID() {
		t.Errorf("tag is at %s %v", got.ID, err)
	}
	if got, err := f.store.Get(t.Context(), one.ID()); err != nil || len(got.RepoTags) > 0 || len(got.RepoDigests) != 1 {
		t.Errorf("old image: %v %v %v", got.RepoTags, got.RepoDigests, err)
	}
}

// Layers that a container uses outlive the removal of the image, restarts of
// the store, and collections; they go with the last owner.
func TestOwnersKeepLayers(t *testing.T) {
	f := setup(t)
	img := small(t, "kept")
	f.pull(f.push("a:v1", img))
	lower := f.layers(img.ID())
	if err := f.store.Remove(t.Context(), img.ID()); err != nil {
		t.Fatal(err)
	}
	f.gc()
	f.gone(img.ID())
	intact := func(when string) {
		t.Helper()
		if b, err := os.ReadFile(filepath.Join(lower[1], "etc/base")); err != nil || string(b) != "kept" {
			t.Fatalf("%s: %q %v", when, b, err)
		}
	}
	intact("after collection")

	f.close()
	f.open()
	if err := f.store.GC(t.Context()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("collection before Restore: %v", err)
	}
	err := f.store.Restore(map[string]string{"test": img.ID(), "ghost": "sha256:none"})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "ghost") {
		t.Errorf("restore with a lost image: %v", err)
	}
	f.gc()
	intact("after restart")
	if again := f.layers(img.ID()); !slices.Equal(again, lower) {
		t.Errorf("layers %v, want %v", again, lower)
	}
	f.store.Release("test")
	f.store.Release("test")
	f.wantEmpty()
}

// Images are the same after the store is opened again.
func TestReopen(t *testing.T) {
	f := setup(t)
	src := small(t, "x")
	index := must(testimages.NewIndex(must(testimages.New(testimages.Config{Architecture: "s390x"}))(t), src))(t)
	before := f.pull(f.push("a:v1", index))
	if _, err := New(Config{Root: filepath.Join(f.root, "images")}); !errdefs.IsUnavailable(err) {
		t.Errorf("second opening: %v", err)
	}
	f.close()
	f.open()
	list, err := f.store.List(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	after := list[0]
	if after.ID != before.ID || after.Size != before.Size || !slices.Equal(after.RepoTags, before.RepoTags) ||
		!slices.Equal(after.RepoDigests, before.RepoDigests) || after.ChainID != before.ChainID {
		t.Errorf("after %+v\nbefore %+v", after, before)
	}
	if err := f.store.Restore(nil); err != nil {
		t.Fatal(err)
	}
	f.gc()
	f.layers(after.ID)
}

func TestPinned(t *testing.T) {
	f := setup(t)
	host := f.reg.Addr
	set := must(newPinSet([]string{"registry.k8s.io/pause", "*/keep/*:v1", "exact.io/a:v2", "busybox"}))(t)
	for name, want := range map[string]bool{
		"registry.k8s.io/pause:3.10": true, "registry.k8s.io/pause@sha256:ab": true, "registry.k8s.io/pause2:1": false,
		host + "/keep/x:v1": true, host + "/keep/x:v2": false, "exact.io/a:v2": true, "exact.io/a:v22": false,
		"docker.io/library/busybox:latest": true,
	} {
		if set.match(name) != want {
			t.Errorf("%s: pinned is %v", name, !want)
		}
	}
}

// TestConfigure: settings change while the store is open; bad ones change nothing.
func TestConfigure(t *testing.T) {
	f := setup(t)
	img := f.pull(f.push("keep:v1", big(t, 1, 100)))
	pinned := func() bool {
		got, err := f.store.Get(t.Context(), img.ID)
		if err != nil {
			t.Fatal(err)
		}
		return got.Pinned
	}
	if pinned() {
		t.Error("pinned from the beginning")
	}
	if err := f.store.Configure(Settings{Pinned: []string{"*/keep:*"}}); err != nil || !pinned() {
		t.Errorf("not pinned after: %v", err)
	}
	if s := f.store.live.Load(); s.MaxParallelDownloads != 3 || s.ProgressTimeout != time.Minute {
		t.Errorf("defaults are %+v", s)
	}
}

// What the store says it uses is what a walk of its directories finds.
func TestFsInfo(t *testing.T) {
	f := setup(t)
	f.pull(f.push("a:v1", big(t, 20, 3<<20)))
	f.gc()
	u, err := f.store.FsInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var bytes, inodes uint64
	for _, dir := range []string{"content/blobs/sha256", "snapshots/snapshots"} {
		err := filepath.WalkDir(filepath.Join(f.root, "images", dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			bytes += uint64(info.Sys().(*syscall.Stat_t).Blocks) * 512
			inodes++
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if diff := int64(bytes) - int64(u.Bytes); diff < -64<<10 || diff > 64<<10 {
		t.Errorf("store says %d bytes, walk finds %d", u.Bytes, bytes)
	}
	if u.Inodes == 0 || u.Inodes > inodes {
		t.Errorf("store says %d inodes, walk finds %d", u.Inodes, inodes)
	}
	if u.Mountpoint != filepath.Join(f.root, "images") {
		t.Errorf("mountpoint %q", u.Mountpoint)
	}
}

// After a boot that came before the layers were synced, they are unpacked
// again from the blobs, without the registry.
func TestTornLayersAreUnpackedAgain(t *testing.T) {
	f := setup(t)
	boot := filepath.Join(f.root, "boot_id")
	write := func(path, s string) {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	reopen := func(id string) {
		t.Helper()
		f.close()
		write(boot, id)
		f.open(func(c *Config) { c.BootIDPath = boot })
		if err := f.store.Restore(nil); err != nil {
			t.Fatal(err)
		}
	}
	reopen("boot 1")
	shared := must(testimages.NewLayer(testimages.Gzip, testimages.File("shared", "shared")))(t)
	image := func(name string) testimages.Image {
		own := must(testimages.NewLayer(testimages.Gzip, testimages.File("own", name)))(t)
		return must(testimages.New(testimages.Config{}, shared, own))(t)
	}
	safe, torn, torn2 := image("safe"), image("torn"), image("torn2")
	for name, img := range map[string]testimages.Image{"safe": safe, "torn": torn, "torn2": torn2} {
		f.pull(f.push(name+":v1", img))
	}
	f.eventually("layers are synced", func() bool {
		f.store.state.mu.Lock()
		defer f.store.state.mu.Unlock()
		return len(f.store.state.rec.Unsynced) == 0
	})
	// As if the host had gone down before that.
	if err := errors.Join(f.store.state.unsynced(torn.ID()), f.store.state.unsynced(torn2.ID())); err != nil {
		t.Fatal(err)
	}
	before := f.layers(torn.ID())
	f.store.Release("test")
	write(filepath.Join(before[0], "own"), "")
	keep := f.layers(safe.ID())
	f.store.Release("test")

	reopen("boot 2")
	f.reg.Close()
	after := f.layers(torn.ID())
	if b, err := os.ReadFile(filepath.Join(after[0], "own")); err != nil || string(b) != "torn" {
		t.Errorf("layer holds %q %v", b, err)
	}
	if got, err := f.store.Rootfs(t.Context(), "safe", safe.ID()); err != nil || !slices.Equal(got.Lower, keep) {
		t.Errorf("layers of the safe image: %v %v, want %v", got, err, keep)
	}
	if _, err := f.store.Rootfs(t.Context(), "torn2", torn2.ID()); err != nil {
		t.Error(err)
	}
	for _, owner := range []string{"test", "safe", "torn2"} {
		f.store.Release(owner)
	}
	for _, img := range []testimages.Image{safe, torn, torn2} {
		if err := f.store.Remove(t.Context(), img.ID()); err != nil {
			t.Fatal(err)
		}
	}
	f.wantEmpty()
}

// A full disk gives a clear error and keeps nothing.
func TestDiskFull(t *testing.T) {
	needRoot(t)
	for name, size := range map[string]int{"while downloading": 2 << 20, "while unpacking": 6 << 20} {
		t.Run(name, func(t *testing.T) {
			disk := t.TempDir()
			if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size="+strconv.Itoa(size)); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { syscall.Unmount(disk, syscall.MNT_DETACH) })
			f := setup(t, func(c *Config) { c.Root = filepath.Join(disk, "images") })
			f.root = disk
			ref := f.push("a:v1", big(t, 21, 4<<20))
			_, err := f.store.Pull(t.Context(), PullOptions{Ref: ref})
			if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "no space left") {
				t.Fatalf("got %v", err)
			}
			t.Log(err)
			f.eventually("nothing is kept", func() bool { return len(f.leftovers()) == 0 })
			f.pull(f.push("a:v2", small(t, "fits")))
		})
	}
}

// What a killed process has left on disk without a trace in the metadata goes
// with the first collection of the next one.
func TestOrphansAreCollected(t *testing.T) {
	f := setup(t)
	f.pull(f.push("a:v1", small(t, "x")))
	f.gc()
	before := f.leftovers()
	f.close()
	images := filepath.Join(f.root, "images")
	for _, dir := range []string{"snapshots/snapshots/new-123/fs", "snapshots/snapshots/9999/fs", "content/ingest/0123"} {
		if err := os.MkdirAll(filepath.Join(images, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"content/blobs/sha256/" + strings.Repeat("a", 64), "snapshots/snapshots/9999/fs/file"} {
		if err := os.WriteFile(filepath.Join(images, name), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f.open()
	if err := f.store.Restore(nil); err != nil {
		t.Fatal(err)
	}
	f.gc()
	if after := f.leftovers(); !slices.Equal(after, before) {
		t.Errorf("left %v\nwant %v", after, before)
	}
}

// Pulling what is there already asks the registry and writes nothing.
func TestPullAgainWritesNothing(t *testing.T) {
	f := setup(t)
	ref := f.push("a:v1", small(t, "x"))
	img := f.pull(ref)
	f.gc()
	f.eventually("layers are synced", func() bool {
		f.store.state.mu.Lock()
		defer f.store.state.mu.Unlock()
		return len(f.store.state.rec.Unsynced) == 0
	})
	f.gc()
	before, fetched := f.databaseTimes(), f.reg.Requests("GET", "")
	for _, r := range []string{ref, img.RepoDigests[0]} {
		if again := f.pull(r); again.ID != img.ID {
			t.Errorf("pulled %s", again.ID)
		}
	}
	if after := f.databaseTimes(); !slices.Equal(before, after) {
		t.Errorf("written at %v, before at %v", after, before)
	}
	if n := f.reg.Requests("GET", ""); n != fetched {
		t.Errorf("%d more GETs", n-fetched)
	}
}

// Torn layers whose blobs are gone cannot be unpacked: the image is forgotten,
// so that it is pulled again.
func TestTornImageWithoutBlobsIsForgotten(t *testing.T) {
	f := setup(t)
	img := small(t, "x")
	ref := f.push("a:v1", img)
	f.pull(ref)
	f.eventually("layers are synced", func() bool {
		f.store.state.mu.Lock()
		defer f.store.state.mu.Unlock()
		return len(f.store.state.rec.Unsynced) == 0
	})
	if err := f.store.state.unsynced(img.ID()); err != nil {
		t.Fatal(err)
	}
	if err := f.store.content.Delete(f.store.life, img.Layers[0].Desc.Digest); err != nil {
		t.Fatal(err)
	}
	f.close()
	boot := filepath.Join(f.root, "boot_id")
	if err := os.WriteFile(boot, []byte("next"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.open(func(c *Config) { c.BootIDPath = boot })
	if err := f.store.Restore(nil); err != nil {
		t.Fatal(err)
	}
	f.gone(ref)
	f.pull(ref)
	f.layers(img.ID())
}

// With no byte left on the disk, removing an image still works: it is what
// makes room.
func TestRemoveOnFullDisk(t *testing.T) {
	needRoot(t)
	disk := t.TempDir()
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=24M"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(disk, syscall.MNT_DETACH) })
	f := setup(t, func(c *Config) { c.Root = filepath.Join(disk, "images") })
	f.root = disk
	var refs []string
	for i := range 3 {
		refs = append(refs, f.push(fmt.Sprintf("a:v%d", i), big(t, uint64(60+i), 1<<20)))
		f.pull(refs[i])
	}
	f.gc()
	junk := must(os.Create(filepath.Join(disk, "junk")))(t)
	defer junk.Close()
	for n := 1 << 20; n > 0; n /= 2 {
		for {
			if _, err := junk.Write(make([]byte, n)); err != nil {
				break
			}
		}
	}
	if _, err := junk.Write([]byte{0}); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	f.pullErr(f.push("b:v1", small(t, "x")), errdefs.ErrResourceExhausted)
	for _, ref := range refs {
		if err := f.store.Remove(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
		f.gone(ref)
	}
	f.eventually("room is made", func() bool { return len(f.leftovers()) < 3 })
	f.wantEmpty()
	f.pull(f.ref("b:v1"))
}
