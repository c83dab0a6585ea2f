package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/cni/gate"
	"github.com/nodeagent/nodeagent/config"
	"github.com/nodeagent/nodeagent/cri"
	"github.com/nodeagent/nodeagent/ebpf"
	"github.com/nodeagent/nodeagent/ebpf/datapath"
	"github.com/nodeagent/nodeagent/ebpf/objects"
	"github.com/nodeagent/nodeagent/ebpf/source"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// newPolicy builds the policy engine, nil when it is off, there is no place that
// policies could come from, or this host cannot. What an earlier daemon left to
// enforce policy by itself goes then: its tables would grow old.
func newPolicy(cfg config.Config, log *slog.Logger) (*ebpf.Engine, error) {
	p := cfg.Policy
	name := policyName(cfg)
	if p.Mode == "off" {
		return nil, ebpf.Clear(p.BPFFS, name)
	}
	if p.Mode == "auto" && !hasPolicies(p) {
		log.Info("no network policy: policy.kubeconfig is not set and policy.dir does not exist (make it and restart)", "dir", p.Dir)
		return nil, ebpf.Clear(p.BPFFS, name)
	}
	engine, err := ebpf.New(ebpf.Config{
		BPFFS: p.BPFFS, Name: name, Uplinks: uplinkPatterns(cfg), Services: p.ServiceCIDRs, Audit: p.AuditNamespaces,
		Source:   policySource(p, log),
		Datapath: datapath.Config{Strict: p.Strict, KeepEstablished: p.KeepEstablished, XDP: p.XDP},
		Log:      log,
	})
	if err != nil {
		return nil, err
	}
	switch err := engine.Load(); {
	case err == nil:
		return engine, nil
	case p.Mode == "auto":
		log.Warn("network policy is not enforced: this host cannot (policy.mode is auto)", "err", err)
		return nil, ebpf.Clear(p.BPFFS, name)
	default:
		return nil, fmt.Errorf("load the programs of network policy (policy.mode is enforce): %w", err)
	}
}

// hasPolicies says whether policies could come from anywhere.
func hasPolicies(p config.Policy) bool {
	if p.Kubeconfig != "" {
		return true
	}
	_, err := os.Stat(p.Dir)
	return !errors.Is(err, fs.ErrNotExist)
}

// policyName marks what is pinned as this daemon's.
func policyName(cfg config.Config) string { return "nodeagent-" + cfg.Network.Name }

// uplinkPatterns is nil for the NICs of the default routes.
func uplinkPatterns(cfg config.Config) []string {
	if len(cfg.Policy.Uplinks) == 0 {
		return nil
	}
	return cfg.Policy.Uplinks
}

// policySocket is where the daemon answers `nodeagent policy`.
func policySocket(cfg config.Config) string { return filepath.Join(cfg.State, "policy.sock") }

// policySource is where the objects come from.
func policySource(p config.Policy, log *slog.Logger) ebpf.Source {
	if p.Kubeconfig == "" {
		return source.NewDir(p.Dir, log)
	}
	return source.NewAPI(func() (*rest.Config, error) { return clientcmd.BuildConfigFromFlags("", p.Kubeconfig) }, log)
}

// policedNetwork is the network of pods that do not go up before their policy
// is in force.
type policedNetwork struct {
	cri.Network
	engine *ebpf.Engine
	must   bool // a pod that cannot be kept silent until its policy is in force does not start
	// builtin says whether Setup will use the built-in network, which calls beforeUp.
	builtin func() bool
	log     *slog.Logger

	mu       sync.Mutex
	starting map[string]*startingPod // by sandbox, while Setup is under way
}

type startingPod struct {
	request cri.NetworkRequest
	policed bool
}

func newPolicedNetwork(cfg config.Config, engine *ebpf.Engine, log *slog.Logger) *policedNetwork {
	return &policedNetwork{engine: engine, must: cfg.Policy.Mode == "enforce", log: log, starting: map[string]*startingPod{}}
}

