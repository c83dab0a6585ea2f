package cri

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/images"
	"github.com/nodeagent/nodeagent/cri/store"
)

// Runtime runs processes. It is the shim's client.
type Runtime interface {
	// Ready waits until the shim answers.
	Ready(ctx context.Context) error
	// Start creates and starts in one call. It is idempotent by ID; on error
	// or when ctx ends nothing is left.
	Start(ctx context.Context, s StartSpec) (Process, error)
	// Signal sends sig to the init process, or to all processes of the
	// container. ErrNotFound if it is gone.
	Signal(ctx context.Context, id string, sig syscall.Signal, all bool) error
	// Delete kills what is left, waits for it, and removes cgroup and state.
	// Idempotent.
	Delete(ctx context.Context, id string) (ProcessExit, error)
	// Forget drops the durable exit record.
	Forget(ctx context.Context, id string) error
	State(ctx context.Context, id string) (Process, error)
	List(ctx context.Context) ([]Process, error)
	// Exits delivers every exit at least once, also those that happened while
	// nobody listened.
	Exits() <-chan ProcessExit
	Update(ctx context.Context, id string, r *specs.LinuxResources) error
	ReopenLog(ctx context.Context, id string) error
	ExecSync(ctx context.Context, id string, o ExecOptions) (ExecResult, error)
	Exec(ctx context.Context, id string, o StreamOptions) (Session, error)
	Attach(ctx context.Context, id string, o StreamOptions) (Session, error)
	// PauseRootfs is a read-only directory that contains /pause.
	PauseRootfs() string
}

// StartSpec is what Runtime.Start needs.
type StartSpec struct {
	ID, SandboxID string
	OCI           *specs.Spec
	LogPath       string // "" for none
	Terminal      bool
	Stdin         bool
	StdinOnce     bool
	Pause         bool // holder of a pod's PID namespace: no stdio
}

// Process is a container's init process as the shim knows it.
type Process struct {
	ID, SandboxID string
	Pid           int
	StartTime     uint64 // clock ticks since boot
	StartedAt     time.Time
	Exit          *ProcessExit // nil while it runs
}

// ProcessExit says how a container's init process ended.
type ProcessExit struct {
	ID     string
	Pid    int
	Code   int
	Signal int
	Known  bool // false: the code was lost
	OOM    bool
	At     time.Time
}

// ExecOptions for Runtime.ExecSync.
type ExecOptions struct {
	Process   *specs.Process
	Timeout   time.Duration // 0: none
	MaxOutput int           // bytes per stream; what is beyond is discarded
}

// ExecResult of Runtime.ExecSync.
type ExecResult struct {
	Stdout, Stderr []byte
	Code           int
	TimedOut       bool
}

// StreamOptions for Runtime.Exec and Runtime.Attach. The files are pipe ends
// for the other side; nil means not wanted.
type StreamOptions struct {
	Process               *specs.Process // nil for attach
	Stdin, Stdout, Stderr *os.File
	Terminal              bool
	Width, Height         uint16
}

// Session is a running exec or attach.
type Session interface {
	Resize(width, height uint16) error
	Wait(ctx context.Context) (code int, err error)
	Close() error
}

// Network connects sandboxes.
type Network interface {
	// Setup is all or nothing.
	Setup(ctx context.Context, r NetworkRequest) (NetworkResult, error)
	// Teardown is idempotent and works when the namespace is gone.
	Teardown(ctx context.Context, r NetworkRequest, res NetworkResult) error
	// Reconcile frees everything of ours whose sandbox is not in live.
	Reconcile(ctx context.Context, live []NetworkRequest, results map[string]NetworkResult) error
	// Status is nil when sandboxes can be connected.
	Status(ctx context.Context) error
	SetPodCIDRs(ctx context.Context, cidrs []netip.Prefix) error
}

// NetworkRequest names a sandbox to the network.
type NetworkRequest struct {
	SandboxID, PodNamespace, PodName, PodUID string
	Netns                                    string
	Ports                                    []PortMapping
	Labels                                   map[string]string // of the pod
	Annotations                              map[string]string
	CgroupParent                             string
	DNS                                      DNS
}

