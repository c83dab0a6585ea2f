//go:build linux

package server

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/nodeagent/nodeagent/shim/api"
)

// profiles shares the seccomp profiles of containers: nearly all have the same,
// it is the largest part of a container's configuration, and libcontainer only
// reads it.
type profiles struct {
	mu sync.Mutex
	m  map[[sha256.Size]byte]*configs.Seccomp
}

func (p *profiles) get(text []byte) (*configs.Seccomp, error) {
	if len(text) == 0 {
		return nil, nil
	}
	key := sha256.Sum256(text)
	p.mu.Lock()
	defer p.mu.Unlock()
	if c, ok := p.m[key]; ok {
		return c, nil
	}
	var spec specs.LinuxSeccomp
	if err := json.Unmarshal(text, &spec); err != nil {
		return nil, fmt.Errorf("decode seccomp profile: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	c, err := specconv.SetupSeccomp(&spec)
	if err != nil {
		return nil, fmt.Errorf("seccomp profile: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if p.m == nil || len(p.m) >= 32 {
		p.m = map[[sha256.Size]byte]*configs.Seccomp{}
	}
	p.m[key] = c
	return c, nil
}

// useSeccomp makes known that processes will start with a profile.
func (s *Server) useSeccomp(p *configs.Seccomp) {
	if p != nil && s.cfg.Seccomp != nil {
		s.cfg.Seccomp.Want(p)
	}
}

// A container's scope is stopped by systemd only when the host goes down. A
// first process without a handler ignores SIGTERM, and the default patience of
// 90 s would then be every reboot's. The form is libcontainer's, in microseconds.
const (
	stopTimeout   = "org.systemd.property.TimeoutStopUSec"
	scopePatience = "uint64 10000000"
)

// config turns a request into libcontainer's configuration and its process.
func (s *Server) config(req *api.StartRequest) (*configs.Config, *specs.Process, error) {
	var spec specs.Spec
	if err := json.Unmarshal(req.Oci, &spec); err != nil {
		return nil, nil, fmt.Errorf("decode runtime spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if spec.Process == nil || len(spec.Process.Args) == 0 || spec.Root == nil || spec.Linux == nil {
		return nil, nil, fmt.Errorf("runtime spec lacks process, root or linux: %w", errdefs.ErrInvalidArgument)
	}
	s.limits.clamp(spec.Process)
	text := req.Seccomp
	if spec.Linux.Seccomp != nil {
		text, _ = json.Marshal(spec.Linux.Seccomp)
		spec.Linux.Seccomp = nil
	}
	profile, err := s.profiles.get(text)
	if err != nil {
		return nil, nil, err
	}
	s.useSeccomp(profile)
	if req.SystemdCgroup {
		if spec.Annotations == nil {
			spec.Annotations = map[string]string{}
		}
		spec.Annotations[stopTimeout] = scopePatience
	}
	cfg, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{
		CgroupName:       req.Id,
		UseSystemdCgroup: req.SystemdCgroup,
		Spec:             &spec,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("runtime spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	cfg.Seccomp = profile
	spec.Process.Terminal = req.Terminal
	return cfg, spec.Process, nil
}

// process turns the process of a runtime spec into libcontainer's.
func process(p *specs.Process) (*libcontainer.Process, error) {
	lp := &libcontainer.Process{
		Args:            p.Args,
		Env:             p.Env,
		UID:             int(p.User.UID),
		GID:             int(p.User.GID),
		Cwd:             p.Cwd,
		Label:           p.SelinuxLabel,
		NoNewPrivileges: &p.NoNewPrivileges,
		AppArmorProfile: p.ApparmorProfile,
		Scheduler:       p.Scheduler,
		IOPriority:      p.IOPriority,
		LogLevel:        "3", // warnings
	}
	if p.ConsoleSize != nil {
		lp.ConsoleWidth = uint16(p.ConsoleSize.Width)
		lp.ConsoleHeight = uint16(p.ConsoleSize.Height)
	}
	if c := p.Capabilities; c != nil {
		lp.Capabilities = &configs.Capabilities{
			Bounding: c.Bounding, Effective: c.Effective, Inheritable: c.Inheritable,
			Permitted: c.Permitted, Ambient: c.Ambient,
		}
	}
	for _, g := range p.User.AdditionalGids {
		lp.AdditionalGroups = append(lp.AdditionalGroups, int(g))
	}
	for _, r := range p.Rlimits {
		which, ok := rlimits[r.Type]
		if !ok {
			return nil, fmt.Errorf("rlimit %q: %w", r.Type, errdefs.ErrInvalidArgument)
		}
		lp.Rlimits = append(lp.Rlimits, configs.Rlimit{Type: which, Hard: r.Hard, Soft: r.Soft})
	}
	affinity, err := configs.ConvertCPUAffinity(p.ExecCPUAffinity)
	if err != nil {
		return nil, fmt.Errorf("CPU affinity: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	lp.CPUAffinity = affinity
	return lp, nil
}
