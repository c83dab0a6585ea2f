//go:build linux

package server

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/moby/sys/capability"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim/join"
)

// onlyLibcontainer says what about an exec package join does not do, "" if
// nothing: all of it is rare.
func onlyLibcontainer(cfg *configs.Config, lp *libcontainer.Process) string {
	zero := func(s string) bool { return strings.IndexByte(s, 0) >= 0 }
	for _, c := range []struct {
		why string
		is  bool
	}{
		{"terminal", lp.ConsoleSocket != nil},
		{"more descriptors", len(lp.ExtraFiles) > 0 || lp.PidfdSocket != nil},
		{"AppArmor profile", lp.AppArmorProfile+cfg.AppArmorProfile != ""},
		{"SELinux label", lp.Label+cfg.ProcessLabel != ""},
		{"scheduler", lp.Scheduler != nil || cfg.Scheduler != nil},
		{"I/O priority", lp.IOPriority != nil || cfg.IOPriority != nil},
		{"CPU affinity", lp.CPUAffinity != nil || cfg.ExecCPUAffinity != nil},
		{"personality", cfg.Personality != nil},
		{"memory policy", cfg.MemoryPolicy != nil},
		{"Intel RDT", cfg.IntelRdt != nil},
		{"rootless", cfg.RootlessEUID || cfg.RootlessCgroups},
		{"parent death signal", cfg.ParentDeathSignal != 0},
		{"no namespaces", len(cfg.Namespaces) == 0},
		{"time namespace", cfg.Namespaces.Contains(configs.NEWTIME)},
		{"zero byte", slices.ContainsFunc(lp.Args, zero) || zero(lp.Cwd)},
	} {
		if c.is {
			return c.why
		}
	}
	return ""
}

// join starts lp in the container without libcontainer. What it does not do, or
// did not manage before anything happened, is join.ErrNotJoined.
func (s *Server) join(c *container, lp *libcontainer.Process, group execGroup) (int, error) {
	if s.cfg.Joiner == nil || s.cannotJoin.Load() {
		return 0, join.ErrNotJoined
	}
	cfg := c.lc.Config()
	if why := onlyLibcontainer(&cfg, lp); why != "" {
		return 0, fmt.Errorf("%w: %s", join.ErrNotJoined, why)
	}
	p, err := joinProcess(&cfg, lp)
	if err != nil {
		return 0, err
	}
	if !cfg.NoNewKeyring {
		p.Keyring = "_ses." + c.id
	}
	if cfg.Seccomp != nil {
		if p.Filter = s.filter(c, cfg.Seccomp); p.Filter == nil {
			return 0, fmt.Errorf("%w: seccomp profile not compiled", join.ErrNotJoined)
		}
	}
	closeNull, err := joinStdio(p, lp)
	if err != nil {
		return 0, err
	}
	defer closeNull()
	to, err := joinContainer(c, &cfg, group)
	if err != nil {
		return 0, err
	}
	pid, err := s.cfg.Joiner.Start(to, p)
	if errors.Is(err, join.ErrNotJoined) {
		// No clone3 into a cgroup, no close_range: it is the kernel's age.
		if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.E2BIG) {
			s.cannotJoin.Store(true)
		}
		s.cfg.Log.Info("exec goes by way of libcontainer", "container", c.id, "err", err)
	}
	return pid, err
}

// joinProcess is libcontainer's newInitConfig: the process' own values before
// the container's.
func joinProcess(cfg *configs.Config, lp *libcontainer.Process) (*join.Process, error) {
	p := &join.Process{
		Args: lp.Args, Env: lp.Env, Cwd: lp.Cwd, UID: uint32(lp.UID), GID: uint32(lp.GID),
		Umask: cfg.Umask, NoNewPrivs: cfg.NoNewPrivileges,
	}
	if lp.NoNewPrivileges != nil {
		p.NoNewPrivs = *lp.NoNewPrivileges
	}
	for _, g := range lp.AdditionalGroups {
		p.Groups = append(p.Groups, uint32(g))
	}
	limits := lp.Rlimits
	if len(limits) == 0 {
		limits = cfg.Rlimits
	}
	for _, r := range limits {
		p.Rlimits = append(p.Rlimits, join.Rlimit{Which: r.Type, Soft: r.Soft, Hard: r.Hard})
	}
	caps := lp.Capabilities
	if caps == nil {
		caps = cfg.Capabilities
	}
	if caps == nil {
		return p, nil
	}
	last, err := capability.LastCap()
	if err != nil {
		return nil, fmt.Errorf("learn the kernel's capabilities: %w", err)
	}
	p.Capabilities = &join.Capabilities{
		Bounding: capMask(caps.Bounding), Effective: capMask(caps.Effective), Permitted: capMask(caps.Permitted),
		Inheritable: capMask(caps.Inheritable), Ambient: capMask(caps.Ambient), Last: int(last),
	}
	return p, nil
}

