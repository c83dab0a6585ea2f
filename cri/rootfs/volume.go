package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ImageOptions of one image volume.
type ImageOptions struct {
	// Subpath is a path inside the image, resolved there: neither ".." nor a
	// symbolic link leaves it. Empty: all of the image.
	Subpath string
	// IDMap shifts the owners of all files, if not zero.
	IDMap
	// Label is the SELinux label of all files, if not empty.
	Label string
}

// MountImage mounts an image read-only for container id and returns the path
// of the directory or file to give to the container. It lasts until
// UnmountImages or Unmount.
//
// Errors: NotFound if the image has no such subpath.
func (m *Mounter) MountImage(ctx context.Context, id string, layers Layers, opts ImageOptions) (string, error) {
	if err := checkID(id); err != nil {
		return "", err
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	path, err := m.mountImage(id, layers, opts)
	if err != nil {
		return "", fmt.Errorf("mount image volume of %q: %w", id, err)
	}
	return path, nil
}

func (m *Mounter) mountImage(id string, layers Layers, opts ImageOptions) (_ string, err error) {
	dir, err := numberedDir(m.imageMounts(id))
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.removeImage(dir))
		}
	}()
	whole, empty := filepath.Join(dir, "image"), filepath.Join(dir, "empty")
	for _, d := range []string{whole, empty} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return "", err
		}
	}
	mapped, done, err := m.mapped(filepath.Join(dir, "lower"), layers.Lower, opts.IDMap)
	if err != nil {
		return "", err
	}
	defer done()
	// An overlay without a writable layer needs two others.
	lower := append(slices.Clone(mapped), empty)
	o := overlay{lower: lower, label: opts.Label}
	if err := o.mountAt(whole, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOSUID); err != nil {
		return "", err
	}
	if opts.Subpath == "" {
		return whole, nil
	}
	return bindSubpath(whole, opts.Subpath, filepath.Join(dir, "subpath"))
}

// bindSubpath binds the file or directory sub of the mounted image to target.
func bindSubpath(image, sub, target string) (string, error) {
	root, err := unix.Open(image, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open %q: %w", image, err)
	}
	defer unix.Close(root)
	fd, err := openInRoot(root, sub)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return "", fmt.Errorf("find subpath %q in the image: %w: %w", sub, err, errdefs.ErrNotFound)
	}
	if err != nil {
		return "", fmt.Errorf("find subpath %q in the image: %w", sub, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", fmt.Errorf("look at subpath %q: %w", sub, err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = os.Mkdir(target, 0o755)
	} else {
		err = os.WriteFile(target, nil, 0o600)
	}
	if err != nil {
		return "", err
	}
	tree, err := unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return "", fmt.Errorf("open tree of subpath %q: %w", sub, err)
	}
	defer unix.Close(tree)
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return "", fmt.Errorf("bind subpath %q to %q: %w", sub, target, err)
	}
	return target, nil
}

// openInRoot opens sub with root as the root directory. The kernel answers
// EAGAIN when a rename or mount anywhere came in between (openat2(2)).
func openInRoot(root int, sub string) (fd int, err error) {
	for range 1000 {
		fd, err = unix.Openat2(root, sub, &unix.OpenHow{
			Flags:   unix.O_PATH | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
		})
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
	return fd, err
}

// numberedDir makes the next of the directories 0, 1, 2... in parent.
func numberedDir(parent string) (string, error) {
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return "", err
	}
	for n := range 1 << 16 {
		dir := filepath.Join(parent, strconv.Itoa(n))
		err := os.Mkdir(dir, 0o700)
		if err == nil {
			return dir, nil
		}
		if !errors.Is(err, fs.ErrExist) {
			return "", err
		}
	}
	return "", fmt.Errorf("too many image volumes in %q: %w", parent, errdefs.ErrResourceExhausted)
}

// UnmountImages takes away all image volumes of container id; none is fine.
func (m *Mounter) UnmountImages(_ context.Context, id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	parent := m.imageMounts(id)
	entries, err := os.ReadDir(parent)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list image volumes of %q: %w", id, err)
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, m.removeImage(filepath.Join(parent, e.Name())))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("unmount image volumes of %q: %w", id, err)
	}
	return os.Remove(parent)
}

// removeImage undoes mountImage.
func (m *Mounter) removeImage(dir string) error {
	for _, name := range []string{"subpath", "image", "lower", "empty"} {
		if err := m.unmountAndRemove(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return os.Remove(dir)
}
