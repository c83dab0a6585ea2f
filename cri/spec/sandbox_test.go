package spec

import (
	"maps"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func podWith(o *runtimeapi.NamespaceOption, sysctls map[string]string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{
		Sysctls: sysctls, SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: o},
	}}
}

func TestSysctls(t *testing.T) {
	node := runtimeapi.NamespaceMode_NODE
	one := []*runtimeapi.IDMapping{{Length: 10}}
	both := Defaults{UnprivilegedPorts: true, UnprivilegedICMP: true}
	for name, tc := range map[string]struct {
		opts *runtimeapi.NamespaceOption
		in   map[string]string
		d    Defaults
		want map[string]string // nil: refused
	}{
		"none":         {nil, nil, Defaults{}, map[string]string{}},
		"defaults":     {nil, nil, both, map[string]string{"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"}},
		"asked wins":   {nil, map[string]string{"net.ipv4.ip_unprivileged_port_start": "80"}, Defaults{UnprivilegedPorts: true}, map[string]string{"net.ipv4.ip_unprivileged_port_start": "80"}},
		"host network": {&runtimeapi.NamespaceOption{Network: node}, map[string]string{"kernel.shmmax": "1"}, both, map[string]string{"kernel.shmmax": "1"}},
		"user namespace": {&runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Uids: one, Gids: one}}, nil, both,
			map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}},
		"slashes":             {nil, map[string]string{"net/ipv4/conf/eth0.1/rp_filter": "1"}, Defaults{}, map[string]string{"net.ipv4.conf.eth0/1.rp_filter": "1"}},
		"ipc":                 {nil, map[string]string{"kernel.sem": "1 2 3 4", "fs.mqueue.msg_max": "9"}, Defaults{}, map[string]string{"kernel.sem": "1 2 3 4", "fs.mqueue.msg_max": "9"}},
		"net on host network": {&runtimeapi.NamespaceOption{Network: node}, map[string]string{"net.core.somaxconn": "1"}, Defaults{}, nil},
		"ipc on host ipc":     {&runtimeapi.NamespaceOption{Ipc: node}, map[string]string{"kernel.sem": "1"}, Defaults{}, nil},
		"node's":              {nil, map[string]string{"vm.swappiness": "1"}, Defaults{}, nil},
		"kernel's":            {nil, map[string]string{"kernel.panic": "1"}, Defaults{}, nil},
		"empty":               {nil, map[string]string{"": "1"}, Defaults{}, nil},
		"dots":                {nil, map[string]string{"net..core": "1"}, Defaults{}, nil},
		"escape":              {nil, map[string]string{"net/../../etc/passwd": "1"}, Defaults{}, nil},
		"NUL":                 {nil, map[string]string{"net.core.somaxconn": "1\x00"}, Defaults{}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Sysctls(podWith(tc.opts, tc.in), tc.d)
			if tc.want == nil {
				if !errdefs.IsInvalidArgument(err) {
					t.Errorf("got %v, %v; want InvalidArgument", got, err)
				}
				return
			}
			if err != nil || !maps.Equal(got, tc.want) {
				t.Errorf("got %v, %v; want %v", got, err, tc.want)
			}
		})
	}
}

func TestResolvConf(t *testing.T) {
	got, err := ResolvConf(&runtimeapi.DNSConfig{Servers: []string{"10.0.0.10", "fd00::1"}, Searches: []string{"ns.svc", "svc"}, Options: []string{"ndots:5", "edns0"}})
	want := "search ns.svc svc\nnameserver 10.0.0.10\nnameserver fd00::1\noptions ndots:5 edns0\n"
	if err != nil || got != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	if got, err := ResolvConf(nil); got != "" || err != nil {
		t.Errorf("got %q, %v; want nothing", got, err)
	}
	for _, bad := range []string{"", "a b", "a\nnameserver 6.6.6.6"} {
		if _, err := ResolvConf(&runtimeapi.DNSConfig{Servers: []string{bad}}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %v, want InvalidArgument", bad, err)
		}
	}
}

func TestCheckSandbox(t *testing.T) {
	host := HostInfo{IDMappedMounts: true}
	good := podWith(&runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Uids: []*runtimeapi.IDMapping{{HostId: 1, Length: 9}}, Gids: []*runtimeapi.IDMapping{{HostId: 1, Length: 9}}}}, nil)
	if err := CheckSandbox(good, host); err != nil {
		t.Error(err)
	}
	if err := CheckSandbox(good, HostInfo{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without idmapped mounts: %v", err)
	}
	for name, c := range map[string]*runtimeapi.PodSandboxConfig{
		"network":   podWith(&runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_CONTAINER}, nil),
		"ipc":       podWith(&runtimeapi.NamespaceOption{Ipc: runtimeapi.NamespaceMode_TARGET}, nil),
		"pid":       podWith(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET}, nil),
		"user":      podWith(&runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_TARGET}}, nil),
		"sysctl":    podWith(nil, map[string]string{"vm.x": "1"}),
		"hostname":  {Hostname: strings.Repeat("h", 65)},
		"dns":       {DnsConfig: &runtimeapi.DNSConfig{Options: []string{"a b"}}},
		"resources": {Linux: &runtimeapi.LinuxPodSandboxConfig{Resources: &runtimeapi.LinuxContainerResources{CpuShares: 1}}},
		"overhead":  {Linux: &runtimeapi.LinuxPodSandboxConfig{Overhead: &runtimeapi.LinuxContainerResources{CpuPeriod: 1}}},
		"selinux":   {Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{SelinuxOptions: &runtimeapi.SELinuxOption{Level: "x"}}}},
		"group":     {Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{RunAsGroup: num(1)}}},
	} {
		if err := CheckSandbox(c, host); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got %v, want InvalidArgument", name, err)
		}
	}
}

