package store

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Version is the version written into every record. A record with another
// version is refused with ErrNotImplemented and kept on disk.
const Version = 1

// Sandbox is what is known for good about a pod sandbox. It is immutable once
// stored, except for Resources and Overhead inside Config.Linux
// (UpdatePodSandboxResources), which replace the whole record.
type Sandbox struct {
	ID        string    // 64 hexadecimal digits
	CreatedAt time.Time // nanosecond precision
	Boot      string    // boot id of the kernel it was made under
	Handler   string    // runtime handler as asked for; "" is the default one
	Digest    string    // hash of the request, tells a repeated request from a different one
	Config    *runtimeapi.PodSandboxConfig

	Namespaces   Namespaces
	Network      Network
	CgroupParent string // as given to the cgroup manager, never empty
	Label        string // SELinux process label of the pod, "" for none
	Dir          string // holds resolv.conf, hostname and shm
	Pause        bool   // a pause container with the sandbox's ID holds the PID namespace
}

// Namespaces are the pinned namespaces of a sandbox; "" means the host's.
type Namespaces struct {
	ID   string `json:"id,omitempty"`
	Net  string `json:"net,omitempty"`
	IPC  string `json:"ipc,omitempty"`
	UTS  string `json:"uts,omitempty"`
	User string `json:"user,omitempty"`
}

// Network is the result of network set-up; the zero value means that the
// sandbox uses the host's network.
type Network struct {
	IPs           []string        `json:"ips,omitempty"`
	HostInterface string          `json:"hostInterface,omitempty"`
	Conf          string          `json:"conf,omitempty"`
	Result        json.RawMessage `json:"result,omitempty"` // handed back on teardown as it came
}

// Container is what is known about a container.
type Container struct {
	ID, SandboxID string
	CreatedAt     time.Time
	Digest        string
	Config        *runtimeapi.ContainerConfig

	ImageID   string // config digest, "sha256:..."
	ImageRef  string // repo digest where there is one, else ImageID
	ImageName string // tag or reference to show to people
	LogPath   string // absolute, "" for none
	// ImageVolumes are the IDs of images mounted as volumes, in order.
	ImageVolumes []string
	User         *runtimeapi.ContainerUser
	Resources    *runtimeapi.LinuxContainerResources // as last updated
	StopSignal   runtimeapi.Signal                   // effective one, as the status shows it
	StopNumber   int                                 // the same for the kernel
	CgroupsPath  string                              // OCI linux.cgroupsPath
	Rootfs       string                              // mount point

	Started *Started // nil: never started
	Exit    *Exit    // nil: did not exit
}

// Started says that the container's process was started.
type Started struct {
	Pid       int       `json:"pid"`
	StartTime uint64    `json:"startTime,omitempty"` // clock ticks since boot, tells a reused pid
	At        time.Time `json:"at"`
}

// Exit says how the container ended.
type Exit struct {
	Code    int       `json:"code"`
	Signal  int       `json:"signal,omitempty"`
	Known   bool      `json:"known"` // false: the code was lost and is not invented
	OOM     bool      `json:"oom,omitempty"`
	At      time.Time `json:"at"`
	Reason  string    `json:"reason,omitempty"` // overrides the derived one, e.g. "StartError"
	Message string    `json:"message,omitempty"`
}

// State derives the CRI state from the recorded facts.
func (c *Container) State() runtimeapi.ContainerState {
	switch {
	case c.Exit != nil:
		return runtimeapi.ContainerState_CONTAINER_EXITED
	case c.Started != nil:
		return runtimeapi.ContainerState_CONTAINER_RUNNING
	}
	return runtimeapi.ContainerState_CONTAINER_CREATED
}

// Image is the image as lists and statuses show it: a name people know, and
// what the user wrote.
func (c *Container) Image() *runtimeapi.ImageSpec {
	asked := c.Config.GetImage()
	name := c.ImageName
	if name == "" {
		name = asked.GetImage()
	}
	return &runtimeapi.ImageSpec{
		Image: name, Annotations: asked.GetAnnotations(),
		UserSpecifiedImage: asked.GetUserSpecifiedImage(), RuntimeHandler: asked.GetRuntimeHandler(),
	}
}

