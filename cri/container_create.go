package cri

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	selinux "github.com/opencontainers/selinux/go-selinux"
	"github.com/opencontainers/selinux/go-selinux/label"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/images"
	"github.com/nodeagent/nodeagent/cri/spec"
	"github.com/nodeagent/nodeagent/cri/store"
)

// CreateContainer makes a container that is ready to start, or returns the one
// that an equal request made or is making.
func (s *Server) CreateContainer(ctx context.Context, r *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	b, err := s.findSandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, fmt.Errorf("create container %q: %w", r.GetConfig().GetMetadata().GetName(), err)
	}
	if err := checkContainer(r.GetConfig(), b.record().Config); err != nil {
		return nil, fmt.Errorf("create container %q in sandbox %s: %w", r.GetConfig().GetMetadata().GetName(), b.id, err)
	}
	key := containerKey(b.id, r.GetConfig().GetMetadata())
	dig := digest(r.GetConfig())
	id, err := s.containerNames.create(ctx, key, dig, func(ctx context.Context) (made, error) {
		return s.makeContainer(ctx, b, r.GetConfig(), dig)
	})
	if err != nil {
		return nil, fmt.Errorf("create container %q in sandbox %s: %w", r.GetConfig().GetMetadata().GetName(), b.id, err)
	}
	return &runtimeapi.CreateContainerResponse{ContainerId: id}, nil
}

// makeContainer does it, or leaves nothing behind.
func (s *Server) makeContainer(ctx context.Context, b *sandbox, config *runtimeapi.ContainerConfig, dig string) (_ made, err error) {
	unlock, err := b.op.share(ctx, "create container")
	if err != nil {
		return made{}, err
	}
	defer unlock()
	ctx, done := b.beginCreate(ctx)
	defer done(&err)
	if err := b.usable(); err != nil {
		return made{}, err
	}
	image, err := s.cfg.Images.Get(ctx, config.GetImage().GetImage())
	if errdefs.IsNotFound(err) {
		return made{}, fmt.Errorf("image %q is not on this node, pull it first: %w", config.GetImage().GetImage(), err)
	}
	if err != nil {
		return made{}, err
	}
	id := newID()
	s.phase(ctx, "CreateContainer/begin", id)
	s.cfg.Cgroups.ExpectProcess()
	rec, err := s.newContainerRecord(id, b.record(), config, image)
	if err != nil {
		return made{}, err
	}
	rec.Digest = dig
	if err := s.writeIntent(intent{Kind: kindContainer, ID: id, SandboxID: b.id}); err != nil {
		return made{}, err
	}
	var u undo
	kept := false
	defer func() {
		if !kept {
			s.rollback(ctx, kindContainer, id, &u)
		}
	}()
	s.phase(ctx, "CreateContainer/intent", id)

	oci, err := s.buildContainer(ctx, b, rec, image, &u)
	if err != nil {
		return made{}, err
	}
	data, err := encodeSpec(oci)
	if err != nil {
		return made{}, err
	}
	if err := ctx.Err(); err != nil {
		return made{}, fmt.Errorf("record container: %w", err)
	}
	s.phase(ctx, "CreateContainer/built", id)
	if err := s.db.PutContainer(rec, data); err != nil {
		u.push("delete record", func(context.Context) error { return s.db.DeleteContainer(id) })
		return made{}, err
	}
	kept = true
	c := newContainer(b, rec, oci)
	s.containers.Add(id, c)
	b.addContainer(c)
	s.phase(ctx, "CreateContainer/recorded", id)
	s.emit(b, id, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT)
	return made{id: id, usable: c.usable, abandon: func() { s.abandonContainer(c) }}, nil
}

