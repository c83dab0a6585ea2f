//go:build linux

package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim/api"
	"github.com/nodeagent/nodeagent/shim/criolog"
)

// session is an exec or an attach that a client is connected to.
type session struct {
	id     string
	c      *container
	tty    *os.File      // for Resize; nil: none
	close  func()        // ends it; may be called more than once
	done   chan struct{} // closed at its end
	code   int           // set before done is closed
	output [2][]byte     // of an ExecSync, what did not fit into the answer
}

type sessions struct {
	mu    sync.Mutex
	m     map[string]*session
	files map[string]passed
}

// passed are the descriptors that came for a session that is to begin:
// stdin, stdout, stderr.
type passed struct {
	files [3]*os.File
	timer *time.Timer
}

func (p passed) closeAll() {
	for _, f := range p.files {
		if f != nil {
			f.Close()
		}
	}
}

func (t *sessions) add(x *session) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if x.id == "" || t.m[x.id] != nil {
		return fmt.Errorf("session %q: %w", x.id, errdefs.ErrAlreadyExists)
	}
	t.m[x.id] = x
	return nil
}

func (t *sessions) remove(x *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.m[x.id] == x {
		delete(t.m, x.id)
	}
}

func (t *sessions) get(id string) (*session, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if x := t.m[id]; x != nil {
		return x, nil
	}
	return nil, fmt.Errorf("session %q: %w", id, errdefs.ErrNotFound)
}

// endAll ends the sessions of a container that is gone.
func (t *sessions) endAll(c *container) {
	t.mu.Lock()
	var mine []*session
	for _, x := range t.m {
		if x.c == c {
			mine = append(mine, x)
		}
	}
	t.mu.Unlock()
	for _, x := range mine {
		x.close()
	}
}

// pass keeps descriptors for the session that names them, for a while.
func (t *sessions) pass(id string, p passed) {
	p.timer = time.AfterFunc(30*time.Second, func() {
		if p, ok := t.take(id); ok {
			p.closeAll()
		}
	})
	t.mu.Lock()
	old, ok := t.files[id]
	t.files[id] = p
	t.mu.Unlock()
	if ok {
		old.timer.Stop()
		old.closeAll()
	}
}

func (t *sessions) take(id string) (passed, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.files[id]
	delete(t.files, id)
	if ok {
		p.timer.Stop()
	}
	return p, ok
}

// ServeFiles accepts descriptors: each connection sends one message, "ios NAME"
// with the letters of those that are there (i stdin, o stdout, e stderr), and
// gets "ok".
func (s *Server) ServeFiles(l *net.UnixListener) error {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			if err := s.receiveFiles(conn); err != nil {
				s.cfg.Log.Warn("receive descriptors", "err", err)
			}
		}()
	}
}

func (s *Server) receiveFiles(conn *net.UnixConn) error {
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	text, control := make([]byte, 512), make([]byte, unix.CmsgSpace(3*4))
	n, cn, _, _, err := conn.ReadMsgUnix(text, control)
	if err != nil {
		return err
	}
	var fds []int
	msgs, err := unix.ParseSocketControlMessage(control[:cn])
	if err != nil {
		return err
	}
	for i := range msgs {
		got, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			return err
		}
		fds = append(fds, got...)
	}
	var p passed
	which, id, ok := strings.Cut(string(text[:n]), " ")
	if !ok || len(which) != len(fds) {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return fmt.Errorf("message %q with %d descriptors", text[:n], len(fds))
	}
	for i, fd := range fds {
		unix.CloseOnExec(fd)
		_ = unix.SetNonblock(fd, true)
		f := os.NewFile(uintptr(fd), "client")
		if k := strings.IndexByte("ioe", which[i]); k >= 0 && p.files[k] == nil {
			p.files[k] = f
		} else {
			f.Close()
		}
	}
	s.sessions.pass(id, p)
	_, err = conn.Write([]byte("ok"))
	return err
}