// The wire forms. CRI messages are kept as protobuf: JSON would alter bytes
// that are not UTF-8 (environment values) and drop unknown fields.
type sandboxRecord struct {
	Version    int        `json:"version"`
	ID         string     `json:"id"`
	CreatedAt  int64      `json:"createdAt"`
	Boot       string     `json:"boot"`
	Handler    string     `json:"handler,omitempty"`
	Digest     string     `json:"digest,omitempty"`
	Config     []byte     `json:"config"`
	Namespaces Namespaces `json:"namespaces"`
	Network    Network    `json:"network"`
	Cgroup     string     `json:"cgroup,omitempty"`
	Label      string     `json:"label,omitempty"`
	Dir        string     `json:"dir,omitempty"`
	Pause      bool       `json:"pause,omitempty"`
}

type containerRecord struct {
	Version    int      `json:"version"`
	ID         string   `json:"id"`
	SandboxID  string   `json:"sandbox"`
	CreatedAt  int64    `json:"createdAt"`
	Digest     string   `json:"digest,omitempty"`
	Config     []byte   `json:"config"`
	ImageID    string   `json:"imageID,omitempty"`
	ImageRef   string   `json:"imageRef,omitempty"`
	ImageName  string   `json:"imageName,omitempty"`
	LogPath    string   `json:"logPath,omitempty"`
	Volumes    []string `json:"imageVolumes,omitempty"`
	User       []byte   `json:"user,omitempty"`
	Resources  []byte   `json:"resources,omitempty"`
	StopSignal int32    `json:"stopSignal,omitempty"`
	StopNumber int      `json:"stopNumber,omitempty"`
	Cgroup     string   `json:"cgroup,omitempty"`
	Rootfs     string   `json:"rootfs,omitempty"`
	Started    *Started `json:"started,omitempty"`
	Exit       *Exit    `json:"exit,omitempty"`
}

// EncodeSandbox returns the record of s as it is stored.
func EncodeSandbox(s *Sandbox) ([]byte, error) {
	config, err := marshal(s.Config)
	if err != nil {
		return nil, fmt.Errorf("encode sandbox %s: config: %w", s.ID, err)
	}
	return json.Marshal(sandboxRecord{
		Version: Version, ID: s.ID, CreatedAt: s.CreatedAt.UnixNano(), Boot: s.Boot, Handler: s.Handler,
		Digest: s.Digest, Config: config, Namespaces: s.Namespaces, Network: s.Network,
		Cgroup: s.CgroupParent, Label: s.Label, Dir: s.Dir, Pause: s.Pause,
	})
}

// DecodeSandbox is the inverse of EncodeSandbox.
//
// Errors: ErrNotImplemented for another version, ErrInvalidArgument for
// anything that is not a record.
func DecodeSandbox(data []byte) (*Sandbox, error) {
	var r sandboxRecord
	if err := decode(data, &r); err != nil {
		return nil, fmt.Errorf("decode sandbox record: %w", err)
	}
	if r.ID == "" {
		return nil, fmt.Errorf("decode sandbox record: no id: %w", errdefs.ErrInvalidArgument)
	}
	s := &Sandbox{
		ID: r.ID, CreatedAt: time.Unix(0, r.CreatedAt), Boot: r.Boot, Handler: r.Handler, Digest: r.Digest,
		Config: &runtimeapi.PodSandboxConfig{}, Namespaces: r.Namespaces, Network: r.Network,
		CgroupParent: r.Cgroup, Label: r.Label, Dir: r.Dir, Pause: r.Pause,
	}
	if err := unmarshal(r.Config, s.Config); err != nil {
		return nil, fmt.Errorf("decode sandbox %s: config: %w", r.ID, err)
	}
	if s.Config.Metadata == nil {
		return nil, fmt.Errorf("decode sandbox %s: config without metadata: %w", r.ID, errdefs.ErrInvalidArgument)
	}
	return s, nil
}

