// Package cni connects pods to networks: to the one of the first CNI configuration found, through libcni,
// or where there is none to the built-in network, in this process and without a fork.
//
// It must not make or remove namespaces (cri/namespaces does), and keeps no record of sandboxes: the
// caller keeps each Result and hands it back. Called by cri and, for Prewire and Unwire, by the
// pool of namespaces; cmd/nodeagent joins them.
//
// Goroutines: that of Run. Locks: mu guards the loaded configuration; the built-in network has its own.
// Kernel: see cni/builtin.
package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/nodeagent/nodeagent/cni/builtin"
	"github.com/nodeagent/nodeagent/cni/nat"
)

// Builtin is Result.Conf of pods on the built-in network.
const Builtin = "builtin"

// Config describes the manager. Zero fields take the defaults named.
type Config struct {
	Name     string   // of the instance, marks all kernel objects; "": nodeagent
	ConfDir  string   // of CNI configurations; "": none are looked for
	BinDirs  []string // of CNI plugins; nil: /opt/cni/bin and /usr/lib/cni
	StateDir string   // /run/nodeagent
	RootDir  string   // /var/lib/nodeagent
	// PodCIDRs of the built-in network; nil: those of the last SetPodCIDRs, or else builtin.DefaultPodCIDRs.
	PodCIDRs     []netip.Prefix
	MTU          int            // bytes; 0: that of the host's default routes
	Masquerade   bool           // what pods send away from the node carries the node's address
	NoMasquerade []netip.Prefix // destinations that see pod addresses all the same
	Quarantine   time.Duration  // rest of a released address; 0: 60 s
	HostNetns    string         // path of the host's network namespace; "": this process's
	// BeforeUp is called when a pod's link is complete but still down (built-in network only).
	BeforeUp func(ctx context.Context, sandboxID string, hostIfIndex int, ips []netip.Addr) error
	Log      *slog.Logger
}

// Request is one sandbox. The same request serves Setup and Teardown.
type Request struct {
	SandboxID    string
	PodNamespace string
	PodName      string
	PodUID       string
	Netns        string // path of the pinned network namespace
	PortMappings []PortMapping
	Annotations  map[string]string // kubernetes.io/ingress-bandwidth and egress-bandwidth are read
	CgroupParent string
	DNS          DNS
}

// DNS is what a CNI plugin with the dns capability is told.
type DNS struct {
	Servers  []string
	Searches []string
	Options  []string
}

// PortMapping is a host port. Without HostPort it is none and ignored.
type PortMapping struct {
	Protocol      string // tcp, udp, sctp; any case
	HostPort      uint16
	ContainerPort uint16
	HostIP        netip.Addr // zero: all addresses of the host
}

// Result of a Setup.
type Result struct {
	IPs           []netip.Addr    // the pod's addresses, the primary one first
	HostInterface string          // the host's end, "" if the plugin named none
	CNIResult     json.RawMessage // as CNI has it; to be kept and handed back to Teardown
	Conf          string          // Builtin, or the name of the CNI network
}

// Manager connects sandboxes.
type Manager struct {
	cfg     Config
	log     *slog.Logger
	builtin *builtin.Network
}

