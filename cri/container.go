package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/store"
)

// Reasons as kubelets and people know them.
const (
	reasonOOM        = "OOMKilled"
	reasonCompleted  = "Completed"
	reasonError      = "Error"
	reasonUnknown    = "Unknown"
	reasonStartError = "StartError"

	codeUnknown    = 255
	codeStartError = 128
)

// container is a live container.
type container struct {
	id  string
	key string
	sb  *sandbox
	op  opLock // see the package comment

	mu       sync.Mutex       // guards what follows
	rec      *store.Container // replaced, never changed
	spec     *specs.Spec      // whole until started, afterwards Process only
	starting bool             // Runtime.Start is under way
	early    *ProcessExit     // an exit that came while starting
	removing bool
	removed  bool

	exited chan struct{} // closed when rec.Exit is set
}

func newContainer(sb *sandbox, rec *store.Container, oci *specs.Spec) *container {
	c := &container{id: rec.ID, key: containerKey(rec.SandboxID, rec.Config.GetMetadata()), sb: sb, op: newOpLock(), rec: rec, spec: oci, exited: make(chan struct{})}
	if rec.Exit != nil {
		close(c.exited)
	}
	return c
}

func containerKey(sandboxID string, m *runtimeapi.ContainerMetadata) string {
	return fmt.Sprintf("%q of sandbox %s (attempt %d)", m.GetName(), sandboxID, m.GetAttempt())
}

func (c *container) record() *store.Container {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rec
}

func (c *container) state() runtimeapi.ContainerState { return c.record().State() }