// EncodeContainer returns the record of c as it is stored.
func EncodeContainer(c *Container) ([]byte, error) {
	config, err := marshal(c.Config)
	if err != nil {
		return nil, fmt.Errorf("encode container %s: config: %w", c.ID, err)
	}
	user, err := marshal(c.User)
	if err != nil {
		return nil, fmt.Errorf("encode container %s: user: %w", c.ID, err)
	}
	resources, err := marshal(c.Resources)
	if err != nil {
		return nil, fmt.Errorf("encode container %s: resources: %w", c.ID, err)
	}
	return json.Marshal(containerRecord{
		Version: Version, ID: c.ID, SandboxID: c.SandboxID, CreatedAt: c.CreatedAt.UnixNano(), Digest: c.Digest,
		Config: config, ImageID: c.ImageID, ImageRef: c.ImageRef, ImageName: c.ImageName, LogPath: c.LogPath, Volumes: c.ImageVolumes, User: user,
		Resources: resources, StopSignal: int32(c.StopSignal), StopNumber: c.StopNumber, Cgroup: c.CgroupsPath, Rootfs: c.Rootfs,
		Started: c.Started, Exit: c.Exit,
	})
}

// DecodeContainer is the inverse of EncodeContainer; errors as DecodeSandbox.
func DecodeContainer(data []byte) (*Container, error) {
	var r containerRecord
	if err := decode(data, &r); err != nil {
		return nil, fmt.Errorf("decode container record: %w", err)
	}
	if r.ID == "" || r.SandboxID == "" {
		return nil, fmt.Errorf("decode container record: no id or no sandbox: %w", errdefs.ErrInvalidArgument)
	}
	c := &Container{
		ID: r.ID, SandboxID: r.SandboxID, CreatedAt: time.Unix(0, r.CreatedAt), Digest: r.Digest,
		Config: &runtimeapi.ContainerConfig{}, ImageID: r.ImageID, ImageRef: r.ImageRef, ImageName: r.ImageName, LogPath: r.LogPath, ImageVolumes: r.Volumes,
		StopSignal: runtimeapi.Signal(r.StopSignal), StopNumber: r.StopNumber, CgroupsPath: r.Cgroup, Rootfs: r.Rootfs, Started: r.Started, Exit: r.Exit,
	}
	if err := unmarshal(r.Config, c.Config); err != nil {
		return nil, fmt.Errorf("decode container %s: config: %w", r.ID, err)
	}
	if c.Config.Metadata == nil {
		return nil, fmt.Errorf("decode container %s: config without metadata: %w", r.ID, errdefs.ErrInvalidArgument)
	}
	if len(r.User) > 0 {
		c.User = &runtimeapi.ContainerUser{}
		if err := unmarshal(r.User, c.User); err != nil {
			return nil, fmt.Errorf("decode container %s: user: %w", r.ID, err)
		}
	}
	if len(r.Resources) > 0 {
		c.Resources = &runtimeapi.LinuxContainerResources{}
		if err := unmarshal(r.Resources, c.Resources); err != nil {
			return nil, fmt.Errorf("decode container %s: resources: %w", r.ID, err)
		}
	}
	return c, nil
}

func decode(data []byte, into any) error {
	var head struct {
		Version *int `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return fmt.Errorf("not a record: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	if head.Version == nil {
		return fmt.Errorf("not a record: no version: %w", errdefs.ErrInvalidArgument)
	}
	if *head.Version != Version {
		return fmt.Errorf("record version %d, this program knows version %d; it is left as it is, run the program that wrote it: %w",
			*head.Version, Version, errdefs.ErrNotImplemented)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("not a record: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

func marshal(m proto.Message) ([]byte, error) {
	if !m.ProtoReflect().IsValid() {
		return nil, nil
	}
	return proto.Marshal(m)
}

func unmarshal(data []byte, m proto.Message) error {
	if err := proto.Unmarshal(data, m); err != nil {
		return fmt.Errorf("%v: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}