// PortMapping forwards a host port to a sandbox.
type PortMapping struct {
	Protocol                string // tcp, udp, sctp
	HostPort, ContainerPort uint16
	HostIP                  netip.Addr // zero: all addresses
}

// DNS is a resolver configuration.
type DNS struct {
	Servers, Searches, Options []string
}

// NetworkResult of a Setup.
type NetworkResult struct {
	IPs           []netip.Addr
	HostInterface string
	Conf          string
	Result        json.RawMessage
}

// Cgroups places containers and makes pod groups.
type Cgroups interface {
	// PodParent is the group of a pod: parent, or one of our own for "".
	PodParent(parent, sandboxID string) (string, error)
	// ContainerPath is the OCI linux.cgroupsPath of container id under parent.
	ContainerPath(parent, id string) (string, error)
	// EnsurePod makes the pod's group if it is missing. res may be nil.
	EnsurePod(ctx context.Context, parent string, res *specs.LinuxResources) error
	// UpdatePod sets new limits on the group if we made it. res may be nil.
	UpdatePod(ctx context.Context, parent string, res *specs.LinuxResources) error
	// RemovePod removes the group if we made it. Idempotent.
	RemovePod(ctx context.Context, parent string) error
	// ExpectProcess says that a process will soon be put into a group. It
	// does not wait and changes nothing.
	ExpectProcess()
	// Systemd reports whether the systemd driver is in use.
	Systemd() bool
}

// Namespaces hands out pinned namespaces.
type Namespaces interface {
	Get(ctx context.Context, w NamespaceWant) (store.Namespaces, error)
	// Release unpins and removes; idempotent.
	Release(ctx context.Context, ns store.Namespaces) error
	// Reconcile removes all whose ID is not in live.
	Reconcile(ctx context.Context, live []string) error
}

// NamespaceWant says which namespaces a sandbox needs.
type NamespaceWant struct {
	Net, IPC, UTS, User bool
	UIDMap, GIDMap      []specs.LinuxIDMapping
	Hostname            string
	Sysctls             map[string]string
}

// Images is the image store.
type Images interface {
	Get(ctx context.Context, ref string) (images.Image, error)
	List(ctx context.Context) ([]images.Image, error)
	Pull(ctx context.Context, o images.PullOptions) (images.Image, error)
	Remove(ctx context.Context, ref string) error
	FsInfo(ctx context.Context) (images.FsUsage, error)
}

// Rootfs mounts root filesystems and image volumes of containers. It keeps the
// images that they stand on.
type Rootfs interface {
	// Mount makes the root filesystem of container id from an image.
	Mount(ctx context.Context, id, imageID string, o RootfsOptions) (path string, err error)
	// MountImage makes subpath of an image available, read-only, as the n-th
	// image volume of container id.
	MountImage(ctx context.Context, id string, n int, imageID, subpath string, o RootfsOptions) (path string, err error)
	// Unmount takes all of it away, the writable layer included. Idempotent.
	Unmount(ctx context.Context, id string) error
	// Restore re-establishes which container stands on which image (a root
	// filesystem and, after it, image volumes), and removes what belongs to no
	// container of the map. At start, before anything else.
	Restore(ctx context.Context, live map[string][]string) error
	// VolumeDir is a directory of the container for anonymous volumes, removed
	// with it; "" if there is none.
	VolumeDir(id string) string
}

// RootfsOptions for Rootfs.Mount.
type RootfsOptions struct {
	ReadOnly       bool
	UIDMap, GIDMap []specs.LinuxIDMapping // of the pod's user namespace
	UserNS         string                 // its path
	Label          string                 // SELinux mount label
}

// Streams turns requests for exec, attach and port-forward into URLs.
type Streams interface {
	GetExec(r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error)
	GetAttach(r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error)
	GetPortForward(r *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error)
}
