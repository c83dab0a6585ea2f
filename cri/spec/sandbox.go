package spec

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CheckSandbox refuses a sandbox config that could never work, before anything
// is made for it.
//
// Errors: InvalidArgument; FailedPrecondition for what the host lacks.
func CheckSandbox(c *runtimeapi.PodSandboxConfig, host HostInfo) error {
	sc := c.GetLinux().GetSecurityContext()
	opts := sc.GetNamespaceOptions()
	modes := map[string]runtimeapi.NamespaceMode{"network": opts.GetNetwork(), "ipc": opts.GetIpc()}
	for field, mode := range modes {
		if mode != runtimeapi.NamespaceMode_POD && mode != runtimeapi.NamespaceMode_NODE {
			return invalid("linux.security_context.namespace_options."+field, mode, "POD or NODE")
		}
	}
	if m := opts.GetPid(); m != runtimeapi.NamespaceMode_POD && m != runtimeapi.NamespaceMode_CONTAINER && m != runtimeapi.NamespaceMode_NODE {
		return invalid("linux.security_context.namespace_options.pid", m, "POD, CONTAINER or NODE")
	}
	user, err := UserNamespace(opts.GetUsernsOptions())
	if err != nil {
		return err
	}
	if user != nil && !host.IDMappedMounts {
		return lacking("linux.security_context.namespace_options.userns_options.mode", "POD", "idmapped mounts (kernel 5.12)")
	}
	if user != nil && (opts.GetPid() == runtimeapi.NamespaceMode_NODE || opts.GetIpc() == runtimeapi.NamespaceMode_NODE) {
		// Its root may mount neither proc nor mqueue of the host's namespaces.
		return invalid("linux.security_context.namespace_options.userns_options.mode", "POD",
			"NODE with the PID or IPC namespace of the node (pid %v, ipc %v)", opts.GetPid(), opts.GetIpc())
	}
	if sc.GetRunAsGroup() != nil && sc.GetRunAsUser() == nil {
		return invalid("linux.security_context.run_as_group", sc.GetRunAsGroup().GetValue(), "unset without run_as_user")
	}
	if _, err := SELinuxOptions("linux.security_context.selinux_options", sc.GetSelinuxOptions()); err != nil {
		return err
	}
	if err := checkHostname(c.GetHostname()); err != nil {
		return err
	}
	for _, r := range []*runtimeapi.LinuxContainerResources{c.GetLinux().GetResources(), c.GetLinux().GetOverhead()} {
		if _, err := MergeResources(nil, r, host); err != nil {
			return err
		}
	}
	if _, err := ResolvConf(c.GetDnsConfig()); err != nil {
		return err
	}
	_, err = Sysctls(c, Defaults{})
	return err
}

// checkHostname: the kernel takes 64 bytes (__NEW_UTS_LEN).
func checkHostname(h string) error {
	if len(h) > 64 || hasNUL(h) {
		return invalid("hostname", h, "at most 64 bytes without NUL")
	}
	return nil
}

// Sysctls returns what to set in the pod's namespaces: the config's sysctls,
// and with the two defaults unprivileged ports and pings where the config does
// not say otherwise. Keys come out with dots.
//
// Errors: InvalidArgument for a sysctl that is not of a namespace which the
// pod has for itself: it would change the host.
// Source: runc libcontainer/configs/validate; containerd sandbox_run_linux.go.
func Sysctls(c *runtimeapi.PodSandboxConfig, d Defaults) (map[string]string, error) {
	opts := c.GetLinux().GetSecurityContext().GetNamespaceOptions()
	hostNet := opts.GetNetwork() == runtimeapi.NamespaceMode_NODE
	hostIPC := opts.GetIpc() == runtimeapi.NamespaceMode_NODE
	out := map[string]string{}
	for key, val := range c.GetLinux().GetSysctls() {
		k := dotted(key)
		switch {
		case !isSysctlName(k) || hasNUL(val):
			return nil, invalid("linux.sysctls", key, "a sysctl name such as net.core.somaxconn")
		case isIPCSysctl(k):
			if hostIPC {
				return nil, invalid("linux.sysctls", key, "a pod with its own IPC namespace for it")
			}
		case strings.HasPrefix(k, "net."):
			if hostNet {
				return nil, invalid("linux.sysctls", key, "a pod with its own network namespace for it")
			}
		default:
			return nil, invalid("linux.sysctls", key, "net.*, fs.mqueue.*, kernel.msgmax, msgmnb, msgmni, sem, shmall, shmmax, shmmni, shm_rmid_forced: others belong to the node")
		}
		out[k] = val
	}
	if hostNet {
		return out, nil
	}
	user, err := UserNamespace(opts.GetUsernsOptions())
	if err != nil {
		return nil, err
	}
	if _, set := out["net.ipv4.ip_unprivileged_port_start"]; d.UnprivilegedPorts && !set {
		out["net.ipv4.ip_unprivileged_port_start"] = "0"
	}
	// The range holds ids that a user namespace has no mapping for.
	if _, set := out["net.ipv4.ping_group_range"]; d.UnprivilegedICMP && !set && user == nil {
		out["net.ipv4.ping_group_range"] = "0 2147483647"
	}
	return out, nil
}

// isSysctlName: words with a dot between them; within a word a '/' stands for
// a dot, but never for "..".
func isSysctlName(k string) bool {
	for word := range strings.SplitSeq(k, ".") {
		if strings.Trim(word, "/") == "" || hasNUL(word) {
			return false
		}
	}
	return true
}