// beforeUp is the built-in network's hook.
func (n *policedNetwork) beforeUp(ctx context.Context, sandboxID string, index int, ips []netip.Addr) error {
	n.mu.Lock()
	s := n.starting[sandboxID]
	n.mu.Unlock()
	if s == nil {
		return fmt.Errorf("sandbox %s is not being set up: %w", sandboxID, errdefs.ErrFailedPrecondition)
	}
	if err := n.engine.PodStarting(ctx, policedPod(s.request, index, ips)); err != nil {
		return err
	}
	n.mu.Lock()
	s.policed = true
	n.mu.Unlock()
	return nil
}

// Setup is the network's, with policy in force when it returns. What another
// CNI plugin wires is kept silent until then: it brings interfaces up by itself.
func (n *policedNetwork) Setup(ctx context.Context, r cri.NetworkRequest) (cri.NetworkResult, error) {
	s := &startingPod{request: r}
	n.mu.Lock()
	n.starting[r.SandboxID] = s
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		delete(n.starting, r.SandboxID)
		n.mu.Unlock()
	}()
	gated := !n.builtin()
	if gated {
		if err := gate.Close(r.Netns); err != nil {
			if n.must {
				return cri.NetworkResult{}, err
			}
			n.log.Error("a pod may be reached before its policy is in force", "sandbox", r.SandboxID, "pod", r.PodNamespace+"/"+r.PodName, "err", err)
			gated = false
		}
	}
	res, err := n.Network.Setup(ctx, r)
	if err == nil {
		if !s.policed {
			err = n.police(ctx, r, res)
		}
		if err == nil && gated {
			err = gate.Open(r.Netns)
		}
		if err != nil {
			err = errors.Join(err, n.Network.Teardown(context.WithoutCancel(ctx), r, res))
			res = cri.NetworkResult{}
		}
	}
	if err != nil {
		err = errors.Join(err, n.forget(ctx, r.SandboxID))
	}
	return res, err
}

func (n *policedNetwork) police(ctx context.Context, r cri.NetworkRequest, res cri.NetworkResult) error {
	if res.HostInterface == "" {
		n.log.Error("network policy is not enforced on a pod: its CNI plugin leaves no interface on the host", "sandbox", r.SandboxID, "pod", r.PodNamespace+"/"+r.PodName)
		return nil
	}
	l, err := net.InterfaceByName(res.HostInterface)
	if err != nil {
		return fmt.Errorf("find the host's end of sandbox %s: %w", r.SandboxID, err)
	}
	return n.engine.PodStarting(ctx, policedPod(r, l.Index, res.IPs))
}

func (n *policedNetwork) forget(ctx context.Context, sandboxID string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return n.engine.PodGone(ctx, sandboxID)
}

// Teardown takes the network, then the policy.
func (n *policedNetwork) Teardown(ctx context.Context, r cri.NetworkRequest, res cri.NetworkResult) error {
	if err := n.Network.Teardown(ctx, r, res); err != nil {
		return err
	}
	return n.forget(ctx, r.SandboxID)
}

// Reconcile also tells the engine which pods live: it begins to enforce.
func (n *policedNetwork) Reconcile(ctx context.Context, live []cri.NetworkRequest, results map[string]cri.NetworkResult) error {
	err := n.Network.Reconcile(ctx, live, results)
	var pods []ebpf.Pod
	for _, r := range live {
		res := results[r.SandboxID]
		if res.HostInterface == "" {
			continue
		}
		l, e := net.InterfaceByName(res.HostInterface)
		if e != nil {
			err = errors.Join(err, fmt.Errorf("policy of sandbox %s: %w", r.SandboxID, e))
			continue
		}
		pods = append(pods, policedPod(r, l.Index, res.IPs))
	}
	return errors.Join(err, n.engine.Reconcile(ctx, pods))
}

func policedPod(r cri.NetworkRequest, index int, ips []netip.Addr) ebpf.Pod {
	return ebpf.Pod{
		SandboxID: r.SandboxID, PodKey: objects.PodKey{Namespace: r.PodNamespace, Name: r.PodName}, UID: r.PodUID,
		Created: time.Now(), Labels: r.Labels, Interface: index, Netns: r.Netns, IPs: ips,
	}
}
