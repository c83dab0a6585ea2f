// Package plugin answers the CNI protocol (ADD, DEL, CHECK, GC, STATUS, VERSION; versions 0.1.0 to 1.1.0)
// with the built-in network: for other runtimes as the executable cmd/nodeagent-cni, and
// for configurations that name it, inside the daemon without a fork.
//
// It must not hold state between calls: everything is in the address records and the kernel. Called by
// cmd/nodeagent-cni and by package cni. No goroutines, no locks. Kernel: see cni/builtin.
package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/pkg/skel"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/nodeagent/nodeagent/cni/builtin"
	"github.com/nodeagent/nodeagent/cni/nat"
)

// Type is the plugin's name in a configuration.
const Type = "nodeagent-cni"

// Conf is the plugin's part of a network configuration.
type Conf struct {
	cnitypes.PluginConf
	PodCIDRs     []netip.Prefix `json:"podCIDRs"`     // default: builtin.DefaultPodCIDRs
	MTU          int            `json:"mtu"`          // bytes, 0: that of the host's default routes
	Masquerade   *bool          `json:"masquerade"`   // default true
	NoMasquerade []netip.Prefix `json:"noMasquerade"` // destinations that see pod addresses
	Quarantine   string         `json:"quarantine"`   // rest of a released address, as "60s"
	// DataDir holds the address records; default /var/lib/nodeagent/cni/<name>. Networks
	// that share it never give out the same address twice.
	DataDir       string `json:"dataDir"`
	RuntimeConfig struct {
		PortMappings []PortMapping `json:"portMappings"`
		IPRanges     [][]IPRange   `json:"ipRanges"`
		Bandwidth    struct {
			IngressRate uint64 `json:"ingressRate"` // bits per second
			EgressRate  uint64 `json:"egressRate"`
		} `json:"bandwidth"`
	} `json:"runtimeConfig"`
}

// PortMapping is the CNI convention of the capability portMappings.
type PortMapping struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP"`
}

// IPRange is the CNI convention of the capability ipRanges; only whole subnets are served.
type IPRange struct {
	Subnet netip.Prefix `json:"subnet"`
}

// Plugin answers calls.
type Plugin struct {
	HostNetns string       // path of the host's network namespace; "": the caller's
	StateDir  string       // "": /run/nodeagent
	Log       *slog.Logger // nil: none
}

// Funcs are the commands for the CNI library's main function.
func (p Plugin) Funcs() skel.CNIFuncs {
	none := func(f func(context.Context, *skel.CmdArgs) error) func(*skel.CmdArgs) error {
		return func(args *skel.CmdArgs) error { return protocolError(f(context.Background(), args)) }
	}
	return skel.CNIFuncs{
		Add: func(args *skel.CmdArgs) error {
			res, v, err := p.add(context.Background(), args)
			if err != nil {
				return protocolError(err)
			}
			return cnitypes.PrintResult(res, v)
		},
		Del: none(p.del), Check: none(p.check), GC: none(p.gc), Status: none(p.status),
	}
}

// Exec answers one call as an executable would: environ and stdin are its environment and standard
// input, what it returns is the standard output. Errors are *types.Error as of the CNI library.
func (p Plugin) Exec(ctx context.Context, environ []string, stdin []byte) ([]byte, error) {
	env := map[string]string{}
	for _, e := range environ {
		k, v, _ := strings.Cut(e, "=")
		env[k] = v // the last one counts, as for an executable
	}
	args := &skel.CmdArgs{
		ContainerID: env["CNI_CONTAINERID"], Netns: env["CNI_NETNS"], IfName: env["CNI_IFNAME"],
		Args: env["CNI_ARGS"], Path: env["CNI_PATH"], StdinData: stdin,
	}
	command := env["CNI_COMMAND"]
	if command == "VERSION" {
		return json.Marshal(map[string]any{"cniVersion": version.Current(), "supportedVersions": version.All.SupportedVersions()})
	}
	if err := supported(command, stdin); err != nil {
		return nil, err
	}
	switch command {
	case "ADD":
		res, v, err := p.add(ctx, args)
		if err != nil {
			return nil, protocolError(err)
		}
		out, err := res.GetAsVersion(v)
		if err != nil {
			return nil, protocolError(err)
		}
		return json.Marshal(out)
	case "DEL":
		return nil, protocolError(p.del(ctx, args))
	case "CHECK":
		return nil, protocolError(p.check(ctx, args))
	case "GC":
		return nil, protocolError(p.gc(ctx, args))
	case "STATUS":
		return nil, protocolError(p.status(ctx, args))
	}
	return nil, cnitypes.NewError(cnitypes.ErrInvalidEnvironmentVariables, fmt.Sprintf("unknown CNI_COMMAND %q", command), "")
}

