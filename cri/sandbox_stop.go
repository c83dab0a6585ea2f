package cri

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/spec"
	"github.com/nodeagent/nodeagent/cri/store"
)

// StopPodSandbox kills the containers and gives the network back. An unknown
// sandbox is a stopped one.
func (s *Server) StopPodSandbox(ctx context.Context, r *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	b, err := s.findSandbox(r.GetPodSandboxId())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.StopPodSandboxResponse{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("stop sandbox: %w", err)
	}
	unlock, err := b.lockToEnd(ctx, "stop sandbox")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := s.stopSandboxLocked(ctx, b); err != nil {
		return nil, fmt.Errorf("stop sandbox %s: %w", b.id, err)
	}
	return &runtimeapi.StopPodSandboxResponse{}, nil
}

// stopSandboxLocked is idempotent; b.op is held alone.
func (s *Server) stopSandboxLocked(ctx context.Context, b *sandbox) error {
	b.mu.Lock()
	done, first := b.clean || b.removed, !b.stopped
	b.mu.Unlock()
	if done {
		return nil
	}
	s.phase(ctx, "StopPodSandbox/begin", b.id)
	if err := s.mark(b.id, markStopped); err != nil {
		return err
	}
	b.markStopped()
	s.phase(ctx, "StopPodSandbox/marked", b.id)

	var kills []func(context.Context) error
	for _, c := range b.members() {
		kills = append(kills, func(ctx context.Context) error { return s.killContainer(ctx, c) })
	}
	if err := parallel(ctx, s.log, "stop sandbox", kills...); err != nil {
		return err
	}
	s.phase(ctx, "StopPodSandbox/killed", b.id)
	rec := b.record()
	if rec.Pause {
		if _, err := s.cfg.Runtime.Delete(ctx, b.id); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("stop pause container: %w", err)
		}
		b.mu.Lock()
		b.pausePid = 0
		b.mu.Unlock()
		s.phase(ctx, "StopPodSandbox/pause", b.id)
	}
	if !hostNetwork(rec.Config) {
		if err := s.cfg.Network.Teardown(ctx, s.networkRequest(rec), networkResult(rec.Network)); err != nil {
			return fmt.Errorf("disconnect from the network: %w", err)
		}
		s.phase(ctx, "StopPodSandbox/network", b.id)
	}
	if rec.Namespaces.ID != "" {
		if err := s.cfg.Namespaces.Release(ctx, rec.Namespaces); err != nil {
			return fmt.Errorf("release namespaces: %w", err)
		}
	}
	if err := unmountShm(rec.Dir); err != nil {
		return err
	}
	b.mu.Lock()
	b.clean = true
	b.mu.Unlock()
	s.phase(ctx, "StopPodSandbox/done", b.id)
	if first {
		s.emit(b, b.id, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
	}
	return nil
}

