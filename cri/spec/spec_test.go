package spec

import (
	"io/fs"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fakeKernel is a host in memory.
type fakeKernel struct {
	links    map[string]string
	missing  map[string]bool
	mounts   map[string]Propagation
	devs     map[string][]specs.LinuxDevice
	rootfs   map[string]string
	files    map[string]string
	profiles map[string]bool
}

func (k fakeKernel) EvalSymlinks(p string) (string, error) {
	if k.missing[p] {
		return "", &fs.PathError{Op: "lstat", Path: p, Err: fs.ErrNotExist}
	}
	if to, ok := k.links[p]; ok {
		return to, nil
	}
	return p, nil
}

func (k fakeKernel) MountPropagation(p string) (Propagation, error) { return k.mounts[p], nil }

func (k fakeKernel) Devices(p string) ([]specs.LinuxDevice, error) {
	d, ok := k.devs[p]
	if !ok {
		return nil, &fs.PathError{Op: "stat", Path: p, Err: fs.ErrNotExist}
	}
	return d, nil
}

func (k fakeKernel) ReadInRootfs(_, name string) ([]byte, error) {
	d, ok := k.rootfs[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return []byte(d), nil
}

func (k fakeKernel) ReadFile(p string) ([]byte, error) {
	d, ok := k.files[p]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return []byte(d), nil
}

func (k fakeKernel) AppArmorProfiles() (map[string]bool, error) { return k.profiles, nil }

func allCaps() []string { return capabilityNames() }

func testInput() Input {
	return Input{
		ID: "c1", SandboxID: "s1",
		Container: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "web"},
			Image:    &runtimeapi.ImageSpec{Image: "sha256:abc", UserSpecifiedImage: "web:1"},
			Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			}},
		},
		Sandbox: &runtimeapi.PodSandboxConfig{
			Metadata: &runtimeapi.PodSandboxMetadata{Name: "pod", Namespace: "ns", Uid: "uid"},
			Hostname: "pod-host",
		},
		Image:      &ocispec.Image{Config: ocispec.ImageConfig{Entrypoint: []string{"/bin/web"}, Cmd: []string{"--port", "80"}, Env: []string{"A=image", "PATH=/bin"}}},
		Rootfs:     "/rootfs",
		Cgroup:     "/kubepods/pod1/c1",
		Namespaces: Namespaces{Net: "/ns/net", IPC: "/ns/ipc", UTS: "/ns/uts"},
		Files:      FilesIn("/sb"),
		Host:       HostInfo{Hostname: "node", Capabilities: allCaps(), Seccomp: true, RecursiveReadOnly: true, IDMappedMounts: true, OOMScoreFloor: -1000},
		Kernel: fakeKernel{rootfs: map[string]string{
			"/etc/passwd": "root:x:0:0::/root:/bin/sh\nweb:x:1000:1001::/:/bin/sh\nbad:x:zero:0:::\n",
			"/etc/group":  "root:x:0:\nweb:x:1001:\ntape:x:26:web,root\n",
		}},
	}
}

func TestContainerIsAcceptedByLibcontainer(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	in := testInput()
	in.Rootfs = t.TempDir()
	in.Host = h
	in.Kernel = nil
	in.Namespaces = Namespaces{Net: "/proc/self/ns/net", IPC: "/proc/self/ns/ipc", UTS: "/proc/self/ns/uts"}
	for _, privileged := range []bool{false, true} {
		in.Sandbox.Linux = &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{Privileged: privileged}}
		in.Container.Linux.SecurityContext.Privileged = privileged
		in.Container.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{}
		s, _, err := Container(in)
		if err != nil {
			t.Fatal(err)
		}
		convert(t, s)
	}
	p, err := Pause(PauseInput{ID: "p", Rootfs: t.TempDir(), Host: h, Namespaces: in.Namespaces})
	if err != nil {
		t.Fatal(err)
	}
	convert(t, p)
	t.Logf("%+v", h)
}

func TestPrivilegedNeedsPrivilegedSandbox(t *testing.T) {
	in := testInput()
	in.Container.Linux.SecurityContext.Privileged = true
	if _, _, err := Container(in); !errdefs.IsInvalidArgument(err) {
		t.Fatalf("got %v, want InvalidArgument", err)
	}
}