// usable says why a created container cannot be handed out again, or nil.
func (c *container) usable() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if st := c.rec.State(); c.removing || c.starting || st != runtimeapi.ContainerState_CONTAINER_CREATED {
		return fmt.Errorf("container %s was started already (%s): %w", c.id, st, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// needRunning is the error of calls that want a live process.
func (c *container) needRunning(what string) error {
	if st := c.state(); st != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return fmt.Errorf("%s container %s: it is not running (%s): %w", what, c.id, st, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// findContainer resolves an ID or a unique prefix of one.
func (s *Server) findContainer(id string) (*container, error) { return s.containers.Get(id) }

// ociSpec is the container's whole OCI spec, from disk once it was started.
func (s *Server) ociSpec(c *container) (*specs.Spec, error) {
	c.mu.Lock()
	oci := c.spec
	c.mu.Unlock()
	if oci != nil && oci.Linux != nil {
		return oci, nil
	}
	data, err := s.db.Spec(c.id)
	if err != nil {
		return nil, err
	}
	oci = &specs.Spec{}
	if err := json.Unmarshal(data, oci); err != nil {
		return nil, fmt.Errorf("decode OCI spec of container %s: %v: %w", c.id, err, errdefs.ErrDataLoss)
	}
	return oci, nil
}

// processSpec is enough of the OCI spec for an exec.
func (s *Server) processSpec(c *container) (*specs.Spec, error) {
	c.mu.Lock()
	oci := c.spec
	c.mu.Unlock()
	if oci != nil {
		return oci, nil
	}
	oci, err := s.ociSpec(c)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.spec = &specs.Spec{Process: oci.Process}
	c.mu.Unlock()
	return oci, nil
}

// status is the whole truth about the container as the CRI tells it.
func (c *container) status() *runtimeapi.ContainerStatus {
	r := c.record()
	st := &runtimeapi.ContainerStatus{
		Id: r.ID, Metadata: r.Config.GetMetadata(), State: r.State(), CreatedAt: r.CreatedAt.UnixNano(),
		Image: r.Image(), ImageRef: r.ImageRef, ImageId: r.ImageID,
		Labels: r.Config.GetLabels(), Annotations: r.Config.GetAnnotations(), Mounts: statusMounts(r),
		LogPath: r.LogPath, User: r.User, StopSignal: r.StopSignal,
	}
	if r.Resources != nil {
		st.Resources = &runtimeapi.ContainerResources{Linux: r.Resources}
	}
	if r.Started != nil {
		st.StartedAt = r.Started.At.UnixNano()
	}
	if e := r.Exit; e != nil {
		st.FinishedAt, st.ExitCode = e.At.UnixNano(), int32(e.Code)
		st.Reason, st.Message = exitReason(e)
		if !e.Known {
			st.ExitCode = codeUnknown
		}
	}
	return st
}

// statusMounts are the mounts as asked for, with the IDs of image volumes.
func statusMounts(r *store.Container) []*runtimeapi.Mount {
	mounts := r.Config.GetMounts()
	if len(r.ImageVolumes) == 0 {
		return mounts
	}
	out, n := make([]*runtimeapi.Mount, len(mounts)), 0
	for i, m := range mounts {
		if m.GetImage().GetImage() != "" && n < len(r.ImageVolumes) {
			m = proto.Clone(m).(*runtimeapi.Mount)
			m.Image.ImageRef = r.ImageVolumes[n]
			n++
		}
		out[i] = m
	}
	return out
}

func exitReason(e *store.Exit) (reason, message string) {
	switch {
	case e.Reason != "":
		return e.Reason, e.Message
	case e.OOM:
		return reasonOOM, e.Message
	case !e.Known:
		return reasonUnknown, e.Message
	case e.Code == 0:
		return reasonCompleted, e.Message
	}
	return reasonError, e.Message
}

// ContainerStatus answers from memory.
func (s *Server) ContainerStatus(ctx context.Context, r *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	c, err := s.findContainer(r.GetContainerId())
	if err != nil {
		return nil, fmt.Errorf("status of container: %w", err)
	}
	resp := &runtimeapi.ContainerStatusResponse{Status: c.status()}
	if r.GetVerbose() {
		resp.Info, err = s.containerInfo(c)
	}
	return resp, err
}

func (s *Server) containerInfo(c *container) (map[string]string, error) {
	oci, err := s.ociSpec(c)
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	c.mu.Lock()
	r, removing := c.rec, c.removing
	c.mu.Unlock()
	pid := 0
	if r.Started != nil && r.Exit == nil {
		pid = r.Started.Pid
	}
	return infoJSON(map[string]any{
		"sandboxID": r.SandboxID, "pid": pid, "removing": removing, "snapshotKey": r.ID, "snapshotter": "overlayfs",
		"rootfs": r.Rootfs, "runtimeType": "io.nodeagent.libcontainer", "runtimeOptions": nil, "config": r.Config,
		"runtimeSpec": oci, "exit": r.Exit,
	})
}

// ListContainers answers from memory.
func (s *Server) ListContainers(ctx context.Context, r *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{Containers: s.listContainers(r.GetFilter())}, nil
}

// StreamContainers is ListContainers in pieces.
func (s *Server) StreamContainers(r *runtimeapi.StreamContainersRequest, out runtimeapi.RuntimeService_StreamContainersServer) error {
	return inPieces(s.listContainers(r.GetFilter()), func(p []*runtimeapi.Container) error {
		return out.Send(&runtimeapi.StreamContainersResponse{Containers: p})
	})
}

func (s *Server) listContainers(f *runtimeapi.ContainerFilter) []*runtimeapi.Container {
	candidates := s.selectContainers(f.GetId(), f.GetPodSandboxId(), f.GetLabelSelector())
	out := make([]*runtimeapi.Container, 0, len(candidates))
	for _, c := range candidates {
		r := c.record()
		state := r.State()
		if f.GetState() != nil && f.GetState().GetState() != state {
			continue
		}
		out = append(out, &runtimeapi.Container{
			Id: r.ID, PodSandboxId: r.SandboxID, Metadata: r.Config.GetMetadata(), Image: r.Image(), ImageRef: r.ImageRef,
			ImageId: r.ImageID, State: state, CreatedAt: r.CreatedAt.UnixNano(),
			Labels: r.Config.GetLabels(), Annotations: r.Config.GetAnnotations(),
		})
	}
	return out
}

// selectContainers applies the conditions that all container filters share. An
// ID that is unknown or not unique matches nothing.
func (s *Server) selectContainers(id, sandboxID string, selector map[string]string) []*container {
	candidates := s.containers.All()
	if id != "" {
		c, err := s.findContainer(id)
		if err != nil {
			return nil
		}
		candidates = []*container{c}
	}
	if sandboxID != "" {
		b, err := s.findSandbox(sandboxID)
		if err != nil {
			return nil
		}
		sandboxID = b.id
	}
	out := candidates[:0:0]
	for _, c := range candidates {
		r := c.record()
		if sandboxID != "" && r.SandboxID != sandboxID || !matches(selector, r.Config.GetLabels()) {
			continue
		}
		out = append(out, c)
	}
	return out
}

// exitLoop takes facts from the shim until ctx ends. It runs from the beginning
// of Recover on, so that the shim is never held up; what comes before the end
// of Recover is looked at then.
func (s *Server) exitLoop(ctx context.Context) {
	ready := s.ready
	var early []ProcessExit
	for {
		select {
		case <-ctx.Done():
			return
		case <-ready:
			for _, e := range early {
				s.exited(e)
			}
			ready, early = nil, nil
		case <-s.alive:
		case e, ok := <-s.cfg.Runtime.Exits():
			switch {
			case !ok:
				return
			case ready != nil:
				early = append(early, e)
			default:
				s.exited(e)
			}
		}
	}
}

// Alive returns once the loop that takes exits has come round. An error means
// that it did not before ctx ended.
func (s *Server) Alive(ctx context.Context) error {
	select {
	case s.alive <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the loop that takes exits: %w", context.Cause(ctx))
	}
}

// exited records that a process ended. It may be told more than once.
func (s *Server) exited(e ProcessExit) {
	c, err := s.containers.Get(e.ID)
	if err == nil && c.id == e.ID {
		s.containerExited(c, e)
		return
	}
	b, err := s.sandboxes.Get(e.ID)
	if err != nil || b.id != e.ID {
		if !s.refused[e.ID] {
			// Half-made (then the shim refuses to forget it), or removed.
			s.work.Go(func() { s.forget(e.ID) })
		}
		return
	}
	b.mu.Lock()
	lost := !b.stopped
	b.stopped = true
	b.pausePid = 0
	b.mu.Unlock()
	if lost {
		s.log.Warn("the process that holds a pod's PID namespace ended; the sandbox is not ready any more", "sandbox", b.id, "code", e.Code, "signal", e.Signal)
		if err := s.mark(b.id, markStopped); err != nil {
			s.log.Warn("cannot note that", "sandbox", b.id, "err", err)
		}
		s.emit(b, b.id, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
	}
}

// forget drops the exit record of something that has no record of ours.
func (s *Server) forget(id string) {
	ctx, cancel := context.WithTimeout(s.life, undoTimeout)
	defer cancel()
	if err := s.cfg.Runtime.Forget(ctx, id); err != nil {
		s.log.Debug("an exit record of nobody stays", "id", id, "err", err)
	}
}

func (s *Server) containerExited(c *container, e ProcessExit) {
	c.mu.Lock()
	if c.starting {
		c.early = &e
		c.mu.Unlock()
		return
	}
	if c.rec.Exit != nil || c.removed {
		c.mu.Unlock()
		return
	}
	rec := *c.rec
	rec.Exit = exitRecord(e)
	if rec.Started == nil {
		// Started by a predecessor of ours that died before it could say so.
		rec.Started = &store.Started{Pid: e.Pid, At: rec.CreatedAt}
	}
	c.rec = &rec
	close(c.exited)
	c.mu.Unlock()
	s.emit(c.sb, c.id, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
	s.work.Go(func() { s.afterExit(c) })
}

func exitRecord(e ProcessExit) *store.Exit {
	x := &store.Exit{Code: e.Code, Signal: e.Signal, Known: e.Known, OOM: e.OOM, At: e.At}
	if e.Known && e.Signal != 0 && e.Code == 0 {
		x.Code = 128 + e.Signal
	}
	if !e.Known {
		x.Message = "the exit code was lost: the process ended while nothing of the runtime was alive to see it"
	}
	if x.At.IsZero() {
		x.At = now()
	}
	return x
}

// afterExit records the exit and lets the shim clean up what the container
// left: processes in its cgroup, the cgroup, FIFOs. The shim has the exit on
// disk and keeps it until it is told to forget, so nothing has to be synced.
func (s *Server) afterExit(c *container) {
	ctx, cancel := context.WithTimeout(s.life, undoTimeout)
	defer cancel()
	unlock, err := c.op.alone(ctx, "clean container "+c.id)
	if err != nil {
		return // shutting down: the next start does it
	}
	defer unlock()
	c.mu.Lock()
	rec, gone := c.rec, c.removed || c.removing
	c.mu.Unlock()
	if gone {
		return
	}
	s.phase(ctx, "Exit/seen", c.id)
	if err := s.db.PutContainerLazy(rec); err != nil {
		s.log.Error("cannot record an exit; the shim keeps it", "container", c.id, "err", err)
	}
	s.phase(ctx, "Exit/recorded", c.id)
	if _, err := s.cfg.Runtime.Delete(ctx, c.id); err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, context.Canceled) {
		s.log.Warn("cannot clean an exited container; its removal will", "container", c.id, "err", err)
	}
	s.phase(ctx, "Exit/done", c.id)
}

func cloneSandboxConfig(c *runtimeapi.PodSandboxConfig) *runtimeapi.PodSandboxConfig {
	return proto.Clone(c).(*runtimeapi.PodSandboxConfig)
}

// untilExit waits for the container's exit, ctx, or d (0 or less: not at all).
func (c *container) untilExit(ctx context.Context, d time.Duration) (gone bool, err error) {
	select {
	case <-c.exited:
		return true, nil
	default:
	}
	if d <= 0 {
		return false, nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-c.exited:
		return true, nil
	case <-t.C:
		return false, nil
	case <-ctx.Done():
		return false, ctx.Err()
	}
}
