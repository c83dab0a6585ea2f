package spec

import (
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/opencontainers/runtime-spec/specs-go"
)

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func (b *builder) process() error {
	p := b.spec.Process
	args, err := Args(b.in.Container.GetCommand(), b.in.Container.GetArgs(), b.image.Entrypoint, b.image.Cmd)
	if err != nil {
		return err
	}
	p.Args = args
	p.Terminal = b.in.Container.GetTty()
	if p.Env, err = b.env(); err != nil {
		return err
	}
	p.Cwd, err = workingDir(b.in.Container.GetWorkingDir(), b.image.WorkingDir)
	return err
}

// Args combines command and args of the CRI with entrypoint and cmd of the
// image: a command replaces both of the image's, args alone replace cmd.
//
// Errors: InvalidArgument when nothing is left to run, or for a NUL byte.
// Source: moby daemon/commit.go, containerd internal/cri/opts WithProcessArgs.
func Args(command, args, entrypoint, cmd []string) ([]string, error) {
	if len(command) == 0 {
		if len(args) == 0 {
			args = cmd
		}
		// Docker writes [""] for an entrypoint that was reset.
		if command == nil && !(len(entrypoint) == 1 && entrypoint[0] == "") {
			command = entrypoint
		}
	}
	all := append(slices.Clone(command), args...)
	if len(all) == 0 {
		return nil, invalid("command", "", "a command or args, or an image with an entrypoint or cmd")
	}
	return all, checkArgs("command", all)
}

// checkArgs refuses what cannot be an argument of execve, or would not arrive
// unchanged: libcontainer hands arguments to its init as JSON, which replaces
// bytes that are not UTF-8.
func checkArgs(field string, args []string) error {
	for _, a := range args {
		if hasNUL(a) {
			return invalid(field, a, "text without NUL bytes")
		}
		if !utf8.ValidString(a) {
			return invalid(field, a, "valid UTF-8")
		}
	}
	return nil
}

// env: default PATH, TERM, HOSTNAME, the image's variables, the container's;
// a later one replaces an earlier one in its place.
func (b *builder) env() ([]string, error) {
	e := environment{index: map[string]int{}}
	e.set(defaultPath)
	if b.in.Container.GetTty() {
		e.set("TERM=xterm")
	}
	host := b.in.Sandbox.GetHostname()
	if host == "" {
		host = b.in.Host.Hostname
	}
	e.set("HOSTNAME=" + host)
	for _, kv := range b.image.Env {
		// An image may hold a bare name: nothing to set.
		if k, _, ok := strings.Cut(kv, "="); ok && k != "" {
			e.set(kv)
		}
	}
	for _, kv := range b.in.Container.GetEnvs() {
		k := kv.GetKey()
		if k == "" || strings.ContainsAny(k, "=\x00") {
			return nil, invalid("envs.key", k, "a name without '=' and NUL bytes")
		}
		e.set(k + "=" + string(kv.GetValue()))
	}
	return e.vars, checkArgs("envs.value", e.vars)
}

type environment struct {
	vars  []string
	index map[string]int
}

func (e *environment) set(kv string) {
	k, _, _ := strings.Cut(kv, "=")
	if i, ok := e.index[k]; ok {
		e.vars[i] = kv
		return
	}
	e.index[k] = len(e.vars)
	e.vars = append(e.vars, kv)
}

// workingDir is created by libcontainer when it is missing in the rootfs.
func workingDir(config, image string) (string, error) {
	dir := config
	if dir == "" {
		dir = image
	}
	if dir == "" {
		return "/", nil
	}
	if hasNUL(dir) {
		return "", invalid("working_dir", dir, "a path without NUL bytes")
	}
	// Docker takes a relative WORKDIR as relative to the root.
	return filepath.Join("/", dir), nil
}

func (b *builder) noNewPrivileges() error {
	b.spec.Process.NoNewPrivileges = b.sc.GetNoNewPrivs()
	return nil
}

// Exec returns the process of an exec in a container that was made from c: the
// container's identity, capabilities and environment with another command.
func Exec(c *specs.Spec, cmd []string, tty bool) *specs.Process {
	p := *c.Process
	p.Args = slices.Clone(cmd)
	p.Env = slices.Clone(p.Env)
	p.Terminal = tty
	p.ConsoleSize = nil
	p.CommandLine = ""
	if tty && !slices.ContainsFunc(p.Env, func(kv string) bool { return strings.HasPrefix(kv, "TERM=") }) {
		p.Env = append(p.Env, "TERM=xterm")
	}
	return &p
}

// CheckExec says whether cmd can be run by an exec.
//
// Errors: InvalidArgument.
func CheckExec(cmd []string) error {
	if len(cmd) == 0 || cmd[0] == "" {
		return invalid("cmd", "", "a command")
	}
	return checkArgs("cmd", cmd)
}
