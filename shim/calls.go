//go:build linux

package shim

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/nodeagent/nodeagent/shim/api"
)

// undoPatience bounds the undoing of a call that was abandoned.
const undoPatience = 30 * time.Second

var classes = map[codes.Code]error{
	codes.NotFound:           errdefs.ErrNotFound,
	codes.InvalidArgument:    errdefs.ErrInvalidArgument,
	codes.AlreadyExists:      errdefs.ErrAlreadyExists,
	codes.FailedPrecondition: errdefs.ErrFailedPrecondition,
	codes.ResourceExhausted:  errdefs.ErrResourceExhausted,
	codes.Unavailable:        errdefs.ErrUnavailable,
	codes.Unimplemented:      errdefs.ErrNotImplemented,
	codes.Canceled:           context.Canceled,
	codes.DeadlineExceeded:   context.DeadlineExceeded,
}

// callError is an error of the shim with the class that it had there.
type callError struct {
	text  string
	class error
}

func (e *callError) Error() string { return e.text }
func (e *callError) Unwrap() error { return e.class }

// again makes a call that may be made twice, and makes it again when the shim
// dies meanwhile, until ctx ends.
func again[T any](ctx context.Context, c *Client, call func(*connection) (T, error)) (T, error) {
	for {
		var none T
		conn, err := c.get(ctx)
		if err != nil {
			return none, err
		}
		v, err := call(conn)
		if err == nil {
			return v, nil
		}
		if ctx.Err() != nil || !conn.gone(err) {
			return none, local(err)
		}
		select {
		case <-conn.lost:
		case <-ctx.Done():
			return none, local(err)
		}
		c.drop(conn)
	}
}

// undoable makes a call that ctx does not reach. When ctx ends first, undo
// makes the call end (it is the shim that undoes it), and its end is awaited;
// without undo the call ends by itself some time.
func undoable[T any](ctx context.Context, call func(context.Context) (T, error), undo func()) (T, error) {
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	own, cancel := context.WithCancel(context.WithoutCancel(ctx))
	go func() {
		defer cancel()
		v, err := call(own)
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
	}
	if undo != nil {
		undo()
		t := time.AfterFunc(time.Second, cancel) // no shim answers
		defer t.Stop()
		<-done
	}
	var none T
	return none, ctx.Err()
}

// gone says whether err is the loss of the connection and no answer.
func (conn *connection) gone(err error) bool {
	if errors.Is(err, ttrpc.ErrClosed) {
		return true
	}
	_, answered := status.FromError(err)
	return !answered && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded)
}

// local gives an error from the wire its class back.
func local(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, ttrpc.ErrClosed) {
		return fmt.Errorf("connection to the shim is lost: %w", errdefs.ErrUnavailable)
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if st, ok := status.FromError(err); ok {
		if class := classes[st.Code()]; class != nil {
			return &callError{st.Message(), class}
		}
		return errors.New(st.Message())
	}
	return fmt.Errorf("call the shim: %w: %w", err, errdefs.ErrUnavailable)
}

// Start creates the container and starts its program. Asked again for an ID
// that is there, it returns that one's state. On error, and when ctx ends
// first, nothing of it is left.
//
// Errors: NotFound or InvalidArgument with libcontainer's text when the program
// cannot be executed; AlreadyExists when the ID is deleted but not forgotten;
// InvalidArgument for a wrong spec; ResourceExhausted. When the shim dies
// meanwhile the next one is asked.
func (c *Client) Start(ctx context.Context, s Spec) (State, error) {
	req, err := c.startRequest(s)
	if err != nil {
		return State{}, err
	}
	if _, err := c.get(ctx); err != nil {
		return State{}, err
	}
	resp, err := undoable(ctx, func(ctx context.Context) (*api.ContainerState, error) {
		return again(ctx, c, func(conn *connection) (*api.ContainerState, error) { return conn.svc.Start(ctx, req) })
	}, func() { c.abort(req) })
	if err != nil {
		return State{}, err
	}
	return stateOf(resp), nil
}

// abort undoes a start whose caller has gone.
func (c *Client) abort(req *api.StartRequest) {
	ctx, cancel := context.WithTimeout(context.Background(), undoPatience)
	defer cancel()
	_, err := again(ctx, c, func(conn *connection) (*api.Empty, error) {
		return conn.svc.Abort(ctx, &api.AbortRequest{Id: req.Id, Token: req.Token})
	})
	if err != nil {
		c.cfg.Log.Error("undo abandoned start", "container", req.Id, "err", err)
	}
}

