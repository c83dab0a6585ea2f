package cri

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/store"
)

// sandbox is a live pod sandbox.
type sandbox struct {
	id  string
	key string
	op  opLock // see the package comment

	mu         sync.Mutex     // guards what follows
	rec        *store.Sandbox // replaced, never changed
	stopped    bool           // not ready any more: stopped, or lost
	clean      bool           // everything of a stopped sandbox is gone
	ungrouped  bool           // its cgroup was given back
	removed    bool
	pausePid   int
	containers []*container // in order of creation
	creates    map[*creation]struct{}
	ending     int // stops and removals that wait for op or hold it
}

// creation is a container's creation in flight.
type creation struct{ cancel context.CancelCauseFunc }

// beginCreate returns a context that ends when somebody wants to stop the
// sandbox. done reports why a creation failed, if that was it.
func (b *sandbox) beginCreate(ctx context.Context) (_ context.Context, done func(*error)) {
	ctx, cancel := context.WithCancelCause(ctx)
	c := &creation{cancel}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.creates == nil {
		b.creates = map[*creation]struct{}{}
	}
	b.creates[c] = struct{}{}
	if b.ending > 0 {
		cancel(errStopping)
	}
	return ctx, func(err *error) {
		if *err != nil && context.Cause(ctx) == errStopping {
			*err = fmt.Errorf("sandbox %s: %w (%v)", b.id, errStopping, *err)
		}
		cancel(nil)
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.creates, c)
	}
}

// errStopping ends the creations in a sandbox.
var errStopping = fmt.Errorf("it is being stopped or removed: %w", errdefs.ErrFailedPrecondition)

// lockToEnd takes op alone, for a stop or a removal. Creations in flight do not
// hold it up: they are cancelled, and no other begins meanwhile.
func (b *sandbox) lockToEnd(ctx context.Context, what string) (unlock func(), err error) {
	b.mu.Lock()
	b.ending++
	for c := range b.creates {
		c.cancel(errStopping)
	}
	b.mu.Unlock()
	unending := func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.ending--
	}
	release, err := b.op.alone(ctx, what+" "+b.id)
	if err != nil {
		unending()
		return nil, err
	}
	return func() {
		unending()
		release()
	}, nil
}

func (b *sandbox) record() *store.Sandbox {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rec
}

func (b *sandbox) state() runtimeapi.PodSandboxState {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.stopped {
		return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	}
	return runtimeapi.PodSandboxState_SANDBOX_READY
}

// usable says why the sandbox cannot be handed out, or nil.
func (b *sandbox) usable() error {
	if b.state() != runtimeapi.PodSandboxState_SANDBOX_READY {
		return fmt.Errorf("sandbox %s is not ready: %w", b.id, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (b *sandbox) markStopped() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stopped = true
}

func (b *sandbox) members() []*container {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.containers)
}

func (b *sandbox) addContainer(c *container) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.containers = append(b.containers, c)
}

func (b *sandbox) dropContainer(c *container) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.containers = slices.DeleteFunc(b.containers, func(o *container) bool { return o == c })
}

func (b *sandbox) pause() (pid int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.pausePid
}

