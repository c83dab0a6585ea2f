package rootfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// fixture is a Mounter with three layers: c (bottom), b, a (top).
type fixture struct {
	testing.TB
	*Mounter
	layers Layers
	dir    string
}

func setup(t testing.TB) *fixture {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	f := &fixture{TB: t, dir: dir, Mounter: New(Config{Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state")})}
	for _, l := range []string{"a", "b", "c"} {
		p := filepath.Join(dir, "layers", l, "fs")
		f.write(filepath.Join(p, "from"), l)
		f.write(filepath.Join(p, l), l)
		f.layers.Lower = append(f.layers.Lower, p)
	}
	t.Cleanup(func() {
		if err := f.Reconcile(context.Background(), nil); err != nil {
			t.Errorf("clean up: %v", err)
		}
		if left := f.mounts(); len(left) > 0 {
			t.Errorf("mounts left: %v", left)
		}
	})
	return f
}

func (f *fixture) write(path, data string) {
	f.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(data), 0o644)); err != nil {
		f.Fatal(err)
	}
}

func (f *fixture) read(path, want string) {
	f.Helper()
	if b, err := os.ReadFile(path); err != nil || string(b) != want {
		f.Errorf("%s: %q %v, want %q", path, b, err, want)
	}
}

// mounts lists mount points below the fixture's directory.
func (f *fixture) mounts() (out []string) {
	f.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		f.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if p := strings.Fields(line)[4]; strings.HasPrefix(p, f.dir+"/") {
			out = append(out, p)
		}
	}
	return out
}

func (f *fixture) mustMount(id string, opts Options) string {
	f.Helper()
	path, err := f.Mount(context.Background(), id, f.layers, opts)
	if err != nil {
		f.Fatal(err)
	}
	return path
}

func TestMount(t *testing.T) {
	f := setup(t)
	path := f.mustMount("one", Options{})
	if want := filepath.Join(f.dir, "state/containers/one/rootfs"); path != want {
		t.Errorf("mounted at %s, want %s", path, want)
	}
	for file, want := range map[string]string{"from": "a", "a": "a", "b": "b", "c": "c"} {
		f.read(filepath.Join(path, file), want)
	}
	f.write(filepath.Join(path, "from"), "container")
	if err := os.Remove(filepath.Join(path, "c")); err != nil {
		t.Error(err)
	}
	f.read(filepath.Join(f.layers.Lower[0], "from"), "a")
	f.read(filepath.Join(f.layers.Lower[2], "c"), "c")

	if err := f.Unmount(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"root/containers/one", "state/containers/one"} {
		if _, err := os.Lstat(filepath.Join(f.dir, p)); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", p, err)
		}
	}
	if err := f.Unmount(t.Context(), "one"); err != nil {
		t.Errorf("second unmount: %v", err)
	}
	if err := f.Unmount(t.Context(), "never"); err != nil {
		t.Errorf("unmount of what never was: %v", err)
	}
}

// What a former life of the id wrote must not show up in the next.
func TestMountAgainStartsEmpty(t *testing.T) {
	f := setup(t)
	f.write(filepath.Join(f.mustMount("one", Options{}), "secret"), "x")
	path := f.mustMount("one", Options{})
	if _, err := os.Lstat(filepath.Join(path, "secret")); !os.IsNotExist(err) {
		t.Errorf("old file is there: %v", err)
	}
	if n := len(f.mounts()); n != 1 {
		t.Errorf("%d mounts", n)
	}
}

func TestMountRootTakesOwnerAndModeOfImage(t *testing.T) {
	f := setup(t)
	top := f.layers.Lower[0]
	if err := errors.Join(os.Chmod(top, 0o711|os.ModeSticky), os.Chown(top, 12, 34)); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(f.mustMount("one", Options{}), &st); err != nil {
		t.Fatal(err)
	}
	if st.Uid != 12 || st.Gid != 34 || st.Mode&0o7777 != 0o1711 {
		t.Errorf("root is %d:%d %o", st.Uid, st.Gid, st.Mode)
	}
}

