package namespaces

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// pinner keeps namespaces alive by id. Every method may be repeated after a
// crash in its middle.
type pinner interface {
	Open() error
	Close() error
	// Pin makes the namespaces outlive this process, at pinPath.
	Pin(id string, files map[kind]*os.File) error
	// Adopt opens what is pinned and makes pinPath valid for this process.
	Adopt(id string) (map[kind]*os.File, error)
	Unpin(id string) error
	// List returns every id of which anything exists.
	List() ([]string, error)
}

func pinPath(dir, id string, k kind) string { return filepath.Join(dir, id, string(k)) }

// makePrivate makes dir a mount of its own that propagates nothing, so that
// what is mounted inside is not repeated in other mount namespaces.
func makePrivate(dir string) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	mounted, err := isMount(dir)
	if err != nil {
		return err
	}
	if !mounted {
		if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %q to itself: %w", dir, err)
		}
	}
	if err := unix.Mount("", dir, "", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make %q private: %w", dir, err)
	}
	return nil
}

// isMount compares mount ids with the parent (statx, Linux 5.8), which also
// sees bind mounts of the same file system.
func isMount(path string) (bool, error) {
	var a, b unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MNT_ID, &a); err != nil {
		return false, &os.PathError{Op: "statx", Path: path, Err: err}
	}
	if err := unix.Statx(unix.AT_FDCWD, filepath.Dir(path), 0, unix.STATX_MNT_ID, &b); err != nil {
		return false, &os.PathError{Op: "statx", Path: filepath.Dir(path), Err: err}
	}
	return a.Mnt_id != b.Mnt_id, nil
}

// unmountAll takes off every mount stacked on path.
func unmountAll(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil // not a mount (any more)
		}
		if err != nil {
			return &os.PathError{Op: "unmount", Path: path, Err: err}
		}
	}
}

// listIDs returns the directories of dir that look like ids.
func listIDs(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		if validID(e.Name()) {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// visiblePins are bind mounts at pinPath in the host's mount namespace.
type visiblePins struct{ dir string }

func (p *visiblePins) Open() error { return makePrivate(p.dir) }

func (p *visiblePins) Close() error { return unmountAll(p.dir) }

func (p *visiblePins) Pin(id string, files map[kind]*os.File) error {
	if err := os.Mkdir(filepath.Join(p.dir, id), 0o711); err != nil {
		return err
	}
	for _, k := range kinds() {
		if files[k] != nil {
			if err := pinFile(files[k], pinPath(p.dir, id, k)); err != nil {
				return err
			}
		}
	}
	return nil
}

// pinFile mounts the namespace behind f on a new file.
func pinFile(f *os.File, target string) error {
	t, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	t.Close()
	tree, err := unix.OpenTree(int(f.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("clone mount of %s: %w", f.Name(), err)
	}
	defer unix.Close(tree)
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount %s on %q: %w", f.Name(), target, err)
	}
	return nil
}

func (p *visiblePins) Adopt(id string) (map[kind]*os.File, error) {
	return openPins(func(k kind) string { return pinPath(p.dir, id, k) })
}

// openPins opens those pins that are namespaces; a file without a mount on it
// was left by a crash or a reboot.
func openPins(path func(kind) string) (map[kind]*os.File, error) {
	files := map[kind]*os.File{}
	for _, k := range kinds() {
		f, err := openNS(path(k))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			closeFiles(files)
			return nil, err
		}
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Type != unix.NSFS_MAGIC {
			f.Close()
			continue
		}
		files[k] = f
	}
	return files, nil
}

func (p *visiblePins) Unpin(id string) error {
	for _, k := range kinds() {
		path := pinPath(p.dir, id, k)
		if err := unmountAll(path); err != nil {
			return err
		}
		if err := ignore(os.Remove(path), os.ErrNotExist); err != nil {
			return err
		}
	}
	return ignore(os.Remove(filepath.Join(p.dir, id)), os.ErrNotExist)
}

func (p *visiblePins) List() ([]string, error) { return listIDs(p.dir) }

// hiddenPins are bind mounts in a mount namespace that holds nothing else, on
// files /<id>/<kind> of a tmpfs that is its root. dir/.mnt pins that mount
// namespace. pinPath is a link to /proc/<pid>/fd/<n> of this daemon.
type hiddenPins struct {
	dir string
	mnt *os.File // the mount namespace, set by Open
}

func (p *hiddenPins) anchor() string { return filepath.Join(p.dir, ".mnt") }

// Open finds the mount namespace of an earlier daemon, or makes one.
func (p *hiddenPins) Open() error {
	if err := makePrivate(p.dir); err != nil {
		return err
	}
	a, err := os.OpenFile(p.anchor(), os.O_CREATE|os.O_RDONLY|unix.O_CLOEXEC, 0o444)
	if err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(a.Fd()), &st); err == nil && st.Type == unix.NSFS_MAGIC {
		p.mnt = a
		return nil
	}
	a.Close()
	err = p.make(-1)
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	// A mount namespace can only be pinned in an older one, and Linux 6.18
	// tells age by an id that each CPU takes from a range of its own: outside
	// of the host's first mount namespace it depends on the CPU whether a new
	// namespace counts as younger than ours. On ours' own CPU it does.
	var allowed unix.CPUSet
	if e := unix.SchedGetaffinity(0, &allowed); e != nil {
		return err
	}
	for cpu := 0; cpu < len(allowed)*64; cpu++ {
		if allowed.IsSet(cpu) {
			if err = p.make(cpu); err == nil {
				return nil
			}
		}
	}
	return err
}

