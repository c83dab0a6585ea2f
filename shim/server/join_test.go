//go:build linux

package server

import (
	"os"
	"testing"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestOnlyLibcontainer(t *testing.T) {
	for want, change := range map[string]func(*configs.Config, *libcontainer.Process){
		"":                 func(*configs.Config, *libcontainer.Process) {},
		"terminal":         func(_ *configs.Config, p *libcontainer.Process) { p.ConsoleSocket = os.Stdin },
		"more descriptors": func(_ *configs.Config, p *libcontainer.Process) { p.ExtraFiles = []*os.File{os.Stdin} },
		"AppArmor profile": func(c *configs.Config, _ *libcontainer.Process) { c.AppArmorProfile = "p" },
		"SELinux label":    func(_ *configs.Config, p *libcontainer.Process) { p.Label = "l" },
		"scheduler":        func(c *configs.Config, _ *libcontainer.Process) { c.Scheduler = &configs.Scheduler{} },
		"I/O priority":     func(_ *configs.Config, p *libcontainer.Process) { p.IOPriority = &specs.LinuxIOPriority{} },
		"CPU affinity":     func(c *configs.Config, _ *libcontainer.Process) { c.ExecCPUAffinity = &configs.CPUAffinity{} },
		"personality":      func(c *configs.Config, _ *libcontainer.Process) { c.Personality = &configs.LinuxPersonality{} },
		"memory policy":    func(c *configs.Config, _ *libcontainer.Process) { c.MemoryPolicy = &configs.LinuxMemoryPolicy{} },
		"Intel RDT":        func(c *configs.Config, _ *libcontainer.Process) { c.IntelRdt = &configs.IntelRdt{} },
		"rootless":         func(c *configs.Config, _ *libcontainer.Process) { c.RootlessEUID = true },
		"no namespaces":    func(c *configs.Config, _ *libcontainer.Process) { c.Namespaces = nil },
		"time namespace":   func(c *configs.Config, _ *libcontainer.Process) { c.Namespaces.Add(configs.NEWTIME, "") },
		"zero byte":        func(_ *configs.Config, p *libcontainer.Process) { p.Args = append(p.Args, "a\x00b") },
	} {
		cfg := &configs.Config{Namespaces: configs.Namespaces{{Type: configs.NEWNS}}}
		lp := &libcontainer.Process{Args: []string{"true"}, Cwd: "/"}
		change(cfg, lp)
		if got := onlyLibcontainer(cfg, lp); got != want {
			t.Errorf("%q: %q", want, got)
		}
	}
}

func TestCapMask(t *testing.T) {
	if got, want := capMask([]string{"CAP_CHOWN", "CAP_NOTHING", "CAP_SYSLOG"}), uint64(1<<unix.CAP_CHOWN|1<<unix.CAP_SYSLOG); got != want {
		t.Errorf("%x, want %x", got, want)
	}
}
