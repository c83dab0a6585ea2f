//go:build linux && cgo

package join

// #include "join.h"
import "C"

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// request is the memory that the joining process maps.
type request struct {
	candidates []string // where the program may be
	head       C.struct_join_request
	tail       []byte
}

func newRequest(c *Container, p *Process) (*request, error) {
	env, home, err := environment(p.Env)
	if err != nil {
		return nil, err
	}
	candidates, search, err := lookPath(p.Args[0], env)
	if err != nil {
		return nil, err
	}
	r := &request{candidates: candidates}
	h := &r.head
	h.namespaces = C.uint64_t(c.Namespaces)
	h.tasks = r.list(c.Tasks, 0)
	if c.OOMScore != "" {
		h.oom_path, h.oom_score, h.oom_len = r.text("/proc/self/oom_score_adj"), r.text(c.OOMScore), C.uint64_t(len(c.OOMScore))
	}
	h.keyring, h.cwd = r.text(p.Keyring), r.text(p.Cwd)
	h.candidates, h.argv, h.envp, h.env_count = r.list(candidates, 0), r.list(p.Args, 0), r.list(env, 1), C.uint64_t(len(env))
	h.uid, h.gid = C.uint32_t(p.UID), C.uint32_t(p.GID)
	var groups []byte
	for _, g := range p.Groups {
		groups = binary.NativeEndian.AppendUint32(groups, g)
	}
	h.groups, h.group_count = r.put(groups), C.uint64_t(len(p.Groups))
	if f := p.Filter; f != nil {
		h.filter, h.filter_count, h.filter_flags = r.put(f.Program), C.uint64_t(len(f.Program)/8), C.uint64_t(f.Flags)
	}
	if p.Umask != nil {
		h.umask = C.uint32_t(*p.Umask)
	}
	if c := p.Capabilities; c != nil {
		h.bounding, h.effective, h.permitted = C.uint64_t(c.Bounding), C.uint64_t(c.Effective), C.uint64_t(c.Permitted)
		h.inheritable, h.ambient, h.last_cap = C.uint64_t(c.Inheritable), C.uint64_t(c.Ambient), C.uint64_t(c.Last)
	}
	for _, f := range []struct {
		set  bool
		flag C.uint64_t
	}{
		{p.Capabilities != nil, C.JOIN_CAPS}, {p.NoNewPrivs, C.JOIN_NO_NEW_PRIVS}, {p.Umask != nil, C.JOIN_UMASK},
		{!home, C.JOIN_HOME}, {search, C.JOIN_SEARCH},
	} {
		if f.set {
			h.flags |= f.flag
		}
	}
	return r, nil
}

// put adds bytes and returns where they will be. They begin at a multiple of 8.
func (r *request) put(b []byte) C.uint64_t {
	at := C.JOIN_AT + C.JOIN_REQUEST + unsafe.Sizeof(r.head) + uintptr(len(r.tail))
	r.tail = append(r.tail, b...)
	for len(r.tail)%8 != 0 {
		r.tail = append(r.tail, 0)
	}
	return C.uint64_t(at)
}

// text adds a C string; that of "" is at 0.
func (r *request) text(s string) C.uint64_t {
	if s == "" {
		return 0
	}
	return r.put(append([]byte(s), 0))
}

// list adds an array of pointers to strings, with room for some more, and the
// zero that closes it.
func (r *request) list(all []string, more int) C.uint64_t {
	var pointers []byte
	for _, s := range all {
		pointers = binary.NativeEndian.AppendUint64(pointers, uint64(r.put(append([]byte(s), 0))))
	}
	return r.put(append(pointers, make([]byte, 8*(more+1))...))
}

// file returns the request as a file in memory.
func (r *request) file() (*os.File, error) {
	fd, err := unix.MemfdCreate("nodeagent-join-request", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "nodeagent-join-request")
	head := unsafe.Slice((*byte)(unsafe.Pointer(&r.head)), int(unsafe.Sizeof(r.head)))
	if _, err := f.WriteAt(append(slices.Clip(head), r.tail...), C.JOIN_REQUEST); err != nil {
		f.Close()
		return nil, fmt.Errorf("write request: %w", err)
	}
	return f, nil
}

// environment is libcontainer's prepareEnv: of each name the last value, and
// errors for what is no variable. Without HOME, home is false.
func environment(env []string) (out []string, home bool, err error) {
	seen := make(map[string]bool, len(env))
	for _, kv := range slices.Backward(env) {
		key, value, ok := strings.Cut(kv, "=")
		switch {
		case !ok:
			return nil, false, errors.New("invalid environment variable: missing '='")
		case key == "":
			return nil, false, errors.New("invalid environment variable: name cannot be empty")
		case seen[key]:
			continue
		}
		seen[key] = true
		if strings.IndexByte(kv, 0) >= 0 {
			return nil, false, fmt.Errorf("invalid environment variable %q: contains nul byte (\\x00)", key)
		}
		if key == "HOME" {
			if value == "" {
				continue
			}
			home = true
		}
		out = append(out, kv)
	}
	slices.Reverse(out)
	return out, home, nil
}

