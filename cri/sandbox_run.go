package cri

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/spec"
	"github.com/nodeagent/nodeagent/cri/store"
)

// RunPodSandbox makes a sandbox, or returns the one that an equal request made
// or is making.
func (s *Server) RunPodSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	maps, err := checkSandbox(r.GetConfig(), s.cfg.Host)
	if err == nil {
		err = s.checkHandler(r.GetRuntimeHandler())
	}
	if err != nil {
		return nil, fmt.Errorf("run sandbox: %w", err)
	}
	m := r.GetConfig().GetMetadata()
	key := sandboxKey(m)
	id, err := s.sandboxNames.create(ctx, key, digest(r), func(ctx context.Context) (made, error) {
		return s.makeSandbox(ctx, key, r, maps)
	})
	if err != nil {
		return nil, fmt.Errorf("run sandbox %q/%q: %w", m.GetNamespace(), m.GetName(), err)
	}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: id}, nil
}

func (s *Server) checkHandler(name string) error {
	if name == "" {
		return nil
	}
	for _, h := range s.cfg.Handlers {
		if h.Name == name {
			return nil
		}
	}
	return fmt.Errorf("runtime handler %q is not configured: %w", name, errdefs.ErrInvalidArgument)
}

// makeSandbox does it, or leaves nothing behind.
func (s *Server) makeSandbox(ctx context.Context, key string, r *runtimeapi.RunPodSandboxRequest, maps *spec.IDMaps) (_ made, err error) {
	id := newID()
	s.phase(ctx, "RunPodSandbox/begin", id)
	parent, err := s.cfg.Cgroups.PodParent(r.GetConfig().GetLinux().GetCgroupParent(), id)
	if err != nil {
		return made{}, fmt.Errorf("config.linux.cgroup_parent: %w", err)
	}
	limits, err := podResources(r.GetConfig().GetLinux(), s.cfg.Host)
	if err != nil {
		return made{}, fmt.Errorf("pod resources: %w", err)
	}
	rec := &store.Sandbox{
		ID: id, CreatedAt: now(), Boot: s.boot, Handler: r.GetRuntimeHandler(), Digest: digest(r),
		Config: r.GetConfig(), CgroupParent: parent, Dir: s.sandboxDir(id),
		Pause: r.GetConfig().GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid() == runtimeapi.NamespaceMode_POD,
	}
	b := &sandbox{id: id, key: key, op: newOpLock(), rec: rec}

	m := rec.Config.GetMetadata()
	if err := s.writeIntent(intent{
		Kind: kindSandbox, ID: id, Cgroup: parent,
		Network: &intentPod{m.GetNamespace(), m.GetName(), m.GetUid(), rec.Config.GetAnnotations()},
	}); err != nil {
		return made{}, err
	}
	var u undo
	kept := false
	defer func() {
		if !kept {
			s.rollback(ctx, kindSandbox, id, &u)
		}
	}()
	s.phase(ctx, "RunPodSandbox/intent", id)

	if rec.Label, err = spec.SandboxLabel(rec.Config, s.cfg.Host); err != nil {
		return made{}, err
	}
	u.push("release SELinux label", func(context.Context) error { spec.ReleaseSandboxLabel(rec.Label); return nil })
	if err := s.buildSandbox(ctx, b, maps, limits, &u); err != nil {
		return made{}, err
	}
	if err := ctx.Err(); err != nil {
		return made{}, fmt.Errorf("record sandbox: the caller went away: %w", err)
	}
	s.phase(ctx, "RunPodSandbox/built", id)
	if err := s.db.PutSandbox(rec); err != nil {
		// It may be on disk all the same.
		u.push("delete record", func(context.Context) error { return s.db.DeleteSandbox(id) })
		return made{}, err
	}
	kept = true
	s.sandboxes.Add(id, b)
	s.phase(ctx, "RunPodSandbox/recorded", id)
	s.emit(b, id, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT)
	s.emit(b, id, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	return made{id: id, usable: b.usable, abandon: func() { s.abandonSandbox(b) }}, nil
}

// buildSandbox makes the kernel objects; steps that do not need each other run
// at the same time.
func (s *Server) buildSandbox(ctx context.Context, b *sandbox, maps *spec.IDMaps, limits *specs.LinuxResources, u *undo) error {
	rec, c := b.rec, b.rec.Config
	want := NamespaceWant{
		Net: !hostNetwork(c), IPC: !hostIPC(c), UTS: !hostNetwork(c), User: maps != nil,
		Hostname: c.GetHostname(),
	}
	var err error
	if want.Sysctls, err = spec.Sysctls(c, s.cfg.Defaults); err != nil {
		return err
	}
	if maps != nil {
		want.UIDMap, want.GIDMap = maps.UIDs, maps.GIDs
	}
	hostname := c.GetHostname()
	if hostname == "" || !want.UTS {
		hostname, _ = os.Hostname()
	}
	namespaces := make(chan struct{}) // closed when rec.Namespaces is set

	connect := func(ctx context.Context) error {
		if want.Net || want.IPC || want.UTS || want.User {
			ns, err := s.cfg.Namespaces.Get(ctx, want)
			if err != nil {
				return fmt.Errorf("make namespaces: %w", err)
			}
			u.push("release namespaces", func(ctx context.Context) error { return s.cfg.Namespaces.Release(ctx, ns) })
			rec.Namespaces = ns
		}
		close(namespaces)
		s.phase(ctx, "RunPodSandbox/namespaces", rec.ID)
		if !want.Net {
			return nil
		}
		req := s.networkRequest(rec)
		res, err := s.cfg.Network.Setup(ctx, req)
		if err != nil {
			return fmt.Errorf("connect to the network: %w", err)
		}
		u.push("disconnect from the network", func(ctx context.Context) error { return s.cfg.Network.Teardown(ctx, req, res) })
		rec.Network = networkRecord(res)
		s.phase(ctx, "RunPodSandbox/network", rec.ID)
		return nil
	}
	place := func(ctx context.Context) error {
		if err := s.cfg.Cgroups.EnsurePod(ctx, rec.CgroupParent, limits); err != nil {
			return err
		}
		// Not before: while the kernel waits, groups cannot be made.
		s.cfg.Cgroups.ExpectProcess()
		u.push("remove pod cgroup", func(ctx context.Context) error { return s.cfg.Cgroups.RemovePod(ctx, rec.CgroupParent) })
		s.phase(ctx, "RunPodSandbox/cgroup", rec.ID)
		u.push("remove sandbox files", func(context.Context) error { return removeSandboxFiles(rec.Dir) })
		if err := makeSandboxFiles(rec.Dir, c, hostname); err != nil {
			return err
		}
		s.phase(ctx, "RunPodSandbox/files", rec.ID)
		if !rec.Pause {
			return nil
		}
		select {
		case <-namespaces:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		return s.startPause(ctx, b, u)
	}
	return parallel(ctx, s.log, "run sandbox", connect, place)
}

// startPause starts the process that holds a shared PID namespace.
func (s *Server) startPause(ctx context.Context, b *sandbox, u *undo) error {
	rec := b.rec
	cgroup, err := s.cfg.Cgroups.ContainerPath(rec.CgroupParent, rec.ID)
	if err != nil {
		return err
	}
	oci, err := spec.Pause(spec.PauseInput{
		ID: rec.ID, Sandbox: rec.Config, Rootfs: s.cfg.Runtime.PauseRootfs(), Cgroup: cgroup,
		Namespaces: spec.Namespaces{Net: rec.Namespaces.Net, IPC: rec.Namespaces.IPC, UTS: rec.Namespaces.UTS, User: rec.Namespaces.User},
		Host:       s.cfg.Host,
	})
	if err != nil {
		return fmt.Errorf("pause container: %w", err)
	}
	p, err := s.cfg.Runtime.Start(ctx, StartSpec{ID: rec.ID, SandboxID: rec.ID, OCI: oci, Pause: true})
	if err != nil {
		return fmt.Errorf("start pause container: %w", err)
	}
	u.push("stop pause container", func(ctx context.Context) error { return s.deleteProcess(ctx, rec.ID) })
	b.mu.Lock()
	b.pausePid = p.Pid
	b.mu.Unlock()
	s.phase(ctx, "RunPodSandbox/pause", rec.ID)
	return nil
}

// deleteProcess removes everything the shim has of id, exit record included.
func (s *Server) deleteProcess(ctx context.Context, id string) error {
	if _, err := s.cfg.Runtime.Delete(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if err := s.cfg.Runtime.Forget(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// rollback undoes a creation; what does not work at once is tried again later.
// The intent goes last.
func (s *Server) rollback(ctx context.Context, kind, id string, u *undo) {
	s.phase(ctx, kind+"/rollback", id)
	finish := func(ctx context.Context) error {
		if err := u.run(ctx); err != nil {
			return err
		}
		return s.dropIntent(id)
	}
	if err := finish(ctx); err != nil {
		s.log.Error("a failed creation could not be undone entirely, will try again", "what", kind, "id", id, "err", err)
		s.janitor.add("half-made "+kind, id, finish)
	}
	s.phase(ctx, kind+"/rolled-back", id)
}

// abandonSandbox removes a sandbox whose callers have all gone away.
func (s *Server) abandonSandbox(b *sandbox) {
	remove := func(ctx context.Context) error {
		unlock, err := b.op.alone(ctx, "remove abandoned sandbox "+b.id)
		if err != nil {
			return err
		}
		defer unlock()
		return s.removeSandboxLocked(ctx, b)
	}
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	if err := remove(ctx); err != nil {
		s.log.Error("an abandoned sandbox could not be removed, will try again", "sandbox", b.id, "err", err)
		s.janitor.add("abandoned sandbox", b.id, remove)
	}
}
