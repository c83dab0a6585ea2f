package images

import (
	"archive/tar"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/cri/rootfs"
	testimages "github.com/nodeagent/nodeagent/test/images"
)

// mounted pulls an image of the layers given and mounts it.
func (f *fixture) mounted(layers ...[]testimages.Entry) string {
	f.Helper()
	var built []testimages.Layer
	for i, entries := range layers {
		built = append(built, must(testimages.NewLayer(testimages.Compression(i%3), entries...))(f))
	}
	img := f.pull(f.push("layers:"+strings.ToLower(filepath.Base(f.TempDir())), must(testimages.New(testimages.Config{}, built...))(f)))
	return f.mount(img.ID)
}

func (f *fixture) mount(id string) string {
	f.Helper()
	l, err := f.store.Rootfs(f.Context(), "mounted", id)
	if err != nil {
		f.Fatal(err)
	}
	m := rootfs.New(rootfs.Config{Root: filepath.Join(f.root, "m-root"), State: filepath.Join(f.root, "m-state")})
	path, err := m.Mount(f.Context(), "c", l, rootfs.Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		if err := m.Reconcile(f.store.life, nil); err != nil {
			f.Error(err)
		}
	})
	return path
}

// tree lists a directory: "dir/" or "file=content", names relative.
func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		rel := strings.TrimPrefix(path, root+"/")
		switch {
		case d.IsDir():
			out[rel] = "dir"
		case d.Type().IsRegular():
			b, err := os.ReadFile(path)
			out[rel] = string(b)
			return err
		case d.Type()&os.ModeSymlink != 0:
			out[rel], err = os.Readlink(path)
			out[rel] = "-> " + out[rel]
			return err
		default:
			out[rel] = d.Type().String()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func wantTree(t *testing.T, root string, want map[string]string) {
	t.Helper()
	got := tree(t, root)
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s is %q, want %q", k, got[k], v)
		}
		delete(got, k)
	}
	for k, v := range got {
		t.Errorf("%s is there: %q", k, v)
	}
}

func TestWhiteouts(t *testing.T) {
	f := setup(t)
	dir, file, wh, opq := testimages.Dir, testimages.File, testimages.Whiteout, testimages.Opaque
	wantTree(t, f.mounted(
		[]testimages.Entry{
			dir("gone"), file("gone/x", "1"), file("single", "1"), dir("part"), file("part/keep", "1"), file("part/drop", "1"),
			dir("opaque"), file("opaque/old", "1"), dir("opaque/olddir"), file("opaque/olddir/x", "1"),
			file("tofile", "1"), dir("todir"), file("todir/x", "1"), dir("back"), file("back/old", "1"),
			wh("nothing-below"),
		},
		[]testimages.Entry{
			wh("gone"), wh("single"), dir("part"), wh("part/drop"),
			dir("opaque"), opq("opaque"), file("opaque/new", "2"),
			dir("tofile"), file("tofile/x", "2"), file("todir", "2"), wh("back"),
		},
		[]testimages.Entry{dir("back"), file("back/new", "3"), file("opaque/third", "3")},
	), map[string]string{
		"part": "dir", "part/keep": "1", "opaque": "dir", "opaque/new": "2", "opaque/third": "3",
		"tofile": "dir", "tofile/x": "2", "todir": "2", "back": "dir", "back/new": "3",
	})
}

func TestLinks(t *testing.T) {
	f := setup(t)
	root := f.mounted(
		[]testimages.Entry{testimages.File("a", "a"), testimages.Hardlink("b", "a"), testimages.Dir("d"), testimages.Symlink("l", "d"), testimages.Symlink("dangling", "/no/where")},
	)
	wantTree(t, root, map[string]string{"a": "a", "b": "a", "d": "dir", "l": "-> d", "dangling": "-> /no/where"})
	var a, b unix.Stat_t
	if err := unix.Stat(root+"/a", &a); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(root+"/b", &b); err != nil || a.Ino != b.Ino || a.Nlink != 2 {
		t.Errorf("a and b are not one file: %d %d %d %v", a.Ino, b.Ino, a.Nlink, err)
	}
}

