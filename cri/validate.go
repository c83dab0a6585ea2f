package cri

import (
	"fmt"
	"math"
	"net/netip"
	"path"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/spec"
)

// badField is the error for a field of a request that is not acceptable.
func badField(field string, value any, want string) error {
	return fmt.Errorf("%s is %q, want %s: %w", field, fmt.Sprint(value), want, errdefs.ErrInvalidArgument)
}

// checkSandbox refuses a sandbox configuration that cannot work, before
// anything is touched. It returns the mappings of the pod's user namespace
// (nil: the host's).
func checkSandbox(c *runtimeapi.PodSandboxConfig, host spec.HostInfo) (*spec.IDMaps, error) {
	m := c.GetMetadata()
	switch {
	case c == nil:
		return nil, fmt.Errorf("config is missing: %w", errdefs.ErrInvalidArgument)
	case m == nil:
		return nil, fmt.Errorf("config.metadata is missing: %w", errdefs.ErrInvalidArgument)
	case m.GetName() == "":
		return nil, badField("config.metadata.name", "", "the pod's name")
	}
	if d := c.GetLogDirectory(); d != "" && !path.IsAbs(d) {
		return nil, badField("config.log_directory", d, "an absolute path")
	}
	if err := checkHostname(c.GetHostname()); err != nil {
		return nil, err
	}
	for i, p := range c.GetPortMappings() {
		if _, _, err := portMapping(p); err != nil {
			return nil, fmt.Errorf("config.port_mappings[%d]: %w", i, err)
		}
	}
	if err := spec.CheckSandbox(c, host); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	maps, err := spec.UserNamespace(c.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions())
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	return maps, nil
}

func hostNetwork(c *runtimeapi.PodSandboxConfig) bool {
	return c.GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork() == runtimeapi.NamespaceMode_NODE
}

func hostIPC(c *runtimeapi.PodSandboxConfig) bool {
	return c.GetLinux().GetSecurityContext().GetNamespaceOptions().GetIpc() == runtimeapi.NamespaceMode_NODE
}

func checkHostname(h string) error {
	if strings.ContainsFunc(h, func(r rune) bool { return unicode.IsControl(r) || unicode.IsSpace(r) || r == '/' }) {
		return badField("config.hostname", h, "a name without spaces, slashes and control characters")
	}
	return nil
}

// portMapping converts p; ok is false for one that asks for no host port.
func portMapping(p *runtimeapi.PortMapping) (m PortMapping, ok bool, err error) {
	switch p.GetProtocol() {
	case runtimeapi.Protocol_TCP:
		m.Protocol = "tcp"
	case runtimeapi.Protocol_UDP:
		m.Protocol = "udp"
	case runtimeapi.Protocol_SCTP:
		m.Protocol = "sctp"
	default:
		return m, false, badField("protocol", p.GetProtocol(), "TCP, UDP or SCTP")
	}
	if hp := p.GetHostPort(); hp < 0 || hp > math.MaxUint16 {
		return m, false, badField("host_port", hp, "0 (none) or 1 to 65535")
	}
	if cp := p.GetContainerPort(); cp < 0 || cp > math.MaxUint16 || cp == 0 && p.GetHostPort() != 0 {
		return m, false, badField("container_port", cp, "1 to 65535")
	}
	if ip := p.GetHostIp(); ip != "" {
		if m.HostIP, err = netip.ParseAddr(ip); err != nil {
			return m, false, badField("host_ip", ip, "an IP address or nothing")
		}
		if m.HostIP.IsUnspecified() {
			m.HostIP = netip.Addr{}
		}
	}
	m.HostPort, m.ContainerPort = uint16(p.GetHostPort()), uint16(p.GetContainerPort())
	return m, m.HostPort != 0, nil
}

// checkContainer refuses a container configuration that cannot work; what
// depends on image and host is checked by package spec.
func checkContainer(c *runtimeapi.ContainerConfig, sb *runtimeapi.PodSandboxConfig) error {
	switch {
	case c == nil:
		return fmt.Errorf("config is missing: %w", errdefs.ErrInvalidArgument)
	case c.GetMetadata().GetName() == "":
		return badField("config.metadata.name", "", "the container's name")
	case c.GetImage().GetImage() == "":
		return badField("config.image.image", "", "an image")
	}
	if _, err := logPath(sb, c); err != nil {
		return err
	}
	if _, _, err := spec.StopSignal(c, ""); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	return nil
}

// logPath is where the container's log goes, "" for nowhere.
func logPath(sb *runtimeapi.PodSandboxConfig, c *runtimeapi.ContainerConfig) (string, error) {
	p, dir := c.GetLogPath(), sb.GetLogDirectory()
	if p == "" || dir == "" {
		return "", nil
	}
	full := path.Join(dir, p)
	if strings.ContainsRune(full, 0) || full == path.Clean(dir) || !strings.HasPrefix(full, strings.TrimSuffix(path.Clean(dir), "/")+"/") {
		return "", badField("config.log_path", p, "a path inside the pod's log directory "+dir)
	}
	return full, nil
}

// podResources are the limits of a pod's own cgroup: what its containers may
// use together plus overhead; nil without either.
func podResources(l *runtimeapi.LinuxPodSandboxConfig, host spec.HostInfo) (*specs.LinuxResources, error) {
	res, over := l.GetResources(), l.GetOverhead()
	if res == nil {
		return nil, nil // overhead alone limits nothing
	}
	sum := &runtimeapi.LinuxContainerResources{
		CpuPeriod: res.GetCpuPeriod(), CpuQuota: res.GetCpuQuota(), CpuShares: res.GetCpuShares(),
		MemoryLimitInBytes: res.GetMemoryLimitInBytes(), HugepageLimits: res.GetHugepageLimits(),
		CpusetCpus: res.GetCpusetCpus(), CpusetMems: res.GetCpusetMems(), Unified: res.GetUnified(),
	}
	if sum.CpuShares > 0 {
		sum.CpuShares = min(sum.CpuShares+max(over.GetCpuShares(), 0), 262144)
	}
	if sum.CpuQuota > 0 && over.GetCpuQuota() > 0 && over.GetCpuPeriod() == sum.CpuPeriod {
		sum.CpuQuota += over.GetCpuQuota()
	}
	if sum.MemoryLimitInBytes > 0 {
		sum.MemoryLimitInBytes += max(over.GetMemoryLimitInBytes(), 0)
	}
	return spec.MergeResources(nil, sum, host)
}
