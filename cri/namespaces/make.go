package namespaces

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// kind is a namespace's name below /proc/<pid>/ns.
type kind string

const (
	kindNet  kind = "net"
	kindIPC  kind = "ipc"
	kindUTS  kind = "uts"
	kindUser kind = "user"
)

// kinds in the order in which they are pinned: user last, so that a set cut
// short by a crash misses it.
func kinds() []kind { return []kind{kindNet, kindIPC, kindUTS, kindUser} }

func (k kind) flag() int {
	switch k {
	case kindNet:
		return unix.CLONE_NEWNET
	case kindIPC:
		return unix.CLONE_NEWIPC
	case kindUTS:
		return unix.CLONE_NEWUTS
	default:
		return unix.CLONE_NEWUSER
	}
}

func (w Want) kinds() (out []kind, flags int) {
	for k, want := range map[kind]bool{kindNet: w.Net, kindIPC: w.IPC, kindUTS: w.UTS, kindUser: w.User} {
		if want {
			out = append(out, k)
			flags |= k.flag()
		}
	}
	return out, flags
}

// onThread runs fn on an OS thread that is thrown away afterwards, so fn may
// change what belongs to a thread (namespaces, root, cwd) and leave it so. It
// is never the main thread: Go cannot end that one, and /proc/<pid>/ns shows
// its namespaces as the process's.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// Hold the main thread while another one does it.
			done <- onThread(fn)
			runtime.UnlockOSThread()
			return
		}
		done <- fn()
		// Not unlocked: the thread ends with this goroutine.
	}()
	return <-done
}

// makeNamespaces returns open descriptors of new namespaces.
func makeNamespaces(w Want) (map[kind]*os.File, error) {
	if w.User {
		return makeInUserNamespace(w)
	}
	want, flags := w.kinds()
	var files map[kind]*os.File
	err := onThread(func() error {
		if err := unix.Unshare(flags); err != nil {
			return fmt.Errorf("unshare %v: %w", want, resource(err))
		}
		var err error
		files, err = openNamespaces("/proc/thread-self/ns", want)
		return err
	})
	return files, err
}

// resource gives the limits of the kernel (user.max_*_namespaces, memory) the
// class that says so.
func resource(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EUSERS) || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	return err
}

func openNamespaces(dir string, want []kind) (map[kind]*os.File, error) {
	files := map[kind]*os.File{}
	for _, k := range want {
		f, err := openNS(filepath.Join(dir, string(k)))
		if err != nil {
			closeFiles(files)
			return nil, err
		}
		files[k] = f
	}
	return files, nil
}