func (c *Client) startRequest(s Spec) (*api.StartRequest, error) {
	if s.OCI == nil || s.OCI.Linux == nil {
		return nil, fmt.Errorf("start container %q: no runtime spec: %w", s.ID, errdefs.ErrInvalidArgument)
	}
	oci, linux := *s.OCI, *s.OCI.Linux
	oci.Linux = &linux
	var profile []byte
	var err error
	if linux.Seccomp != nil {
		if profile, err = json.Marshal(linux.Seccomp); err != nil {
			return nil, fmt.Errorf("start container %q: encode seccomp profile: %w: %w", s.ID, err, errdefs.ErrInvalidArgument)
		}
		linux.Seccomp = nil
	}
	text, err := json.Marshal(&oci)
	if err != nil {
		return nil, fmt.Errorf("start container %q: encode runtime spec: %w: %w", s.ID, err, errdefs.ErrInvalidArgument)
	}
	return &api.StartRequest{
		Id: s.ID, SandboxId: s.SandboxID, Oci: text, Seccomp: profile, LogPath: s.LogPath,
		Terminal: s.Terminal, Stdin: s.Stdin, StdinOnce: s.StdinOnce,
		MaxLogLine: int32(s.MaxLogLine), Pause: s.Pause,
		SystemdCgroup: c.cfg.SystemdCgroup, Token: rand.Text(),
	}, nil
}

// Signal sends sig to the container's first process, or with all to each of its
// processes. NotFound when it has exited.
func (c *Client) Signal(ctx context.Context, id string, sig syscall.Signal, all bool) error {
	_, err := again(ctx, c, func(conn *connection) (*api.Empty, error) {
		return conn.svc.Signal(ctx, &api.SignalRequest{Id: id, Signal: int32(sig), All: all})
	})
	return err
}

// Delete kills all that runs in the container, waits for it and removes
// everything but the exit record, which stays until Forget. Asked again it
// returns the same. NotFound when there is neither container nor record.
func (c *Client) Delete(ctx context.Context, id string) (Exit, error) {
	x, err := again(ctx, c, func(conn *connection) (*api.ContainerExit, error) {
		return conn.svc.Delete(ctx, &api.IDRequest{Id: id})
	})
	if err != nil {
		return Exit{}, err
	}
	return *exitOf(x), nil
}

// Forget drops the exit record of a deleted container. FailedPrecondition
// while the container is there; nil when there is no record.
func (c *Client) Forget(ctx context.Context, id string) error {
	_, err := again(ctx, c, func(conn *connection) (*api.Empty, error) {
		return conn.svc.Forget(ctx, &api.IDRequest{Id: id})
	})
	return err
}

// State returns what is known of a container; of a deleted one its exit, until
// it is forgotten.
func (c *Client) State(ctx context.Context, id string) (State, error) {
	s, err := again(ctx, c, func(conn *connection) (*api.ContainerState, error) {
		return conn.svc.State(ctx, &api.IDRequest{Id: id})
	})
	if err != nil {
		return State{}, err
	}
	return stateOf(s), nil
}

// List returns the State of all containers that State knows.
func (c *Client) List(ctx context.Context) ([]State, error) {
	resp, err := again(ctx, c, func(conn *connection) (*api.ListResponse, error) { return conn.svc.List(ctx, &api.Empty{}) })
	if err != nil {
		return nil, err
	}
	all := make([]State, 0, len(resp.Containers))
	for _, s := range resp.Containers {
		all = append(all, stateOf(s))
	}
	return all, nil
}

// Wait returns when the container has exited. It goes on waiting when the shim
// is replaced meanwhile.
func (c *Client) Wait(ctx context.Context, id string) (Exit, error) {
	for {
		// The shim answers within waitPatience, so an abandoned call ends too.
		x, err := undoable(ctx, func(ctx context.Context) (*api.ContainerExit, error) {
			return again(ctx, c, func(conn *connection) (*api.ContainerExit, error) {
				return conn.svc.Wait(ctx, &api.IDRequest{Id: id})
			})
		}, nil)
		if err != nil {
			return Exit{}, err
		}
		if x.Id != "" {
			return *exitOf(x), nil
		}
	}
}

// Update changes the resources that r sets; others stay as they are.
func (c *Client) Update(ctx context.Context, id string, r *specs.LinuxResources) error {
	text, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("update container %q: encode resources: %w", id, err)
	}
	_, err = again(ctx, c, func(conn *connection) (*api.Empty, error) {
		return conn.svc.Update(ctx, &api.UpdateRequest{Id: id, Resources: text})
	})
	return err
}

// ReopenLog opens the log by its path again, after it was renamed.
func (c *Client) ReopenLog(ctx context.Context, id string) error {
	_, err := again(ctx, c, func(conn *connection) (*api.Empty, error) {
		return conn.svc.ReopenLog(ctx, &api.IDRequest{Id: id})
	})
	return err
}

// Shutdown ends the shim and its reaper; containers run on, unwatched. For
// tests and for taking a node out of service: Run starts a new one at once.
func (c *Client) Shutdown(ctx context.Context) error {
	conn, err := c.get(ctx)
	if err != nil {
		return err
	}
	_, err = conn.svc.Shutdown(ctx, &api.Empty{})
	return local(err)
}