// RemovePodSandbox removes the sandbox and everything in it, by force. An
// unknown sandbox is a removed one.
func (s *Server) RemovePodSandbox(ctx context.Context, r *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	b, err := s.findSandbox(r.GetPodSandboxId())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.RemovePodSandboxResponse{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("remove sandbox: %w", err)
	}
	unlock, err := b.lockToEnd(ctx, "remove sandbox")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := s.removeSandboxLocked(ctx, b); err != nil {
		return nil, fmt.Errorf("remove sandbox %s: %w", b.id, err)
	}
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

// removeSandboxLocked is idempotent; b.op is held alone.
func (s *Server) removeSandboxLocked(ctx context.Context, b *sandbox) error {
	b.mu.Lock()
	removed := b.removed
	b.mu.Unlock()
	if removed {
		return nil
	}
	s.phase(ctx, "RemovePodSandbox/begin", b.id)
	if err := s.mark(b.id, markRemoving); err != nil {
		return err
	}
	if err := s.stopSandboxLocked(ctx, b); err != nil {
		return err
	}
	var removals []func(context.Context) error
	for _, c := range b.members() {
		removals = append(removals, func(ctx context.Context) error { return s.removeContainerInSandbox(ctx, c) })
	}
	if err := parallel(ctx, s.log, "remove sandbox", removals...); err != nil {
		return err
	}
	s.phase(ctx, "RemovePodSandbox/containers", b.id)
	rec := b.record()
	if err := removeSandboxFiles(rec.Dir); err != nil {
		return err
	}
	if err := s.ungroup(ctx, b, rec); err != nil {
		return err
	}
	s.phase(ctx, "RemovePodSandbox/cleaned", b.id)
	if err := s.db.DeleteSandbox(b.id); err != nil {
		return err
	}
	s.phase(ctx, "RemovePodSandbox/unrecorded", b.id)
	if rec.Pause {
		if err := s.cfg.Runtime.Forget(ctx, b.id); err != nil && !errdefs.IsNotFound(err) {
			s.log.Warn("the exit record of a pause container stays", "sandbox", b.id, "err", err)
		}
	}
	b.mu.Lock()
	b.removed = true
	b.mu.Unlock()
	spec.ReleaseSandboxLabel(rec.Label)
	s.sandboxes.Delete(b.id)
	s.sandboxNames.free(b.key, b.id)
	if err := s.dropIntent(b.id); err != nil {
		s.log.Warn("an intent stays; the next start removes it", "sandbox", b.id, "err", err)
	}
	s.emit(b, b.id, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT)
	s.phase(ctx, "RemovePodSandbox/done", b.id)
	return nil
}

// ungroup gives the pod's cgroup back, once: pods may share one, and the
// manager counts them. Those of an earlier boot are not counted.
func (s *Server) ungroup(ctx context.Context, b *sandbox, rec *store.Sandbox) error {
	// Not under the lock of b: shared looks at every sandbox, b too.
	used := rec.Boot != s.boot && s.shared(rec.CgroupParent)
	b.mu.Lock()
	done := b.ungrouped || used
	b.mu.Unlock()
	if done {
		return nil
	}
	if err := s.cfg.Cgroups.RemovePod(ctx, rec.CgroupParent); err != nil {
		return fmt.Errorf("remove pod cgroup: %w", err)
	}
	b.mu.Lock()
	b.ungrouped = true
	b.mu.Unlock()
	return nil
}

// UpdatePodSandboxResources records what the pod may use now, and applies it
// to the pod's cgroup if that is one of ours.
func (s *Server) UpdatePodSandboxResources(ctx context.Context, r *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	b, err := s.findSandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, fmt.Errorf("update resources of sandbox: %w", err)
	}
	unlock, err := b.op.alone(ctx, "update resources of sandbox "+b.id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := b.usable(); err != nil {
		return nil, fmt.Errorf("update resources of sandbox: %w", err)
	}
	old := b.record()
	rec := *old
	rec.Config = cloneSandboxConfig(old.Config)
	if rec.Config.Linux == nil {
		rec.Config.Linux = &runtimeapi.LinuxPodSandboxConfig{}
	}
	if r.GetOverhead() != nil {
		rec.Config.Linux.Overhead = r.GetOverhead()
	}
	if r.GetResources() != nil {
		rec.Config.Linux.Resources = r.GetResources()
	}
	limits, err := podResources(rec.Config.Linux, s.cfg.Host)
	if err != nil {
		return nil, fmt.Errorf("update resources of sandbox %s: %w", b.id, err)
	}
	if err := s.cfg.Cgroups.UpdatePod(ctx, rec.CgroupParent, limits); err != nil {
		return nil, fmt.Errorf("update resources of sandbox %s: %w", b.id, err)
	}
	if err := s.db.PutSandbox(&rec); err != nil {
		if before, e := podResources(old.Config.GetLinux(), s.cfg.Host); e == nil {
			err = errors.Join(err, s.cfg.Cgroups.UpdatePod(context.WithoutCancel(ctx), old.CgroupParent, before))
		}
		return nil, fmt.Errorf("update resources of sandbox %s: %w", b.id, err)
	}
	b.mu.Lock()
	b.rec = &rec
	b.mu.Unlock()
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, nil
}
