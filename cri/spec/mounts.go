package spec

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"
)

// systemMounts are in every container. /dev/shm, /sys/fs/cgroup and the pod's
// files come on top.
// Source: containerd pkg/oci/mounts.go, without /run.
func systemMounts() []specs.Mount {
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
	}
}

const hostShm = "/dev/shm"

// mounts are the system's, then the pod's files, image volumes and what the
// config asks for, ordered so that a mount never hides a deeper one. A mount of
// the config replaces one of ours at the same place, and a mount on /dev
// replaces everything of ours below it.
func (b *builder) mounts() error {
	config, err := b.configMounts()
	if err != nil {
		return err
	}
	taken := map[string]bool{}
	for _, m := range config {
		taken[path.Clean(m.Destination)] = true
	}
	ours := func(m specs.Mount) bool {
		dst := path.Clean(m.Destination)
		return !taken[dst] && !(taken["/dev"] && strings.HasPrefix(dst, "/dev/"))
	}
	for _, m := range append(systemMounts(), b.cgroupMount()) {
		if m.Destination == "/sys" {
			m = b.sysMount(m)
		}
		if ours(m) {
			b.spec.Mounts = append(b.spec.Mounts, m)
		}
	}
	for _, m := range append(b.podFiles(), b.volumeMounts()...) {
		if ours(m) {
			config = append(config, m)
		}
	}
	slices.SortStableFunc(config, func(x, y specs.Mount) int { return depth(x) - depth(y) })
	b.spec.Mounts = append(b.spec.Mounts, config...)
	return nil
}

func depth(m specs.Mount) int { return strings.Count(path.Clean(m.Destination), "/") }

// sysMount: a privileged container writes to sysfs. In a user namespace with
// the host's network sysfs cannot be mounted (the network namespace belongs to
// another user namespace), so the host's is bound, read-only all the way.
func (b *builder) sysMount(m specs.Mount) specs.Mount {
	if b.in.Namespaces.User != "" && b.in.Namespaces.Net == "" {
		return specs.Mount{Destination: "/sys", Type: "bind", Source: "/sys", Options: []string{"rbind", "rro", "nosuid", "nodev", "noexec"}}
	}
	if b.sc.GetPrivileged() {
		m.Options = replace(m.Options, "ro", "rw")
	}
	return m
}

func (b *builder) cgroupMount() specs.Mount {
	opts := []string{"nosuid", "noexec", "nodev", "relatime", "ro"}
	if b.sc.GetPrivileged() || (b.in.Defaults.CgroupWritable && b.in.Host.CgroupUnified) {
		opts = replace(opts, "ro", "rw")
	}
	// Without a cgroup namespace of its own, mounting cgroup2 would change the
	// options of the host's superblock: repeat the host's.
	if !slices.ContainsFunc(b.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.CgroupNamespace }) {
		opts = append(opts, b.in.Host.CgroupMountOptions...)
	}
	return specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: opts}
}

func replace(opts []string, old, with string) []string {
	out := slices.Clone(opts)
	for i := range out {
		if out[i] == old {
			out[i] = with
		}
	}
	return out
}

// podFiles are the sandbox's hostname, resolv.conf and /dev/shm. /etc/hosts is
// kubelet's. None is idmapped: they are on /run, a tmpfs, which can only since
// Linux 6.3; Prepare gives the files to the container's root instead, and a shm
// of mode 1777 that starts empty needs nothing.
func (b *builder) podFiles() []specs.Mount {
	mode := "rw"
	if b.sc.GetReadonlyRootfs() {
		mode = "ro"
	}
	var out []specs.Mount
	file := func(dst, src string) {
		if src != "" {
			out = append(out, specs.Mount{Destination: dst, Type: "bind", Source: src, Options: []string{"rbind", "rprivate", mode}})
		}
	}
	file("/etc/hostname", b.in.Files.Hostname)
	file("/etc/resolv.conf", b.in.Files.ResolvConf)

	shm := b.in.Files.Shm
	if b.in.Namespaces.IPC == "" {
		shm = hostShm
	}
	if shm != "" {
		out = append(out, specs.Mount{Destination: "/dev/shm", Type: "bind", Source: shm,
			Options: []string{"rbind", "rprivate", "rw", "nosuid", "nodev", "noexec"}})
	}
	return out
}