// supported checks that the configuration's version is known and has the command.
func supported(command string, stdin []byte) error {
	v, err := (&version.ConfigDecoder{}).Decode(stdin)
	if err != nil {
		return cnitypes.NewError(cnitypes.ErrDecodingFailure, err.Error(), "")
	}
	if e := (&version.Reconciler{}).Check(v, version.All); e != nil {
		return cnitypes.NewError(cnitypes.ErrIncompatibleCNIVersion, "incompatible CNI versions", e.Details())
	}
	least := map[string]string{"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}[command]
	if least == "" {
		return nil
	}
	if ok, err := version.GreaterThanOrEqualTo(v, least); err != nil || !ok {
		return cnitypes.NewError(cnitypes.ErrIncompatibleCNIVersion, "config version does not allow "+command, "")
	}
	return nil
}

// protocolError gives an error the code CNI has for it.
func protocolError(err error) error {
	if err == nil {
		return nil
	}
	var e *cnitypes.Error
	if errors.As(err, &e) {
		return e
	}
	code := cnitypes.ErrInternal
	switch {
	case errors.Is(err, errdefs.ErrInvalidArgument):
		code = cnitypes.ErrInvalidNetworkConfig
	case errors.Is(err, errdefs.ErrResourceExhausted):
		code = cnitypes.ErrTryAgainLater
	case errors.Is(err, errdefs.ErrNotFound):
		code = cnitypes.ErrUnknownContainer
	}
	return cnitypes.NewError(code, err.Error(), "")
}

// decode reads the configuration.
func decode(stdin []byte) (*Conf, error) {
	c := &Conf{}
	if err := json.Unmarshal(stdin, c); err != nil {
		return nil, cnitypes.NewError(cnitypes.ErrDecodingFailure, fmt.Sprintf("decode network configuration: %v", err), "")
	}
	if c.Name == "" {
		return nil, fmt.Errorf("network configuration: name is empty: %w", errdefs.ErrInvalidArgument)
	}
	for _, set := range c.RuntimeConfig.IPRanges {
		for _, r := range set {
			c.PodCIDRs = appendNew(c.PodCIDRs, r.Subnet)
		}
	}
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return nil, cnitypes.NewError(cnitypes.ErrDecodingFailure, err.Error(), "")
	}
	return c, nil
}

func appendNew(all []netip.Prefix, p netip.Prefix) []netip.Prefix {
	for _, q := range all {
		if p == q {
			return all
		}
	}
	return append(all, p)
}

// open builds the network of a configuration.
func (p Plugin) open(c *Conf) (*builtin.Network, error) {
	cfg := builtin.Config{
		Name: c.Name, RootDir: c.DataDir, StateDir: p.StateDir, PodCIDRs: c.PodCIDRs, MTU: c.MTU,
		Masquerade: c.Masquerade == nil || *c.Masquerade, NoMasquerade: c.NoMasquerade, HostNetns: p.HostNetns, Log: p.Log,
	}
	if cfg.StateDir == "" {
		cfg.StateDir = "/run/nodeagent"
	}
	if cfg.RootDir == "" {
		cfg.RootDir = filepath.Join("/var/lib/nodeagent/cni", c.Name)
	}
	if c.Quarantine != "" {
		d, err := time.ParseDuration(c.Quarantine)
		if err != nil || d <= 0 {
			return nil, fmt.Errorf("network configuration: quarantine %q: not a duration like 60s: %w", c.Quarantine, errdefs.ErrInvalidArgument)
		}
		cfg.Quarantine = d
	}
	return builtin.New(cfg)
}

// attachment is what a call is about. The host's link is named after container and interface, since DEL
// and GC may not know the namespace.
func attachment(id, ifName, netns string) builtin.Attachment {
	return builtin.Attachment{SandboxID: id, IfName: ifName, Netns: netns, Key: id + "/" + ifName}
}

