package main

import (
	"context"
	"syscall"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/nodeagent/nodeagent/cri"
	"github.com/nodeagent/nodeagent/shim"
)

// runtimeOf is the shim's client as the CRI server sees it.
type runtimeOf struct {
	c       *shim.Client
	maxLine int // bytes of a log line before it is split
	exits   chan cri.ProcessExit
}

func newRuntime(c *shim.Client, maxLine int) *runtimeOf {
	return &runtimeOf{c: c, maxLine: maxLine, exits: make(chan cri.ProcessExit)}
}

// run converts exits until ctx ends.
func (r *runtimeOf) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-r.c.Exits():
			select {
			case r.exits <- processExit(e):
			case <-ctx.Done():
				return nil
			}
		}
	}
}

func processExit(e shim.Exit) cri.ProcessExit {
	return cri.ProcessExit{ID: e.ID, Pid: e.Pid, Code: e.Code, Signal: e.Signal, Known: e.Known, OOM: e.OOMKilled, At: e.At}
}

func process(s shim.State) cri.Process {
	p := cri.Process{ID: s.ID, SandboxID: s.SandboxID, Pid: s.Pid, StartTime: s.StartTime, StartedAt: s.StartedAt}
	if s.Exit != nil {
		e := processExit(*s.Exit)
		p.Exit = &e
	}
	return p
}

func (r *runtimeOf) Ready(ctx context.Context) error { return r.c.Ready(ctx) }

func (r *runtimeOf) Start(ctx context.Context, s cri.StartSpec) (cri.Process, error) {
	st, err := r.c.Start(ctx, shim.Spec{
		ID: s.ID, SandboxID: s.SandboxID, OCI: s.OCI, LogPath: s.LogPath, Terminal: s.Terminal,
		Stdin: s.Stdin, StdinOnce: s.StdinOnce, MaxLogLine: r.maxLine, Pause: s.Pause,
	})
	return process(st), err
}

func (r *runtimeOf) Signal(ctx context.Context, id string, sig syscall.Signal, all bool) error {
	return r.c.Signal(ctx, id, sig, all)
}

func (r *runtimeOf) Delete(ctx context.Context, id string) (cri.ProcessExit, error) {
	e, err := r.c.Delete(ctx, id)
	return processExit(e), err
}

func (r *runtimeOf) Forget(ctx context.Context, id string) error { return r.c.Forget(ctx, id) }

func (r *runtimeOf) State(ctx context.Context, id string) (cri.Process, error) {
	st, err := r.c.State(ctx, id)
	return process(st), err
}

func (r *runtimeOf) List(ctx context.Context) ([]cri.Process, error) {
	states, err := r.c.List(ctx)
	out := make([]cri.Process, len(states))
	for i, st := range states {
		out[i] = process(st)
	}
	return out, err
}

func (r *runtimeOf) Exits() <-chan cri.ProcessExit { return r.exits }

func (r *runtimeOf) Update(ctx context.Context, id string, res *specs.LinuxResources) error {
	return r.c.Update(ctx, id, res)
}

func (r *runtimeOf) ReopenLog(ctx context.Context, id string) error { return r.c.ReopenLog(ctx, id) }

func (r *runtimeOf) ExecSync(ctx context.Context, id string, o cri.ExecOptions) (cri.ExecResult, error) {
	res, err := r.c.ExecSync(ctx, id, shim.ExecOptions(o))
	return cri.ExecResult(res), err
}

func (r *runtimeOf) Exec(ctx context.Context, id string, o cri.StreamOptions) (cri.Session, error) {
	return session(r.c.Exec(ctx, id, shim.StreamOptions(o)))
}

func (r *runtimeOf) Attach(ctx context.Context, id string, o cri.StreamOptions) (cri.Session, error) {
	return session(r.c.Attach(ctx, id, shim.StreamOptions(o)))
}

// session keeps a nil session from becoming a non-nil interface.
func session(s shim.Session, err error) (cri.Session, error) {
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (r *runtimeOf) PauseRootfs() string { return r.c.PauseBinary() }