// New checks cfg, reports all its faults at once and opens files and sockets. It changes nothing on the host.
func New(cfg Config) (*Manager, error) {
	if cfg.Name == "" {
		cfg.Name = "nodeagent"
	}
	if cfg.StateDir == "" {
		cfg.StateDir = "/run/nodeagent"
	}
	if cfg.RootDir == "" {
		cfg.RootDir = "/var/lib/nodeagent"
	}
	if cfg.BinDirs == nil {
		cfg.BinDirs = []string{"/opt/cni/bin", "/usr/lib/cni"}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	var errs []error
	for _, d := range append([]string{cfg.ConfDir}, cfg.BinDirs...) {
		if d != "" && !filepath.IsAbs(d) {
			errs = append(errs, fmt.Errorf("directory %q: must be an absolute path: %w", d, errdefs.ErrInvalidArgument))
		}
	}
	net, err := builtin.New(builtin.Config{
		Name: cfg.Name, StateDir: cfg.StateDir, RootDir: cfg.RootDir, PodCIDRs: cfg.PodCIDRs, MTU: cfg.MTU,
		Masquerade: cfg.Masquerade, NoMasquerade: cfg.NoMasquerade, Quarantine: cfg.Quarantine,
		HostNetns: cfg.HostNetns, BeforeUp: cfg.BeforeUp, Log: cfg.Log,
	})
	if err = errors.Join(append(errs, err)...); err != nil {
		if net != nil {
			net.Close()
		}
		return nil, err
	}
	return &Manager{cfg: cfg, log: cfg.Log, builtin: net}, nil
}

// Close drops descriptors; what pods use stays.
func (m *Manager) Close() error { return m.builtin.Close() }

// Run does the background work (deletion of links, sweep of records) until ctx ends.
func (m *Manager) Run(ctx context.Context) error { return m.builtin.Run(ctx) }

// Setup connects the sandbox. All or nothing.
func (m *Manager) Setup(ctx context.Context, req Request) (Result, error) {
	if err := req.check(); err != nil {
		return Result{}, err
	}
	a := req.attachment()
	got, err := m.builtin.Attach(ctx, a)
	if err != nil {
		return Result{}, err
	}
	raw, err := json.Marshal(cniResult(a, got))
	if err != nil {
		return Result{}, errors.Join(fmt.Errorf("encode CNI result: %w", err), m.builtin.Detach(ctx, a, got.IPs))
	}
	return Result{IPs: got.IPs, HostInterface: got.HostInterface, CNIResult: raw, Conf: Builtin}, nil
}

// Teardown disconnects the sandbox. It is idempotent, works when the namespace is gone, and takes an empty Result
// for a sandbox whose Setup did not come to its end.
func (m *Manager) Teardown(ctx context.Context, req Request, res Result) error {
	return m.builtin.Detach(ctx, req.attachment(), res.IPs)
}

// Prewire prepares a warm namespace for a fast Setup. It does nothing when pods go to a CNI network.
func (m *Manager) Prewire(ctx context.Context, netns string) error {
	return m.builtin.Prewire(ctx, netns)
}

// Unwire undoes Prewire for a namespace that is thrown away.
func (m *Manager) Unwire(ctx context.Context, netns string) error {
	return m.builtin.Unwire(ctx, netns)
}

// Reconcile frees everything of ours whose sandbox is not in live. results is by sandbox ID.
func (m *Manager) Reconcile(ctx context.Context, live []Request, results map[string]Result) error {
	var all []builtin.Live
	for _, req := range live {
		res := results[req.SandboxID]
		all = append(all, builtin.Live{Attachment: req.attachment(), IPs: res.IPs})
	}
	return m.builtin.Reconcile(ctx, all)
}

// Status is nil when pods can be connected.
func (m *Manager) Status(ctx context.Context) error { return m.builtin.Status(ctx) }

// SetPodCIDRs replaces the ranges for pods to come, durably.
func (m *Manager) SetPodCIDRs(ctx context.Context, cidrs []netip.Prefix) error {
	return m.builtin.SetPodCIDRs(ctx, cidrs)
}

// Remove takes away what is on the host for all pods together; for a daemon that ends with no pod left.
func (m *Manager) Remove(ctx context.Context) error { return m.builtin.Remove(ctx) }

func (r Request) check() error {
	var errs []error
	if r.SandboxID == "" {
		errs = append(errs, fmt.Errorf("sandbox ID is empty: %w", errdefs.ErrInvalidArgument))
	}
	if !filepath.IsAbs(r.Netns) {
		errs = append(errs, fmt.Errorf("network namespace %q: must be an absolute path: %w", r.Netns, errdefs.ErrInvalidArgument))
	}
	return errors.Join(errs...)
}

func (r Request) attachment() builtin.Attachment {
	a := builtin.Attachment{SandboxID: r.SandboxID, Netns: r.Netns, Key: r.Netns}
	for _, p := range r.PortMappings {
		if p.HostPort != 0 {
			a.Ports = append(a.Ports, nat.Port{Protocol: p.Protocol, HostPort: p.HostPort, ContainerPort: p.ContainerPort, HostIP: p.HostIP})
		}
	}
	return a
}

// cniResult is what CNI says of an attachment to the built-in network.
func cniResult(a builtin.Attachment, got builtin.Attached) *types100.Result {
	return got.Result(a)
}