// lookPath returns where exec.LookPath would look for the program, in the
// container and with its environment.
func lookPath(name string, env []string) (candidates []string, search bool, err error) {
	if strings.Contains(name, "/") {
		return []string{name}, false, nil
	}
	if name == "" || name == "." || name == ".." {
		return nil, false, &exec.Error{Name: name, Err: exec.ErrNotFound}
	}
	for _, kv := range env {
		path, ok := strings.CutPrefix(kv, "PATH=")
		if !ok {
			continue
		}
		for _, dir := range filepath.SplitList(path) {
			if dir == "" {
				dir = "."
			}
			candidates = append(candidates, filepath.Join(dir, name))
		}
	}
	return candidates, true, nil
}

// explain makes libcontainer's error of a message; those of steps before the
// second process are ErrNotJoined.
func explain(p *Process, m *C.struct_join_message) error {
	errno := unix.Errno(m.err)
	lookup := func(err error) error { return &exec.Error{Name: p.Args[0], Err: err} }
	stdio := func(op string) error {
		name := []string{"/dev/stdin", "/dev/stdout", "/dev/stderr"}[m.what%3]
		return fmt.Errorf("unable to setup user: %w", &os.PathError{Op: op, Path: name, Err: errno})
	}
	unmapped := func(what string, id uint32) error {
		if errno == unix.EINVAL {
			return fmt.Errorf("unable to setup user: cannot set%s to unmapped %s %d in user namespace", what, what, id)
		}
		return fmt.Errorf("unable to setup user: %w", errno)
	}
	switch m.step {
	case C.JOIN_START:
		return fmt.Errorf("%w: make ready to join: %w", ErrNotJoined, errno)
	case C.JOIN_OOM:
		return fmt.Errorf("%w: set oom_score_adj: %w", ErrNotJoined, errno)
	case C.JOIN_CGROUP:
		return fmt.Errorf("%w: enter cgroups: %w", ErrNotJoined, errno)
	case C.JOIN_SETNS:
		return fmt.Errorf("%w: enter namespaces: %w", ErrNotJoined, errno)
	case C.JOIN_FORK:
		return fmt.Errorf("%w: fork: %w", ErrNotJoined, errno)
	case C.JOIN_SESSION:
		return fmt.Errorf("setsid failed: %w", errno)
	case C.JOIN_KEYRING:
		return fmt.Errorf("unable to join session keyring: unable to create session key: %w", errno)
	case C.JOIN_PRIVS:
		return fmt.Errorf("set no_new_privs: %w", errno)
	case C.JOIN_SECCOMP:
		return fmt.Errorf("unable to init seccomp: error loading seccomp filter into kernel: error loading seccomp filter: %w", errno)
	case C.JOIN_CHDIR:
		return fmt.Errorf("chdir to cwd (%q) set in config.json failed: %w", p.Cwd, errno)
	case C.JOIN_BOUNDING:
		return fmt.Errorf("unable to apply bounding set: %w", errno)
	case C.JOIN_KEEP_CAPS:
		return fmt.Errorf("unable to set or clear keep caps: %w", errno)
	case C.JOIN_STDIO_STAT:
		return stdio("fstat")
	case C.JOIN_STDIO_CHOWN:
		return stdio("chown")
	case C.JOIN_SETGROUPS:
		return fmt.Errorf("unable to setup user: %w", os.NewSyscallError("setgroups", errno))
	case C.JOIN_SETGID:
		return unmapped("gid", p.GID)
	case C.JOIN_SETUID:
		return unmapped("uid", p.UID)
	case C.JOIN_GETCWD:
		if errno == unix.ENOENT {
			return errors.New("current working directory is outside of container mount namespace root -- possible container breakout detected")
		}
		return fmt.Errorf("failed to verify if current working directory is safe: getwd: %w", errno)
	case C.JOIN_CAPSET:
		return fmt.Errorf("unable to apply caps: can't apply capabilities: %w", errno)
	case C.JOIN_STAT:
		return lookup(&os.PathError{Op: "stat", Path: p.Args[0], Err: errno})
	case C.JOIN_ACCESS:
		return lookup(errno)
	case C.JOIN_NOT_FOUND:
		return lookup(exec.ErrNotFound)
	case C.JOIN_RELATIVE:
		return lookup(exec.ErrDot)
	}
	return fmt.Errorf("unknown step %d: %w", m.step, errno)
}
