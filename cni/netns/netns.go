// Package netns opens network namespaces by path and runs short functions inside them.
//
// It must not create, pin or remove namespaces; it never leaves a thread in the wrong one:
// a thread that cannot be brought back is not returned to the Go scheduler and dies.
// Called by cni/builtin, cni/nat and cni. It has no goroutines of its own beyond the one
// Do runs its function on, and no locks. Linux 3.8 or newer.
package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"runtime"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Handle is an open network namespace. The zero value (nil) stands for the caller's own.
// It keeps the namespace alive until Close.
type Handle struct {
	fd int
}

// Open opens the namespace bound at path.
//
// Errors: NotFound if there is nothing at path or it is not (or no longer) a namespace,
// that is after a reboot or after the pin was unmounted.
func Open(path string) (*Handle, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("open network namespace %s: %w", path, errdefs.ErrNotFound)
		}
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	// NS_GET_NSTYPE (kernel 4.11) tells a namespace from the plain file that was under the mount.
	kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		unix.Close(fd)
		return nil, fmt.Errorf("open network namespace %s: not a network namespace: %w", path, errdefs.ErrNotFound)
	}
	return &Handle{fd: fd}, nil
}

// FD is the descriptor, owned by the handle; -1 for the caller's own namespace.
func (h *Handle) FD() int {
	if h == nil {
		return -1
	}
	return h.fd
}

// Close drops the descriptor. A nil handle is fine.
func (h *Handle) Close() error {
	if h == nil {
		return nil
	}
	return unix.Close(h.fd)
}

// Do runs f with its thread in the namespace of h and comes back. f must not start goroutines
// that rely on the namespace. A nil handle runs f where the caller is.
func Do(h *Handle, f func() error) error {
	if h == nil {
		return f()
	}
	runtime.LockOSThread()
	back, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer unix.Close(back)
	if err := unix.Setns(h.fd, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace: %w", err)
	}
	ferr := f()
	if err := unix.Setns(back, unix.CLONE_NEWNET); err != nil {
		// The thread stays locked: when this goroutine ends the runtime destroys it.
		return errors.Join(ferr, fmt.Errorf("return to own network namespace: %w", err))
	}
	runtime.UnlockOSThread()
	return ferr
}
