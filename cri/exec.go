package cri

import (
	"context"
	"fmt"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/spec"
)

// ExecSync runs a command in a container and returns what it wrote.
func (s *Server) ExecSync(ctx context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	c, err := s.findContainer(r.GetContainerId())
	if err != nil {
		return nil, fmt.Errorf("exec in container: %w", err)
	}
	if err := spec.CheckExec(r.GetCmd()); err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	if r.GetTimeout() < 0 {
		return nil, fmt.Errorf("exec in container %s: %w", c.id, badField("timeout", r.GetTimeout(), "0 (none) or more seconds"))
	}
	if err := c.needRunning("exec in"); err != nil {
		return nil, err
	}
	oci, err := s.processSpec(c)
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	p := spec.Exec(oci, r.GetCmd(), false)
	res, err := s.cfg.Runtime.ExecSync(ctx, c.id, ExecOptions{Process: p, Timeout: seconds(r.GetTimeout()), MaxOutput: s.cfg.ExecMaxOutput})
	if err != nil {
		return nil, fmt.Errorf("exec %q in container %s: %w", r.GetCmd()[0], c.id, err)
	}
	if res.TimedOut {
		return nil, fmt.Errorf("exec %q in container %s: timed out after %s, all it had started was killed: %w", r.GetCmd()[0], c.id, seconds(r.GetTimeout()), context.DeadlineExceeded)
	}
	res.Stdout, res.Stderr = fitMessage(res.Stdout, res.Stderr)
	return &runtimeapi.ExecSyncResponse{Stdout: res.Stdout, Stderr: res.Stderr, ExitCode: int32(res.Code)}, nil
}

// fitMessage cuts output so that both streams fit into one message, of which
// clients take MaxMessage bytes. The longer one gives way.
func fitMessage(stdout, stderr []byte) ([]byte, []byte) {
	const room = MaxMessage - 64 // field tags, lengths and the exit code
	over := len(stdout) + len(stderr) - room
	if over <= 0 {
		return stdout, stderr
	}
	switch {
	case len(stderr) <= room/2:
		stdout = stdout[:room-len(stderr)]
	case len(stdout) <= room/2:
		stderr = stderr[:room-len(stdout)]
	default:
		stdout, stderr = stdout[:room/2], stderr[:room/2]
	}
	return stdout, stderr
}