func TestMetadata(t *testing.T) {
	f := setup(t)
	caps := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // cap_net_bind_service=ep
	root := f.mounted([]testimages.Entry{
		{Name: "bin", Typeflag: tar.TypeDir, Mode: 0o1777, UID: 3, GID: 4},
		{Name: "bin/ping", Data: []byte("x"), Mode: 0o4755, UID: 1, GID: 2, Xattrs: map[string]string{"security.capability": caps, "user.note": "hello"}},
		{Name: "null", Typeflag: tar.TypeChar, Mode: 0o666, DevMajor: 1, DevMinor: 3},
		{Name: "disk", Typeflag: tar.TypeBlock, Mode: 0o600, DevMajor: 7, DevMinor: 0},
		{Name: "pipe", Typeflag: tar.TypeFifo, Mode: 0o640},
	})
	for name, want := range map[string]struct {
		mode     uint32
		uid, gid uint32
		rdev     uint64
	}{
		"bin":      {unix.S_IFDIR | 0o1777, 3, 4, 0},
		"bin/ping": {unix.S_IFREG | 0o4755, 1, 2, 0},
		"null":     {unix.S_IFCHR | 0o666, 0, 0, unix.Mkdev(1, 3)},
		"disk":     {unix.S_IFBLK | 0o600, 0, 0, unix.Mkdev(7, 0)},
		"pipe":     {unix.S_IFIFO | 0o640, 0, 0, 0},
	} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, name), &st); err != nil {
			t.Error(err)
			continue
		}
		if st.Mode != want.mode || st.Uid != want.uid || st.Gid != want.gid || st.Rdev != want.rdev {
			t.Errorf("%s: mode %o owner %d:%d rdev %d, want %+v", name, st.Mode, st.Uid, st.Gid, st.Rdev, want)
		}
		if name == "bin/ping" && st.Mtim.Sec != 0 {
			t.Errorf("%s: mtime %d", name, st.Mtim.Sec)
		}
	}
	for attr, want := range map[string]string{"security.capability": caps, "user.note": "hello"} {
		buf := make([]byte, 100)
		if n, err := unix.Lgetxattr(root+"/bin/ping", attr, buf); err != nil || string(buf[:n]) != want {
			t.Errorf("%s: %q %v", attr, buf[:max(n, 0)], err)
		}
	}
}

// A hard link to a file that the layer does not hold is refused, as containerd
// does: no builder makes such layers.
func TestHardlinkToLayerBelow(t *testing.T) {
	f := setup(t)
	below := must(testimages.NewLayer(testimages.Gzip, testimages.File("a", "a")))(t)
	above := must(testimages.NewLayer(testimages.Gzip, testimages.Hardlink("b", "a")))(t)
	_, err := f.store.Pull(t.Context(), PullOptions{Ref: f.push("x:v1", must(testimages.New(testimages.Config{}, below, above))(t))})
	if err == nil || errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "link ") || strings.Contains(err.Error(), "aborted") {
		t.Errorf("got %v", err)
	}
	f.wantEmpty()
}

// Whatever a layer calls its entries, nothing outside of it changes. It may be
// refused, or end up inside.
func TestPathsThatTryToLeave(t *testing.T) {
	outside := t.TempDir()
	victim := filepath.Join(outside, "victim")
	if err := os.WriteFile(victim, []byte("untouched"), 0o600); err != nil {
		t.Fatal(err)
	}
	up := strings.Repeat("../", 20)
	rel := up + strings.TrimPrefix(outside, "/")
	layers := map[string][]testimages.Entry{
		"dotdot":                 {testimages.File(rel+"/victim", "evil"), testimages.File(rel+"/new", "evil")},
		"absolute":               {testimages.File(victim, "evil"), testimages.File(outside+"/new", "evil")},
		"dotdot inside":          {testimages.Dir("a"), testimages.File("a/../"+rel+"/new", "evil")},
		"through a symlink":      {testimages.Symlink("out", outside), testimages.File("out/victim", "evil"), testimages.File("out/new", "evil")},
		"through a rel symlink":  {testimages.Symlink("out", rel), testimages.File("out/victim", "evil")},
		"two symlinks":           {testimages.Symlink("a", "."), testimages.Symlink("a/b", ".."), testimages.Symlink("a/b/c", outside), testimages.File("a/b/c/new", "evil")},
		"hardlink dotdot":        {testimages.Hardlink("h", rel+"/victim"), testimages.File("h", "evil")},
		"hardlink absolute":      {testimages.Hardlink("h", victim), testimages.File("h", "evil")},
		"hardlink by symlink":    {testimages.Symlink("s", outside), testimages.Hardlink("h", "s/victim"), testimages.File("h", "evil")},
		"hardlink to symlink":    {testimages.Symlink("s", victim), testimages.Hardlink("h", "s"), testimages.File("h", "evil")},
		"file over symlink":      {testimages.Symlink("s", victim), testimages.File("s", "evil")},
		"whiteout of ..":         {testimages.File(".wh...", "")},
		"whiteout by dotdot":     {testimages.File(rel+"/.wh.victim", "")},
		"whiteout by symlink":    {testimages.Symlink("s", outside), testimages.File("s/.wh.victim", "")},
		"opaque by symlink":      {testimages.Symlink("s", outside), testimages.File("s/.wh..wh..opq", "")},
		"device by symlink":      {testimages.Symlink("s", outside), {Name: "s/new", Typeflag: tar.TypeChar, DevMajor: 1, DevMinor: 3}},
		"chmod by symlink":       {testimages.Symlink("s", outside), {Name: "s", Typeflag: tar.TypeDir, Mode: 0o777}},
		"root replaced by link":  {testimages.Symlink(".", outside), testimages.File("new", "evil")},
		"root replaced by slash": {testimages.Symlink("/", outside), testimages.File("new", "evil")},
	}
	f := setup(t)
	var before unix.Stat_t
	if err := unix.Stat(outside, &before); err != nil {
		t.Fatal(err)
	}
	n := 0
	for name, entries := range layers {
		for _, split := range []bool{false, true} { // all in one layer, and each entry in its own
			var built []testimages.Layer
			if split {
				for _, e := range entries {
					built = append(built, must(testimages.NewLayer(testimages.Gzip, e))(t))
				}
			} else {
				built = append(built, must(testimages.NewLayer(testimages.Gzip, entries...))(t))
			}
			n++
			ref := f.push(fmt.Sprintf("evil:v%d", n), must(testimages.New(testimages.Config{}, built...))(t))
			_, err := f.store.Pull(t.Context(), PullOptions{Ref: ref})
			t.Logf("%s, split %v: %v", name, split, err)
			if b, err := os.ReadFile(victim); err != nil || string(b) != "untouched" {
				t.Errorf("%s: the victim holds %q %v", name, b, err)
			}
			var st, dir unix.Stat_t
			if err := unix.Lstat(victim, &st); err != nil || st.Nlink != 1 || st.Mode&0o777 != 0o600 {
				t.Errorf("%s: the victim has %d links, mode %o, %v", name, st.Nlink, st.Mode, err)
			}
			if err := unix.Stat(outside, &dir); err != nil || dir.Mode != before.Mode || dir.Uid != before.Uid {
				t.Errorf("%s: the directory outside has mode %o, %v", name, dir.Mode, err)
			}
			if entries, _ := os.ReadDir(outside); len(entries) != 1 {
				t.Fatalf("%s: outside holds %v", name, entries)
			}
		}
	}
	for _, dir := range []string{".", "images", "images/snapshots"} {
		if entries, _ := os.ReadDir(filepath.Join(f.root, dir)); len(entries) > 8 {
			t.Errorf("%s holds %v", dir, entries)
		}
	}
}

