//go:build linux

package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/nodeagent/nodeagent/shim/api"
	"github.com/nodeagent/nodeagent/shim/record"
)

// Register makes r answer for s.
func (s *Server) Register(r *ttrpc.Server) { api.RegisterShimService(r, service{s}) }

// Stopped is closed when a client has asked for the end of the shim.
func (s *Server) Stopped() <-chan struct{} { return s.stop }

// service is Server on the wire.
type service struct{ s *Server }

// wire gives err its code.
func wire(err error) error {
	if err == nil {
		return nil
	}
	code := codes.Unknown
	switch {
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	case errdefs.IsNotFound(err):
		code = codes.NotFound
	case errdefs.IsInvalidArgument(err):
		code = codes.InvalidArgument
	case errdefs.IsAlreadyExists(err):
		code = codes.AlreadyExists
	case errdefs.IsFailedPrecondition(err):
		code = codes.FailedPrecondition
	case errdefs.IsResourceExhausted(err), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EMFILE), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM):
		code = codes.ResourceExhausted
	case errdefs.IsUnavailable(err):
		code = codes.Unavailable
	}
	return grpcstatus.Error(code, err.Error())
}

func (v service) Info(context.Context, *api.InfoRequest) (*api.InfoResponse, error) {
	v.s.mu.Lock()
	defer v.s.mu.Unlock()
	return &api.InfoResponse{Pid: int32(os.Getpid()), Containers: int32(len(v.s.containers))}, nil
}

func (v service) Start(ctx context.Context, r *api.StartRequest) (*api.ContainerState, error) {
	c, err := v.s.start(ctx, r)
	if err != nil {
		return nil, wire(err)
	}
	return c.state(), nil
}

func (v service) Abort(ctx context.Context, r *api.AbortRequest) (*api.Empty, error) {
	v.s.mu.Lock()
	c := v.s.containers[r.Id]
	if c == nil {
		v.s.abortAhead(r.Token)
	}
	v.s.mu.Unlock()
	if c == nil || c.token != r.Token || r.Token == "" {
		return &api.Empty{}, nil
	}
	if _, err := v.s.delete(ctx, r.Id); err != nil && !errdefs.IsNotFound(err) {
		return nil, wire(err)
	}
	return &api.Empty{}, wire(v.s.forget(r.Id))
}

func (v service) Signal(_ context.Context, r *api.SignalRequest) (*api.Empty, error) {
	c, err := v.s.get(r.Id)
	if err == nil {
		v.s.oom.note(c.unified()) // it may be its end, and the group's
		err = c.signal(unix.Signal(r.Signal), r.All)
	}
	return &api.Empty{}, wire(err)
}

func (v service) Delete(ctx context.Context, r *api.IDRequest) (*api.ContainerExit, error) {
	x, err := v.s.delete(ctx, r.Id)
	if err != nil {
		return nil, wire(err)
	}
	return wireExit(&x), nil
}

func (v service) Forget(_ context.Context, r *api.IDRequest) (*api.Empty, error) {
	return &api.Empty{}, wire(v.s.forget(r.Id))
}

func (v service) State(_ context.Context, r *api.IDRequest) (*api.ContainerState, error) {
	if c, err := v.s.get(r.Id); err == nil {
		return c.state(), nil
	}
	v.s.mu.Lock()
	defer v.s.mu.Unlock()
	if x, ok := v.s.exits[r.Id]; ok {
		return exitedState(x), nil
	}
	return nil, wire(fmt.Errorf("container %q: %w", r.Id, errdefs.ErrNotFound))
}

// exitedState is the state of a container of which only the exit is left.
func exitedState(x record.Exit) *api.ContainerState {
	return &api.ContainerState{
		Id: x.ID, SandboxId: x.SandboxID, Pid: int32(x.Pid), StartTime: x.StartTime,
		CreatedAt: x.CreatedAt.UnixNano(), StartedAt: x.StartedAt.UnixNano(), Exit: wireExit(&x),
	}
}

func (v service) List(context.Context, *api.Empty) (*api.ListResponse, error) {
	v.s.mu.Lock()
	defer v.s.mu.Unlock()
	resp := &api.ListResponse{}
	for _, c := range v.s.containers {
		if c.isStarted() {
			resp.Containers = append(resp.Containers, c.state())
		}
	}
	for id, x := range v.s.exits {
		if _, ok := v.s.containers[id]; !ok {
			resp.Containers = append(resp.Containers, exitedState(x))
		}
	}
	return resp, nil
}

// waitPatience is when a Wait that has nothing to say yet says so: a client that
// has gone on cannot tell us.
const waitPatience = 20 * time.Second

