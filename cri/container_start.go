package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/spec"
	"github.com/nodeagent/nodeagent/cri/store"
)

// StartContainer starts a created container.
func (s *Server) StartContainer(ctx context.Context, r *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	c, err := s.findContainer(r.GetContainerId())
	if err != nil {
		return nil, fmt.Errorf("start container: %w", err)
	}
	unlockPod, err := c.sb.op.share(ctx, "start container "+c.id)
	if err != nil {
		return nil, err
	}
	defer unlockPod()
	unlock, err := c.op.alone(ctx, "start container "+c.id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := s.startContainerLocked(ctx, c); err != nil {
		return nil, fmt.Errorf("start container %q (%s): %w", c.record().Config.GetMetadata().GetName(), c.id, err)
	}
	return &runtimeapi.StartContainerResponse{}, nil
}

func (s *Server) startContainerLocked(ctx context.Context, c *container) error {
	if err := c.sb.usable(); err != nil {
		return err
	}
	c.mu.Lock()
	rec := c.rec
	if st := rec.State(); c.removing || st != runtimeapi.ContainerState_CONTAINER_CREATED {
		c.mu.Unlock()
		return fmt.Errorf("it is not waiting to be started (%s): %w", st, errdefs.ErrFailedPrecondition)
	}
	c.starting = true
	c.mu.Unlock()

	s.phase(ctx, "StartContainer/begin", c.id)
	p, err := s.startProcess(ctx, c, rec)
	s.phase(ctx, "StartContainer/started", c.id)

	c.mu.Lock()
	c.starting = false
	early := c.early
	c.early = nil
	next := *rec
	switch {
	case err == nil:
		next.Started = &store.Started{Pid: p.Pid, StartTime: p.StartTime, At: p.StartedAt}
		if next.Started.At.IsZero() {
			next.Started.At = now()
		}
	case final(ctx, err):
		// The container cannot be started, now or later: that is its end.
		next.Exit = &store.Exit{Code: codeStartError, Known: true, At: now(), Reason: reasonStartError, Message: err.Error()}
		close(c.exited)
	default: // nothing happened, the caller may try again
		c.mu.Unlock()
		return err
	}
	c.rec = &next
	if c.spec != nil {
		c.spec = &specs.Spec{Process: c.spec.Process}
	}
	c.mu.Unlock()
	// The shim knows the same until it is told to forget: no need to sync.
	if e := s.db.PutContainerLazy(&next); e != nil {
		s.log.Error("cannot record a start; the shim knows it", "container", c.id, "err", e)
	}
	if err != nil {
		s.emit(c.sb, c.id, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
		return err
	}
	s.emit(c.sb, c.id, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	s.phase(ctx, "StartContainer/done", c.id)
	if early == nil {
		early = p.Exit
	}
	if early != nil {
		s.containerExited(c, *early)
	}
	return nil
}

// final reports whether a failed start says something about the container, as
// opposed to the caller or the runtime.
func final(ctx context.Context, err error) bool {
	return ctx.Err() == nil && !errdefs.IsUnavailable(err) && !errdefs.IsCanceled(err) && !errdefs.IsDeadlineExceeded(err)
}

func (s *Server) startProcess(ctx context.Context, c *container, rec *store.Container) (Process, error) {
	oci, err := s.ociSpec(c)
	if err != nil {
		return Process{}, err
	}
	if err := s.refreshPidNamespace(c, oci); err != nil {
		return Process{}, err
	}
	return s.cfg.Runtime.Start(ctx, StartSpec{
		ID: c.id, SandboxID: rec.SandboxID, OCI: oci, LogPath: rec.LogPath,
		Terminal: rec.Config.GetTty(), Stdin: rec.Config.GetStdin(), StdinOnce: rec.Config.GetStdinOnce(),
	})
}

// refreshPidNamespace checks that the process whose PID namespace is to be
// joined is still the one meant at creation; its pid may have been reused.
func (s *Server) refreshPidNamespace(c *container, oci *specs.Spec) error {
	want, err := s.pidNamespace(c.sb, c.record().Config)
	if err != nil || want == "" {
		return err
	}
	for i, ns := range oci.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace && ns.Path != "" {
			oci.Linux.Namespaces[i].Path = want
		}
	}
	return nil
}

// UpdateContainerResources changes limits of a created or running container:
// in the kernel and on record, or not at all.
func (s *Server) UpdateContainerResources(ctx context.Context, r *runtimeapi.UpdateContainerResourcesRequest) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	c, err := s.findContainer(r.GetContainerId())
	if err != nil {
		return nil, fmt.Errorf("update resources of container: %w", err)
	}
	unlock, err := c.op.alone(ctx, "update resources of container "+c.id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := s.updateResourcesLocked(ctx, c, r.GetLinux()); err != nil {
		return nil, fmt.Errorf("update resources of container %s: %w", c.id, err)
	}
	return &runtimeapi.UpdateContainerResourcesResponse{}, nil
}

func (s *Server) updateResourcesLocked(ctx context.Context, c *container, ask *runtimeapi.LinuxContainerResources) error {
	rec := c.record()
	state := rec.State()
	if state != runtimeapi.ContainerState_CONTAINER_CREATED && state != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return fmt.Errorf("it has ended (%s): %w", state, errdefs.ErrFailedPrecondition)
	}
	old, err := s.ociSpec(c)
	if err != nil {
		return err
	}
	merged, err := spec.MergeResources(old.Linux.Resources, ask, s.cfg.Host)
	if err != nil {
		return err
	}
	oci := *old
	linux := *old.Linux
	linux.Resources = merged
	oci.Linux = &linux
	data, err := encodeSpec(&oci)
	if err != nil {
		return err
	}
	running := state == runtimeapi.ContainerState_CONTAINER_RUNNING
	if running {
		if err := s.cfg.Runtime.Update(ctx, c.id, merged); err != nil {
			return s.revertResources(ctx, c, old.Linux.Resources, err)
		}
	}
	s.phase(ctx, "UpdateContainerResources/applied", c.id)
	next := *rec
	next.Resources = spec.StatusResources(merged, oci.Process.OOMScoreAdj).GetLinux()
	c.mu.Lock()
	next.Started, next.Exit = c.rec.Started, c.rec.Exit
	c.mu.Unlock()
	if err := s.db.PutContainer(&next, data); err != nil {
		if running {
			return s.revertResources(ctx, c, old.Linux.Resources, err)
		}
		return err
	}
	c.mu.Lock()
	next.Started, next.Exit = c.rec.Started, c.rec.Exit // an exit may have come meanwhile; afterExit records it
	c.rec = &next
	if c.spec != nil && c.spec.Linux != nil {
		c.spec = &oci
	}
	c.mu.Unlock()
	return nil
}

// revertResources puts the old limits back and returns cause.
func (s *Server) revertResources(ctx context.Context, c *container, old *specs.LinuxResources, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if err := s.cfg.Runtime.Update(ctx, c.id, old); err != nil && c.state() == runtimeapi.ContainerState_CONTAINER_RUNNING {
		return fmt.Errorf("%w (and the old limits could not be put back: %v)", cause, err)
	}
	return cause
}

// ReopenContainerLog makes the writer of the log open its path again.
func (s *Server) ReopenContainerLog(ctx context.Context, r *runtimeapi.ReopenContainerLogRequest) (*runtimeapi.ReopenContainerLogResponse, error) {
	c, err := s.findContainer(r.GetContainerId())
	if err != nil {
		return nil, fmt.Errorf("reopen log of container: %w", err)
	}
	if err := c.needRunning("reopen log of"); err != nil {
		return nil, err
	}
	if err := s.cfg.Runtime.ReopenLog(ctx, c.id); err != nil {
		return nil, fmt.Errorf("reopen log of container %s: %w", c.id, err)
	}
	return &runtimeapi.ReopenContainerLogResponse{}, nil
}