func (c *Conf) ports() ([]nat.Port, error) {
	var ports []nat.Port
	for _, m := range c.RuntimeConfig.PortMappings {
		if m.HostPort == 0 {
			continue
		}
		if m.HostPort < 0 || m.HostPort > 65535 || m.ContainerPort < 1 || m.ContainerPort > 65535 {
			return nil, fmt.Errorf("port mapping %d to %d: ports are 1 to 65535: %w", m.HostPort, m.ContainerPort, errdefs.ErrInvalidArgument)
		}
		p := nat.Port{Protocol: m.Protocol, HostPort: uint16(m.HostPort), ContainerPort: uint16(m.ContainerPort)}
		if m.HostIP != "" {
			ip, err := netip.ParseAddr(m.HostIP)
			if err != nil {
				return nil, fmt.Errorf("port mapping of host port %d: host IP %q: %w", m.HostPort, m.HostIP, errdefs.ErrInvalidArgument)
			}
			p.HostIP = ip
		}
		ports = append(ports, p)
	}
	return ports, nil
}

func (p Plugin) add(ctx context.Context, args *skel.CmdArgs) (*types100.Result, string, error) {
	c, n, err := p.begin(args)
	if err != nil {
		return nil, "", err
	}
	defer n.Close()
	a := attachment(args.ContainerID, args.IfName, args.Netns)
	if a.Ports, err = c.ports(); err != nil {
		return nil, "", err
	}
	a.Ingress, a.Egress = c.RuntimeConfig.Bandwidth.IngressRate, c.RuntimeConfig.Bandwidth.EgressRate
	got, err := n.Attach(ctx, a)
	if err != nil {
		return nil, "", err
	}
	res := got.Result(a)
	res.DNS = c.DNS
	return res, c.CNIVersion, nil
}

func (p Plugin) begin(args *skel.CmdArgs) (*Conf, *builtin.Network, error) {
	c, err := decode(args.StdinData)
	if err != nil {
		return nil, nil, err
	}
	n, err := p.open(c)
	if err != nil {
		return nil, nil, err
	}
	return c, n, nil
}

func (p Plugin) del(ctx context.Context, args *skel.CmdArgs) error {
	c, n, err := p.begin(args)
	if err != nil {
		return err
	}
	defer n.Close()
	a := attachment(args.ContainerID, args.IfName, args.Netns)
	if a.Ports, err = c.ports(); err != nil {
		return err
	}
	// The addresses come from the records: a previous result may be missing or be another's.
	return n.Detach(ctx, a, nil)
}

func (p Plugin) check(ctx context.Context, args *skel.CmdArgs) error {
	c, n, err := p.begin(args)
	if err != nil {
		return err
	}
	defer n.Close()
	if c.PrevResult == nil {
		return fmt.Errorf("network configuration: CHECK needs prevResult: %w", errdefs.ErrInvalidArgument)
	}
	res, err := types100.GetResult(c.PrevResult)
	if err != nil {
		return err
	}
	var ips []netip.Addr
	for _, ip := range res.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			ips = append(ips, a.Unmap())
		}
	}
	return n.Check(ctx, attachment(args.ContainerID, args.IfName, args.Netns), ips)
}

func (p Plugin) gc(ctx context.Context, args *skel.CmdArgs) error {
	c, n, err := p.begin(args)
	if err != nil {
		return err
	}
	defer n.Close()
	var live []builtin.Live
	for _, v := range c.ValidAttachments {
		live = append(live, builtin.Live{Attachment: attachment(v.ContainerID, v.IfName, ""), KeepPorts: true})
	}
	return n.Reconcile(ctx, live)
}

func (p Plugin) status(ctx context.Context, args *skel.CmdArgs) error {
	_, n, err := p.begin(args)
	if err != nil {
		return err
	}
	defer n.Close()
	if err := n.Status(ctx); err != nil {
		return cnitypes.NewError(cnitypes.ErrPluginNotAvailable, err.Error(), "")
	}
	return nil
}

// Main runs the executable: arguments come from the environment, the configuration from standard input.
func Main() {
	p := Plugin{Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))}
	skel.PluginMainFuncs(p.Funcs(), version.All, "nodeagent-cni: the built-in network of nodeagent as a CNI plugin")
}