// volumeMounts are the anonymous volumes that the image declares.
func (b *builder) volumeMounts() []specs.Mount {
	var out []specs.Mount
	for _, v := range imageVolumes(b.in) {
		out = append(out, specs.Mount{Destination: v.dst, Type: "bind", Source: v.src, Options: []string{"rbind", "rprivate", "rw"}})
	}
	return out
}

func (b *builder) configMounts() ([]specs.Mount, error) {
	var out []specs.Mount
	for i, m := range b.in.Container.GetMounts() {
		om, err := b.configMount(fmt.Sprintf("mounts[%d]", i), m)
		if err != nil {
			return nil, err
		}
		out = append(out, om)
	}
	return out, nil
}

func (b *builder) configMount(field string, m *runtimeapi.Mount) (specs.Mount, error) {
	src, err := b.mountSource(field, m)
	if err != nil {
		return specs.Mount{}, err
	}
	mode, err := b.readOnly(field, m)
	if err != nil {
		return specs.Mount{}, err
	}
	prop, err := b.propagation(field, m, src)
	if err != nil {
		return specs.Mount{}, err
	}
	opts := []string{"rbind", prop, mode}
	extra, err := mountOptions(field, m.GetMountOptions())
	if err != nil {
		return specs.Mount{}, err
	}
	out := specs.Mount{
		Destination: path.Join("/", m.GetContainerPath()),
		Type:        "bind",
		Source:      src,
		Options:     append(opts, extra...),
	}
	return out, b.idmap(field, m, &out)
}

// mountSource resolves what is mounted: links of the host path are followed.
func (b *builder) mountSource(field string, m *runtimeapi.Mount) (string, error) {
	if dst := m.GetContainerPath(); dst == "" || hasNUL(dst) {
		return "", invalid(field+".container_path", dst, "a path")
	}
	if img := m.GetImage().GetImage(); img != "" {
		if m.GetHostPath() != "" {
			return "", invalid(field+".host_path", m.GetHostPath(), "empty when image is set (%q)", img)
		}
		src, ok := b.in.ImageMounts[m.GetContainerPath()]
		if !ok {
			return "", fmt.Errorf("%s: image %q for %q is not mounted on the host: %w", field, img, m.GetContainerPath(), errdefs.ErrFailedPrecondition)
		}
		return src, nil
	}
	host := m.GetHostPath()
	if !path.IsAbs(host) || hasNUL(host) {
		return "", invalid(field+".host_path", host, "an absolute path")
	}
	src, err := b.kernel.EvalSymlinks(host)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%s.host_path %q: %w: %w", field, host, err, errdefs.ErrNotFound)
	}
	if err != nil {
		return "", fmt.Errorf("%s.host_path %q: resolve: %w", field, host, err)
	}
	return src, nil
}

// propagation returns the mount option, and raises the rootfs propagation so
// that mounts can get through at all.
func (b *builder) propagation(field string, m *runtimeapi.Mount, src string) (string, error) {
	want := m.GetPropagation()
	switch want {
	case runtimeapi.MountPropagation_PROPAGATION_PRIVATE:
		return "rprivate", nil
	case runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
	default:
		return "", invalid(field+".propagation", want, "PROPAGATION_PRIVATE, PROPAGATION_HOST_TO_CONTAINER or PROPAGATION_BIDIRECTIONAL")
	}
	p, err := b.kernel.MountPropagation(src)
	if err != nil {
		return "", fmt.Errorf("%s: propagation of %q: %w", field, src, err)
	}
	linux := b.spec.Linux
	if want == runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL {
		if !p.Shared {
			return "", fmt.Errorf("%s: propagation is %v: %q is on the mount %q, which is not shared: %w", field, want, src, p.Mountpoint, errdefs.ErrFailedPrecondition)
		}
		linux.RootfsPropagation = "rshared"
		return "rshared", nil
	}
	if !p.Shared && !p.Slave {
		return "", fmt.Errorf("%s: propagation is %v: %q is on the mount %q, which is neither shared nor a slave: %w", field, want, src, p.Mountpoint, errdefs.ErrFailedPrecondition)
	}
	if linux.RootfsPropagation == "" {
		linux.RootfsPropagation = "rslave"
	}
	return "rslave", nil
}

