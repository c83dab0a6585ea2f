//go:build linux

package server

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim/criolog"
)

// stdio is the shim's side of a container's input and output.
//
// Outputs are named fifos whose container side is open for reading too: so the
// container never sees a broken pipe when the shim dies; it blocks when the
// fifo is full and goes on when the next shim reads it. What is in a fifo lives
// only as long as somebody has it open, so the reaper holds the read ends too:
// a container may end while there is no shim. A terminal's output goes master ->
// fifo -> log; its master and the fifo, and the write end of stdin, live on in
// the reaper as well.
type stdio struct {
	out [2]*os.File // read ends, not blocking; nil: none
	in  *os.File    // write end of stdin, not blocking; nil: none
	tty *os.File    // master of the terminal, not blocking; nil: none
	via *os.File    // write end of the fifo behind tty

	mu     sync.Mutex
	inDone bool // stdin was closed
}

func (o *stdio) close() {
	for _, f := range []*os.File{o.out[0], o.out[1], o.in, o.tty, o.via} {
		if f != nil {
			f.Close()
		}
	}
}

// childIO is the container's side, held until its first process has it.
type childIO struct {
	files   []*os.File
	console *os.File // our end of the socket that brings the master
}

func (c *childIO) close() {
	for _, f := range c.files {
		f.Close()
	}
	c.files = nil
}

func (c *container) fifo(name string) string { return filepath.Join(c.dir, name) }

// openStdio makes the fifos and gives the container's ends to lp.
func (c *container) openStdio(cfg *configs.Config, lp *libcontainer.Process) (_ *childIO, err error) {
	child := &childIO{}
	defer func() {
		if err != nil {
			child.close()
			c.io.close()
		}
	}()
	if c.facts.Pause {
		return child, nil
	}
	uid, err := cfg.HostRootUID()
	if err != nil {
		return nil, err
	}
	gid, err := cfg.HostRootGID()
	if err != nil {
		return nil, err
	}
	mk := func(name string) error {
		if err := unix.Mkfifo(c.fifo(name), 0o600); err != nil {
			return fmt.Errorf("make fifo %s: %w", c.fifo(name), err)
		}
		return os.Chown(c.fifo(name), uid, gid)
	}
	if c.facts.Terminal {
		return child, c.openConsole(child, lp, mk)
	}
	for s, name := range []string{"stdout", "stderr"} {
		if err := mk(name); err != nil {
			return nil, err
		}
		w, err := openFd(c.fifo(name), unix.O_RDWR)
		if err != nil {
			return nil, err
		}
		child.files = append(child.files, w)
		if s == 0 {
			lp.Stdout = w
		} else {
			lp.Stderr = w
		}
		if c.io.out[s], err = openFd(c.fifo(name), unix.O_RDONLY|unix.O_NONBLOCK); err != nil {
			return nil, err
		}
	}
	if !c.facts.Stdin {
		return child, nil
	}
	if err := mk("stdin"); err != nil {
		return nil, err
	}
	fd, err := unix.Open(c.fifo("stdin"), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", c.fifo("stdin"), err)
	}
	if c.io.in, err = openFd(c.fifo("stdin"), unix.O_WRONLY|unix.O_NONBLOCK); err == nil {
		err = unix.SetNonblock(fd, false)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	r := os.NewFile(uintptr(fd), c.fifo("stdin"))
	child.files = append(child.files, r)
	lp.Stdin = r
	return child, nil
}

// openConsole makes the fifo behind the terminal and the socket that libcontainer
// sends the master through.
func (c *container) openConsole(child *childIO, lp *libcontainer.Process, mk func(string) error) error {
	if err := mk("stdout"); err != nil {
		return err
	}
	var err error
	if c.io.via, err = openFd(c.fifo("stdout"), unix.O_RDWR|unix.O_NONBLOCK); err != nil {
		return err
	}
	if c.io.out[0], err = openFd(c.fifo("stdout"), unix.O_RDONLY|unix.O_NONBLOCK); err != nil {
		return err
	}
	return child.openConsoleSocket(lp)
}

func (c *childIO) openConsoleSocket(lp *libcontainer.Process) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	c.console = os.NewFile(uintptr(fds[0]), "console")
	lp.ConsoleSocket = os.NewFile(uintptr(fds[1]), "console")
	c.files = append(c.files, c.console, lp.ConsoleSocket)
	return nil
}