func (v service) Wait(ctx context.Context, r *api.IDRequest) (*api.ContainerExit, error) {
	c, err := v.s.get(r.Id)
	if err == nil {
		t := time.NewTimer(waitPatience)
		defer t.Stop()
		select {
		case <-c.exited:
			return wireExit(c.exitRecord()), nil
		case <-t.C:
			return &api.ContainerExit{}, nil
		case <-ctx.Done():
			return nil, wire(ctx.Err())
		}
	}
	v.s.mu.Lock()
	defer v.s.mu.Unlock()
	if x, ok := v.s.exits[r.Id]; ok {
		return wireExit(&x), nil
	}
	return nil, wire(err)
}

func (v service) Exits(ctx context.Context, _ *api.Empty, stream api.Shim_ExitsServer) error {
	f, known := v.s.follow()
	defer v.s.unfollow(f)
	for sent := 0; ; {
		for _, x := range v.s.take(f) {
			if err := stream.Send(&api.ExitEvent{Exit: wireExit(&x)}); err != nil {
				return err
			}
			sent++
		}
		if known >= 0 && sent >= known {
			known = -1
			if err := stream.Send(&api.ExitEvent{Synced: true}); err != nil {
				return err
			}
		}
		select {
		case <-f.wake:
		case <-ctx.Done():
			return nil
		case <-v.s.stop:
			return nil
		}
	}
}

func (v service) Update(_ context.Context, r *api.UpdateRequest) (*api.Empty, error) {
	var res specs.LinuxResources
	if err := json.Unmarshal(r.Resources, &res); err != nil {
		return nil, wire(fmt.Errorf("decode resources: %w: %w", err, errdefs.ErrInvalidArgument))
	}
	return &api.Empty{}, wire(v.s.update(r.Id, &res))
}

func (v service) ReopenLog(_ context.Context, r *api.IDRequest) (*api.Empty, error) {
	c, err := v.s.get(r.Id)
	if err == nil {
		err = c.log.Reopen()
	}
	return &api.Empty{}, wire(err)
}

func (v service) ExecSync(ctx context.Context, r *api.ExecSyncRequest) (*api.ExecSyncResponse, error) {
	resp, err := v.s.execSync(ctx, r)
	return resp, wire(err)
}

func (v service) ExecOutput(_ context.Context, r *api.ExecOutputRequest) (*api.ExecOutputResponse, error) {
	x, err := v.s.sessions.get(r.Session)
	if err != nil {
		return nil, wire(err)
	}
	b := x.output[0]
	if r.Stderr {
		b = x.output[1]
	}
	from := min(max(r.Offset, 0), int64(len(b)))
	return &api.ExecOutputResponse{Data: b[from:min(from+2*inlineOutput, int64(len(b)))]}, nil
}

func (v service) CancelExec(_ context.Context, r *api.SessionRequest) (*api.Empty, error) {
	v.s.mu.Lock()
	if _, err := v.s.sessions.get(r.Session); err != nil {
		v.s.abortAhead(r.Session)
	}
	v.s.mu.Unlock()
	return v.closeSession(r.Session)
}

// begin registers a session, unless its end came first.
func (s *Server) begin(x *session) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.abortedAhead(x.id) {
		return fmt.Errorf("session %q: %w", x.id, context.Canceled)
	}
	return s.sessions.add(x)
}

func (v service) Exec(_ context.Context, r *api.StreamRequest) (*api.Empty, error) {
	return &api.Empty{}, wire(v.s.execStream(r))
}

func (v service) Attach(_ context.Context, r *api.StreamRequest) (*api.Empty, error) {
	return &api.Empty{}, wire(v.s.attach(r))
}

func (v service) Resize(_ context.Context, r *api.ResizeRequest) (*api.Empty, error) {
	x, err := v.s.sessions.get(r.Session)
	if err == nil {
		err = x.resize(uint16(r.Width), uint16(r.Height))
	}
	return &api.Empty{}, wire(err)
}

// WaitSession waits for the end of a session. The client asks as soon as it has
// one; so when the connection is lost while it waits, the client is gone, and
// the session ends.
func (v service) WaitSession(ctx context.Context, r *api.SessionRequest) (*api.WaitSessionResponse, error) {
	x, err := v.s.sessions.get(r.Session)
	if err != nil {
		return nil, wire(err)
	}
	select {
	case <-x.done:
		v.s.sessions.remove(x)
		return &api.WaitSessionResponse{Code: int32(x.code)}, nil
	case <-ctx.Done():
		x.close()
		return nil, wire(ctx.Err())
	}
}

func (v service) CloseSession(_ context.Context, r *api.SessionRequest) (*api.Empty, error) {
	return v.closeSession(r.Session)
}

func (v service) closeSession(id string) (*api.Empty, error) {
	x, err := v.s.sessions.get(id)
	if err != nil {
		return &api.Empty{}, nil // over already
	}
	x.close()
	<-x.done
	v.s.sessions.remove(x)
	return &api.Empty{}, nil
}

func (v service) Shutdown(context.Context, *api.Empty) (*api.Empty, error) {
	v.s.mu.Lock()
	defer v.s.mu.Unlock()
	select {
	case <-v.s.stop:
	default:
		close(v.s.stop)
	}
	return &api.Empty{}, nil
}