// capBits are the capabilities that the kernel knows, by their names in a spec.
var capBits = sync.OnceValue(func() map[string]uint64 {
	bits := map[string]uint64{}
	supported, _ := capability.ListSupported()
	for _, c := range supported {
		bits["CAP_"+strings.ToUpper(c.String())] = 1 << c
	}
	return bits
})

// capMask ignores what the kernel does not know, as libcontainer does.
func capMask(names []string) (mask uint64) {
	for _, name := range names {
		mask |= capBits()[name]
	}
	return mask
}

// joinStdio takes lp's files, with /dev/null for those that are not there.
func joinStdio(p *join.Process, lp *libcontainer.Process) (closeNull func(), err error) {
	var null []*os.File
	closeNull = func() {
		for _, f := range null {
			f.Close()
		}
	}
	for i, v := range []any{lp.Stdin, lp.Stdout, lp.Stderr} {
		if f, ok := v.(*os.File); ok {
			p.Stdio[i] = f
			continue
		}
		if v != nil {
			closeNull()
			return nil, fmt.Errorf("%w: stream is a %T", join.ErrNotJoined, v)
		}
		mode := os.O_WRONLY
		if i == 0 {
			mode = os.O_RDONLY
		}
		f, err := os.OpenFile(os.DevNull, mode, 0)
		if err != nil {
			closeNull()
			return nil, err
		}
		null = append(null, f)
		p.Stdio[i] = f
	}
	return closeNull, nil
}

func joinContainer(c *container, cfg *configs.Config, group execGroup) (*join.Container, error) {
	flags := map[configs.NamespaceType]uint64{
		configs.NEWNET: unix.CLONE_NEWNET, configs.NEWPID: unix.CLONE_NEWPID, configs.NEWNS: unix.CLONE_NEWNS,
		configs.NEWUTS: unix.CLONE_NEWUTS, configs.NEWIPC: unix.CLONE_NEWIPC, configs.NEWUSER: unix.CLONE_NEWUSER,
		configs.NEWCGROUP: unix.CLONE_NEWCGROUP,
	}
	to := &join.Container{Pidfd: c.pidfd, Unified: c.facts.CgroupPaths[""]}
	for _, ns := range cfg.Namespaces {
		to.Namespaces |= flags[ns.Type]
	}
	if to.Namespaces&unix.CLONE_NEWUSER != 0 {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(c.facts.Pid) + "/setgroups")
		if err != nil || bytes.HasPrefix(b, []byte("deny")) {
			return nil, fmt.Errorf("%w: user namespace without setgroups", join.ErrNotJoined)
		}
	}
	if cfg.OomScoreAdj != nil {
		to.OOMScore = strconv.Itoa(*cfg.OomScoreAdj)
	}
	if cgroups.IsCgroup2UnifiedMode() {
		return to, nil
	}
	for controller, path := range c.facts.CgroupPaths {
		if controller != "" {
			to.Tasks = append(to.Tasks, filepath.Join(path, group.sub[controller], "tasks"))
		}
	}
	slices.Sort(to.Tasks)
	to.Tasks = slices.Compact(to.Tasks) // controllers that share a hierarchy
	return to, nil
}

// filter is the container's seccomp program, nil while there is none.
func (s *Server) filter(c *container, profile *configs.Seccomp) *join.Filter {
	if f := c.filter.Load(); f != nil || s.cfg.Seccomp == nil {
		return f
	}
	program, flags, ok := s.cfg.Seccomp.Program(profile)
	if !ok {
		return nil
	}
	f := &join.Filter{Program: program, Flags: flags}
	c.filter.Store(f)
	return f
}