func (s *Server) newContainerRecord(id string, sb *store.Sandbox, config *runtimeapi.ContainerConfig, image images.Image) (*store.Container, error) {
	log, err := logPath(sb.Config, config)
	if err != nil {
		return nil, err
	}
	sig, number, err := spec.StopSignal(config, image.Config.Config.StopSignal)
	if err != nil {
		return nil, err
	}
	cgroup, err := s.cfg.Cgroups.ContainerPath(sb.CgroupParent, id)
	if err != nil {
		return nil, err
	}
	rec := &store.Container{
		ID: id, SandboxID: sb.ID, CreatedAt: now(), Config: config, ImageID: image.ID, ImageRef: image.ID,
		ImageName: showName(config.GetImage(), image), LogPath: log, StopSignal: sig, StopNumber: int(number), CgroupsPath: cgroup,
	}
	if len(image.RepoDigests) > 0 {
		rec.ImageRef = image.RepoDigests[0]
	}
	return rec, nil
}

// showName picks the name of an image that its user will recognise.
func showName(asked *runtimeapi.ImageSpec, image images.Image) string {
	for _, want := range []string{asked.GetUserSpecifiedImage(), asked.GetImage()} {
		if want == "" {
			continue
		}
		for _, tag := range image.RepoTags {
			if tag == want || strings.HasSuffix(tag, "/"+want) || strings.TrimSuffix(tag, ":latest") == want || strings.HasSuffix(tag, "/"+want+":latest") {
				return tag
			}
		}
		if slices.Contains(image.RepoDigests, want) {
			return want
		}
	}
	if len(image.RepoTags) > 0 {
		return image.RepoTags[0]
	}
	return asked.GetImage()
}

// buildContainer mounts the root filesystem and makes the OCI spec.
func (s *Server) buildContainer(ctx context.Context, b *sandbox, rec *store.Container, image images.Image, u *undo) (*specs.Spec, error) {
	sb := b.record()
	in := spec.Input{
		ID: rec.ID, SandboxID: b.id, Container: rec.Config, Sandbox: sb.Config, Image: &image.Config, Cgroup: rec.CgroupsPath,
		Namespaces:  spec.Namespaces{Net: sb.Namespaces.Net, IPC: sb.Namespaces.IPC, UTS: sb.Namespaces.UTS, User: sb.Namespaces.User},
		Files:       spec.FilesIn(sb.Dir),
		ImageMounts: map[string]string{},
		CDI:         s.cfg.CDI, SandboxLabel: sb.Label,
		Host: s.cfg.Host, Defaults: s.cfg.Defaults,
	}
	if len(image.Config.Config.Volumes) > 0 {
		in.VolumeDir = s.cfg.Rootfs.VolumeDir(rec.ID)
	}
	var err error
	if in.Namespaces.PID, err = s.pidNamespace(b, rec.Config); err != nil {
		return nil, err
	}
	maps, err := spec.UserNamespace(sb.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions())
	if err != nil {
		return nil, err
	}
	opts := RootfsOptions{ReadOnly: rec.Config.GetLinux().GetSecurityContext().GetReadonlyRootfs() && in.VolumeDir == ""}
	if maps != nil {
		opts.UIDMap, opts.GIDMap, opts.UserNS = maps.UIDs, maps.GIDs, sb.Namespaces.User
	}
	if opts.Label, err = s.mountLabel(sb, rec.Config); err != nil {
		return nil, err
	}
	u.push("unmount root filesystem", func(ctx context.Context) error { return s.cfg.Rootfs.Unmount(ctx, rec.ID) })
	if rec.Rootfs, err = s.cfg.Rootfs.Mount(ctx, rec.ID, rec.ImageID, opts); err != nil {
		return nil, err
	}
	in.Rootfs = rec.Rootfs
	s.phase(ctx, "CreateContainer/rootfs", rec.ID)
	if err := s.mountImageVolumes(ctx, rec, opts, in.ImageMounts); err != nil {
		return nil, err
	}
	if err := spec.Prepare(ctx, in); err != nil {
		return nil, err
	}
	oci, user, err := spec.Container(in)
	if err != nil {
		return nil, err
	}
	if err := spec.Relabel(in, oci); err != nil {
		return nil, err
	}
	rec.User = user.CRI()
	rec.Resources = spec.StatusResources(oci.Linux.Resources, oci.Process.OOMScoreAdj).GetLinux()
	if err := makeLogDir(rec.LogPath); err != nil {
		return nil, err
	}
	s.phase(ctx, "CreateContainer/spec", rec.ID)
	return oci, nil
}

