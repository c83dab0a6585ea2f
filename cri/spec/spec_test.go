package spec

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
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
}

// baseSpec is what testInput gives, written out.
func baseSpec() *specs.Spec {
	caps := func() []string { return DefaultCapabilities() }
	return &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: "/rootfs"},
		Process: &specs.Process{
			Args: []string{"/bin/web", "--port", "80"},
			Cwd:  "/",
			Env:  []string{"PATH=/bin", "HOSTNAME=pod-host", "A=image"},
			User: specs.User{AdditionalGids: []uint32{0, 26}},
			Capabilities: &specs.LinuxCapabilities{
				Bounding: caps(), Effective: caps(), Permitted: caps(),
			},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
			{Destination: "/etc/hostname", Type: "bind", Source: "/sb/hostname", Options: []string{"rbind", "rprivate", "rw"}},
			{Destination: "/etc/resolv.conf", Type: "bind", Source: "/sb/resolv.conf", Options: []string{"rbind", "rprivate", "rw"}},
			{Destination: "/dev/shm", Type: "bind", Source: "/sb/shm", Options: []string{"rbind", "rprivate", "rw", "nosuid", "nodev", "noexec"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/kubepods/pod1/c1",
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.MountNamespace},
				{Type: specs.NetworkNamespace, Path: "/ns/net"},
				{Type: specs.IPCNamespace, Path: "/ns/ipc"},
				{Type: specs.UTSNamespace, Path: "/ns/uts"},
				{Type: specs.PIDNamespace},
			},
			Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}}},
		},
		Annotations: map[string]string{
			"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.container-name": "web",
			"io.kubernetes.cri.sandbox-id": "s1", "io.kubernetes.cri.sandbox-name": "pod",
			"io.kubernetes.cri.sandbox-namespace": "ns", "io.kubernetes.cri.sandbox-uid": "uid",
			"io.kubernetes.cri.image-name": "web:1",
		},
	}
}

// sc is the security context of in.
func sc(in *Input) *runtimeapi.LinuxContainerSecurityContext {
	return in.Container.Linux.SecurityContext
}

func podSC(in *Input) *runtimeapi.LinuxSandboxSecurityContext {
	if in.Sandbox.Linux == nil {
		in.Sandbox.Linux = &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{}}
	}
	return in.Sandbox.Linux.SecurityContext
}

func setCaps(s *specs.Spec, caps, ambient []string) {
	s.Process.Capabilities = &specs.LinuxCapabilities{
		Bounding: caps, Effective: caps, Permitted: caps, Inheritable: ambient, Ambient: ambient,
	}
}

func bind(dst, src string, opts ...string) specs.Mount {
	return specs.Mount{Destination: dst, Type: "bind", Source: src, Options: append([]string{"rbind"}, opts...)}
}

// insert puts m before the mount on dst.
func insert(s *specs.Spec, dst string, m ...specs.Mount) {
	i := slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == dst })
	s.Mounts = slices.Insert(s.Mounts, i, m...)
}

func remove(s *specs.Spec, dst ...string) {
	s.Mounts = slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool { return slices.Contains(dst, m.Destination) })
}

func ns(s *specs.Spec, n ...specs.LinuxNamespace) { s.Linux.Namespaces = n }

// oldSeccomp and oldAppArmor are the deprecated ways, which old kubelets use.
func oldSeccomp(in *Input, path string) {
	//lint:ignore SA1019 see above
	sc(in).SeccompProfilePath = path
}

func oldAppArmor(in *Input, path string) {
	//lint:ignore SA1019 see above
	sc(in).ApparmorProfile = path
}

func num(v int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: v} }