// receiveMaster takes the master of the terminal from the console socket.
func receiveMaster(socket int) (*os.File, error) {
	name, control := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, name, control, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
	if err != nil {
		return nil, fmt.Errorf("receive terminal: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("receive terminal: %d control messages: %w", len(msgs), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("receive terminal: %d descriptors: %w", len(fds), err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}

// openFd opens path; with O_NONBLOCK the netpoller waits for it.
func openFd(path string, flags int) (*os.File, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, fmt.Errorf("open %s: %w", path, err)
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// kept are the files that must outlive this process, by the reaper's names.
func (c *container) kept() map[string]*os.File {
	all := map[string]*os.File{
		"out/" + c.id: c.io.out[0], "err/" + c.id: c.io.out[1],
		"tty/" + c.id: c.io.tty, "via/" + c.id: c.io.via, "stdin/" + c.id: c.io.in,
	}
	maps.DeleteFunc(all, func(_ string, f *os.File) bool { return f == nil })
	return all
}

func (s *Server) keep(c *container) {
	for name, f := range c.kept() {
		if err := s.cfg.Reaper.Keep(name, rawFd(f)); err != nil {
			s.cfg.Log.Error("give descriptor to the reaper", "name", name, "err", err)
		}
	}
}

func (s *Server) dropKept(c *container) {
	for name := range c.kept() {
		_ = s.cfg.Reaper.Drop(name)
	}
}

// rawFd is the number of f, which the caller keeps open; unlike File.Fd it does
// not make f blocking.
func rawFd(f *os.File) int {
	n := -1
	if raw, err := f.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { n = int(fd) })
	}
	return n
}

// openLog opens the container's log.
func (s *Server) openLog(c *container) (*criolog.Log, error) {
	return criolog.Open(criolog.Config{
		Dir: c.dir, Path: c.facts.LogPath, MaxLine: c.facts.MaxLogLine, StripCR: c.facts.Terminal,
		Log: s.cfg.Log.With("container", c.id),
		Tap: c.taps.write, Tapped: c.taps.any,
	})
}

// takeTerminal receives the master when the container has a terminal.
func (c *container) takeTerminal(child *childIO) error {
	if child.console == nil {
		return nil
	}
	var err error
	c.io.tty, err = receiveMaster(rawFd(child.console))
	return err
}

// runPumps starts what moves the output.
func (s *Server) runPumps(c *container) {
	for i, f := range c.io.out {
		if f == nil {
			continue
		}
		c.pumps.Go(func() { s.pump(c, criolog.Stream(i), f) })
	}
	if c.io.tty != nil {
		c.pumps.Go(func() { s.pumpTerminal(c) })
	}
}

// pump moves output into the log until the last writer is gone or the
// container is deleted.
func (s *Server) pump(c *container, stream criolog.Stream, f *os.File) {
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	said := ""
	for {
		var n int
		var terr error
		rerr := raw.Read(func(fd uintptr) bool {
			n, terr = c.log.Take(stream, int(fd))
			return terr != unix.EAGAIN
		})
		switch {
		case rerr != nil, errors.Is(terr, os.ErrClosed):
			return
		case terr != nil:
			if said != terr.Error() {
				said = terr.Error()
				s.cfg.Log.Error("move output to log; trying again", "container", c.id, "stream", stream, "err", terr)
			}
			select {
			case <-c.gone:
				return
			case <-time.After(time.Second):
			}
		case n == 0:
			if err := c.log.Finish(stream); err != nil && !errors.Is(err, os.ErrClosed) {
				s.cfg.Log.Error("finish log", "container", c.id, "stream", stream, "err", err)
			}
			return
		}
	}
}

// pumpTerminal moves what the terminal prints into the fifo, until the last
// process of the terminal is gone. The fifo then gets its end of file.
func (s *Server) pumpTerminal(c *container) {
	defer func() {
		_ = s.cfg.Reaper.Drop("via/" + c.id)
		c.io.via.Close()
	}()
	raw, err := c.io.tty.SyscallConn()
	if err != nil {
		return
	}
	move := &mover{dst: c.io.via}
	for {
		var n int
		var serr error
		rerr := raw.Read(func(fd uintptr) bool {
			n, serr = move.splice(int(fd))
			return serr != unix.EAGAIN
		})
		switch {
		case rerr != nil, serr == unix.EIO, serr == nil && n == 0:
			return // EIO: nobody has the terminal open any more
		case serr != nil:
			select {
			case <-c.gone:
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
}

// mover moves bytes from a terminal into a pipe without a moment in which they
// are only in our memory.
type mover struct {
	dst  *os.File
	copy atomic.Bool // the kernel cannot splice from a terminal (before 5.11)
}

// splice returns EAGAIN when src has nothing; it waits for space in dst.
func (m *mover) splice(src int) (int, error) {
	raw, err := m.dst.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	var serr error
	rerr := raw.Write(func(dst uintptr) bool {
		for {
			n, serr = m.once(src, int(dst))
			switch {
			case serr != unix.EAGAIN:
				return true
			case !ready(int(dst), unix.POLLOUT):
				return false // woken when there is space
			case !ready(src, unix.POLLIN):
				return true // the caller waits for src
			}
			// Whichever was missing has come since: nothing will wake us for it.
		}
	})
	if rerr != nil {
		return 0, rerr
	}
	return n, serr
}

func (m *mover) once(src, dst int) (int, error) {
	for {
		if m.copy.Load() {
			return copyOnce(src, dst)
		}
		n, err := unix.Splice(src, nil, dst, nil, 64<<10, unix.SPLICE_F_NONBLOCK)
		if err == unix.EINVAL {
			m.copy.Store(true)
			continue
		}
		if err != unix.EINTR {
			return int(n), err
		}
	}
}

// copyOnce reads only what surely fits into the pipe.
func copyOnce(src, dst int) (int, error) {
	if !ready(dst, unix.POLLOUT) {
		return 0, unix.EAGAIN
	}
	var b [4096]byte // PIPE_BUF: whole or not at all
	n, err := unix.Read(src, b[:])
	if n <= 0 {
		return 0, err
	}
	return unix.Write(dst, b[:n])
}

func ready(fd int, events int16) bool {
	return poll([]unix.PollFd{{Fd: int32(fd), Events: events}}) > 0
}

func poll(p []unix.PollFd) int {
	for {
		n, err := unix.Poll(p, 0)
		if err != unix.EINTR {
			return n
		}
	}
}

// drain brings what is in the pipes now into the log: all that a process wrote
// that is dead now.
func (s *Server) drain(c *container) {
	for i, f := range c.io.out {
		if f == nil {
			continue
		}
		raw, err := f.SyscallConn()
		if err != nil {
			continue
		}
		stream := criolog.Stream(i)
		_ = raw.Control(func(fd uintptr) {
			left, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
			for err == nil && left > 0 {
				var n int
				if n, err = c.log.Take(stream, int(fd)); n <= 0 {
					break
				}
				left -= n
			}
			_ = c.log.Finish(stream)
		})
	}
}
