package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// usageSample is a measured writable layer.
type usageSample struct {
	bytes, inodes uint64
	until         time.Time // valid so long
}

// A walk is repeated at most every usageMinAge, and so rarely that walking
// takes no more than a hundredth of the time.
const (
	usageMinAge = 5 * time.Second
	usageShare  = 100
)

// Usage returns what the container's writable layer takes on disk: bytes of
// allocated blocks, and inodes; a file with several links counts once. The
// value may be some seconds old.
//
// Errors: NotFound if the container has no root filesystem.
func (m *Mounter) Usage(ctx context.Context, id string) (bytes, inodes uint64, err error) {
	if err := checkID(id); err != nil {
		return 0, 0, err
	}
	m.mu.Lock()
	s, ok := m.usage[id]
	m.mu.Unlock()
	start := time.Now()
	if ok && start.Before(s.until) {
		return s.bytes, s.inodes, nil
	}
	w := walk{seen: map[inode]bool{}}
	if err := w.dir(ctx, m.upper(id)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		}
		return 0, 0, fmt.Errorf("measure writable layer of %q: %w", id, err)
	}
	took := time.Since(start)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.usage[id] = usageSample{w.bytes, w.inodes, time.Now().Add(max(usageMinAge, took*usageShare))}
	return w.bytes, w.inodes, nil
}

type inode struct{ dev, ino uint64 }

type walk struct {
	bytes, inodes uint64
	seen          map[inode]bool // only of files with several links
}

func (w *walk) add(st *unix.Stat_t) {
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		key := inode{st.Dev, st.Ino}
		if w.seen[key] {
			return
		}
		w.seen[key] = true
	}
	w.bytes += uint64(st.Blocks) * 512
	w.inodes++
}

// dir adds a directory and all below; what vanishes meanwhile is not counted.
func (w *walk) dir(ctx context.Context, path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return w.tree(ctx, os.NewFile(uintptr(fd), path))
}

// tree walks an open directory by descriptors, and closes it.
func (w *walk) tree(ctx context.Context, d *os.File) error {
	defer d.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(d.Fd()), &st); err != nil {
		return err
	}
	w.add(&st)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		names, err := d.Readdirnames(512)
		for _, name := range names {
			if err := w.child(ctx, d, name); err != nil {
				return err
			}
		}
		if err != nil || len(names) == 0 {
			return nil
		}
	}
}

func (w *walk) child(ctx context.Context, d *os.File, name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(int(d.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		w.add(&st)
		return nil
	}
	fd, err := unix.Openat(int(d.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	return w.tree(ctx, os.NewFile(uintptr(fd), filepath.Join(d.Name(), name)))
}