func TestContainer(t *testing.T) {
	mount, net, ipc, uts := specs.LinuxNamespace{Type: specs.MountNamespace}, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: "/ns/net"},
		specs.LinuxNamespace{Type: specs.IPCNamespace, Path: "/ns/ipc"}, specs.LinuxNamespace{Type: specs.UTSNamespace, Path: "/ns/uts"}
	pid := specs.LinuxNamespace{Type: specs.PIDNamespace}
	null := specs.LinuxDevice{Path: "/dev/null", Type: "c", Major: 1, Minor: 3, FileMode: ptr(os.FileMode(0o666)), UID: ptr(uint32(0)), GID: ptr(uint32(0))}
	disk := specs.LinuxDevice{Path: "/dev/d/a/b", Type: "b", Major: 8, Minor: 1, FileMode: ptr(os.FileMode(0o660)), UID: ptr(uint32(0)), GID: ptr(uint32(6))}
	userMap := []*runtimeapi.IDMapping{{HostId: 100000, Length: 65536}}
	ociMap := []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
	podUser := &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: userMap, Gids: userMap}

	for name, tc := range map[string]struct {
		in   func(*Input)
		want func(*specs.Spec)
	}{
		"default": {func(*Input) {}, func(*specs.Spec) {}},
		"no image config": {
			func(in *Input) { in.Image = nil; in.Container.Command = []string{"x"} },
			func(s *specs.Spec) {
				s.Process.Args = []string{"x"}
				s.Process.Env = []string{defaultPath, "HOSTNAME=pod-host"}
			},
		},
		"args replace cmd":      {func(in *Input) { in.Container.Args = []string{"-v"} }, func(s *specs.Spec) { s.Process.Args = []string{"/bin/web", "-v"} }},
		"command replaces both": {func(in *Input) { in.Container.Command = []string{"sh"} }, func(s *specs.Spec) { s.Process.Args = []string{"sh"} }},
		"command and args": {
			func(in *Input) {
				in.Container.Command, in.Container.Args = []string{"sh"}, []string{"-c", "a 'b' \x01\u00e4\n"}
			},
			func(s *specs.Spec) { s.Process.Args = []string{"sh", "-c", "a 'b' \x01\u00e4\n"} },
		},
		"terminal and environment": {
			func(in *Input) {
				in.Container.Tty = true
				in.Container.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("mine=1\n")}, {Key: "TERM", Value: []byte("dumb")}, {Key: "E"}}
				in.Image.Config.Env = append(in.Image.Config.Env, "BARE", "=x")
			},
			func(s *specs.Spec) {
				s.Process.Terminal = true
				s.Process.Env = []string{"PATH=/bin", "TERM=dumb", "HOSTNAME=pod-host", "A=mine=1\n", "E="}
			},
		},
		"host's name in a host network pod": {
			func(in *Input) { in.Sandbox.Hostname = "" },
			func(s *specs.Spec) { s.Process.Env[1] = "HOSTNAME=node" },
		},
		"working dir of the image": {func(in *Input) { in.Image.Config.WorkingDir = "app/../srv" }, func(s *specs.Spec) { s.Process.Cwd = "/srv" }},
		"working dir":              {func(in *Input) { in.Image.Config.WorkingDir = "/a"; in.Container.WorkingDir = "/b" }, func(s *specs.Spec) { s.Process.Cwd = "/b" }},
		"read-only rootfs": {
			func(in *Input) { sc(in).ReadonlyRootfs = true },
			func(s *specs.Spec) {
				s.Root.Readonly = true
				for i := range s.Mounts {
					if strings.HasPrefix(s.Mounts[i].Destination, "/etc/") {
						s.Mounts[i].Options = []string{"rbind", "rprivate", "ro"}
					}
				}
			},
		},
		"no new privileges": {func(in *Input) { sc(in).NoNewPrivs = true }, func(s *specs.Spec) { s.Process.NoNewPrivileges = true }},
		"masked paths": {
			func(in *Input) {
				sc(in).MaskedPaths = []string{"/proc/kcore"}
				sc(in).ReadonlyPaths = []string{"/proc/sys"}
			},
			func(s *specs.Spec) {
				s.Linux.MaskedPaths = []string{"/proc/kcore"}
				s.Linux.ReadonlyPaths = []string{"/proc/sys"}
			},
		},
		"drop all, add one": {
			func(in *Input) {
				sc(in).Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"all"}, AddCapabilities: []string{"net_admin", "CAP_CHOWN", "NET_ADMIN"}}
			},
			func(s *specs.Spec) { setCaps(s, []string{"CAP_NET_ADMIN", "CAP_CHOWN"}, nil) },
		},
		"add all, drop one": {
			func(in *Input) {
				sc(in).Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"ALL"}, DropCapabilities: []string{"CHOWN"}}
			},
			func(s *specs.Spec) { setCaps(s, allCaps()[1:], nil) },
		},
		"ambient": {
			func(in *Input) {
				sc(in).Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}, AddAmbientCapabilities: []string{"NET_RAW"}}
			},
			func(s *specs.Spec) { setCaps(s, []string{"CAP_NET_RAW"}, []string{"CAP_NET_RAW"}) },
		},
		"ambient that is dropped": {
			func(in *Input) {
				sc(in).Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL", "NET_RAW"}, AddAmbientCapabilities: []string{"NET_RAW"}}
			},
			func(s *specs.Spec) { setCaps(s, nil, nil) },
		},
		"privileged": {
			func(in *Input) {
				sc(in).Privileged, podSC(in).Privileged = true, true
				sc(in).Seccomp = &runtimeapi.SecurityProfile{}
				sc(in).MaskedPaths = []string{"/proc/kcore"}
				k := in.Kernel.(fakeKernel)
				k.devs = map[string][]specs.LinuxDevice{"/dev": {null, disk}, "/dev/null": {null}}
				in.Kernel = k
				in.Container.Devices = []*runtimeapi.Device{{HostPath: "/dev/null", Permissions: "r"}}
				in.Host.CgroupUnified, in.Host.CgroupMountOptions = true, []string{"nsdelegate"}
			},
			func(s *specs.Spec) {
				setCaps(s, allCaps(), nil)
				s.Mounts[4].Options = []string{"nosuid", "noexec", "nodev", "rw"}
				s.Mounts[5].Options = []string{"nosuid", "noexec", "nodev", "relatime", "rw", "nsdelegate"}
				s.Linux.Devices = []specs.LinuxDevice{null, disk}
				s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
			},
		},
		"privileged without host devices": {
			func(in *Input) {
				sc(in).Privileged, podSC(in).Privileged = true, true
				in.Defaults.PrivilegedWithoutHostDevices = true
			},
			func(s *specs.Spec) {
				setCaps(s, allCaps(), nil)
				s.Mounts[4].Options = []string{"nosuid", "noexec", "nodev", "rw"}
				s.Mounts[5].Options = []string{"nosuid", "noexec", "nodev", "relatime", "rw"}
				s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
			},
		},
		"host namespaces": {
			func(in *Input) {
				sc(in).NamespaceOptions = &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE, Ipc: runtimeapi.NamespaceMode_NODE, Pid: runtimeapi.NamespaceMode_NODE}
				in.Namespaces = Namespaces{}
			},
			func(s *specs.Spec) {
				ns(s, mount)
				s.Mounts[8].Source = "/dev/shm"
			},
		},
		"cgroup v2 has a cgroup namespace": {
			func(in *Input) { in.Host.CgroupUnified, in.Host.CgroupMountOptions = true, []string{"nsdelegate"} },
			func(s *specs.Spec) {
				ns(s, mount, net, ipc, uts, pid, specs.LinuxNamespace{Type: specs.CgroupNamespace})
			},
		},
		"pod's PID namespace": {
			func(in *Input) {
				sc(in).NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
				in.Namespaces.PID = "/proc/7/ns/pid"
			},
			func(s *specs.Spec) {
				ns(s, mount, net, ipc, uts, specs.LinuxNamespace{Type: specs.PIDNamespace, Path: "/proc/7/ns/pid"})
			},
		},
		"another container's PID namespace": {
			func(in *Input) {
				sc(in).NamespaceOptions.Pid, sc(in).NamespaceOptions.TargetId = runtimeapi.NamespaceMode_TARGET, "c0"
				in.Namespaces.PID = "/proc/8/ns/pid"
			},
			func(s *specs.Spec) {
				ns(s, mount, net, ipc, uts, specs.LinuxNamespace{Type: specs.PIDNamespace, Path: "/proc/8/ns/pid"})
			},
		},
		"user namespace": {
			func(in *Input) {
				sc(in).NamespaceOptions.UsernsOptions = podUser
				podSC(in).NamespaceOptions = &runtimeapi.NamespaceOption{UsernsOptions: podUser}
				in.Namespaces.User = "/ns/user"
				in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "/data", HostPath: "/h", UidMappings: userMap, GidMappings: userMap}}
			},
			func(s *specs.Spec) {
				ns(s, mount, net, ipc, uts, pid, specs.LinuxNamespace{Type: specs.UserNamespace, Path: "/ns/user"})
				m := bind("/data", "/h", "rprivate", "rw")
				m.UIDMappings, m.GIDMappings = ociMap, ociMap
				insert(s, "/etc/hostname", m)
			},
		},
		"user namespace on the host's network": {
			func(in *Input) {
				sc(in).NamespaceOptions.UsernsOptions, sc(in).NamespaceOptions.Network = podUser, runtimeapi.NamespaceMode_NODE
				podSC(in).NamespaceOptions = &runtimeapi.NamespaceOption{UsernsOptions: podUser}
				in.Namespaces = Namespaces{User: "/ns/user", IPC: "/ns/ipc"}
				in.Host.IDMappedMounts = false
			},
			func(s *specs.Spec) {
				ns(s, mount, ipc, pid, specs.LinuxNamespace{Type: specs.UserNamespace, Path: "/ns/user"})
				s.Mounts[4] = bind("/sys", "/sys", "rro", "nosuid", "nodev", "noexec")
			},
		},
		"user by name, strict groups": {
			func(in *Input) {
				sc(in).RunAsUsername, sc(in).RunAsUser = "web", num(7)
				sc(in).SupplementalGroups = []int64{9, 5, 9}
				sc(in).SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
			},
			func(s *specs.Spec) {
				s.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{5, 9, 1001}}
			},
		},
		"user by number, group, merged groups": {
			func(in *Input) {
				sc(in).RunAsUser, sc(in).RunAsGroup = num(1000), num(3000)
				sc(in).SupplementalGroups = []int64{5}
			},
			func(s *specs.Spec) {
				s.Process.User = specs.User{UID: 1000, GID: 3000, AdditionalGids: []uint32{5, 26, 3000}}
			},
		},
		"number that passwd does not know": {
			func(in *Input) { sc(in).RunAsUser = num(4242) },
			func(s *specs.Spec) { s.Process.User = specs.User{UID: 4242, AdditionalGids: []uint32{0}} },
		},
		"user of the image": {
			func(in *Input) { in.Image.Config.User = "web:tape" },
			func(s *specs.Spec) { s.Process.User = specs.User{UID: 1000, GID: 26, AdditionalGids: []uint32{26}} },
		},
		"no user files": {
			func(in *Input) { in.Kernel = fakeKernel{}; in.Image.Config.User = "12:13" },
			func(s *specs.Spec) { s.Process.User = specs.User{UID: 12, GID: 13, AdditionalGids: []uint32{13}} },
		},
		"mounts": {
			func(in *Input) {
				in.Kernel = fakeKernel{links: map[string]string{"/link": "/real"}, mounts: map[string]Propagation{"/shared": {Shared: true}, "/slave": {Slave: true}}}
				in.Container.Mounts = []*runtimeapi.Mount{
					{ContainerPath: "/a/deep/one", HostPath: "/link", Readonly: true},
					{ContainerPath: "/etc/hostname/", HostPath: "/mine"},
					{ContainerPath: "rel", HostPath: "/slave", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
					{ContainerPath: "/b", HostPath: "/shared", Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL},
					{ContainerPath: "/c", HostPath: "/c", Readonly: true, RecursiveReadOnly: true, MountOptions: []string{"noexec", "nodev"}},
					{ContainerPath: "/img", Image: &runtimeapi.ImageSpec{Image: "sha256:1"}},
				}
				in.ImageMounts = map[string]string{"/img": "/prepared"}
			},
			func(s *specs.Spec) {
				s.Process.User.AdditionalGids = []uint32{0}
				s.Linux.RootfsPropagation = "rshared"
				remove(s, "/etc/hostname")
				insert(s, "/etc/resolv.conf", bind("/rel", "/slave", "rslave", "rw"), bind("/b", "/shared", "rshared", "rw"),
					bind("/c", "/c", "rprivate", "rro", "noexec", "nodev"), bind("/img", "/prepared", "rprivate", "ro"), bind("/etc/hostname", "/mine", "rprivate", "rw"))
				s.Mounts = append(s.Mounts, bind("/a/deep/one", "/real", "rprivate", "ro"))
			},
		},
		"own /dev hides ours": {
			func(in *Input) { in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "/dev", HostPath: "/dev"}} },
			func(s *specs.Spec) {
				remove(s, "/dev", "/dev/pts", "/dev/mqueue", "/dev/shm")
				insert(s, "/etc/hostname", bind("/dev", "/dev", "rprivate", "rw"))
			},
		},
		"volumes of the image": {
			func(in *Input) {
				in.Image.Config.Volumes = map[string]struct{}{"/z": {}, "a/b": {}, "/covered": {}, "/": {}}
				in.VolumeDir = "/vols"
				in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "/covered", HostPath: "/h"}}
			},
			func(s *specs.Spec) {
				insert(s, "/etc/hostname", bind("/covered", "/h", "rprivate", "rw"), bind("/z", "/vols/002", "rprivate", "rw"))
				s.Mounts = append(s.Mounts, bind("/a/b", "/vols/003", "rprivate", "rw"))
			},
		},
		"devices": {
			func(in *Input) {
				in.Kernel = fakeKernel{devs: map[string][]specs.LinuxDevice{"/dev/null": {null}, "/dev/d": {disk}}}
				in.Container.Devices = []*runtimeapi.Device{
					{HostPath: "/dev/null", ContainerPath: "/dev/x", Permissions: "r"}, {HostPath: "/dev/d", ContainerPath: "/dev/e", Permissions: "rwm"}}
				in.Defaults.DeviceOwnership = true
				sc(in).RunAsUser, sc(in).RunAsGroup = num(5), num(6)
			},
			func(s *specs.Spec) {
				x, e := null, disk
				x.Path, x.UID, x.GID = "/dev/x", ptr(uint32(5)), ptr(uint32(6))
				e.Path, e.UID, e.GID = "/dev/e/a/b", ptr(uint32(5)), ptr(uint32(6))
				s.Linux.Devices = []specs.LinuxDevice{x, e}
				s.Linux.Resources.Devices = append(s.Linux.Resources.Devices,
					specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "r"},
					specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: ptr(int64(8)), Minor: ptr(int64(1)), Access: "rwm"})
				s.Process.User = specs.User{UID: 5, GID: 6, AdditionalGids: []uint32{6}}
			},
		},
		"resources": {
			func(in *Input) {
				in.Host.SwapLimit, in.Host.Hugetlb, in.Host.CgroupUnified = true, true, true
				in.Host.OOMScoreFloor = -500
				in.Defaults.PidsLimit = 100
				in.Defaults.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 4096}}
				in.Container.Linux.Resources = &runtimeapi.LinuxContainerResources{
					CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, CpusetCpus: "0-1", CpusetMems: "0", MemoryLimitInBytes: 1 << 20,
					OomScoreAdj: -900, HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}}, Unified: map[string]string{"memory.high": "1"},
				}
			},
			func(s *specs.Spec) {
				ns(s, mount, net, ipc, uts, pid, specs.LinuxNamespace{Type: specs.CgroupNamespace})
				s.Process.OOMScoreAdj = ptr(-500)
				s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 4096}}
				s.Linux.Resources = &specs.LinuxResources{
					Devices:        s.Linux.Resources.Devices,
					CPU:            &specs.LinuxCPU{Period: ptr(uint64(100000)), Quota: ptr(int64(50000)), Shares: ptr(uint64(512)), Cpus: "0-1", Mems: "0"},
					Memory:         &specs.LinuxMemory{Limit: ptr(int64(1 << 20)), Swap: ptr(int64(1 << 20))},
					Pids:           &specs.LinuxPids{Limit: ptr(int64(100))},
					HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4 << 20}},
					Unified:        map[string]string{"memory.high": "1"},
				}
			},
		},
		"seccomp default": {
			func(in *Input) { sc(in).Seccomp = &runtimeapi.SecurityProfile{} },
			func(s *specs.Spec) { s.Linux.Seccomp = DefaultSeccomp(DefaultCapabilities()) },
		},
		"seccomp default for none": {
			func(in *Input) { in.Defaults.SeccompUnset = SeccompUnsetRuntimeDefault },
			func(s *specs.Spec) { s.Linux.Seccomp = DefaultSeccomp(DefaultCapabilities()) },
		},
		"seccomp unconfined": {
			func(in *Input) {
				in.Defaults.SeccompUnset = SeccompUnsetRuntimeDefault
				sc(in).Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
			},
			func(*specs.Spec) {},
		},
		"seccomp localhost": {
			func(in *Input) {
				k := in.Kernel.(fakeKernel)
				k.files = map[string]string{"/p.json": `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}]}`}
				in.Kernel = k
				sc(in).Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "localhost//p.json"}
			},
			func(s *specs.Spec) {
				s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: specs.ActErrno}}}
			},
		},
		"seccomp by the old path": {
			func(in *Input) { oldSeccomp(in, "runtime/default") },
			func(s *specs.Spec) { s.Linux.Seccomp = DefaultSeccomp(DefaultCapabilities()) },
		},
		"AppArmor default": {
			func(in *Input) { in.Host.AppArmor, in.Host.AppArmorDefault = true, "def" },
			func(s *specs.Spec) { s.Process.ApparmorProfile = "def" },
		},
		"AppArmor localhost": {
			func(in *Input) {
				in.Host.AppArmor = true
				k := in.Kernel.(fakeKernel)
				k.profiles = map[string]bool{"mine": true}
				in.Kernel = k
				sc(in).Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "mine"}
			},
			func(s *specs.Spec) { s.Process.ApparmorProfile = "mine" },
		},
		"AppArmor unconfined": {
			func(in *Input) {
				in.Host.AppArmor, in.Host.AppArmorDefault = true, "def"
				oldAppArmor(in, "unconfined")
			},
			func(*specs.Spec) {},
		},
		"SELinux options on a host without": {
			func(in *Input) { sc(in).SelinuxOptions = &runtimeapi.SELinuxOption{Level: "s0:c1,c2"} },
			func(*specs.Spec) {},
		},
		"ten thousand annotations stay outside": {
			func(in *Input) {
				in.Container.Annotations = map[string]string{"org.systemd.property.Slice": "'x'"}
				for i := range 10_000 {
					in.Container.Annotations[fmt.Sprintf("k%d\x01\n", i)] = "v"
				}
			},
			func(*specs.Spec) {},
		},
	} {
		t.Run(name, func(t *testing.T) {
			in, want := testInput(), baseSpec()
			tc.in(&in)
			tc.want(want)
			got, user, err := Container(in)
			if err != nil {
				t.Fatal(err)
			}
			if g, w := indent(t, got), indent(t, want); g != w {
				t.Errorf("got\n%s\nwant\n%s", diff(g, w), "(lines with -)")
			}
			if u := got.Process.User; user.UID != u.UID || user.GID != u.GID || !slices.Equal(user.Groups, u.AdditionalGids) {
				t.Errorf("status has user %+v, spec %+v", user, u)
			}
			again, _, err := Container(in)
			if err != nil || indent(t, again) != indent(t, got) {
				t.Errorf("not the same twice: %v", err)
			}
		})
	}
}

