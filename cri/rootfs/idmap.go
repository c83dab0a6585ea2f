package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// hostID is the id on the host for id of the image, -1 if it has none.
func hostID(maps []specs.LinuxIDMapping, id uint32) int {
	if len(maps) == 0 {
		return int(id)
	}
	for _, m := range maps {
		if id >= m.ContainerID && id-m.ContainerID < m.Size {
			return int(m.HostID + id - m.ContainerID)
		}
	}
	return -1
}

// IDMap shifts the owners of files for a user namespace. The zero value leaves
// them alone.
type IDMap struct {
	UIDMap, GIDMap []specs.LinuxIDMapping
	// UserNS is the path of a user namespace with just these maps, if there is
	// one; without it a short-lived process makes one.
	UserNS string
}

// mapped returns paths of the layers under which their owners are shifted, and
// what to call when the overlay is mounted. The layers are mounted at the new
// directory at meanwhile, which must be below the state directory: nothing
// there is ever deleted as a tree. The overlay keeps its own copy of the
// idmapped mount, so that this one can go at once.
func (m *Mounter) mapped(at string, lower []string, ids IDMap) ([]string, func(), error) {
	if len(ids.UIDMap) == 0 && len(ids.GIDMap) == 0 {
		return lower, func() {}, nil
	}
	if !kernelAtLeast(5, 19) {
		return nil, nil, fmt.Errorf("root filesystem for a user namespace: overlayfs takes idmapped layers from kernel 5.19 on: %w", errdefs.ErrNotImplemented)
	}
	ns, err := userNamespace(ids)
	if err != nil {
		return nil, nil, fmt.Errorf("user namespace for idmapped layers: %w", err)
	}
	defer ns.Close()
	base := commonDir(lower)
	tree, err := idmappedTree(base, int(ns.Fd()))
	if err != nil {
		return nil, nil, err
	}
	defer unix.Close(tree)
	if err := os.Mkdir(at, 0o700); err != nil {
		return nil, nil, err
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return nil, nil, fmt.Errorf("attach idmapped layers to %q: %w", at, err)
	}
	out := make([]string, len(lower))
	for i, dir := range lower {
		out[i] = filepath.Join(at, strings.TrimPrefix(dir, base))
	}
	return out, func() {
		if err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			m.log.Error("cannot detach idmapped layers", "path", at, "err", err)
			return
		}
		_ = os.Remove(at)
	}, nil
}

// idmappedTree makes a detached copy of the mount at dir whose owners are
// shifted by the user namespace, read-only.
func idmappedTree(dir string, userns int) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open tree of %q: %w", dir, err)
	}
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{
		Attr_set: unix.MOUNT_ATTR_IDMAP | unix.MOUNT_ATTR_RDONLY, Userns_fd: uint64(userns),
		// Private, so that the copy does not show up in other namespaces.
		Propagation: unix.MS_PRIVATE,
	})
	if err != nil {
		unix.Close(fd)
		class := err
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
			class = fmt.Errorf("%w: the filesystem does not allow idmapped mounts: %w", err, errdefs.ErrNotImplemented)
		}
		return -1, fmt.Errorf("shift owners of %q: %w", dir, class)
	}
	return fd, nil
}

// commonDir is the deepest directory that holds all dirs (properly: it is none
// of them, so that a relative path is left for each).
func commonDir(dirs []string) string {
	common := filepath.Dir(filepath.Clean(dirs[0]))
	for _, d := range dirs[1:] {
		for common != "/" && !strings.HasPrefix(filepath.Clean(d), common+"/") {
			common = filepath.Dir(common)
		}
	}
	return common
}

// userNamespace opens the namespace that is named or makes one.
func userNamespace(ids IDMap) (*os.File, error) {
	if ids.UserNS != "" {
		return os.Open(ids.UserNS)
	}
	return makeUserNamespace(ids.UIDMap, ids.GIDMap)
}

// makeUserNamespace starts a process in a new user namespace, stopped before
// its first instruction (ptrace), opens the namespace, and kills the process.
func makeUserNamespace(uids, gids []specs.LinuxIDMapping) (*os.File, error) {
	runtime.LockOSThread() // the thread is the tracer
	defer runtime.UnlockOSThread()
	conv := func(in []specs.LinuxIDMapping) []syscall.SysProcIDMap {
		var out []syscall.SysProcIDMap
		for _, m := range in {
			out = append(out, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
		}
		return out
	}
	proc, err := os.StartProcess("/proc/self/exe", []string{"nodeagent-userns"}, &os.ProcAttr{
		Sys: &syscall.SysProcAttr{
			Cloneflags:                 unix.CLONE_NEWUSER,
			UidMappings:                conv(uids),
			GidMappings:                conv(gids),
			GidMappingsEnableSetgroups: true,
			Ptrace:                     true,
			Pdeathsig:                  syscall.SIGKILL,
		},
	})
	if err != nil {
		return nil, fmt.Errorf("start process in a new user namespace: %w", err)
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", proc.Pid))
	_ = proc.Kill()
	_, waitErr := proc.Wait()
	if err != nil {
		return nil, err
	}
	if waitErr != nil {
		ns.Close()
		return nil, waitErr
	}
	return ns, nil
}

// kernelAtLeast compares the running kernel's version.
func kernelAtLeast(major, minor int) bool {
	v := kernelVersion()
	return slices.Compare(v[:], []int{major, minor}) >= 0
}

var kernelVersion = sync.OnceValue(func() [2]int {
	var u unix.Utsname
	var v [2]int
	if unix.Uname(&u) == nil {
		_, _ = fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &v[0], &v[1])
	}
	return v
})
