package config

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// maxSocketPath is what fits into sockaddr_un.sun_path with its final
	// NUL (unix(7)), in bytes.
	maxSocketPath = 107
	// stateSocketRoom is the longest name of a socket below State, in bytes.
	stateSocketRoom = 32
	// maxNetworkName leaves room for the marks that links and nftables
	// tables are named with.
	maxNetworkName = 32
)

var (
	networkName    = regexp.MustCompile(`^[a-z][a-z0-9-]*$`)
	nodeName       = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	runtimeHandler = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$`)
)

// Validate reports everything that is wrong with c, as Faults without lines.
func (c Config) Validate() error {
	if list := c.faults(); len(list) > 0 {
		return Faults{Name: "configuration", List: list}
	}
	return nil
}

// faults checks meaning; types and closed choices were the decoder's part,
// except for Configs that were made in code.
func (c Config) faults() []Fault {
	var v validator
	v.choices(reflect.ValueOf(c), "")

	v.absolute("root", c.Root)
	v.absolute("state", c.State)
	if within(c.State, c.Root) || within(c.Root, c.State) {
		v.add("state", "%q and root %q lie in one another; one survives a reboot, the other must not", c.State, c.Root)
	}
	if n := len(c.State) + stateSocketRoom; n > maxSocketPath {
		v.add("state", "is %d bytes too long: the sockets below it would not fit into the kernel's %d bytes", n-maxSocketPath, maxSocketPath)
	}

	v.cri(c.CRI)
	v.images(c.Images)
	v.network(c.Network)
	v.absolute("policy.dir", c.Policy.Dir)
	v.absolute("policy.bpffs", c.Policy.BPFFS)
	if c.Policy.Kubeconfig != "" {
		v.absolute("policy.kubeconfig", c.Policy.Kubeconfig)
	}
	for i, pattern := range c.Policy.Uplinks {
		if _, err := filepath.Match(pattern, ""); err != nil || pattern == "" {
			v.add(fmt.Sprintf("policy.uplinks[%d]", i), "%q is no pattern of names", pattern)
		}
	}
	v.node(c.Node)
	if c.Metrics.Address != "" {
		v.hostPort("metrics.address", c.Metrics.Address)
	}
	return v.list
}

type validator struct{ list []Fault }

func (v *validator) add(path, format string, args ...any) {
	v.list = append(v.list, Fault{Path: path, Message: fmt.Sprintf(format, args...)})
}

func (v *validator) cri(c CRI) {
	v.absolute("cri.socket", c.Socket)
	if n := len(c.Socket); n > maxSocketPath {
		v.add("cri.socket", "is %d bytes long, the kernel takes %d", n, maxSocketPath)
	}
	if !c.Streaming.Address.IsValid() {
		v.add("cri.streaming.address", "is not set")
	}
	between(v, "cri.streaming.port", c.Streaming.Port, 0, 65535)
	between(v, "cri.maxLogLineSize", c.MaxLogLineSize, 256, 1<<20)
	between(v, "cri.execSyncMaxOutput", c.ExecSyncMaxOutput, 1<<10, 16<<20) // gRPC messages of the CRI end at 16 MiB
	v.each("cri.runtimeHandlers", c.RuntimeHandlers, func(path, s string) {
		if !runtimeHandler.MatchString(s) {
			v.add(path, "%q is not a handler name: lower-case letters, digits, '-' and '.'", s)
		}
	})
	v.each("cri.cdiSpecDirs", c.CDISpecDirs, v.absolute)
}

func (v *validator) images(i Images) {
	v.each("images.registryConfigDirs", i.RegistryConfigDirs, v.absolute)
	between(v, "images.maxParallelDownloads", i.MaxParallelDownloads, 1, 64)
	between(v, "images.maxParallelUnpacks", i.MaxParallelUnpacks, 1, 64)
	v.each("images.pinned", i.Pinned, func(path, s string) {
		if s == "" || strings.ContainsAny(s, " \t\n") {
			v.add(path, "%q is not an image reference", s)
		}
	})
	if t := i.ProgressTimeout; t < time.Second || t > 24*time.Hour {
		v.add("images.progressTimeout", "%s is not from 1s to 24h", t)
	}
}

func (v *validator) network(n Network) {
	if !networkName.MatchString(n.Name) || len(n.Name) > maxNetworkName {
		v.add("network.name", "%q is not a name: a lower-case letter, then letters, digits and '-', %d bytes at most", n.Name, maxNetworkName)
	}
	v.absolute("network.cniConfDir", n.CNIConfDir)
	v.each("network.cniBinDirs", n.CNIBinDirs, v.absolute)
	v.podCIDRs(n.PodCIDRs)
	minMTU, why := 1280, "IPv6"
	if len(n.PodCIDRs) > 0 && !slices.ContainsFunc(n.PodCIDRs, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		minMTU, why = 576, "IPv4"
	}
	if n.MTU != 0 && (n.MTU < minMTU || n.MTU > 65535) {
		v.add("network.mtu", "%d is not 0 or from %d (%s needs it) to 65535", n.MTU, minMTU, why)
	}
	between(v, "network.warmNamespaces", n.WarmNamespaces, 0, 256)
}

func (v *validator) node(n Node) {
	if n.Name != "" && (!nodeName.MatchString(n.Name) || len(n.Name) > 253) {
		v.add("node.name", "%q is not a name of a Node: lower-case letters, digits, '-' and '.', 253 bytes at most", n.Name)
	}
	v.absolute("node.kubeconfig", n.Kubeconfig)
	v.absolute("node.bootstrapKubeconfig", n.BootstrapKubeconfig)
	v.absolute("node.certDir", n.CertDir)
	for i, a := range n.Addresses {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.Zone() != "" {
			v.add(fmt.Sprintf("node.addresses[%d]", i), "%s is no address that others reach a node at", a)
		}
	}
	if n.Listen != "" {
		v.hostPort("node.listen", n.Listen)
	}
	if n.ClientCAFile != "" {
		v.absolute("node.clientCAFile", n.ClientCAFile)
	}
}

func (v *validator) podCIDRs(cidrs []netip.Prefix) {
	for i, p := range cidrs {
		path := fmt.Sprintf("network.podCIDRs[%d]", i)
		a := p.Addr()
		switch {
		case !p.IsValid():
			v.add(path, "is not set")
		case a.Is4In6():
			v.add(path, "%s is an IPv4 range written as IPv6; write it as IPv4", p)
		case p != p.Masked():
			v.add(path, "%s has host bits set; the range is %s", p, p.Masked())
		case a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a.IsUnspecified():
			v.add(path, "%s is no range that pods can have addresses of", p)
		case a.BitLen()-p.Bits() < 2:
			v.add(path, "%s is too small; /%d is the smallest range", p, a.BitLen()-2)
		}
		for j, o := range cidrs[:i] {
			if p.IsValid() && o.IsValid() && p.Overlaps(o) {
				v.add(path, "%s overlaps network.podCIDRs[%d] %s", p, j, o)
			}
		}
	}
}

func (v *validator) absolute(path, value string) {
	switch {
	case value == "":
		v.add(path, "is empty; an absolute path is needed")
	case strings.ContainsRune(value, 0):
		v.add(path, "%q has a NUL byte in it", value)
	case !filepath.IsAbs(value):
		v.add(path, "%q is not an absolute path", value)
	case filepath.Clean(value) == "/":
		v.add(path, "%q is the root directory", value)
	case filepath.Clean(value) != value:
		v.add(path, "%q is not in its shortest form, which is %q", value, filepath.Clean(value))
	}
}

// each checks the elements of a list, and that none comes twice.
func (v *validator) each(path string, list []string, check func(path, value string)) {
	seen := map[string]bool{}
	for i, s := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		check(at, s)
		if seen[s] {
			v.add(at, "%q is given twice", s)
		}
		seen[s] = true
	}
}

// choices checks every field that has an `allowed` tag.
func (v *validator) choices(st reflect.Value, path string) {
	for f := range st.Type().Fields() {
		at, value := join(path, f.Tag.Get("yaml")), st.FieldByIndex(f.Index)
		allowed := allowedOf(f.Tag)
		switch {
		case !isScalar(f.Type) && f.Type.Kind() == reflect.Struct:
			v.choices(value, at)
		case allowed == nil || slices.Contains(allowed, value.String()):
		case value.String() == "":
			v.list = append(v.list, Fault{Path: at, Message: "is missing", Allowed: allowed})
		default:
			v.list = append(v.list, Fault{Path: at, Message: fmt.Sprintf("%q is not allowed", value), Allowed: allowed})
		}
	}
}

func (v *validator) hostPort(path, value string) {
	host, port, err := net.SplitHostPort(value)
	n, portErr := strconv.Atoi(port)
	if err != nil || portErr != nil || n < 0 || n > 65535 {
		v.add(path, "%q is not host:port", value)
		return
	}
	if _, err := netip.ParseAddr(host); host != "" && host != "localhost" && err != nil {
		v.add(path, "%q does not begin with an IP address", value)
	}
}

func between[T int | int64](v *validator, path string, n, low, high T) {
	if n < low || n > high {
		v.add(path, "%d is not from %d to %d", n, low, high)
	}
}

// within reports whether path is dir or lies below it.
func within(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}
