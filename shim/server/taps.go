//go:build linux

package server

import (
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nodeagent/nodeagent/shim/criolog"
)

// tapPatience is how long an attached client may take nothing while the
// container waits for it.
const tapPatience = 10 * time.Second

// taps copies a container's output to attached clients. Each client's pipe is
// its buffer; when it is full the container waits.
type taps struct {
	count atomic.Int32
	mu    sync.Mutex
	list  []*tap
}

// tap is the pipe of one client for one stream, not blocking.
type tap struct {
	stream criolog.Stream
	file   *os.File
	cut    func() // called when the client is lost
}

func (t *taps) any() bool { return t.count.Load() > 0 }

func (t *taps) add(x *tap) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.list = append(t.list, x)
	t.count.Add(1)
}

func (t *taps) remove(x *tap) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, y := range t.list {
		if y == x {
			t.list = append(t.list[:i:i], t.list[i+1:]...)
			t.count.Add(-1)
			return true
		}
	}
	return false
}

// write gives p to every client of the stream, one after the other.
func (t *taps) write(s criolog.Stream, p []byte) {
	t.mu.Lock()
	list := t.list
	t.mu.Unlock()
	for _, x := range list {
		if x.stream == s && !x.write(p) && t.remove(x) {
			x.cut()
		}
	}
}

// write reports whether the client is still there.
func (x *tap) write(p []byte) bool {
	for len(p) > 0 {
		_ = x.file.SetWriteDeadline(time.Now().Add(tapPatience))
		n, err := x.file.Write(p)
		p = p[n:]
		if err != nil && (n == 0 || !os.IsTimeout(err)) {
			return false
		}
	}
	return true
}
