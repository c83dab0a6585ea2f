//go:build linux

package shim

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim/api"
)

// ExecSync runs a command in the container to its end and returns its output.
// At the timeout, and when ctx ends, the command is killed with all that it
// started: in cgroup v1 really all (it has a freezer group of its own), in
// cgroup v2 all that descends from it or is in its session, which leaves out
// daemons that have cut both ties. What a command leaves running when it ends by
// itself goes on.
//
// Errors: NotFound (also: no such program), FailedPrecondition when the
// container has exited, InvalidArgument, Unavailable.
func (c *Client) ExecSync(ctx context.Context, id string, o ExecOptions) (ExecResult, error) {
	text, err := encodeProcess(o.Process)
	if err != nil {
		return ExecResult{}, err
	}
	conn, err := c.get(ctx)
	if err != nil {
		return ExecResult{}, err
	}
	session := rand.Text()
	resp, err := undoable(ctx, func(ctx context.Context) (*api.ExecSyncResponse, error) {
		return conn.svc.ExecSync(ctx, &api.ExecSyncRequest{
			Id: id, Session: session, Process: text, Timeout: int64(o.Timeout), MaxOutput: int64(o.MaxOutput),
		})
	}, func() { conn.cancel(session) })
	if err != nil {
		return ExecResult{}, local(err)
	}
	r := ExecResult{Stdout: resp.Stdout, Stderr: resp.Stderr, Code: int(resp.Code), TimedOut: resp.TimedOut}
	if r.Stdout, err = conn.rest(ctx, session, false, r.Stdout, resp.MoreStdout); err != nil {
		return ExecResult{}, err
	}
	if r.Stderr, err = conn.rest(ctx, session, true, r.Stderr, resp.MoreStderr); err != nil {
		return ExecResult{}, err
	}
	return r, nil
}

// cancel ends an exec whose caller has gone; it returns when it is dead.
func (conn *connection) cancel(session string) {
	ctx, cancel := context.WithTimeout(context.Background(), undoPatience)
	defer cancel()
	_, _ = conn.svc.CancelExec(ctx, &api.SessionRequest{Session: session}) // lost connection: the shim cancels by itself
}

// rest gets the output that did not fit into one message.
func (conn *connection) rest(ctx context.Context, session string, stderr bool, have []byte, more int64) ([]byte, error) {
	for more > 0 {
		resp, err := conn.svc.ExecOutput(ctx, &api.ExecOutputRequest{Session: session, Stderr: stderr, Offset: int64(len(have))})
		if err != nil {
			return nil, local(err)
		}
		if len(resp.Data) == 0 {
			return nil, fmt.Errorf("exec output ends %d bytes early: %w", more, errdefs.ErrUnavailable)
		}
		have, more = append(have, resp.Data...), more-int64(len(resp.Data))
	}
	return have, nil
}

func encodeProcess(p *specs.Process) ([]byte, error) {
	if p == nil {
		return nil, fmt.Errorf("exec without a process: %w", errdefs.ErrInvalidArgument)
	}
	text, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("encode process: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return text, nil
}

// Session is an exec or an attach in progress.
type Session interface {
	// Resize sets the size of its terminal in characters.
	Resize(w, h uint16) error
	// Wait returns the exit code of an exec; for an attach 0, when it was
	// closed or the container has ended.
	Wait(ctx context.Context) (code int, err error)
	// Close kills an exec, detaches an attach, and frees what belongs to it.
	Close() error
}

// Exec runs a command with the given streams. Without a terminal the command
// has the pipes themselves; with one, Stderr is not used.
func (c *Client) Exec(ctx context.Context, id string, o StreamOptions) (Session, error) {
	text, err := encodeProcess(o.Process)
	if err != nil {
		o.closeAll()
		return nil, err
	}
	return c.stream(ctx, id, o, text)
}

// Attach connects the streams to the container's own, from now on: output that
// was before is in the log.
func (c *Client) Attach(ctx context.Context, id string, o StreamOptions) (Session, error) {
	return c.stream(ctx, id, o, nil)
}

func (o *StreamOptions) closeAll() {
	for _, f := range []*os.File{o.Stdin, o.Stdout, o.Stderr} {
		if f != nil {
			f.Close()
		}
	}
}

func (c *Client) stream(ctx context.Context, id string, o StreamOptions, process []byte) (Session, error) {
	defer o.closeAll()
	conn, err := c.get(ctx)
	if err != nil {
		return nil, err
	}
	name := rand.Text()
	if err := c.pass(ctx, name, o); err != nil {
		return nil, fmt.Errorf("pass descriptors to the shim: %w: %w", err, errdefs.ErrUnavailable)
	}
	req := &api.StreamRequest{
		Id: id, Session: name, Process: process, Terminal: o.Terminal,
		Width: uint32(o.Width), Height: uint32(o.Height),
	}
	if process != nil {
		_, err = conn.svc.Exec(ctx, req)
	} else {
		_, err = conn.svc.Attach(ctx, req)
	}
	if err != nil {
		if ctx.Err() != nil {
			conn.cancel(name)
		}
		return nil, local(err)
	}
	s := &session{conn: conn, name: name, done: make(chan struct{})}
	go s.follow()
	return s, nil
}

// pass sends the streams' descriptors under the session's name.
func (c *Client) pass(ctx context.Context, name string, o StreamOptions) error {
	nc, err := dial(ctx, c.cfg.StateDir, "fd.sock")
	if err != nil {
		return err
	}
	defer nc.Close()
	var which string
	var fds []int
	for i, f := range []*os.File{o.Stdin, o.Stdout, o.Stderr} {
		if f == nil {
			continue
		}
		which += "ioe"[i : i+1]
		fds = append(fds, int(f.Fd()))
	}
	_ = nc.SetDeadline(time.Now().Add(10 * time.Second))
	_, _, err = nc.WriteMsgUnix([]byte(which+" "+name), unix.UnixRights(fds...), nil)
	runtime.KeepAlive(o)
	if err != nil {
		return err
	}
	var ok [2]byte
	n, err := nc.Read(ok[:])
	if err == nil && string(ok[:n]) != "ok" {
		err = errors.New("the shim refuses them")
	}
	return err
}

// session is the client's half of an exec or attach. One goroutine waits for
// its end, from the begin on: by that the shim sees when this process dies.
type session struct {
	conn *connection
	name string
	done chan struct{}
	code int
	err  error
	once sync.Once
}

func (s *session) follow() {
	defer close(s.done)
	resp, err := s.conn.svc.WaitSession(context.Background(), &api.SessionRequest{Session: s.name})
	if err != nil {
		s.err = local(err)
		return
	}
	s.code = int(resp.Code)
}

func (s *session) Resize(w, h uint16) error {
	ctx, cancel := context.WithTimeout(context.Background(), undoPatience)
	defer cancel()
	_, err := s.conn.svc.Resize(ctx, &api.ResizeRequest{Session: s.name, Width: uint32(w), Height: uint32(h)})
	return local(err)
}

func (s *session) Wait(ctx context.Context) (int, error) {
	select {
	case <-s.done:
		return s.code, s.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func (s *session) Close() error {
	var err error
	s.once.Do(func() {
		select {
		case <-s.done:
			return
		default:
		}
		ctx, cancel := context.WithTimeout(context.Background(), undoPatience)
		defer cancel()
		_, err = s.conn.svc.CloseSession(ctx, &api.SessionRequest{Session: s.name})
		err = local(err)
	})
	return err
}
