package metrics

import (
	"bytes"
	"errors"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

// counter counts descriptors of processes. It is not for concurrent use; take
// one from counters.
type counter struct {
	pids []int
	dir  []byte
}

var counters = sync.Pool{New: func() any { return &counter{dir: make([]byte, 16<<10)} }}

// count fills p for the processes of g; init is the container's first process.
// Processes that end meanwhile are not counted.
func (c *counter) count(g Group, init int, p *sample.Process) error {
	var err error
	if c.pids, err = g.Pids(c.pids[:0]); err != nil {
		return err
	}
	p.Processes = uint64(len(c.pids))
	for _, pid := range c.pids {
		fds, sockets := c.descriptors(pid)
		p.FDs += fds
		p.Sockets += sockets
	}
	if len(c.pids) == 0 {
		return nil
	}
	// A pid that is not in the group is someone else's by now.
	if !slices.Contains(c.pids, init) {
		init = slices.Min(c.pids)
	}
	var limit unix.Rlimit
	if unix.Prlimit(init, unix.RLIMIT_NOFILE, nil, &limit) == nil {
		p.OpenFilesSoft = limit.Cur
	}
	return nil
}

// descriptors counts the open descriptors of a process, and of these the
// sockets.
func (c *counter) descriptors(pid int) (fds, sockets uint64) {
	dir, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/fd", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, 0
	}
	defer unix.Close(dir)
	var target [64]byte
	for {
		n, err := unix.Getdents(dir, c.dir)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n <= 0 {
			return fds, sockets
		}
		for b := c.dir[:n]; ; {
			var name []byte
			if name, b = nextDirent(b); name == nil {
				break
			}
			if name[0] == '.' {
				continue
			}
			fds++
			m, err := unix.Readlinkat(dir, string(name), target[:])
			if err == nil && bytes.HasPrefix(target[:m], []byte("socket:")) {
				sockets++
			}
		}
	}
}

// nextDirent takes the first name off a buffer of struct linux_dirent64
// (getdents64(2)): inode and offset, 8 bytes each, length 2, type 1, name.
func nextDirent(b []byte) (name, rest []byte) {
	const header = 19
	if len(b) < header+1 {
		return nil, nil
	}
	length := int(nativeEndian.Uint16(b[16:]))
	if length <= header || length > len(b) {
		return nil, nil
	}
	name = b[header:length]
	if i := bytes.IndexByte(name, 0); i >= 0 {
		name = name[:i]
	}
	if len(name) == 0 {
		return nil, nil
	}
	return name, b[length:]
}
