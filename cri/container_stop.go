package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// StopContainer asks the container to end, and kills it when the grace period
// is over. An unknown or ended container is a stopped one. Several calls may
// wait at once; the shortest grace period wins.
func (s *Server) StopContainer(ctx context.Context, r *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	if r.GetTimeout() < 0 {
		return nil, fmt.Errorf("stop container: %w", badField("timeout", r.GetTimeout(), "0 or more seconds"))
	}
	c, err := s.findContainer(r.GetContainerId())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.StopContainerResponse{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("stop container: %w", err)
	}
	if err := s.stopContainer(ctx, c, seconds(r.GetTimeout())); err != nil {
		return nil, fmt.Errorf("stop container %s: %w", c.id, err)
	}
	return &runtimeapi.StopContainerResponse{}, nil
}

// seconds converts without overflow.
func seconds(n int64) time.Duration {
	const most = int64(1<<63-1) / int64(time.Second)
	return time.Duration(min(n, most)) * time.Second
}

func (s *Server) stopContainer(ctx context.Context, c *container, grace time.Duration) error {
	// Not in the middle of a start; the lock is not kept while waiting.
	unlock, err := c.op.alone(ctx, "stop container "+c.id)
	if err != nil {
		return err
	}
	unlock()
	rec := c.record()
	if rec.State() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil
	}
	if grace > 0 {
		s.phase(ctx, "StopContainer/signal", c.id)
		err := s.cfg.Runtime.Signal(ctx, c.id, syscall.Signal(rec.StopNumber), false)
		if err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("send signal %d: %w", rec.StopNumber, err)
		}
		if gone, err := c.untilExit(ctx, grace); gone || err != nil {
			return err
		}
	}
	return s.killContainer(ctx, c)
}

// killContainer ends a running container and waits until it has; it is
// idempotent. The caller keeps starts away.
func (s *Server) killContainer(ctx context.Context, c *container) error {
	if c.state() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil
	}
	s.phase(ctx, "StopContainer/kill", c.id)
	err := s.cfg.Runtime.Signal(ctx, c.id, syscall.SIGKILL, true)
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("kill container %s: %w", c.id, err)
	}
	if errdefs.IsNotFound(err) {
		// Gone: its exit is on its way, or was never seen by anybody.
		if gone, err := c.untilExit(ctx, 2*time.Second); gone || err != nil {
			return err
		}
		e, err := s.cfg.Runtime.Delete(ctx, c.id)
		if err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("kill container %s: %w", c.id, err)
		}
		e.ID = c.id
		s.containerExited(c, e)
		return nil
	}
	gone, err := c.untilExit(ctx, 10*time.Minute)
	if err != nil {
		return fmt.Errorf("kill container %s: it was sent SIGKILL and does not end (a process may hang in the kernel): %w", c.id, err)
	}
	if !gone {
		return fmt.Errorf("kill container %s: it was sent SIGKILL ten minutes ago and has not ended: %w", c.id, context.DeadlineExceeded)
	}
	s.phase(ctx, "StopContainer/done", c.id)
	return nil
}

// RemoveContainer removes a container, by force if it runs. An unknown one is
// a removed one.
func (s *Server) RemoveContainer(ctx context.Context, r *runtimeapi.RemoveContainerRequest) (*runtimeapi.RemoveContainerResponse, error) {
	c, err := s.findContainer(r.GetContainerId())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.RemoveContainerResponse{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("remove container: %w", err)
	}
	if err := s.removeContainer(ctx, c); err != nil {
		return nil, fmt.Errorf("remove container %s: %w", c.id, err)
	}
	return &runtimeapi.RemoveContainerResponse{}, nil
}

func (s *Server) removeContainer(ctx context.Context, c *container) error {
	unlock, err := c.sb.op.share(ctx, "remove container "+c.id)
	if err != nil {
		return err
	}
	defer unlock()
	return s.removeContainerInSandbox(ctx, c)
}

// removeContainerInSandbox is idempotent; the sandbox's lock is held.
func (s *Server) removeContainerInSandbox(ctx context.Context, c *container) error {
	unlock, err := c.op.alone(ctx, "remove container "+c.id)
	if err != nil {
		return err
	}
	defer unlock()
	c.mu.Lock()
	if c.removed {
		c.mu.Unlock()
		return nil
	}
	c.removing = true
	c.mu.Unlock()
	s.phase(ctx, "RemoveContainer/begin", c.id)
	if err := s.mark(c.id, markRemoving); err != nil {
		return err
	}
	if err := s.killContainer(ctx, c); err != nil {
		return err
	}
	if c.record().Started != nil {
		if _, err := s.cfg.Runtime.Delete(ctx, c.id); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	s.phase(ctx, "RemoveContainer/process", c.id)
	if err := s.cfg.Rootfs.Unmount(ctx, c.id); err != nil {
		return err
	}
	s.phase(ctx, "RemoveContainer/rootfs", c.id)
	if err := s.db.DeleteContainer(c.id); err != nil {
		return err
	}
	s.phase(ctx, "RemoveContainer/unrecorded", c.id)
	if err := s.cfg.Runtime.Forget(ctx, c.id); err != nil && !errdefs.IsNotFound(err) {
		s.log.Warn("the exit record of a removed container stays; the next start drops it", "container", c.id, "err", err)
	}
	c.mu.Lock()
	c.removed = true
	c.mu.Unlock()
	s.containers.Delete(c.id)
	c.sb.dropContainer(c)
	s.containerNames.free(c.key, c.id)
	if err := s.dropIntent(c.id); err != nil {
		s.log.Warn("an intent stays; the next start removes it", "container", c.id, "err", err)
	}
	s.emit(c.sb, c.id, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT)
	s.phase(ctx, "RemoveContainer/done", c.id)
	return nil
}

func encodeSpec(oci *specs.Spec) ([]byte, error) {
	data, err := json.Marshal(oci)
	if err != nil {
		return nil, fmt.Errorf("encode OCI spec: %w", err)
	}
	return data, nil
}