// newID is what containers and sandboxes are called: 256 random bits in hex.
func newID() string {
	var b [32]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// digest tells requests apart.
func digest(parts ...proto.Message) string {
	h := sha256.New()
	for _, p := range parts {
		data, _ := proto.MarshalOptions{Deterministic: true}.Marshal(p)
		fmt.Fprintf(h, "%d\n", len(data))
		h.Write(data)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

func sandboxKey(m *runtimeapi.PodSandboxMetadata) string {
	return fmt.Sprintf("%q/%q (uid %q, attempt %d)", m.GetNamespace(), m.GetName(), m.GetUid(), m.GetAttempt())
}

func (s *Server) sandboxDir(id string) string { return filepath.Join(s.cfg.State, "sandboxes", id) }

func (s *Server) networkRequest(r *store.Sandbox) NetworkRequest {
	m, c := r.Config.GetMetadata(), r.Config
	req := NetworkRequest{
		SandboxID: r.ID, PodNamespace: m.GetNamespace(), PodName: m.GetName(), PodUID: m.GetUid(),
		Netns: r.Namespaces.Net, Labels: c.GetLabels(), Annotations: c.GetAnnotations(), CgroupParent: r.CgroupParent,
		DNS: DNS{c.GetDnsConfig().GetServers(), c.GetDnsConfig().GetSearches(), c.GetDnsConfig().GetOptions()},
	}
	for _, p := range c.GetPortMappings() {
		if m, ok, err := portMapping(p); ok && err == nil {
			req.Ports = append(req.Ports, m)
		}
	}
	return req
}

func networkResult(n store.Network) NetworkResult {
	res := NetworkResult{HostInterface: n.HostInterface, Conf: n.Conf, Result: n.Result}
	for _, ip := range n.IPs {
		if a, err := netip.ParseAddr(ip); err == nil {
			res.IPs = append(res.IPs, a)
		}
	}
	return res
}

func networkRecord(n NetworkResult) store.Network {
	rec := store.Network{HostInterface: n.HostInterface, Conf: n.Conf, Result: n.Result}
	for _, ip := range n.IPs {
		rec.IPs = append(rec.IPs, ip.String())
	}
	return rec
}

// findSandbox resolves an ID or a unique prefix of one.
func (s *Server) findSandbox(id string) (*sandbox, error) { return s.sandboxes.Get(id) }

// PodSandboxStatus answers from memory.
func (s *Server) PodSandboxStatus(ctx context.Context, r *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	b, err := s.findSandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, fmt.Errorf("status of sandbox: %w", err)
	}
	resp := &runtimeapi.PodSandboxStatusResponse{
		Status:    b.status(),
		Timestamp: now().UnixNano(),
	}
	for _, c := range b.members() {
		resp.ContainersStatuses = append(resp.ContainersStatuses, c.status())
	}
	if r.GetVerbose() {
		resp.Info, err = s.sandboxInfo(b)
	}
	return resp, err
}

func (b *sandbox) status() *runtimeapi.PodSandboxStatus {
	r := b.record()
	st := &runtimeapi.PodSandboxStatus{
		Id: r.ID, Metadata: r.Config.GetMetadata(), State: b.state(), CreatedAt: r.CreatedAt.UnixNano(),
		Network: &runtimeapi.PodSandboxNetworkStatus{},
		Linux: &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{
			Options: r.Config.GetLinux().GetSecurityContext().GetNamespaceOptions(),
		}},
		Labels: r.Config.GetLabels(), Annotations: r.Config.GetAnnotations(), RuntimeHandler: r.Handler,
	}
	if st.Linux.Namespaces.Options == nil {
		st.Linux.Namespaces.Options = &runtimeapi.NamespaceOption{}
	}
	if ips := r.Network.IPs; len(ips) > 0 {
		st.Network.Ip = ips[0]
		for _, ip := range ips[1:] {
			st.Network.AdditionalIps = append(st.Network.AdditionalIps, &runtimeapi.PodIP{Ip: ip})
		}
	}
	return st
}

func (s *Server) sandboxInfo(b *sandbox) (map[string]string, error) {
	r := b.record()
	netns, closed := "", false
	if r.Namespaces.Net != "" {
		netns, closed = r.Namespaces.Net, !isNamespace(r.Namespaces.Net)
	}
	return infoJSON(map[string]any{
		"pid": b.pause(), "processStatus": map[bool]string{true: "running", false: "stopped"}[b.state() == 0],
		"netNsClosed": closed, "netNs": netns, "namespaces": r.Namespaces, "cgroupParent": r.CgroupParent,
		"directory": r.Dir, "network": r.Network, "cniResult": r.Network.Result, "runtimeHandler": r.Handler,
		"runtimeType": "io.nodeagent.libcontainer", "config": r.Config, "boot": r.Boot,
	})
}

// ListPodSandbox answers from memory.
func (s *Server) ListPodSandbox(ctx context.Context, r *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{Items: s.listSandboxes(r.GetFilter())}, nil
}

// StreamPodSandboxes is ListPodSandbox in pieces.
func (s *Server) StreamPodSandboxes(r *runtimeapi.StreamPodSandboxesRequest, out runtimeapi.RuntimeService_StreamPodSandboxesServer) error {
	return inPieces(s.listSandboxes(r.GetFilter()), func(p []*runtimeapi.PodSandbox) error {
		return out.Send(&runtimeapi.StreamPodSandboxesResponse{PodSandboxes: p})
	})
}

func (s *Server) listSandboxes(f *runtimeapi.PodSandboxFilter) []*runtimeapi.PodSandbox {
	candidates := s.sandboxes.All()
	if f.GetId() != "" {
		b, err := s.findSandbox(f.GetId())
		if err != nil {
			return nil // an ID that is unknown or not unique matches nothing
		}
		candidates = []*sandbox{b}
	}
	out := make([]*runtimeapi.PodSandbox, 0, len(candidates))
	for _, b := range candidates {
		r, state := b.record(), b.state()
		if f.GetState() != nil && f.GetState().GetState() != state || !matches(f.GetLabelSelector(), r.Config.GetLabels()) {
			continue
		}
		out = append(out, &runtimeapi.PodSandbox{
			Id: r.ID, Metadata: r.Config.GetMetadata(), State: state, CreatedAt: r.CreatedAt.UnixNano(),
			Labels: r.Config.GetLabels(), Annotations: r.Config.GetAnnotations(), RuntimeHandler: r.Handler,
		})
	}
	return out
}

// matches reports whether labels has everything that selector asks for.
func matches(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}