func TestMountBusyIsDetached(t *testing.T) {
	f := setup(t)
	path := f.mustMount("one", Options{})
	file, err := os.Create(filepath.Join(path, "open"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := f.Unmount(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	if left := f.mounts(); len(left) > 0 {
		t.Errorf("mounts left: %v", left)
	}
}

func TestManyLayersAndLongPaths(t *testing.T) {
	f := setup(t)
	for i := range 120 {
		p := filepath.Join(f.dir, strings.Repeat("long", 40), strings.Repeat("path", 40), fmt.Sprint(i), "fs")
		f.write(filepath.Join(p, "n"), fmt.Sprint(i))
		f.write(filepath.Join(p, fmt.Sprint("file", i)), "")
		f.layers.Lower = append(f.layers.Lower, p)
	}
	check := func(path string) {
		t.Helper()
		f.read(filepath.Join(path, "n"), "0")
		f.read(filepath.Join(path, "from"), "a")
		f.read(filepath.Join(path, "file119"), "")
	}
	check(f.mustMount("new", Options{}))

	// The way of older kernels.
	var o overlay
	o.lower = f.layers.Lower
	for _, d := range []*string{&o.upper, &o.work} {
		*d = t.TempDir()
	}
	target := filepath.Join(f.dir, "classic")
	if err := os.Mkdir(target, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := o.mountClassic(target, 0); err != nil {
		t.Fatal(err)
	}
	defer f.unmount(target)
	check(target)
}

func TestNoDescriptorsLeak(t *testing.T) {
	f := setup(t)
	count := func() int { e, _ := os.ReadDir("/proc/self/fd"); return len(e) }
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 300000, Size: 65536}}
	round := func() {
		f.mustMount("one", Options{})
		f.mustMount("two", Options{IDMap: IDMap{UIDMap: ids, GIDMap: ids}})
		if _, err := f.MountImage(t.Context(), "two", f.layers, ImageOptions{Subpath: "a"}); err != nil {
			t.Fatal(err)
		}
		_, _ = f.MountImage(t.Context(), "two", f.layers, ImageOptions{Subpath: "none"})
		_, _, _ = f.Usage(t.Context(), "one")
		if err := errors.Join(f.Unmount(t.Context(), "one"), f.Unmount(t.Context(), "two")); err != nil {
			t.Fatal(err)
		}
	}
	round()
	before := count()
	for range 10 {
		round()
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors, before %d", after, before)
	}
}

func TestMountErrors(t *testing.T) {
	f := setup(t)
	for _, id := range []string{"", ".", "..", "a/b", ".trash", "a\x00b", `a\b`, "a:b", strings.Repeat("x", 300)} {
		if _, err := f.Mount(t.Context(), id, f.layers, Options{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("id %q: %v", id, err)
		}
	}
	if _, err := f.Mount(t.Context(), "one", Layers{}, Options{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no layers: %v", err)
	}
	f.layers.Lower[1] = filepath.Join(f.dir, "gone")
	if _, err := f.Mount(t.Context(), "one", f.layers, Options{}); err == nil || !strings.Contains(err.Error(), "gone") {
		t.Errorf("layer gone: %v", err)
	}
	for _, dir := range []string{"state/containers", "root/containers"} {
		entries, _ := os.ReadDir(filepath.Join(f.dir, dir))
		for _, e := range entries {
			if e.Name() != ".trash" {
				t.Errorf("left in %s: %s", dir, e.Name())
			}
		}
	}
}

func TestUserNamespace(t *testing.T) {
	f := setup(t)
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 300000, Size: 65536}}
	if err := os.Chown(filepath.Join(f.layers.Lower[1], "b"), 7, 8); err != nil {
		t.Fatal(err)
	}
	path := f.mustMount("one", Options{IDMap: IDMap{UIDMap: ids, GIDMap: ids}})
	owner := func(name string, uid, gid uint32) {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(path, name), &st); err != nil || st.Uid != uid || st.Gid != gid {
			t.Errorf("%q belongs to %d:%d (%v), want %d:%d", name, st.Uid, st.Gid, err, uid, gid)
		}
	}
	owner("", 300000, 300000)
	owner("a", 300000, 300000)
	owner("b", 300007, 300008)
	if err := os.Chmod(filepath.Join(path, "b"), 0o600); err != nil { // copy up
		t.Error(err)
	}
	owner("b", 300007, 300008)
	if n := len(f.mounts()); n != 1 {
		t.Errorf("%d mounts: %v", n, f.mounts())
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(f.layers.Lower[1], "b"), &st); err != nil || st.Uid != 7 {
		t.Errorf("the layer has changed: uid %d %v", st.Uid, err)
	}
	// An image owner that the maps do not have.
	if err := os.Chown(f.layers.Lower[0], 70000, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Mount(t.Context(), "two", f.layers, Options{IDMap: IDMap{UIDMap: ids, GIDMap: ids}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unmapped owner: %v", err)
	}
}

// A crash while the idmapped copy of the layers is attached must not let the
// clean-up reach the layers themselves.
func TestReconcileSparesLayers(t *testing.T) {
	f := setup(t)
	at := f.lowerMount("dead")
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		t.Fatal(err)
	}
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 300000, Size: 65536}}
	if _, _, err := f.mapped(at, f.layers.Lower, IDMap{UIDMap: ids, GIDMap: ids}); err != nil {
		t.Fatal(err)
	}
	f.mustMount("live", Options{})
	f.mustMount("dead2", Options{})
	if _, err := f.MountImage(t.Context(), "dead2", f.layers, ImageOptions{Subpath: "a"}); err != nil {
		t.Fatal(err)
	}
	if err := f.Reconcile(t.Context(), map[string]bool{"live": true}); err != nil {
		t.Fatal(err)
	}
	if got := f.mounts(); len(got) != 1 || !strings.Contains(got[0], "live") {
		t.Errorf("mounts left: %v", got)
	}
	f.sweep(t.Context())
	f.read(filepath.Join(f.layers.Lower[0], "a"), "a")
	if entries, err := os.ReadDir(f.trash()); err != nil || len(entries) > 0 {
		t.Errorf("trash: %v %v", entries, err)
	}
}