// readOnly follows KEP-3857. Image mounts are always read-only.
func (b *builder) readOnly(field string, m *runtimeapi.Mount) (string, error) {
	isImage := m.GetImage().GetImage() != ""
	if !m.GetRecursiveReadOnly() {
		if m.GetReadonly() || isImage {
			return "ro", nil
		}
		return "rw", nil
	}
	if !m.GetReadonly() {
		return "", invalid(field+".recursive_read_only", true, "false on a writable mount (host_path %q)", m.GetHostPath())
	}
	if m.GetPropagation() != runtimeapi.MountPropagation_PROPAGATION_PRIVATE {
		return "", invalid(field+".propagation", m.GetPropagation(), "PROPAGATION_PRIVATE with recursive_read_only (host_path %q)", m.GetHostPath())
	}
	if !b.in.Host.RecursiveReadOnly {
		// Both errors: kubelet looks for the text of crierrors.
		return "", fmt.Errorf("%s.recursive_read_only (host_path %q): %w: kernel 5.12 is needed: %w", field, m.GetHostPath(), crierrors.ErrRROUnsupported, errdefs.ErrFailedPrecondition)
	}
	return "rro", nil
}

// bindOptions can be set on a single bind mount; everything else belongs to a
// file system and would silently do nothing.
const bindOptions = "noexec nodev nosuid nosymfollow noatime nodiratime relatime strictatime exec dev suid symfollow atime diratime norelatime nostrictatime " +
	"rnoexec rnodev rnosuid rnosymfollow rnoatime rnodiratime rrelatime rstrictatime rexec rdev rsuid rsymfollow ratime rdiratime rnorelatime rnostrictatime ro"

func mountOptions(field string, opts []string) ([]string, error) {
	allowed := strings.Fields(bindOptions)
	for _, o := range opts {
		if !slices.Contains(allowed, o) {
			return nil, invalid(field+".mount_options", o, "%s", strings.Join(allowed, ", "))
		}
	}
	return opts, nil
}

func (b *builder) idmap(field string, m *runtimeapi.Mount, out *specs.Mount) (err error) {
	if len(m.GetUidMappings()) == 0 && len(m.GetGidMappings()) == 0 {
		return nil
	}
	if len(m.GetUidMappings()) == 0 || len(m.GetGidMappings()) == 0 {
		return invalid(field+".uidMappings", m.GetUidMappings(), "set together with gidMappings (%v)", m.GetGidMappings())
	}
	if !b.in.Host.IDMappedMounts {
		return lacking(field+".uidMappings", m.GetUidMappings(), "idmapped mounts (kernel 5.12)")
	}
	if m.GetImage().GetImage() != "" {
		return nil // mapped where the image was mounted
	}
	if out.UIDMappings, err = idMappings(field+".uidMappings", m.GetUidMappings()); err != nil {
		return err
	}
	out.GIDMappings, err = idMappings(field+".gidMappings", m.GetGidMappings())
	return err
}

// maskedPaths: the lists of the config as they are. kubelet sends the default
// lists with procMount Default and empty ones with Unmasked.
func (b *builder) maskedPaths() error {
	if b.sc.GetPrivileged() {
		return nil
	}
	for field, list := range map[string][]string{"masked_paths": b.sc.GetMaskedPaths(), "readonly_paths": b.sc.GetReadonlyPaths()} {
		for _, p := range list {
			if !path.IsAbs(p) || hasNUL(p) {
				return invalid("linux.security_context."+field, p, "an absolute path")
			}
		}
	}
	b.spec.Linux.MaskedPaths = b.sc.GetMaskedPaths()
	b.spec.Linux.ReadonlyPaths = b.sc.GetReadonlyPaths()
	return nil
}