// make makes the mount namespace, on one CPU if cpu is not negative, and pins
// it at the anchor.
func (p *hiddenPins) make(cpu int) error {
	mnt, err := makeMountNamespace(p.dir, cpu)
	if err != nil {
		return fmt.Errorf("make a mount namespace for pins: %w", err)
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", mnt.Fd()), p.anchor(), "", unix.MS_BIND, ""); err != nil {
		mnt.Close()
		return fmt.Errorf("pin a mount namespace at %q: %w", p.anchor(), err)
	}
	p.mnt = mnt
	return nil
}

// makeMountNamespace returns a mount namespace with nothing but an empty tmpfs
// as root: none of the host's mounts, which would otherwise stay busy.
func makeMountNamespace(dir string, cpu int) (*os.File, error) {
	var mnt *os.File
	err := onThread(func() (err error) {
		if cpu >= 0 {
			var one unix.CPUSet
			one.Set(cpu)
			if err := unix.SchedSetaffinity(0, &one); err != nil {
				return fmt.Errorf("run on CPU %d: %w", cpu, err)
			}
		}
		if err = unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare: %w", resource(err))
		}
		if mnt, err = openNS("/proc/thread-self/ns/mnt"); err != nil {
			return err
		}
		for _, step := range []struct {
			what string
			do   func() error
		}{
			{"make mounts private", func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") }},
			{"mount tmpfs", func() error {
				return unix.Mount("nodeagent-ns", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700,size=16m")
			}},
			{"chdir", func() error { return unix.Chdir(dir) }},
			{"pivot root", func() error { return unix.PivotRoot(".", ".") }},
			{"detach host mounts", func() error { return unix.Unmount(".", unix.MNT_DETACH) }},
			{"chdir", func() error { return unix.Chdir("/") }},
		} {
			if err := step.do(); err != nil {
				mnt.Close()
				return fmt.Errorf("%s: %w", step.what, err)
			}
		}
		return nil
	})
	return mnt, err
}

// inside runs fn in the mount namespace of the pins, where "/" holds them.
func (p *hiddenPins) inside(fn func() error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare root directory: %w", err)
		}
		if err := unix.Setns(int(p.mnt.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("enter mount namespace of the pins: %w", err)
		}
		return fn()
	})
}

func hiddenPath(id string, k kind) string { return "/" + id + "/" + string(k) }

func (p *hiddenPins) Pin(id string, files map[kind]*os.File) error {
	// Links first: List finds a set by either.
	if err := p.link(id, files); err != nil {
		return err
	}
	return p.inside(func() error {
		// A mount of its own, so that one unmount takes all: each one waits for
		// an RCU grace period.
		dir := "/" + id
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %q to itself: %w", dir, err)
		}
		for _, k := range kinds() {
			if files[k] != nil {
				if err := pinFile(files[k], hiddenPath(id, k)); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// link points dir/<id>/<kind> to this process's descriptors.
func (p *hiddenPins) link(id string, files map[kind]*os.File) error {
	if err := ignore(os.Mkdir(filepath.Join(p.dir, id), 0o711), os.ErrExist); err != nil {
		return err
	}
	for k, f := range files {
		path := pinPath(p.dir, id, k)
		if err := ignore(os.Remove(path), os.ErrNotExist); err != nil {
			return err
		}
		if err := os.Symlink("/proc/"+strconv.Itoa(os.Getpid())+"/fd/"+strconv.Itoa(int(f.Fd())), path); err != nil {
			return err
		}
	}
	return nil
}

func (p *hiddenPins) Adopt(id string) (files map[kind]*os.File, err error) {
	err = p.inside(func() error {
		files, err = openPins(func(k kind) string { return hiddenPath(id, k) })
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := p.link(id, files); err != nil {
		closeFiles(files)
		return nil, err
	}
	return files, nil
}

func (p *hiddenPins) Unpin(id string) error {
	err := p.inside(func() error {
		if err := unmountAll("/" + id); err != nil {
			return err
		}
		return os.RemoveAll("/" + id)
	})
	if err != nil {
		return err
	}
	for _, k := range kinds() {
		if err := ignore(os.Remove(pinPath(p.dir, id, k)), os.ErrNotExist); err != nil {
			return err
		}
	}
	return ignore(os.Remove(filepath.Join(p.dir, id)), os.ErrNotExist)
}

func (p *hiddenPins) List() ([]string, error) {
	ids, err := listIDs(p.dir)
	if err != nil {
		return nil, err
	}
	err = p.inside(func() error {
		entries, err := os.ReadDir("/")
		for _, e := range entries {
			if validID(e.Name()) {
				ids = append(ids, e.Name())
			}
		}
		return err
	})
	slices.Sort(ids)
	return slices.Compact(ids), err
}

// Close removes the mount namespace and the private mount; the pins must be
// gone.
func (p *hiddenPins) Close() error {
	if p.mnt != nil {
		p.mnt.Close()
	}
	if err := unmountAll(p.anchor()); err != nil {
		return err
	}
	if err := ignore(os.Remove(p.anchor()), os.ErrNotExist); err != nil {
		return err
	}
	return unmountAll(p.dir)
}