func TestUsage(t *testing.T) {
	f := setup(t)
	path := f.mustMount("one", Options{})
	if _, _, err := f.Usage(t.Context(), "none"); !errdefs.IsNotFound(err) {
		t.Errorf("usage of nothing: %v", err)
	}
	f.write(filepath.Join(path, "dir/big"), strings.Repeat("x", 1<<20))
	if err := os.Link(filepath.Join(path, "dir/big"), filepath.Join(path, "link")); err != nil {
		t.Fatal(err)
	}
	bytes, inodes, err := f.Usage(t.Context(), "one")
	if err != nil || bytes < 1<<20 || bytes > 1<<20+64<<10 || inodes != 3 {
		t.Errorf("usage %d bytes %d inodes %v, want 1 MiB and 3 inodes", bytes, inodes, err)
	}
	f.write(filepath.Join(path, "more"), strings.Repeat("x", 1<<20))
	if again, _, _ := f.Usage(t.Context(), "one"); again != bytes {
		t.Errorf("usage was not cached")
	}
}

func TestImageVolumes(t *testing.T) {
	f := setup(t)
	f.write(filepath.Join(f.layers.Lower[2], "data/inner/file"), "inner")
	for link, target := range map[string]string{"out": "../../../../../../etc", "abs": "/data", "hop": "data/../../data/inner", "proc": "/proc/self/root"} {
		if err := os.Symlink(target, filepath.Join(f.layers.Lower[1], link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ sub, file, want string }{
		{"", "data/inner/file", "inner"},
		{"data/inner", "file", "inner"},
		{"/data/inner", "file", "inner"},
		{"data/inner/file", "", "inner"},
		{"abs/inner", "file", "inner"},
		{"hop", "file", "inner"},
		{"../../data", "inner/file", "inner"},
	} {
		path, err := f.MountImage(t.Context(), "one", f.layers, ImageOptions{Subpath: c.sub})
		if err != nil {
			t.Errorf("subpath %q: %v", c.sub, err)
			continue
		}
		f.read(filepath.Join(path, c.file), c.want)
		if err := os.WriteFile(filepath.Join(path, c.file), []byte("x"), 0o644); !errors.Is(err, unix.EROFS) {
			t.Errorf("subpath %q: write: %v", c.sub, err)
		}
	}
	for _, sub := range []string{"missing", "out", "data/inner/file/x", "proc"} {
		if path, err := f.MountImage(t.Context(), "one", f.layers, ImageOptions{Subpath: sub}); !errdefs.IsNotFound(err) {
			t.Errorf("subpath %q: %q %v", sub, path, err)
		}
	}
	one := Layers{Lower: f.layers.Lower[:1]}
	path, err := f.MountImage(t.Context(), "one", one, ImageOptions{})
	if err != nil {
		t.Fatal(err)
	}
	f.read(filepath.Join(path, "from"), "a")
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 300000, Size: 65536}}
	if path, err = f.MountImage(t.Context(), "one", f.layers, ImageOptions{Subpath: "data", IDMap: IDMap{UIDMap: ids, GIDMap: ids}}); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(path, "inner"), &st); err != nil || st.Uid != 300000 {
		t.Errorf("owner in a user namespace: %d %v", st.Uid, err)
	}
	if err := f.UnmountImages(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	if err := f.UnmountImages(t.Context(), "one"); err != nil {
		t.Errorf("again: %v", err)
	}
	if left := f.mounts(); len(left) > 0 {
		t.Errorf("mounts left: %v", left)
	}
}

