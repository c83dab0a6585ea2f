// Package spec turns what the CRI asks for (ContainerConfig, PodSandboxConfig)
// and what the image says into an OCI runtime spec that libcontainer accepts.
//
// It decides, it does not do: [Container], [Exec], [Pause] and [MergeResources]
// return values and change nothing on the host. What they have to read (the
// image's passwd file, device nodes, the mount table, a seccomp profile) they
// read through [Kernel], so that tests can feed them a host of their own. The
// few effects that a container needs before its spec is built (host paths that
// do not exist yet, SELinux relabels, image volumes) are in [Prepare].
//
// It must not: start, mount or sign anything, keep state, or know gRPC.
// Callers: the CRI handlers in cri/. There are no goroutines, locks or
// package variables that change; every function may be called concurrently.
//
// Kernel: 5.6 for openat2 (older kernels take a slower safe lookup), 5.12 for
// recursive read-only and idmapped mounts; [Detect] finds what is there and a
// config that needs more is refused with FailedPrecondition.
//
// The semantics follow containerd's CRI plugin (internal/cri/server,
// internal/cri/opts, pkg/oci) where the CRI text leaves room; differences are
// noted where they are made.
package spec

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Input is everything that decides a container's spec.
type Input struct {
	ID        string
	SandboxID string

	Container *runtimeapi.ContainerConfig
	Sandbox   *runtimeapi.PodSandboxConfig
	Image     *ocispec.Image // nil: an image without a config

	// Rootfs is the absolute path of the mounted root filesystem. Users and
	// groups are looked up inside it, never following a link out of it.
	Rootfs string
	// Cgroup is the OCI linux.cgroupsPath, in the form that the cgroup driver
	// wants ("/kubepods/pod1/id" or "slice:prefix:id").
	Cgroup string
	// Namespaces holds the paths that the container joins.
	Namespaces Namespaces
	// Files are the pod's files that every container of it sees.
	Files SandboxFiles
	// ImageMounts maps the container_path of a Mount with an image to the
	// prepared host directory (image_sub_path already applied).
	ImageMounts map[string]string
	// VolumeDir is a directory of the container for the anonymous volumes that
	// the image declares (config.Volumes). "" leaves them in the rootfs.
	VolumeDir string
	// CDI injects CDI devices; nil refuses containers that ask for some.
	CDI DeviceInjector

	// SandboxLabel is the SELinux process label of the pod, "" for none.
	SandboxLabel string

	Host     HostInfo
	Defaults Defaults
	// Kernel is read through when set; nil reads this host.
	Kernel Kernel
}

// Namespaces are paths of namespaces to join; "" is the host's namespace,
// except for PID: there the CRI mode decides ("" with mode CONTAINER is a new
// PID namespace, with NODE the host's).
type Namespaces struct {
	Net, IPC, UTS, User string
	// PID is /proc/<pid>/ns/pid of the pod's pause process (mode POD) or of
	// the target container (mode TARGET).
	PID string
}

// SandboxFiles are host paths; "" leaves the file out.
type SandboxFiles struct {
	Hostname   string // bind mounted on /etc/hostname
	ResolvConf string // bind mounted on /etc/resolv.conf
	Shm        string // tmpfs bind mounted on /dev/shm; ignored with host IPC
}

// FilesIn returns the usual names below the sandbox's directory.
func FilesIn(sandboxDir string) SandboxFiles {
	return SandboxFiles{
		Hostname:   filepath.Join(sandboxDir, "hostname"),
		ResolvConf: filepath.Join(sandboxDir, "resolv.conf"),
		Shm:        filepath.Join(sandboxDir, "shm"),
	}
}

// Defaults are the node's choices where the CRI leaves one. The zero value is
// what containerd does.
type Defaults struct {
	// Rlimits of every container; none: inherited from the shim.
	Rlimits []specs.POSIXRlimit
	// Capabilities of an ordinary container; nil: [DefaultCapabilities].
	Capabilities []string
	// SeccompUnset is the profile of a container that names none.
	// The CRI says that none means unconfined; a node may be stricter.
	SeccompUnset SeccompDefault
	// PrivilegedWithoutHostDevices gives privileged containers no host devices.
	PrivilegedWithoutHostDevices bool
	// CgroupWritable mounts /sys/fs/cgroup writable (cgroup v2 only).
	CgroupWritable bool
	// DeviceOwnership gives devices to run_as_user and run_as_group.
	DeviceOwnership bool
	// PidsLimit of every container, 0 for none.
	PidsLimit int64
	// UnprivilegedPorts and UnprivilegedICMP: see [Sysctls].
	UnprivilegedPorts, UnprivilegedICMP bool
}

// SeccompDefault says what a container without a seccomp profile gets.
type SeccompDefault int