func indent(t *testing.T, v any) string {
	t.Helper()
	data, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// diff shows the lines that only one has, good enough to see what is wrong.
func diff(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	var out []string
	for _, l := range g {
		if !slices.Contains(w, l) {
			out = append(out, "+"+l)
		}
	}
	for _, l := range w {
		if !slices.Contains(g, l) {
			out = append(out, "-"+l)
		}
	}
	if len(out) == 0 {
		return got // only the order differs
	}
	return strings.Join(out, "\n")
}

func TestContainerRefuses(t *testing.T) {
	invalid, lacks, missing := errdefs.IsInvalidArgument, errdefs.IsFailedPrecondition, errdefs.IsNotFound
	one := []*runtimeapi.IDMapping{{HostId: 1, Length: 10}}
	mounts := func(m *runtimeapi.Mount) func(*Input) {
		return func(in *Input) { in.Container.Mounts = []*runtimeapi.Mount{m} }
	}
	resources := func(r *runtimeapi.LinuxContainerResources) func(*Input) {
		return func(in *Input) { in.Container.Linux.Resources = r }
	}
	addCap := func(c string) func(*Input) {
		return func(in *Input) { sc(in).Capabilities = &runtimeapi.Capability{AddCapabilities: []string{c}} }
	}
	device := func(d *runtimeapi.Device) func(*Input) {
		return func(in *Input) { in.Container.Devices = []*runtimeapi.Device{d} }
	}
	seccomp := func(p *runtimeapi.SecurityProfile) func(*Input) { return func(in *Input) { sc(in).Seccomp = p } }
	apparmor := func(on bool, p *runtimeapi.SecurityProfile) func(*Input) {
		return func(in *Input) { in.Host.AppArmor = on; sc(in).Apparmor = p }
	}
	local := func(ref string) *runtimeapi.SecurityProfile {
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: ref}
	}
	user := func(u *runtimeapi.UserNamespace) func(*Input) {
		return func(in *Input) {
			podSC(in).NamespaceOptions = &runtimeapi.NamespaceOption{UsernsOptions: u}
			sc(in).NamespaceOptions.UsernsOptions = u
		}
	}
	bidirectional := runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL
	for name, tc := range map[string]struct {
		in    func(*Input)
		class func(error) bool
		text  string // of the error: field, value, allowed
	}{
		"no container":         {func(in *Input) { in.Container = nil }, invalid, "container config is missing"},
		"no sandbox":           {func(in *Input) { in.Sandbox = nil }, invalid, "sandbox config is missing"},
		"relative rootfs":      {func(in *Input) { in.Rootfs = "x" }, invalid, `rootfs "x": allowed is an absolute path`},
		"privileged":           {func(in *Input) { sc(in).Privileged = true }, invalid, "linux.security_context.privileged is true"},
		"nothing to run":       {func(in *Input) { in.Image = nil }, invalid, "command"},
		"reset entrypoint":     {func(in *Input) { in.Image.Config.Entrypoint, in.Image.Config.Cmd = []string{""}, nil }, invalid, "command"},
		"NUL in args":          {func(in *Input) { in.Container.Args = []string{"a\x00b"} }, invalid, `command is "a\x00b"`},
		"broken UTF-8 in args": {func(in *Input) { in.Container.Args = []string{"a\xff"} }, invalid, "UTF-8"},
		"env name":             {func(in *Input) { in.Container.Envs = []*runtimeapi.KeyValue{{Key: "A=B"}} }, invalid, `envs.key is "A=B"`},
		"env value":            {func(in *Input) { in.Container.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte{0}}} }, invalid, "envs.value"},
		"working dir":          {func(in *Input) { in.Container.WorkingDir = "/a\x00" }, invalid, "working_dir"},
		"group without user":   {func(in *Input) { sc(in).RunAsGroup = num(5) }, invalid, "linux.security_context.run_as_group is 5: allowed is unset without run_as_user"},
		"negative user":        {func(in *Input) { sc(in).RunAsUser = num(-1) }, invalid, "run_as_user is -1: allowed is 0 to 2147483647"},
		"large group":          {func(in *Input) { sc(in).RunAsUser, sc(in).RunAsGroup = num(1), num(1<<31) }, invalid, "run_as_group is 2147483648"},
		"unknown user":         {func(in *Input) { sc(in).RunAsUsername = "nobody" }, missing, `user "nobody": no such user`},
		"user with bad line":   {func(in *Input) { sc(in).RunAsUsername = "bad" }, missing, `user "bad": no such user`},
		"user name with colon": {func(in *Input) { sc(in).RunAsUsername = "a:b" }, invalid, `run_as_username is "a:b"`},
		"unknown group":        {func(in *Input) { in.Image.Config.User = "web:nogroup" }, missing, `group "nogroup": no such group`},
		"image user":           {func(in *Input) { in.Image.Config.User = "a:b:c" }, invalid, `user is "a:b:c"`},
		"image user too large": {func(in *Input) { in.Image.Config.User = "99999999999999999999" }, invalid, "user is"},
		"supplemental group":   {func(in *Input) { sc(in).SupplementalGroups = []int64{-5} }, invalid, "supplemental_groups is -5"},
		"groups policy":        {func(in *Input) { sc(in).SupplementalGroupsPolicy = 9 }, invalid, "supplemental_groups_policy is 9: allowed is Merge or Strict"},
		"capability":           {addCap("FLY"), invalid, `add_capabilities is "FLY": allowed is ALL or one of CHOWN`},
		"capability not held":  {func(in *Input) { in.Host.Capabilities = nil; addCap("CHOWN")(in) }, lacks, `"CHOWN": this daemon does not hold it`},
		"pid mode":             {func(in *Input) { sc(in).NamespaceOptions.Pid = 9 }, invalid, "namespace_options.pid is 9: allowed is POD, CONTAINER, NODE or TARGET"},
		"no pid namespace":     {func(in *Input) { sc(in).NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD }, invalid, "namespace_options.pid is POD"},
		"network mode":         {func(in *Input) { sc(in).NamespaceOptions.Network = runtimeapi.NamespaceMode_CONTAINER }, invalid, "namespace_options.network is CONTAINER"},
		"user mode":            {user(&runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_CONTAINER}), invalid, "userns_options.mode is CONTAINER: allowed is POD or NODE"},
		"two mappings":         {user(&runtimeapi.UserNamespace{Uids: append(one, one...), Gids: one}), invalid, "userns_options.uids is \"2 mappings\": allowed is exactly one"},
		"no mappings":          {user(&runtimeapi.UserNamespace{}), invalid, "0 mappings"},
		"root not mapped":      {user(&runtimeapi.UserNamespace{Uids: one, Gids: []*runtimeapi.IDMapping{{ContainerId: 1, Length: 1}}}), invalid, "gids.container_id is 1"},
		"empty mapping":        {user(&runtimeapi.UserNamespace{Uids: []*runtimeapi.IDMapping{{}}, Gids: one}), invalid, "uids.length is 0"},
		"mapping wraps":        {user(&runtimeapi.UserNamespace{Uids: []*runtimeapi.IDMapping{{HostId: 1<<32 - 2, Length: 9}}, Gids: one}), invalid, "ranges below"},
		"node with mappings":   {user(&runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_NODE, Uids: one}), invalid, "mode is NODE"},
		"user not as sandbox": {func(in *Input) {
			sc(in).NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Uids: one, Gids: one}
		}, invalid, "what the sandbox has"},
		"user without path":  {user(&runtimeapi.UserNamespace{Uids: one, Gids: one}), invalid, "the sandbox has no user namespace"},
		"no container path":  {mounts(&runtimeapi.Mount{HostPath: "/x"}), invalid, `mounts[0].container_path is ""`},
		"relative host path": {mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "x"}), invalid, `mounts[0].host_path is "x": allowed is an absolute path`},
		"host path gone": {func(in *Input) {
			in.Kernel = fakeKernel{missing: map[string]bool{"/x": true}}
			mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x"})(in)
		}, missing, `host_path "/x"`},
		"propagation":     {mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", Propagation: 7}), invalid, "mounts[0].propagation is 7"},
		"not shared":      {mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", Propagation: bidirectional}), lacks, "not shared"},
		"not a slave":     {mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", Propagation: 1}), lacks, "neither shared nor a slave"},
		"rro writable":    {mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", RecursiveReadOnly: true}), invalid, "recursive_read_only is true: allowed is false on a writable mount"},
		"rro propagation": {mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", Readonly: true, RecursiveReadOnly: true, Propagation: 1}), invalid, "PROPAGATION_PRIVATE with recursive_read_only"},
		"rro kernel": {func(in *Input) {
			in.Host.RecursiveReadOnly = false
			mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", Readonly: true, RecursiveReadOnly: true})(in)
		}, lacks, "recursive_read_only"},
		"mount option": {mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", MountOptions: []string{"size=1"}}), invalid, `mount_options is "size=1": allowed is noexec`},
		"one idmap":    {mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", UidMappings: one}), invalid, "set together with gidMappings"},
		"idmap kernel": {func(in *Input) {
			in.Host.IDMappedMounts = false
			mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", UidMappings: one, GidMappings: one})(in)
		}, lacks, "idmapped mounts"},
		"image and path":        {mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", Image: &runtimeapi.ImageSpec{Image: "i"}}), invalid, "empty when image is set"},
		"image not mounted":     {mounts(&runtimeapi.Mount{ContainerPath: "/x", Image: &runtimeapi.ImageSpec{Image: "i"}}), lacks, `image "i"`},
		"masked path":           {func(in *Input) { sc(in).MaskedPaths = []string{"proc"} }, invalid, `masked_paths is "proc"`},
		"device permissions":    {device(&runtimeapi.Device{HostPath: "/dev/null", Permissions: "x"}), invalid, `devices[0].permissions is "x": allowed is one or more of r, w, m`},
		"no device permissions": {device(&runtimeapi.Device{HostPath: "/dev/null"}), invalid, "permissions"},
		"device path":           {device(&runtimeapi.Device{HostPath: "null", Permissions: "r"}), invalid, "host_path"},
		"device in container":   {device(&runtimeapi.Device{HostPath: "/dev/null", ContainerPath: "x", Permissions: "r"}), invalid, "container_path"},
		"no such device":        {device(&runtimeapi.Device{HostPath: "/dev/none", Permissions: "r"}), missing, `"/dev/none"`},
		"cpu period":            {resources(&runtimeapi.LinuxContainerResources{CpuPeriod: 5}), invalid, "linux.resources.cpu_period is 5: allowed is 0 (unset) or 1000 to 1000000"},
		"cpu quota":             {resources(&runtimeapi.LinuxContainerResources{CpuQuota: 5}), invalid, "cpu_quota is 5"},
		"cpu shares":            {resources(&runtimeapi.LinuxContainerResources{CpuShares: 1}), invalid, "cpu_shares is 1"},
		"memory":                {resources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: -7}), invalid, "memory_limit_in_bytes is -7"},
		"swap":                  {resources(&runtimeapi.LinuxContainerResources{MemorySwapLimitInBytes: -7}), invalid, "memory_swap_limit_in_bytes is -7"},
		"swap below memory": {func(in *Input) {
			in.Host.SwapLimit = true
			resources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 9, MemorySwapLimitInBytes: 8})(in)
		}, invalid, "at least the memory limit (9)"},
		"oom score":        {resources(&runtimeapi.LinuxContainerResources{OomScoreAdj: 1001}), invalid, "oom_score_adj is 1001"},
		"cpuset":           {resources(&runtimeapi.LinuxContainerResources{CpusetCpus: "all"}), invalid, `cpuset_cpus is "all"`},
		"unified on v1":    {resources(&runtimeapi.LinuxContainerResources{Unified: map[string]string{"memory.max": "1"}}), lacks, "cgroup v2"},
		"unified path":     {resources(&runtimeapi.LinuxContainerResources{Unified: map[string]string{"../x": "1"}}), invalid, "linux.resources.unified"},
		"hugepage size":    {resources(&runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2"}}}), invalid, `hugepage_limits[0].page_size is "2"`},
		"hugepages":        {resources(&runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 1}}}), lacks, "hugetlb"},
		"seccomp ref":      {seccomp(&runtimeapi.SecurityProfile{LocalhostRef: "/x"}), invalid, `seccomp.localhost_ref is "/x": allowed is empty unless`},
		"seccomp type":     {seccomp(&runtimeapi.SecurityProfile{ProfileType: 9}), invalid, "seccomp.profile_type is 9"},
		"seccomp relative": {seccomp(local("x.json")), invalid, "an absolute path"},
		"seccomp missing":  {seccomp(local("/x.json")), missing, `profile "/x.json"`},
		"seccomp not JSON": {func(in *Input) { in.Kernel = fakeKernel{files: map[string]string{"/x": "{"}}; seccomp(local("/x"))(in) }, invalid, "is not a seccomp profile"},
		"seccomp empty": {func(in *Input) {
			in.Kernel = fakeKernel{files: map[string]string{"/x": "{}"}}
			seccomp(local("/x"))(in)
		}, invalid, "a profile with a defaultAction"},
		"no seccomp":          {func(in *Input) { in.Host.Seccomp = false; seccomp(&runtimeapi.SecurityProfile{})(in) }, lacks, "this host has no seccomp"},
		"old seccomp path":    {func(in *Input) { oldSeccomp(in, "mine") }, invalid, `seccomp_profile is "mine"`},
		"no AppArmor":         {apparmor(false, &runtimeapi.SecurityProfile{}), lacks, "this host has no AppArmor"},
		"AppArmor not loaded": {apparmor(true, local("mine")), missing, `AppArmor profile "mine" is not loaded`},
		"AppArmor no default": {apparmor(true, &runtimeapi.SecurityProfile{}), lacks, "default AppArmor profile"},
		"SELinux level":       {func(in *Input) { sc(in).SelinuxOptions = &runtimeapi.SELinuxOption{Level: "secret"} }, invalid, `selinux_options.level is "secret"`},
		"CDI disabled":        {func(in *Input) { in.Container.CDIDevices = []*runtimeapi.CDIDevice{{Name: "v.com/c=d"}} }, lacks, "v.com/c=d"},
		"CDI annotation":      {func(in *Input) { in.Container.Annotations = map[string]string{"cdi.k8s.io/x": "nonsense"} }, invalid, "cdi.k8s.io/"},
	} {
		t.Run(name, func(t *testing.T) {
			in := testInput()
			tc.in(&in)
			s, _, err := Container(in)
			if err == nil {
				t.Fatalf("accepted: %s", indent(t, s))
			}
			if !tc.class(err) {
				t.Errorf("class of %v", err)
			}
			if !strings.Contains(err.Error(), tc.text) {
				t.Errorf("%q lacks %q", err, tc.text)
			}
		})
	}
}