// openNS does not go through os.OpenFile, which would try to poll the file.
func openNS(path string) (*os.File, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// makeInUserNamespace makes a user namespace with w's mappings, and the others
// inside it so that it owns them. A thread of a Go program cannot enter a new
// user namespace, so a child does: it is traced and stopped before its first
// instruction, and killed once its namespaces are open.
// Source: containerd pkg/sys/unshare_linux.go.
func makeInUserNamespace(w Want) (map[kind]*os.File, error) {
	want, flags := w.kinds()
	var files map[kind]*os.File
	err := onThread(func() error {
		pidfd := -1
		proc, err := os.StartProcess("/proc/self/exe", []string{"nodeagent-namespaces"}, &os.ProcAttr{
			Sys: &syscall.SysProcAttr{
				Cloneflags:                 uintptr(flags),
				UidMappings:                goMappings(w.UIDMap),
				GidMappings:                goMappings(w.GIDMap),
				GidMappingsEnableSetgroups: true,
				Ptrace:                     true,
				Pdeathsig:                  syscall.SIGKILL,
				PidFD:                      &pidfd,
			},
		})
		if err != nil {
			return fmt.Errorf("start a process in new namespaces %v: %w", want, resource(err))
		}
		if pidfd >= 0 {
			defer unix.Close(pidfd)
		}
		defer func() {
			_ = proc.Kill()
			_, _ = proc.Wait()
		}()
		files, err = openNamespaces(fmt.Sprintf("/proc/%d/ns", proc.Pid), want)
		if err != nil || pidfd < 0 {
			return err
		}
		// Still the same process, so what was opened is its own.
		if err := unix.PidfdSendSignal(pidfd, 0, nil, 0); err != nil {
			closeFiles(files)
			return fmt.Errorf("process in new namespaces %v ended early: %w", want, err)
		}
		return nil
	})
	return files, err
}

func goMappings(in []specs.LinuxIDMapping) (out []syscall.SysProcIDMap) {
	for _, m := range in {
		out = append(out, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
	}
	return out
}

// configure sets hostname and sysctls from a thread inside the set.
func (h *held) configure(w Want) error {
	hostname := w.Hostname != "" && h.files[kindUTS] != nil
	if !hostname && len(w.Sysctls) == 0 {
		return nil
	}
	return onThread(func() error {
		if hostname {
			if err := enter(h.files, kindUTS); err != nil {
				return err
			}
			if err := unix.Sethostname([]byte(w.Hostname)); err != nil {
				return fmt.Errorf("set hostname %q: %w", w.Hostname, err)
			}
		}
		if len(w.Sysctls) == 0 {
			return nil
		}
		for _, k := range []kind{kindIPC, kindNet} {
			if err := enter(h.files, k); err != nil {
				return err
			}
		}
		return writeSysctls(w)
	})
}

// writeSysctls runs on a thread inside the set, which it leaves without
// privileges when the set has a user namespace: sysctls of an IPC namespace are
// writable for the root of its user namespace alone, not for ours (ipc/
// ipc_sysctl.c, ipc_permissions).
func writeSysctls(w Want) error {
	isIPC := func(key string) bool { return !strings.HasPrefix(key, "net.") }
	for _, ipc := range []bool{false, true} {
		if ipc && w.User {
			if err := becomeRootOf(w.UIDMap); err != nil {
				return err
			}
		}
		for key, val := range w.Sysctls {
			if isIPC(key) != ipc {
				continue
			}
			if err := writeSysctl(key, val); err != nil {
				return err
			}
		}
	}
	return nil
}

// becomeRootOf makes this thread, and no other, the user that is root in a user
// namespace with the given mappings.
func becomeRootOf(uids []specs.LinuxIDMapping) error {
	for _, m := range uids {
		if m.ContainerID != 0 {
			continue
		}
		keep := ^uintptr(0)
		// Not unix.Setresuid: Go's changes all threads.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(m.HostID), keep); errno != 0 {
			return fmt.Errorf("become user %d for sysctls: %w", m.HostID, errno)
		}
		return nil
	}
	return fmt.Errorf("set sysctls: the mappings have no root: %w", errdefs.ErrInvalidArgument)
}

func enter(files map[kind]*os.File, k kind) error {
	f := files[k]
	if f == nil {
		return nil
	}
	if err := unix.Setns(int(f.Fd()), k.flag()); err != nil {
		return fmt.Errorf("enter %s namespace: %w", k, err)
	}
	return nil
}

// writeSysctl: below /proc/sys the kernel shows each thread its own namespaces.
// A '/' in key is a dot of a name (net.ipv4.conf.eno2/100.rp_filter).
func writeSysctl(key, val string) error {
	rel := strings.NewReplacer(".", "/", "/", ".").Replace(key)
	path := filepath.Join("/proc/sys", rel)
	if !strings.HasPrefix(path, "/proc/sys/") {
		return fmt.Errorf("sysctl %q: not a name: %w", key, errdefs.ErrInvalidArgument)
	}
	err := os.WriteFile(path, []byte(val), 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ERANGE) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("set sysctl %s to %q: %w: %w", key, val, err, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("set sysctl %s to %q: %w", key, val, err)
	}
	return nil
}