func TestPause(t *testing.T) {
	got, err := Pause(PauseInput{
		ID: "s1", Rootfs: "/pause-root", Cgroup: "/pod/s1", Namespaces: Namespaces{Net: "/n", IPC: "/i", User: "/u", PID: "ignored"},
		Sandbox: &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "p", Namespace: "n", Uid: "u"}},
		Host:    HostInfo{Seccomp: true, OOMScoreFloor: -1000},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: "/pause-root", Readonly: true},
		Process: &specs.Process{Args: []string{"/pause"}, Cwd: "/", Capabilities: &specs.LinuxCapabilities{}, NoNewPrivileges: true, OOMScoreAdj: ptr(-998)},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=64k"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/pod/s1",
			Namespaces: []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.PIDNamespace},
				{Type: specs.NetworkNamespace, Path: "/n"}, {Type: specs.IPCNamespace, Path: "/i"}, {Type: specs.UserNamespace, Path: "/u"}},
			Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}}, CPU: &specs.LinuxCPU{Shares: ptr(uint64(2))}},
			Seccomp:   DefaultSeccomp(nil),
		},
		Annotations: map[string]string{"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "s1",
			"io.kubernetes.cri.sandbox-name": "p", "io.kubernetes.cri.sandbox-namespace": "n", "io.kubernetes.cri.sandbox-uid": "u"},
	}
	if g, w := indent(t, got), indent(t, want); g != w {
		t.Error(diff(g, w))
	}
	if _, err := Pause(PauseInput{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("without a rootfs: %v", err)
	}
}

func TestExec(t *testing.T) {
	in := testInput()
	sc(&in).NoNewPrivs, sc(&in).RunAsUser = true, num(1000)
	c, _, err := Container(in)
	if err != nil {
		t.Fatal(err)
	}
	before := indent(t, c)
	got := Exec(c, []string{"sh", "-i"}, true)
	want := *c.Process
	want.Args, want.Terminal, want.Env = []string{"sh", "-i"}, true, append([]string{}, c.Process.Env...)
	want.Env = append(want.Env, "TERM=xterm")
	if g, w := indent(t, got), indent(t, &want); g != w {
		t.Error(diff(g, w))
	}
	if again := Exec(c, []string{"true"}, false); again.Terminal || len(again.Env) != len(c.Process.Env) {
		t.Errorf("without a terminal: %v", again)
	}
	if indent(t, c) != before {
		t.Error("the container's spec was changed")
	}
	for _, bad := range [][]string{nil, {""}, {"a\x00"}, {"a", "\xff"}} {
		if err := CheckExec(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %v, want InvalidArgument", bad, err)
		}
	}
	if err := CheckExec([]string{"a", "", "\n\x01"}); err != nil {
		t.Error(err)
	}
}

func TestStopSignal(t *testing.T) {
	for name, tc := range map[string]struct {
		config runtimeapi.Signal
		image  string
		cri    runtimeapi.Signal
		want   syscall.Signal
	}{
		"none":            {0, "", runtimeapi.Signal_SIGNAL_SIGTERM, 15},
		"image name":      {0, "SIGQUIT", runtimeapi.Signal_SIGNAL_SIGQUIT, 3},
		"image short":     {0, "usr1", runtimeapi.Signal_SIGNAL_SIGUSR1, 10},
		"image number":    {0, "9", runtimeapi.Signal_SIGNAL_SIGKILL, 9},
		"image real time": {0, "SIGRTMIN+3", runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3, 37},
		"image nonsense":  {0, "SIGNOPE", runtimeapi.Signal_SIGNAL_SIGTERM, 15},
		"image too large": {0, "65", runtimeapi.Signal_SIGNAL_SIGTERM, 15},
		"config wins":     {runtimeapi.Signal_SIGNAL_SIGINT, "9", runtimeapi.Signal_SIGNAL_SIGINT, 2},
		"config maximum":  {runtimeapi.Signal_SIGNAL_SIGRTMAXMINUS1, "", runtimeapi.Signal_SIGNAL_SIGRTMAXMINUS1, 63},
	} {
		cri, n, err := StopSignal(&runtimeapi.ContainerConfig{StopSignal: tc.config}, tc.image)
		if err != nil || n != tc.want || cri != tc.cri {
			t.Errorf("%s: got %v, %d, %v; want %v, %d", name, cri, n, err, tc.cri, tc.want)
		}
	}
	if _, _, err := StopSignal(&runtimeapi.ContainerConfig{StopSignal: 999}, ""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown: %v", err)
	}
	for s := range runtimeapi.Signal_name {
		if _, ok := signalNumber(runtimeapi.Signal(s)); !ok && s != 0 {
			t.Errorf("%v has no number", runtimeapi.Signal(s))
		}
	}
}

