package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/spec"
)

// Exec answers with a URL at which the session can be had.
func (s *Server) Exec(_ context.Context, r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	c, err := s.findContainer(r.GetContainerId())
	if err != nil {
		return nil, fmt.Errorf("exec in container: %w", err)
	}
	if err := c.needRunning("exec in"); err != nil {
		return nil, err
	}
	if err := spec.CheckExec(r.GetCmd()); err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	if err := checkStreams(r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTty()); err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	if s.streams == nil {
		return nil, errNoStreams
	}
	req := &runtimeapi.ExecRequest{ContainerId: c.id, Cmd: r.GetCmd(), Tty: r.GetTty(), Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr()}
	return s.streams.GetExec(req)
}

// Attach answers with a URL at which the session can be had.
func (s *Server) Attach(_ context.Context, r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	c, err := s.findContainer(r.GetContainerId())
	if err != nil {
		return nil, fmt.Errorf("attach to container: %w", err)
	}
	if err := c.needRunning("attach to"); err != nil {
		return nil, err
	}
	if err := checkStreams(r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTty()); err != nil {
		return nil, fmt.Errorf("attach to container %s: %w", c.id, err)
	}
	if s.streams == nil {
		return nil, errNoStreams
	}
	// What the container has decides, not what the caller believes.
	tty := c.record().Config.GetTty()
	req := &runtimeapi.AttachRequest{ContainerId: c.id, Tty: tty, Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr() && !tty}
	return s.streams.GetAttach(req)
}

// PortForward answers with a URL at which ports of the pod can be reached.
func (s *Server) PortForward(_ context.Context, r *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	b, err := s.findSandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, fmt.Errorf("port-forward to sandbox: %w", err)
	}
	if err := b.usable(); err != nil {
		return nil, fmt.Errorf("port-forward to sandbox: %w", err)
	}
	for _, p := range r.GetPort() {
		if p <= 0 || p > 65535 {
			return nil, fmt.Errorf("port-forward to sandbox %s: %w", b.id, badField("port", p, "1 to 65535"))
		}
	}
	if s.streams == nil {
		return nil, errNoStreams
	}
	return s.streams.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: b.id, Port: r.GetPort()})
}

var errNoStreams = fmt.Errorf("the streaming server is not running: %w", errdefs.ErrUnavailable)

func checkStreams(stdin, stdout, stderr, tty bool) error {
	switch {
	case !stdin && !stdout && !stderr:
		return badField("stdin, stdout, stderr", false, "at least one of them to be true")
	case tty && stderr:
		return badField("stderr", true, "false together with tty, which merges stderr into stdout")
	}
	return nil
}

// WindowSize is a terminal's size in characters.
type WindowSize struct{ Width, Height uint16 }

// Streamed are a session's ends at the caller's side; nil means not wanted.
type Streamed struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Terminal       bool
	Resize         <-chan WindowSize // may be nil; its end means no more changes
}