// execStream begins an exec with the descriptors that were passed before.
func (s *Server) execStream(req *api.StreamRequest) error {
	p, ok := s.sessions.take(req.Session)
	if !ok {
		return fmt.Errorf("exec: no descriptors came for session %q: %w", req.Session, errdefs.ErrFailedPrecondition)
	}
	started := false
	defer func() {
		if !started {
			p.closeAll()
		}
	}()
	c, err := s.get(req.Id)
	if err != nil {
		return err
	}
	lp, err := s.execProcess(req.Process)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	x := &session{id: req.Session, c: c, close: cancel, done: make(chan struct{})}
	var e *execution
	if req.Terminal {
		e, err = s.execTerminal(x, lp, req)
	} else {
		e, err = s.execPipes(c, lp, p)
	}
	if err == nil {
		if err = s.begin(x); err != nil {
			e.kill()
		}
	}
	if err != nil {
		cancel()
		return err
	}
	started = true
	go func() {
		defer cancel()
		var copied chan struct{}
		if req.Terminal {
			copied = copyTerminal(x.tty, p, cancel)
		} else {
			p.closeAll() // the process has them
		}
		code, ended := e.wait(ctx, time.Time{})
		if !ended {
			code = e.kill()
		}
		if copied != nil {
			select {
			case <-copied:
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
			x.tty.Close()
			p.closeAll()
		}
		s.end(x, code)
	}()
	return nil
}

// end ends the session; its code can be asked for a minute longer.
func (s *Server) end(x *session, code int) {
	x.code = code
	close(x.done)
	time.AfterFunc(time.Minute, func() { s.sessions.remove(x) })
}

// execPipes gives the client's pipes to the process itself: its output does not
// pass through us.
func (s *Server) execPipes(c *container, lp *libcontainer.Process, p passed) (*execution, error) {
	for i, f := range p.files {
		if f == nil {
			continue
		}
		if err := unix.SetNonblock(rawFd(f), false); err != nil {
			return nil, err
		}
		switch i {
		case 0:
			lp.Stdin = f
		case 1:
			lp.Stdout = f
		case 2:
			lp.Stderr = f
		}
	}
	return s.exec(c, lp, s.newExecGroup(c))
}

func (s *Server) execTerminal(x *session, lp *libcontainer.Process, req *api.StreamRequest) (*execution, error) {
	child := &childIO{}
	if err := child.openConsoleSocket(lp); err != nil {
		return nil, err
	}
	defer child.close()
	if req.Width > 0 && req.Height > 0 {
		lp.ConsoleWidth, lp.ConsoleHeight = uint16(req.Width), uint16(req.Height)
	}
	e, err := s.exec(x.c, lp, s.newExecGroup(x.c))
	if err != nil {
		return nil, err
	}
	if x.tty, err = receiveMaster(rawFd(child.console)); err != nil {
		e.kill()
		return nil, err
	}
	return e, nil
}

// copyTerminal connects the client's pipes to a terminal. The channel is closed
// when the terminal has nothing more to print. A client that is gone is told by
// lost.
func copyTerminal(tty *os.File, p passed, lost func()) chan struct{} {
	if in := p.files[0]; in != nil {
		go func() {
			_, _ = copyFile(tty, in)
			in.Close()
		}()
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		out := p.files[1]
		if out == nil {
			_, _ = copyFile(io.Discard, tty)
			return
		}
		if _, err := copyFile(out, tty); errors.Is(err, unix.EPIPE) {
			lost()
		}
		out.Close()
	}()
	return done
}

// copyFile copies with a small buffer; unlike io.Copy it uses no splice, which
// terminals do badly.
func copyFile(dst io.Writer, src io.Reader) (int64, error) {
	b := make([]byte, 8<<10)
	return io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, b)
}

// attach connects a client to the container's own streams.
func (s *Server) attach(req *api.StreamRequest) error {
	p, ok := s.sessions.take(req.Session)
	if !ok {
		return fmt.Errorf("attach: no descriptors came for session %q: %w", req.Session, errdefs.ErrFailedPrecondition)
	}
	c, err := s.get(req.Id)
	if err != nil {
		p.closeAll()
		return err
	}
	select {
	case <-c.exited:
		p.closeAll()
		return fmt.Errorf("attach to container %q, which has exited: %w", c.id, errdefs.ErrFailedPrecondition)
	default:
	}
	var once sync.Once
	over := make(chan struct{})
	x := &session{id: req.Session, c: c, tty: c.io.tty, done: make(chan struct{})}
	x.close = func() { once.Do(func() { close(over) }) }
	if err := s.begin(x); err != nil {
		p.closeAll()
		return err
	}
	var mine []*tap
	for i, stream := range []criolog.Stream{criolog.Stdout, criolog.Stderr} {
		if f := p.files[1+i]; f != nil && c.io.out[i] != nil {
			mine = append(mine, &tap{stream: stream, file: f, cut: x.close})
		}
	}
	for _, t := range mine {
		c.taps.add(t)
	}
	ended := make(chan struct{}) // the container's output is over
	go func() {
		defer close(ended)
		select {
		case <-c.exited:
			c.awaitPumps(time.Second)
		case <-over:
		}
	}()
	input := s.attachInput(c, p.files[0])
	go func() {
		select {
		case <-ended:
		case <-over:
		}
		x.close()
		for _, t := range mine {
			c.taps.remove(t)
		}
		p.closeAll()
		if input != nil {
			<-input
			if c.facts.StdinOnce {
				s.closeStdin(c)
			}
		}
		s.end(x, 0)
	}()
	return nil
}

// attachInput copies the client's input to the container; the channel is
// closed when that is over. At the end of the client's input a stdin that is
// to be used once ends too.
func (s *Server) attachInput(c *container, in *os.File) chan struct{} {
	dst := c.io.in
	if dst == nil {
		dst = c.io.tty
	}
	if in == nil || dst == nil || !c.facts.Stdin {
		return nil
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		// A descriptor of its own: closing it ends a write that waits.
		fd, err := unix.FcntlInt(uintptr(rawFd(dst)), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return
		}
		own := os.NewFile(uintptr(fd), "stdin")
		defer own.Close()
		stop := make(chan struct{})
		defer close(stop)
		go func() {
			select {
			case <-c.exited:
				own.Close()
			case <-stop:
			}
		}()
		_, err = copyFile(own, in)
		if err == nil && c.facts.StdinOnce {
			s.closeStdin(c)
		}
	}()
	return done
}

// closeStdin ends the container's input for good.
func (s *Server) closeStdin(c *container) {
	c.io.mu.Lock()
	defer c.io.mu.Unlock()
	if c.io.inDone || c.io.in == nil {
		return
	}
	c.io.inDone = true
	_ = s.cfg.Reaper.Drop("stdin/" + c.id)
	c.io.in.Close()
	// For the next shim, which would open it again otherwise.
	if err := os.WriteFile(filepath.Join(c.dir, "stdin.closed"), nil, 0o600); err != nil {
		s.cfg.Log.Error("note that stdin is closed", "container", c.id, "err", err)
	}
}

// resize sets the size of the session's terminal.
func (x *session) resize(w, h uint16) error {
	if x.tty == nil {
		return fmt.Errorf("resize session %q: it has no terminal: %w", x.id, errdefs.ErrFailedPrecondition)
	}
	raw, err := x.tty.SyscallConn()
	if err != nil {
		return err
	}
	var ierr error
	if err := raw.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: h, Col: w})
	}); err != nil {
		return fmt.Errorf("resize session %q: %w", x.id, err)
	}
	return ierr
}
