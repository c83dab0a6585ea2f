package rootfs

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Layers are the directories of an unpacked image, topmost first; at least one.
type Layers struct {
	Lower []string
}

// Config of a Mounter.
type Config struct {
	// Root and State are the daemon's directories; "containers" below each
	// belongs to the Mounter (see the package comment).
	Root, State string
	Log         *slog.Logger
}

// Options of one container's root filesystem.
type Options struct {
	// ReadOnly is for the runtime to enforce (OCI root.readonly): the mount
	// stays writable here, because mount points must be made in it first.
	ReadOnly bool
	// IDMap shifts the owners of all files, if not zero.
	IDMap
	// Label is the SELinux label of all files, if not empty.
	Label string
}

// Mounter mounts root filesystems. See the package comment.
type Mounter struct {
	root, state string
	log         *slog.Logger
	swept       chan struct{} // capacity 1: there is something in the trash

	mu    sync.Mutex // guards usage
	usage map[string]usageSample
}

// New returns a Mounter. It touches nothing yet.
func New(cfg Config) *Mounter {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Mounter{
		root:  filepath.Join(cfg.Root, "containers"),
		state: filepath.Join(cfg.State, "containers"),
		log:   log,
		swept: make(chan struct{}, 1),
		usage: map[string]usageSample{},
	}
}

func (m *Mounter) trash() string                { return filepath.Join(m.root, ".trash") }
func (m *Mounter) layerDir(id string) string    { return filepath.Join(m.root, id) }
func (m *Mounter) stateDir(id string) string    { return filepath.Join(m.state, id) }
func (m *Mounter) mountPoint(id string) string  { return filepath.Join(m.state, id, "rootfs") }
func (m *Mounter) imageMounts(id string) string { return filepath.Join(m.state, id, "images") }
func (m *Mounter) lowerMount(id string) string  { return filepath.Join(m.state, id, "lower") }
func (m *Mounter) upper(id string) string       { return filepath.Join(m.root, id, "upper") }

