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
	"github.com/containernetworking/cni/libcni"
	"github.com/nodeagent/nodeagent/cni/builtin"
	"github.com/nodeagent/nodeagent/cni/nat"
	"github.com/nodeagent/nodeagent/cni/netns"
	"github.com/nodeagent/nodeagent/cni/plugin"
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
	conf    confDir
	exec    *executor
	others  delegate
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
	m := &Manager{cfg: cfg, log: cfg.Log, builtin: net, conf: confDir{dir: cfg.ConfDir}}
	m.exec = &executor{plugin: plugin.Plugin{HostNetns: cfg.HostNetns, StateDir: cfg.StateDir, Log: cfg.Log}}
	if cfg.HostNetns != "" {
		if m.exec.host, err = netns.Open(cfg.HostNetns); err != nil {
			return nil, errors.Join(err, net.Close())
		}
	}
	dir := filepath.Join(cfg.RootDir, "cni")
	m.others.cni = libcni.NewCNIConfigWithCacheDir(cfg.BinDirs, dir, m.exec)
	m.others.dir = filepath.Join(dir, "attachments")
	return m, nil
}

// Close drops descriptors; what pods use stays.
func (m *Manager) Close() error { return errors.Join(m.builtin.Close(), m.exec.host.Close()) }

// Run does the background work (deletion of links, sweep of records) until ctx ends.
func (m *Manager) Run(ctx context.Context) error { return m.builtin.Run(ctx) }

// Alive returns once Run has come round. An error means that it did not before ctx ended.
func (m *Manager) Alive(ctx context.Context) error { return m.builtin.Alive(ctx) }

// Setup connects the sandbox. All or nothing: if it fails, or ctx ends, everything is undone before it returns.
//
// Errors: ResourceExhausted without a free address; AlreadyExists for a host port that another pod has, or
// a sandbox connected already; NotFound without a namespace; FailedPrecondition if host or configuration
// does not allow it; Unavailable if a CNI plugin says to try later.
func (m *Manager) Setup(ctx context.Context, req Request) (Result, error) {
	if err := req.check(); err != nil {
		return Result{}, err
	}
	list, err := m.conf.current()
	if err != nil {
		return Result{}, err
	}
	if list != nil {
		// A warm namespace may have been wired before the configuration appeared.
		if m.builtin.Wired(req.Netns) {
			if err := m.builtin.Unwire(ctx, req.Netns); err != nil {
				return Result{}, err
			}
		}
		return m.others.add(ctx, list, req, m.builtin.ChosenCIDRs())
	}
	return m.setupBuiltin(ctx, req)
}

func (m *Manager) setupBuiltin(ctx context.Context, req Request) (Result, error) {
	bw, err := req.bandwidth()
	if err != nil {
		return Result{}, err
	}
	a := req.attachment()
	a.Ingress, a.Egress = bw.IngressRate, bw.EgressRate
	got, err := m.builtin.Attach(ctx, a)
	if err != nil {
		return Result{}, err
	}
	raw, err := json.Marshal(got.Result(a))
	if err != nil {
		return Result{}, errors.Join(fmt.Errorf("encode CNI result: %w", err), m.builtin.Detach(context.WithoutCancel(ctx), a, got.IPs))
	}
	return Result{IPs: got.IPs, HostInterface: got.HostInterface, CNIResult: raw, Conf: Builtin}, nil
}

// Teardown disconnects the sandbox. It is idempotent, works when the namespace is gone, and takes an empty Result
// for a sandbox whose Setup did not come to its end.
func (m *Manager) Teardown(ctx context.Context, req Request, res Result) error {
	var errs []error
	if res.Conf == Builtin || res.Conf == "" {
		errs = append(errs, m.builtin.Detach(ctx, req.attachment(), res.IPs))
	}
	if res.Conf != Builtin {
		errs = append(errs, m.others.del(ctx, req.SandboxID, req.Netns, m.named(res.Conf)))
	}
	return errors.Join(errs...)
}

// named is the configuration in force if it has that name, else nil.
func (m *Manager) named(network string) *libcni.NetworkConfigList {
	if list, err := m.conf.current(); err == nil && list != nil && list.Name == network {
		return list
	}
	return nil
}

// Check compares the sandbox's connection with what Setup made.
func (m *Manager) Check(ctx context.Context, req Request, res Result) error {
	if res.Conf == Builtin {
		return m.builtin.Check(ctx, req.attachment(), res.IPs)
	}
	return m.others.check(ctx, req.SandboxID)
}

// Prewire prepares a warm namespace for a fast Setup. It does nothing when pods go to a CNI network.
func (m *Manager) Prewire(ctx context.Context, netns string) error {
	if list, err := m.conf.current(); err != nil || list != nil {
		return nil
	}
	return m.builtin.Prewire(ctx, netns)
}

// Unwire undoes Prewire for a namespace that is thrown away. One not wired is success.
func (m *Manager) Unwire(ctx context.Context, netns string) error {
	return m.builtin.Unwire(ctx, netns)
}

// Reconcile frees every address, link, host port and attachment of ours whose sandbox is not in live, and restores
// records of live ones. results is by sandbox ID. Namespaces prewired by this process stay. It is for the start, before
// the first Setup: a sandbox whose Setup ends while it runs, and which is not in live, is taken for dead.
func (m *Manager) Reconcile(ctx context.Context, live []Request, results map[string]Result) error {
	var ours []builtin.Live
	all := map[string]bool{}
	for _, req := range live {
		all[req.SandboxID] = true
		if res := results[req.SandboxID]; res.Conf == Builtin || res.Conf == "" {
			ours = append(ours, builtin.Live{Attachment: req.attachment(), IPs: res.IPs})
		}
	}
	list, err := m.conf.current()
	return errors.Join(err, m.builtin.Reconcile(ctx, ours), m.others.reconcile(ctx, all, list))
}

// Status is nil when pods can be connected; the error says what is missing. It may run CNI plugins, but not more
// often than every few seconds.
func (m *Manager) Status(ctx context.Context) error {
	list, err := m.conf.current()
	if err != nil {
		return err
	}
	if list != nil {
		return m.others.ready(ctx, list, m.exec)
	}
	return m.builtin.Status(ctx)
}

// Network is the name of the network that Setup would use now: Builtin or a CNI network.
func (m *Manager) Network() (string, error) {
	list, err := m.conf.current()
	if err != nil || list == nil {
		return Builtin, err
	}
	return list.Name, nil
}

// SetPodCIDRs replaces the ranges for pods to come, durably.
func (m *Manager) SetPodCIDRs(ctx context.Context, cidrs []netip.Prefix) error {
	return m.builtin.SetPodCIDRs(ctx, cidrs)
}

// Remove takes away what is on the host for all pods together; for a daemon that ends with no pod left.
//
// Errors: FailedPrecondition, and nothing is done, while a sandbox is on the built-in network.
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
