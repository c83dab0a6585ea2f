package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/spec"
	"github.com/nodeagent/nodeagent/cri/stream"
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

// Sessions is what the streaming server runs sessions on.
func (s *Server) Sessions() stream.Runtime { return sessions{s} }

type sessions struct{ s *Server }

// Exec starts cmd in a container.
func (x sessions) Exec(ctx context.Context, id string, cmd []string, p stream.Pipes) (stream.Session, error) {
	c, err := x.s.findContainer(id)
	if err != nil {
		return nil, fmt.Errorf("exec in container: %w", err)
	}
	if err := c.needRunning("exec in"); err != nil {
		return nil, err
	}
	oci, err := x.s.processSpec(c)
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	session, err := x.s.cfg.Runtime.Exec(ctx, c.id, StreamOptions{
		Process: spec.Exec(oci, cmd, p.Terminal),
		Stdin:   p.Stdin, Stdout: p.Stdout, Stderr: p.Stderr, Terminal: p.Terminal,
	})
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	return session, nil
}

// Attach connects to the container's own streams.
func (x sessions) Attach(ctx context.Context, id string, p stream.Pipes) (stream.Session, error) {
	c, err := x.s.findContainer(id)
	if err != nil {
		return nil, fmt.Errorf("attach to container: %w", err)
	}
	if err := c.needRunning("attach to"); err != nil {
		return nil, err
	}
	session, err := x.s.cfg.Runtime.Attach(ctx, c.id, StreamOptions{Stdin: p.Stdin, Stdout: p.Stdout, Stderr: p.Stderr, Terminal: p.Terminal})
	if err != nil {
		return nil, fmt.Errorf("attach to container %s: %w", c.id, err)
	}
	return session, nil
}

// Netns is the path of a ready sandbox's network namespace, "" for the host's.
func (x sessions) Netns(_ context.Context, id string) (string, error) {
	b, err := x.s.findSandbox(id)
	if err != nil {
		return "", err
	}
	if err := b.usable(); err != nil {
		return "", err
	}
	return b.record().Namespaces.Net, nil
}