// RunExec runs a command in a container with its streams and returns its exit
// code. It ends with ctx, which kills the command.
func (s *Server) RunExec(ctx context.Context, id string, cmd []string, io Streamed) (int, error) {
	c, err := s.findContainer(id)
	if err != nil {
		return 0, fmt.Errorf("exec in container: %w", err)
	}
	if err := c.needRunning("exec in"); err != nil {
		return 0, err
	}
	oci, err := s.processSpec(c)
	if err != nil {
		return 0, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	o := StreamOptions{Process: spec.Exec(oci, cmd, io.Terminal), Terminal: io.Terminal}
	code, err := runSession(ctx, io, o, func(o StreamOptions) (Session, error) { return s.cfg.Runtime.Exec(ctx, c.id, o) })
	if err != nil {
		return code, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	return code, nil
}

// RunAttach connects to the container's own streams until the caller leaves or
// the container ends.
func (s *Server) RunAttach(ctx context.Context, id string, io Streamed) error {
	c, err := s.findContainer(id)
	if err != nil {
		return fmt.Errorf("attach to container: %w", err)
	}
	if err := c.needRunning("attach to"); err != nil {
		return err
	}
	_, err = runSession(ctx, io, StreamOptions{Terminal: io.Terminal}, func(o StreamOptions) (Session, error) { return s.cfg.Runtime.Attach(ctx, c.id, o) })
	if err != nil {
		return fmt.Errorf("attach to container %s: %w", c.id, err)
	}
	return nil
}

// SandboxNetns is the path of a ready sandbox's network namespace, "" for the
// host's.
func (s *Server) SandboxNetns(id string) (string, error) {
	b, err := s.findSandbox(id)
	if err != nil {
		return "", err
	}
	if err := b.usable(); err != nil {
		return "", err
	}
	return b.record().Namespaces.Net, nil
}

// drainQuiet is for how long a stream whose process has ended may be silent
// until it counts as finished: children that were left in the background keep
// it open for ever.
const drainQuiet = 500 * time.Millisecond

// runSession joins the caller's streams and the shim's with pipes.
func runSession(ctx context.Context, streams Streamed, o StreamOptions, start func(StreamOptions) (Session, error)) (int, error) {
	var theirs, ours []*os.File
	closeAll := func(files []*os.File) {
		for _, f := range files {
			f.Close()
		}
	}
	pipe := func() (r, w *os.File, err error) {
		if r, w, err = os.Pipe(); err != nil {
			err = fmt.Errorf("make a pipe: %v: %w", err, errdefs.ErrResourceExhausted)
		}
		return r, w, err
	}
	defer func() { closeAll(ours) }()
	var stdin *os.File
	var outputs []func(*atomic.Bool)
	var readers []*os.File
	if streams.Stdin != nil {
		r, w, err := pipe()
		if err != nil {
			return 0, err
		}
		o.Stdin, stdin = r, w
		theirs, ours = append(theirs, r), append(ours, w)
	}
	output := func(to io.Writer) (*os.File, error) {
		r, w, err := pipe()
		if err != nil {
			return nil, err
		}
		theirs, ours, readers = append(theirs, w), append(ours, r), append(readers, r)
		outputs = append(outputs, func(ended *atomic.Bool) { drain(to, r, ended) })
		return w, nil
	}
	var err error
	if streams.Stdout != nil {
		o.Stdout, err = output(streams.Stdout)
	}
	if err == nil && streams.Stderr != nil && !o.Terminal {
		o.Stderr, err = output(streams.Stderr)
	}
	if err == nil && o.Terminal && streams.Resize != nil {
		// The first size, if it is known already, so that the program never
		// sees another one.
		select {
		case size, ok := <-streams.Resize:
			if ok {
				o.Width, o.Height = size.Width, size.Height
			}
		case <-time.After(10 * time.Millisecond):
		}
	}
	var session Session
	if err == nil {
		session, err = start(o)
	}
	closeAll(theirs)
	if err != nil {
		return 0, err
	}
	defer session.Close()

	if stdin != nil {
		go func() { // ends when the caller's connection does
			io.Copy(stdin, streams.Stdin)
			stdin.Close()
		}()
	}
	over := make(chan struct{})
	defer close(over)
	if streams.Resize != nil {
		go func() {
			for {
				select {
				case size, ok := <-streams.Resize:
					if !ok || session.Resize(size.Width, size.Height) != nil {
						return
					}
				case <-over:
					return
				}
			}
		}()
	}
	var ended atomic.Bool
	var wg sync.WaitGroup
	for _, copyOut := range outputs {
		wg.Go(func() { copyOut(&ended) })
	}
	code, err := session.Wait(ctx)
	ended.Store(true)
	for _, r := range readers {
		r.SetReadDeadline(time.Now().Add(drainQuiet))
	}
	if err != nil || ctx.Err() != nil {
		closeAll(readers) // nobody reads any more
	}
	wg.Wait()
	return code, err
}

// drain copies until the end of r, or until r is silent after the process has
// ended.
func drain(to io.Writer, r *os.File, ended *atomic.Bool) {
	buf := make([]byte, 32<<10)
	for {
		if ended.Load() {
			r.SetReadDeadline(time.Now().Add(drainQuiet))
		}
		n, err := r.Read(buf)
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil {
				to = io.Discard // the process must not block on a caller who left
			}
		}
		if errors.Is(err, os.ErrDeadlineExceeded) && n > 0 {
			continue
		}
		if err != nil {
			return
		}
	}
}
