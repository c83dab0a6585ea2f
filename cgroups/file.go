package cgroups

import (
	"errors"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// reader reads small files of cgroupfs without allocating: the path and the
// contents live in its two buffers. Not for concurrent use; take one from
// readers.
type reader struct {
	path []byte // NUL-terminated for the kernel
	buf  []byte
	n    [2]uint64 // scratch for numbers; a local one would escape
}

// maxFile bounds what is read from one file. The largest is io.stat, one line
// a device; procs files are read elsewhere.
const maxFile = 1 << 20

const halfPage = 2048

var readers = sync.Pool{New: func() any {
	return &reader{path: make([]byte, 0, 256), buf: make([]byte, 16<<10)}
}}

// read returns the contents of dir/name, valid until the next call.
func (r *reader) read(dir, name string) ([]byte, error) {
	fd, err := r.open(dir, name)
	if err != nil {
		return nil, r.pathError("open", err)
	}
	defer unix.Close(fd)
	n := 0
	for {
		if n == len(r.buf) {
			if n >= maxFile {
				return nil, r.pathError("read", unix.EFBIG)
			}
			r.buf = append(r.buf, make([]byte, n)...)
		}
		m, err := unix.Read(fd, r.buf[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, r.pathError("read", err)
		}
		n += m
		// The kernel fills at least most of a page if there is more to come
		// (seq_file), so a shorter read was the last: no second one for most.
		if m < halfPage {
			return r.buf[:n], nil
		}
	}
}

func (r *reader) open(dir, name string) (int, error) {
	r.path = append(r.path[:0], dir...)
	r.path = append(r.path, '/')
	r.path = append(r.path, name...)
	r.path = append(r.path, 0)
	for {
		fd, _, errno := unix.Syscall6(unix.SYS_OPENAT, dirCWD, uintptr(unsafe.Pointer(&r.path[0])),
			unix.O_RDONLY|unix.O_CLOEXEC, 0, 0, 0)
		switch errno {
		case 0:
			return int(fd), nil
		case unix.EINTR:
		default:
			return -1, errno
		}
	}
}

// dirCWD is AT_FDCWD; a variable, because the constant is negative.
var dirCWD = func() uintptr { fd := unix.AT_FDCWD; return uintptr(fd) }()

func (r *reader) pathError(op string, err error) error {
	return &os.PathError{Op: op, Path: string(r.path[:len(r.path)-1]), Err: err}
}

// gone reports whether the error means that the group no longer exists:
// ENODEV comes from a file that was open when its group was removed.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV)
}

// absent reports whether the error means that the kernel does not offer the
// file for this group: EOPNOTSUPP is PSI switched off.
func absent(err error) bool {
	return gone(err) || errors.Is(err, unix.EOPNOTSUPP)
}