// Attributes by which overlayfs steers itself must not come from an image.
func TestOverlayAttributesOfImage(t *testing.T) {
	f := setup(t)
	root := f.mounted(
		[]testimages.Entry{testimages.Dir("d"), testimages.File("d/below", "1"), testimages.File("etc", "secret")},
		[]testimages.Entry{
			{Name: "d", Typeflag: tar.TypeDir, Xattrs: map[string]string{"trusted.overlay.opaque": "y"}},
			{Name: "e", Typeflag: tar.TypeDir, Xattrs: map[string]string{"trusted.overlay.redirect": "/d"}},
		},
	)
	t.Log(tree(t, root))
}

// A directory that a layer needs but does not list keeps the owner, mode and
// attributes that it has below.
func TestImplicitDirectoriesKeepMetadata(t *testing.T) {
	f := setup(t)
	attrs := map[string]string{"user.note": "kept"}
	root := f.mounted(
		[]testimages.Entry{
			{Name: "var", Typeflag: tar.TypeDir, Mode: 0o700, UID: 5, GID: 6},
			{Name: "var/lib", Typeflag: tar.TypeDir, Mode: 0o1777, UID: 7, GID: 8, Xattrs: attrs},
			{Name: "was", Typeflag: tar.TypeDir, Mode: 0o700, UID: 9, GID: 9},
			{Name: "listed", Typeflag: tar.TypeDir, Mode: 0o700, UID: 9, GID: 9},
		},
		[]testimages.Entry{testimages.File("var/lib/a", "2"), testimages.Whiteout("was"), testimages.Dir("listed"), testimages.File("listed/x", "2")},
		[]testimages.Entry{testimages.File("var/lib/b", "3"), testimages.File("was/x", "3"), testimages.File("new/dir/x", "3")},
	)
	for name, want := range map[string][3]uint32{
		"var": {0o700, 5, 6}, "var/lib": {0o1777, 7, 8}, "was": {0o755, 0, 0}, "listed": {0o755, 0, 0}, "new/dir": {0o755, 0, 0},
	} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, name), &st); err != nil || st.Mode&0o7777 != want[0] || st.Uid != want[1] || st.Gid != want[2] {
			t.Errorf("%s: mode %o owner %d:%d %v, want %o %d:%d", name, st.Mode&0o7777, st.Uid, st.Gid, err, want[0], want[1], want[2])
		}
	}
	buf := make([]byte, 10)
	if n, err := unix.Lgetxattr(root+"/var/lib", "user.note", buf); err != nil || string(buf[:n]) != "kept" {
		t.Errorf("attribute of var/lib: %v", err)
	}
}