// mountLabel is the SELinux label of the files of a container: the one that
// goes with the process label its spec will have. "" without SELinux, and for
// options without a level, whose categories are drawn when the spec is made.
func (s *Server) mountLabel(sb *store.Sandbox, config *runtimeapi.ContainerConfig) (string, error) {
	if !s.cfg.Host.SELinux {
		return "", nil
	}
	asked := config.GetLinux().GetSecurityContext().GetSelinuxOptions()
	opts, err := spec.SELinuxOptions("linux.security_context.selinux_options", asked)
	if err != nil {
		return "", err
	}
	if len(opts) == 0 {
		opts, err = selinux.DupSecOpt(sb.Label)
	} else if asked.GetLevel() == "" {
		return "", nil
	}
	if err != nil || len(opts) == 0 {
		return "", err
	}
	_, mount, err := label.InitLabels(opts)
	return mount, err
}

func (s *Server) mountImageVolumes(ctx context.Context, rec *store.Container, opts RootfsOptions, into map[string]string) error {
	n := 0
	for i, m := range rec.Config.GetMounts() {
		ref := m.GetImage().GetImage()
		if ref == "" {
			continue
		}
		if !m.GetReadonly() {
			return fmt.Errorf("config.mounts[%d]: image volume of %q: readonly is false, images can only be mounted read-only: %w", i, ref, errdefs.ErrInvalidArgument)
		}
		image, err := s.cfg.Images.Get(ctx, ref)
		if err != nil {
			return fmt.Errorf("config.mounts[%d]: image volume: %w", i, err)
		}
		path, err := s.cfg.Rootfs.MountImage(ctx, rec.ID, n, image.ID, m.GetImageSubPath(), opts)
		if err != nil {
			return fmt.Errorf("config.mounts[%d]: image volume: %w", i, err)
		}
		rec.ImageVolumes = append(rec.ImageVolumes, image.ID)
		into[m.GetContainerPath()] = path
		n++
		s.phase(ctx, "CreateContainer/image-volume", rec.ID)
	}
	return nil
}

// pidNamespace is the path of the PID namespace to join, "" for none.
func (s *Server) pidNamespace(b *sandbox, config *runtimeapi.ContainerConfig) (string, error) {
	opts := config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	switch opts.GetPid() {
	case runtimeapi.NamespaceMode_POD:
		if pid := b.pause(); pid != 0 {
			return fmt.Sprintf("/proc/%d/ns/pid", pid), nil
		}
		return "", fmt.Errorf("the container wants the pod's PID namespace (POD), but the sandbox was made without one: %w", errdefs.ErrInvalidArgument)
	case runtimeapi.NamespaceMode_TARGET:
		target, err := s.findContainer(opts.GetTargetId())
		if err != nil {
			return "", fmt.Errorf("target of the PID namespace: %w", err)
		}
		if target.sb != b {
			return "", fmt.Errorf("target %s of the PID namespace is in another sandbox: %w", target.id, errdefs.ErrInvalidArgument)
		}
		if err := target.needRunning("use the PID namespace of"); err != nil {
			return "", err
		}
		return fmt.Sprintf("/proc/%d/ns/pid", target.record().Started.Pid), nil
	}
	return "", nil
}

// abandonContainer removes a container whose callers have all gone away.
func (s *Server) abandonContainer(c *container) {
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	if err := s.removeContainer(ctx, c); err != nil {
		s.log.Error("an abandoned container could not be removed, will try again", "container", c.id, "err", err)
		s.janitor.add("abandoned container", c.id, func(ctx context.Context) error { return s.removeContainer(ctx, c) })
	}
}