func isIPCSysctl(k string) bool {
	known := strings.Fields("kernel.msgmax kernel.msgmnb kernel.msgmni kernel.sem kernel.shmall kernel.shmmax kernel.shmmni kernel.shm_rmid_forced")
	return strings.HasPrefix(k, "fs.mqueue.") || slices.Contains(known, k)
}

// dotted turns "net/ipv4/conf/eno2.100/rp_filter" into the form with dots,
// where a '/' stands for a dot within a name. See sysctl.d(5).
func dotted(k string) string {
	i := strings.IndexAny(k, "./")
	if i < 0 || k[i] == '.' {
		return k
	}
	return strings.NewReplacer(".", "/", "/", ".").Replace(k)
}

// ResolvConf is the text of the pod's resolv.conf; "" without an error for a
// nil config: the pod then gets a copy of the host's.
//
// Errors: InvalidArgument for entries that would break the lines.
func ResolvConf(dns *runtimeapi.DNSConfig) (string, error) {
	var b strings.Builder
	line := func(field, key string, vals []string, each bool) error {
		for _, v := range vals {
			if v == "" || strings.ContainsAny(v, " \t\r\n\x00") {
				return invalid("dns_config."+field, v, "a word without spaces")
			}
			if each {
				fmt.Fprintf(&b, "%s %s\n", key, v)
			}
		}
		if !each && len(vals) > 0 {
			fmt.Fprintf(&b, "%s %s\n", key, strings.Join(vals, " "))
		}
		return nil
	}
	for _, err := range []error{
		line("searches", "search", dns.GetSearches(), false),
		line("servers", "nameserver", dns.GetServers(), true),
		line("options", "options", dns.GetOptions(), false),
	} {
		if err != nil {
			return "", err
		}
	}
	return b.String(), nil
}

// PauseInput decides the spec of a pod's PID namespace holder.
type PauseInput struct {
	ID     string
	Rootfs string // read-only directory with /pause
	Cgroup string // OCI linux.cgroupsPath
	// Namespaces that the pause process joins; PID is ignored, it gets its own.
	Namespaces Namespaces
	Sandbox    *runtimeapi.PodSandboxConfig
	Host       HostInfo
}

// pauseOOMScore: the kernel shall take everything else of the pod first.
const pauseOOMScore = -998

// Pause returns the spec of the process that holds the PID namespace of a pod
// whose containers share one: no capabilities, no new privileges, the default
// seccomp profile where the host has seccomp, nothing writable.
func Pause(in PauseInput) (*specs.Spec, error) {
	if !path.IsAbs(in.Rootfs) {
		return nil, fmt.Errorf("rootfs %q of the pause process: allowed is an absolute path: %w", in.Rootfs, errdefs.ErrInvalidArgument)
	}
	ns := []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}}
	for _, n := range []specs.LinuxNamespace{
		{Type: specs.NetworkNamespace, Path: in.Namespaces.Net},
		{Type: specs.IPCNamespace, Path: in.Namespaces.IPC},
		{Type: specs.UTSNamespace, Path: in.Namespaces.UTS},
		{Type: specs.UserNamespace, Path: in.Namespaces.User},
	} {
		if n.Path != "" {
			ns = append(ns, n)
		}
	}
	s := &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: in.Rootfs, Readonly: true},
		Process: &specs.Process{
			Args:            []string{"/pause"},
			Cwd:             "/",
			Capabilities:    &specs.LinuxCapabilities{},
			NoNewPrivileges: true,
			OOMScoreAdj:     ptr(in.Host.oomScore(pauseOOMScore)),
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=64k"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: in.Cgroup,
			Namespaces:  ns,
			Resources: &specs.LinuxResources{
				Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
				CPU:     &specs.LinuxCPU{Shares: ptr(uint64(2))},
			},
		},
		Annotations: map[string]string{
			"io.kubernetes.cri.container-type":    "sandbox",
			"io.kubernetes.cri.sandbox-id":        in.ID,
			"io.kubernetes.cri.sandbox-name":      in.Sandbox.GetMetadata().GetName(),
			"io.kubernetes.cri.sandbox-namespace": in.Sandbox.GetMetadata().GetNamespace(),
			"io.kubernetes.cri.sandbox-uid":       in.Sandbox.GetMetadata().GetUid(),
		},
	}
	if in.Host.Seccomp {
		s.Linux.Seccomp = DefaultSeccomp(nil)
	}
	return s, nil
}

// imageVolume is an anonymous volume: host directory and place in the container.
type imageVolume struct{ src, dst string }

// imageVolumes are the volumes of the image that no mount of the config covers.
func imageVolumes(in Input) []imageVolume {
	if in.Image == nil || in.VolumeDir == "" {
		return nil
	}
	covered := map[string]bool{}
	for _, m := range in.Container.GetMounts() {
		covered[path.Clean(m.GetContainerPath())] = true
	}
	var out []imageVolume
	for i, v := range slices.Sorted(maps.Keys(in.Image.Config.Volumes)) {
		dst := path.Join("/", v)
		if dst == "/" || covered[dst] || hasNUL(dst) {
			continue
		}
		out = append(out, imageVolume{src: path.Join(in.VolumeDir, fmt.Sprintf("%03d", i)), dst: dst})
	}
	return out
}
