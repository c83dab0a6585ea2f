package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

// clientStreams are one client's; nil streams are not wanted.
type clientStreams struct {
	in       io.Reader
	out, err io.WriteCloser
	tty      bool
	resize   <-chan remotecommand.TerminalSize
	attach   bool
}

// session runs one exec or attach: streams to pipes, until the process ends or
// the server stops. A client that goes away ends an attach, and an exec with a
// terminal, as a hangup does; another exec goes on with its pipes closed.
// A failed command is a utilexec.CodeExitError, which the protocol hands on as
// its exit code.
func (s *Server) session(ctx context.Context, c clientStreams, start func(context.Context, Pipes) (Session, error)) error {
	ctx, end, ok := s.begin(ctx)
	if !ok {
		return errStopping()
	}
	defer end()
	if c.tty {
		c.err = nil // one terminal, one stream
	}
	p, err := newPlumbing(c)
	if err != nil {
		return fmt.Errorf("make pipes: %w", err)
	}
	defer p.closeOurs()
	sess, err := start(ctx, p.theirs)
	p.closeTheirs()
	if err != nil {
		return err
	}
	defer sess.Close()

	ctx, hangUp := context.WithCancel(ctx)
	defer hangUp()
	done := make(chan struct{})
	defer close(done)
	s.whenGone(ctx, done, func() {
		p.closeOurs()
		if c.attach || c.tty {
			hangUp()
		}
	})
	s.background(func() { p.copyIn(c.in) })
	s.background(func() { passSizes(sess, c.resize, done) })

	var outputs sync.WaitGroup
	outputs.Go(func() { p.stdout.copyTo(c.out) })
	outputs.Go(func() { p.stderr.copyTo(c.err) })

	code, err := sess.Wait(ctx)
	if err != nil {
		// Killed or detached first: a reader of ours must not wait for it.
		err = errors.Join(err, sess.Close())
		p.closeOurs()
		outputs.Wait()
		return err
	}
	p.drain(s.cfg.DrainTimeout)
	outputs.Wait()
	if code != 0 {
		// As a value: the protocol asserts the type and does not unwrap.
		return utilexec.CodeExitError{Err: fmt.Errorf("command terminated with exit code %d", code), Code: code}
	}
	return nil
}

// background runs what ends only when the client's connection is closed, which
// happens after the session; Run waits for it.
func (s *Server) background(fn func()) { s.open.Go(fn) }

// passSizes hands terminal sizes on until the client or the session ends.
func passSizes(sess Session, sizes <-chan remotecommand.TerminalSize, done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		case sz, ok := <-sizes:
			if !ok {
				return
			}
			// A process that ends just now has no terminal any more.
			_ = sess.Resize(sz.Width, sz.Height)
		}
	}
}

// plumbing is up to three pipes between a client and a process.
type plumbing struct {
	theirs         Pipes
	stdin          *os.File // our writing end, nil for none
	stdout, stderr output
}

func newPlumbing(c clientStreams) (*plumbing, error) {
	p := &plumbing{theirs: Pipes{Terminal: c.tty}}
	var err error
	if c.in != nil {
		p.theirs.Stdin, p.stdin, err = os.Pipe()
	}
	if err == nil && c.out != nil {
		p.stdout.r, p.theirs.Stdout, err = os.Pipe()
	}
	if err == nil && c.err != nil {
		p.stderr.r, p.theirs.Stderr, err = os.Pipe()
	}
	if err != nil {
		p.closeTheirs()
		p.closeOurs()
		return nil, err
	}
	return p, nil
}

func (p *plumbing) closeTheirs() { closeAll(p.theirs.Stdin, p.theirs.Stdout, p.theirs.Stderr) }

// closeOurs also wakes whoever reads or writes them.
func (p *plumbing) closeOurs() { closeAll(p.stdin, p.stdout.r, p.stderr.r) }

func closeAll(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close() // twice does no harm
		}
	}
}

// copyIn copies what the client sends; its end of input closes the pipe, and
// the output goes on.
func (p *plumbing) copyIn(in io.Reader) {
	if p.stdin == nil {
		return
	}
	_, err := io.Copy(p.stdin, onlyReader{in})
	p.stdin.Close()
	if err == nil {
		return
	}
	// The process closed its stdin, or it or the client is gone. What the client
	// still sends is read and dropped: on a WebSocket all channels stand still
	// behind one that nobody reads.
	_, _ = io.Copy(io.Discard, onlyReader{in})
}

// onlyReader hides WriteTo and friends: the copy must end at the first error
// of either side.
type onlyReader struct{ io.Reader }

// output is one stream from the process.
type output struct {
	r     *os.File // nil for none
	drain atomic.Int64
}

// copyTo copies until the process closed its end, the client is gone, or,
// while draining, nothing came for the drain timeout. When the client is gone,
// the pipe is closed: the process sees EPIPE as with any broken pipe.
func (o *output) copyTo(w io.Writer) {
	if o.r == nil {
		return
	}
	defer o.r.Close()
	buf := make([]byte, 32<<10)
	for {
		start, quiet := time.Now(), time.Duration(o.drain.Load())
		if quiet > 0 {
			_ = o.r.SetReadDeadline(start.Add(quiet))
		}
		n, err := o.r.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return
			}
		}
		// The deadline that only says that draining began is no silence yet.
		if errors.Is(err, os.ErrDeadlineExceeded) && (quiet == 0 || time.Since(start) < quiet) {
			continue
		}
		if err != nil {
			return
		}
	}
}

// drain lets the copies end once their pipes are silent for quiet.
func (p *plumbing) drain(quiet time.Duration) {
	for _, o := range []*output{&p.stdout, &p.stderr} {
		if o.r != nil {
			o.drain.Store(int64(quiet))
			_ = o.r.SetReadDeadline(time.Now())
		}
	}
}