func checkID(id string) error {
	if id == "" || id[0] == '.' || len(id) > 200 || strings.ContainsAny(id, "/\x00\\:,") {
		return fmt.Errorf("container id %q cannot name a directory: %w", id, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Mount mounts the root filesystem of container id and returns its path. What
// an earlier life of this id has left is removed first. On error nothing is
// left. Writes are not synced ("volatile" where the kernel has it).
//
// Errors: InvalidArgument; NotImplemented if the kernel lacks what the options
// ask for.
func (m *Mounter) Mount(ctx context.Context, id string, layers Layers, opts Options) (_ string, err error) {
	if err := checkID(id); err != nil {
		return "", err
	}
	if len(layers.Lower) == 0 {
		return "", fmt.Errorf("mount root filesystem of %q: no layers given: %w", id, errdefs.ErrInvalidArgument)
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	path, err := m.mount(id, layers, opts)
	if err != nil {
		if undo := m.Unmount(context.WithoutCancel(ctx), id); undo != nil {
			m.log.Error("cannot undo mount", "container", id, "err", undo)
		}
		return "", fmt.Errorf("mount root filesystem of %q: %w", id, err)
	}
	return path, nil
}

func (m *Mounter) mount(id string, layers Layers, opts Options) (string, error) {
	target := m.mountPoint(id)
	if err := m.freshDirs(id, target); err != nil {
		return "", err
	}
	var top unix.Stat_t
	if err := unix.Stat(layers.Lower[0], &top); err != nil {
		return "", fmt.Errorf("look at layer %q: %w", layers.Lower[0], err)
	}
	if len(opts.UIDMap) > 0 {
		if err := m.passable(id); err != nil {
			return "", err
		}
	}
	lower, done, err := m.mapped(m.lowerMount(id), layers.Lower, opts.IDMap)
	if err != nil {
		return "", err
	}
	defer done()
	uid, gid := hostID(opts.UIDMap, top.Uid), hostID(opts.GIDMap, top.Gid)
	if uid < 0 || gid < 0 {
		return "", fmt.Errorf("owner %d:%d of the image's root is not mapped: %w", top.Uid, top.Gid, errdefs.ErrInvalidArgument)
	}
	upper, work := m.upper(id), filepath.Join(m.layerDir(id), "work")
	if err := os.Chown(upper, uid, gid); err != nil {
		return "", err
	}
	if err := unix.Chmod(upper, top.Mode&0o7777); err != nil {
		return "", fmt.Errorf("set mode of %q: %w", upper, err)
	}
	o := overlay{lower: lower, upper: upper, work: work, label: opts.Label, volatile: kernelAtLeast(5, 10)}
	return target, o.mountAt(target, 0)
}

// passable lets the users of a user namespace through to their container. The
// directories of others stay closed: a user of the host could run their setuid
// programs.
func (m *Mounter) passable(id string) error {
	if err := os.Chmod(m.state, 0o711); err != nil {
		return err
	}
	return os.Chmod(m.stateDir(id), 0o711)
}

// freshDirs makes upper, work and the mount point, empty.
func (m *Mounter) freshDirs(id, target string) error {
	// Passable, because the first process of a container in a user namespace
	// has to get to its root filesystem; see passable.
	if err := os.MkdirAll(m.state, 0o711); err != nil {
		return err
	}
	if err := os.MkdirAll(target, 0o700); err != nil {
		return err
	}
	err := os.Mkdir(m.layerDir(id), 0o700)
	switch {
	case errors.Is(err, fs.ErrExist):
		if err := m.unmount(target); err != nil {
			return err
		}
		if err := m.discard(id); err != nil {
			return err
		}
		err = os.Mkdir(m.layerDir(id), 0o700)
	case errors.Is(err, fs.ErrNotExist):
		err = os.MkdirAll(m.layerDir(id), 0o700)
	}
	if err != nil {
		return err
	}
	return errors.Join(os.Mkdir(m.upper(id), 0o755), os.Mkdir(filepath.Join(m.layerDir(id), "work"), 0o711), os.Mkdir(m.VolumeDir(id), 0o711))
}

// Unmount unmounts all of a container's filesystems, image volumes included,
// and deletes what it wrote (in the background). It may be repeated, and for
// an id that was never mounted.
func (m *Mounter) Unmount(ctx context.Context, id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	err := errors.Join(m.UnmountImages(ctx, id), m.unmount(m.mountPoint(id)), m.unmountAndRemove(m.lowerMount(id)))
	if err == nil {
		err = m.discard(id)
	}
	if err != nil {
		return fmt.Errorf("unmount root filesystem of %q: %w", id, err)
	}
	_ = os.Remove(m.mountPoint(id))
	_ = os.Remove(m.stateDir(id)) // others may keep files there
	m.mu.Lock()
	delete(m.usage, id)
	m.mu.Unlock()
	return nil
}

// VolumeDir is a directory for anonymous volumes of a container (the image
// config's Volumes). It goes with the writable layer, and counts as little as
// volumes do in Usage. It exists from Mount to Unmount.
func (m *Mounter) VolumeDir(id string) string { return filepath.Join(m.layerDir(id), "volumes") }

// unmount takes away every mount on path; one that is busy is detached and
// goes when its last user does.
func (m *Mounter) unmount(path string) error {
	for range 64 {
		err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		switch {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT): // not a mount point (any more)
			return nil
		case err != nil:
			return fmt.Errorf("unmount %q: %w", path, err)
		}
	}
	return fmt.Errorf("unmount %q: too many mounts on it: %w", path, errdefs.ErrFailedPrecondition)
}

// unmountAndRemove also removes the mount point. It never removes a tree, so
// that no layer is deleted should something still be mounted.
func (m *Mounter) unmountAndRemove(path string) error {
	if err := m.unmount(path); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// discard moves a container's writable layer into the trash.
func (m *Mounter) discard(id string) error {
	dest := filepath.Join(m.trash(), id+"-"+rand.Text()[:8])
	err := os.Rename(m.layerDir(id), dest)
	if errors.Is(err, fs.ErrNotExist) {
		if _, statErr := os.Lstat(m.layerDir(id)); errors.Is(statErr, fs.ErrNotExist) {
			return nil
		}
		if err := os.MkdirAll(m.trash(), 0o700); err != nil {
			return err
		}
		err = os.Rename(m.layerDir(id), dest)
	}
	if err != nil {
		return fmt.Errorf("discard writable layer: %w", err)
	}
	select {
	case m.swept <- struct{}{}:
	default:
	}
	return nil
}

// Run deletes what is in the trash until ctx ends, beginning with what a
// former process has left there.
func (m *Mounter) Run(ctx context.Context) error {
	for {
		m.sweep(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-m.swept:
		}
	}
}

func (m *Mounter) sweep(ctx context.Context) {
	entries, err := os.ReadDir(m.trash())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.log.Error("cannot read trash", "path", m.trash(), "err", err)
	}
	for _, e := range entries {
		if ctx.Err() != nil {
			return
		}
		if err := os.RemoveAll(filepath.Join(m.trash(), e.Name())); err != nil {
			m.log.Error("cannot delete writable layer", "path", e.Name(), "err", err)
		}
	}
}

// Reconcile unmounts and deletes everything of containers that are not live.
func (m *Mounter) Reconcile(ctx context.Context, live map[string]bool) error {
	dead := map[string]bool{}
	for _, dir := range []string{m.root, m.state} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("reconcile root filesystems: %w", err)
		}
		for _, e := range entries {
			if !live[e.Name()] && checkID(e.Name()) == nil {
				dead[e.Name()] = true
			}
		}
	}
	var errs []error
	for id := range dead {
		errs = append(errs, m.Unmount(ctx, id))
	}
	return errors.Join(errs...)
}
