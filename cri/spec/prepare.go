package spec

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path"

	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux/label"
	"golang.org/x/sys/unix"
)

// Prepare does on the host what the spec takes for granted; call it before
// [Container], with the rootfs mounted. It creates host paths of mounts that
// do not exist yet as directories (mode 0755, as containerd does and kubelet
// relies on), fills the anonymous volumes of the image below VolumeDir, and
// gives the pod's files to the root of the pod's user namespace. It may be
// repeated. The caller removes VolumeDir with the container; host
// paths stay, they belong to the user.
//
// Errors: those of the file system, with the path.
func Prepare(ctx context.Context, in Input) error {
	for i, m := range in.Container.GetMounts() {
		host := m.GetHostPath()
		if m.GetImage().GetImage() != "" || !path.IsAbs(host) || hasNUL(host) {
			continue // Container refuses what is wrong
		}
		if err := createHostPath(host); err != nil {
			return fmt.Errorf("create mounts[%d].host_path %q: %w", i, host, err)
		}
	}
	for _, f := range []string{in.Files.Hostname, in.Files.ResolvConf} {
		if err := ownByPod(in, f); err != nil && !errors.Is(err, iofs.ErrNotExist) {
			return fmt.Errorf("give %q to the container's root: %w", f, err)
		}
	}
	for _, v := range imageVolumes(in) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := fillVolume(in, v); err != nil {
			return fmt.Errorf("create volume for %q of the image: %w", v.dst, err)
		}
	}
	return nil
}

func createHostPath(host string) error {
	_, err := os.Stat(host)
	if !errors.Is(err, iofs.ErrNotExist) {
		return err
	}
	err = os.MkdirAll(host, 0o755)
	if errors.Is(err, iofs.ErrExist) {
		// A link to nowhere: its target is the user's business.
		return fmt.Errorf("it is a link whose target does not exist: %w", errdefs.ErrInvalidArgument)
	}
	return err
}

// fillVolume copies what the image has at the place of the volume, owners and
// modes included. With a user namespace the rootfs shows the mapped owners
// already, so the copy needs no idmap.
func fillVolume(in Input, v imageVolume) error {
	if _, err := os.Stat(v.src); err == nil {
		return nil
	}
	from, err := fs.RootPath(in.Rootfs, v.dst)
	if err != nil {
		return err
	}
	// Copied aside and renamed: a volume that exists is complete.
	tmp := v.src + ".tmp"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return err
	}
	st, err := os.Stat(from)
	switch {
	case errors.Is(err, iofs.ErrNotExist):
		err = ownByPod(in, tmp)
	case err == nil && st.IsDir():
		err = fs.CopyDir(tmp, from, fs.WithXAttrExclude("security.selinux"))
	}
	if err != nil {
		return err
	}
	return os.Rename(tmp, v.src)
}

// ownByPod gives path to the root of the pod's user namespace, if it has one.
func ownByPod(in Input, path string) error {
	maps, err := UserNamespace(in.Sandbox.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions())
	if err != nil || maps == nil || path == "" {
		return err
	}
	return os.Lchown(path, int(maps.UIDs[0].HostID), int(maps.GIDs[0].HostID))
}

// Relabel gives the container's SELinux label to the host paths of mounts with
// selinux_relabel, and to the pod's own files. Call it after [Container]; it
// does nothing on a host without SELinux.
func Relabel(in Input, s *specs.Spec) error {
	l := s.Linux.MountLabel
	if l == "" {
		return nil
	}
	paths := []string{in.Files.Hostname, in.Files.ResolvConf}
	if in.Namespaces.IPC != "" {
		paths = append(paths, in.Files.Shm)
	}
	for _, m := range in.Container.GetMounts() {
		if m.GetSelinuxRelabel() && m.GetHostPath() != "" {
			paths = append(paths, m.GetHostPath())
		}
	}
	for _, v := range imageVolumes(in) {
		paths = append(paths, v.src)
	}
	for _, p := range paths {
		if p == "" {
			continue
		}
		// Shared between the containers of a pod, as all of it is.
		if err := label.Relabel(p, l, false); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("relabel %q with %q: %w", p, l, err)
		}
	}
	return nil
}