// Values of [Defaults.SeccompUnset].
const (
	SeccompUnsetUnconfined SeccompDefault = iota
	SeccompUnsetRuntimeDefault
)

// Container returns the complete spec of one container, and the identity that
// its first process starts with.
//
// Errors: InvalidArgument for a wrong field (the text names field, value and
// what is allowed), FailedPrecondition for what this host lacks, NotFound for
// a user, device or profile that does not exist.
func Container(in Input) (*specs.Spec, *User, error) {
	b, err := newBuilder(in)
	if err != nil {
		return nil, nil, err
	}
	steps := []func() error{
		b.process,
		b.user,
		b.capabilities,
		b.noNewPrivileges,
		b.namespaces,
		b.selinux,
		b.mounts,
		b.maskedPaths,
		b.devices,
		b.resources,
		b.oomScore,
		b.apparmor,
		b.seccomp,
		b.annotations,
		b.cdi,
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, nil, fmt.Errorf("spec of container %q: %w", b.name(), err)
		}
	}
	return b.spec, b.usr, nil
}

// builder carries one call of Container through its steps.
type builder struct {
	in     Input
	kernel Kernel
	image  ocispec.ImageConfig
	sc     *runtimeapi.LinuxContainerSecurityContext // may be nil, getters work
	spec   *specs.Spec
	usr    *User
}

func newBuilder(in Input) (*builder, error) {
	if in.Container == nil {
		return nil, fmt.Errorf("container config is missing: %w", errdefs.ErrInvalidArgument)
	}
	if in.Sandbox == nil {
		return nil, fmt.Errorf("sandbox config is missing: %w", errdefs.ErrInvalidArgument)
	}
	if !filepath.IsAbs(in.Rootfs) {
		return nil, fmt.Errorf("rootfs %q: allowed is an absolute path: %w", in.Rootfs, errdefs.ErrInvalidArgument)
	}
	b := &builder{in: in, kernel: in.Kernel, sc: in.Container.GetLinux().GetSecurityContext()}
	if b.kernel == nil {
		b.kernel = hostKernel{}
	}
	if in.Image != nil {
		b.image = in.Image.Config
	}
	b.spec = &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: in.Rootfs, Readonly: b.sc.GetReadonlyRootfs()},
		Process: &specs.Process{Cwd: "/", Rlimits: in.Defaults.Rlimits},
		Linux: &specs.Linux{
			CgroupsPath: in.Cgroup,
			Resources: &specs.LinuxResources{
				// libcontainer adds the devices of every container (null, zero,
				// full, random, urandom, tty, pts, ptmx) behind this.
				Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
			},
		},
	}
	if b.sc.GetPrivileged() && !in.Sandbox.GetLinux().GetSecurityContext().GetPrivileged() {
		return nil, invalid("linux.security_context.privileged", true, "false in a sandbox that is not privileged")
	}
	return b, nil
}

func (b *builder) name() string {
	if n := b.in.Container.GetMetadata().GetName(); n != "" {
		return n
	}
	return b.in.ID
}

func (b *builder) annotations() error {
	meta := b.in.Sandbox.GetMetadata()
	b.spec.Annotations = map[string]string{
		"io.kubernetes.cri.container-type":    "container",
		"io.kubernetes.cri.container-name":    b.in.Container.GetMetadata().GetName(),
		"io.kubernetes.cri.sandbox-id":        b.in.SandboxID,
		"io.kubernetes.cri.sandbox-name":      meta.GetName(),
		"io.kubernetes.cri.sandbox-namespace": meta.GetNamespace(),
		"io.kubernetes.cri.sandbox-uid":       meta.GetUid(),
		"io.kubernetes.cri.image-name":        imageName(b.in.Container.GetImage()),
	}
	return nil
}

func imageName(img *runtimeapi.ImageSpec) string {
	if u := img.GetUserSpecifiedImage(); u != "" {
		return u
	}
	return img.GetImage()
}

// invalid is the error for a field whose value is not allowed.
func invalid(field string, value any, allowed string, args ...any) error {
	v := fmt.Sprintf("%v", value)
	if s, ok := value.(string); ok {
		v = fmt.Sprintf("%q", s)
	}
	return fmt.Errorf("%s is %s: allowed is %s: %w", field, v, fmt.Sprintf(allowed, args...), errdefs.ErrInvalidArgument)
}

// lacking is the error for what the config demands and the host has not.
func lacking(field string, value any, what string) error {
	return fmt.Errorf("%s is %v: this host has no %s: %w", field, value, what, errdefs.ErrFailedPrecondition)
}

func hasNUL(s string) bool { return strings.IndexByte(s, 0) >= 0 }

func ptr[T any](v T) *T { return &v }