func TestMergeResources(t *testing.T) {
	host := HostInfo{SwapLimit: true, Hugetlb: true, CgroupUnified: true}
	old := &specs.LinuxResources{
		Devices:        []specs.LinuxDeviceCgroup{{Access: "rwm"}},
		CPU:            &specs.LinuxCPU{Shares: ptr(uint64(100)), Quota: ptr(int64(5000)), Period: ptr(uint64(100000))},
		Memory:         &specs.LinuxMemory{Limit: ptr(int64(100)), Swap: ptr(int64(100))},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "1GB", Limit: 1}, {Pagesize: "2MB", Limit: 2}},
		Unified:        map[string]string{"memory.high": "1"},
	}
	before := indent(t, old)
	for name, tc := range map[string]struct {
		ask  *runtimeapi.LinuxContainerResources
		host HostInfo
		want func(*specs.LinuxResources)
	}{
		"nothing": {nil, host, func(*specs.LinuxResources) {}},
		"zero":    {&runtimeapi.LinuxContainerResources{}, host, func(*specs.LinuxResources) {}},
		"cpu": {&runtimeapi.LinuxContainerResources{CpuQuota: -1, CpuShares: 2}, host, func(r *specs.LinuxResources) {
			r.CPU.Quota, r.CPU.Shares = ptr(int64(-1)), ptr(uint64(2))
		}},
		"memory": {&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 200}, host, func(r *specs.LinuxResources) {
			r.Memory.Limit, r.Memory.Swap = ptr(int64(200)), ptr(int64(200))
		}},
		"memory without swap control": {&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 50, MemorySwapLimitInBytes: 70}, HostInfo{}, func(r *specs.LinuxResources) {
			r.Memory.Limit = ptr(int64(50))
		}},
		"swap": {&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 200, MemorySwapLimitInBytes: 300}, host, func(r *specs.LinuxResources) {
			r.Memory.Limit, r.Memory.Swap = ptr(int64(200)), ptr(int64(300))
		}},
		"no limit": {&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: -1}, host, func(r *specs.LinuxResources) {
			r.Memory.Limit, r.Memory.Swap = ptr(int64(-1)), ptr(int64(-1))
		}},
		"hugepages": {&runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "1GB", Limit: 7}}}, host, func(r *specs.LinuxResources) {
			r.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 2}, {Pagesize: "1GB", Limit: 7}}
		}},
		"no hugepages where none can be": {&runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "1GB"}}}, HostInfo{}, func(*specs.LinuxResources) {}},
		"unified": {&runtimeapi.LinuxContainerResources{Unified: map[string]string{"memory.low": "2"}}, host, func(r *specs.LinuxResources) {
			r.Unified = map[string]string{"memory.high": "1", "memory.low": "2"}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			want, err := cloneResources(old)
			if err != nil {
				t.Fatal(err)
			}
			tc.want(want)
			got, err := MergeResources(old, tc.ask, tc.host)
			if err != nil {
				t.Fatal(err)
			}
			if g, w := indent(t, got), indent(t, want); g != w {
				t.Error(diff(g, w))
			}
			if indent(t, old) != before {
				t.Error("the old resources were changed")
			}
		})
	}
}

func TestStatusResources(t *testing.T) {
	ask := &runtimeapi.LinuxContainerResources{
		CpuPeriod: 100000, CpuQuota: 5000, CpuShares: 3, CpusetCpus: "0", CpusetMems: "0", MemoryLimitInBytes: 9, MemorySwapLimitInBytes: 10,
		OomScoreAdj: 7, HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 1}}, Unified: map[string]string{"a": "b"},
	}
	res, err := MergeResources(nil, ask, HostInfo{SwapLimit: true, Hugetlb: true, CgroupUnified: true})
	if err != nil {
		t.Fatal(err)
	}
	if g, w := indent(t, StatusResources(res, ptr(7)).Linux), indent(t, ask); g != w {
		t.Error(diff(g, w))
	}
	if got := StatusResources(nil, nil).Linux; got.CpuShares != 0 {
		t.Errorf("of nothing: %v", got)
	}
}

func TestSandboxLabel(t *testing.T) {
	level := func(l string) *runtimeapi.PodSandboxConfig {
		return &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			SelinuxOptions: &runtimeapi.SELinuxOption{Level: l},
		}}}
	}
	if got, err := SandboxLabel(level("s0:c1,c2"), HostInfo{}); got != "" || err != nil {
		t.Errorf("without SELinux: %q, %v", got, err)
	}
	if _, err := SandboxLabel(level("top"), HostInfo{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a malformed level: %v", err)
	}
	ReleaseSandboxLabel("")
}