// Renames elsewhere on the machine make the kernel's safe lookup give up; that
// must not show.
func TestSubpathWhileOthersRename(t *testing.T) {
	f := setup(t)
	f.write(filepath.Join(f.layers.Lower[0], "data/inner/file"), "x")
	if err := os.Symlink("../../data/../data/inner", filepath.Join(f.layers.Lower[0], "hop")); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan bool), make(chan error)
	go func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if err := os.MkdirAll(filepath.Join(f.dir, "r", fmt.Sprint(i%2)), 0o755); err != nil {
				done <- err
				return
			}
			_ = os.Rename(filepath.Join(f.dir, "r", fmt.Sprint(i%2)), filepath.Join(f.dir, "r", "x"))
			_ = os.Remove(filepath.Join(f.dir, "r", "x"))
		}
	}()
	for range 200 {
		if _, err := f.MountImage(t.Context(), "one", f.layers, ImageOptions{Subpath: "hop"}); err != nil {
			t.Error(err)
			break
		}
		if err := f.UnmountImages(t.Context(), "one"); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestRunSweepsTrash(t *testing.T) {
	f := setup(t)
	f.write(filepath.Join(f.mustMount("one", Options{}), "x"), "x")
	if err := f.Unmount(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- f.Run(ctx) }()
	empty := func() bool { e, _ := os.ReadDir(f.trash()); return len(e) == 0 }
	for deadline := time.Now().Add(5 * time.Second); !empty() && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if !empty() {
		t.Error("trash is not swept")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func BenchmarkMountUnmount(b *testing.B) {
	f := setup(b)
	for i := range 10 {
		p := filepath.Join(f.dir, "bench", fmt.Sprint(i), "fs")
		f.write(filepath.Join(p, "f"), "x")
		f.layers.Lower = append(f.layers.Lower, p)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- f.Run(ctx) }()
	for b.Loop() {
		f.mustMount("bench", Options{})
		if err := f.Unmount(ctx, "bench"); err != nil {
			b.Fatal(err)
		}
	}
	cancel()
	<-done
}
