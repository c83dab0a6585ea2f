// Package builtin is the network a node has when nobody configured another: each pod hangs on the
// host by a veth pair of its own, routed, without a bridge.
//
// In the pod, eth0 has a /32 and a /128, and the default routes lead to 169.254.1.1 and fe80::1,
// addresses nobody owns: a permanent neighbour entry gives them the host end's MAC. On the host, one
// route for each pod address leads to its link, with a permanent neighbour entry too. So
// nothing is ever asked by ARP or neighbour discovery, and no address is probed before use.
//
// Every kernel object carries a mark: links are in an interface group derived from the instance's
// name from the moment they exist, routes have protocol number 110, the nftables table has the
// instance's name, address records name it. So a fresh process finds what a killed one left (Reconcile).
//
// It must not know of Kubernetes, CNI or containers: who calls says which namespace, which
// owner and which ports. Called by cni (the daemon's hot path) and cni/plugin (the CNI plugin).
//
// Run owns one goroutine, that deletes links and sweeps address records. Locks: life (attach and detach
// share it, Reconcile has it alone), mu (warm namespaces and node state). Kernel 5.6 or newer; needs CAP_NET_ADMIN, CAP_SYS_ADMIN for
// entering namespaces, and a writable /proc/sys/net.
package builtin

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/cni/ipam"
	"github.com/nodeagent/nodeagent/cni/nat"
	"github.com/nodeagent/nodeagent/cni/netns"
	"github.com/nodeagent/nodeagent/cni/rtnl"
)

// Protocol marks our routes (RTA protocol; iproute2 shows "proto 110").
const Protocol = 110

// DefaultPodCIDRs are the ranges used when nobody sets any. The IPv6 one is "nodeage" in a
// unique local prefix (RFC 4193); both stay on the node, behind masquerade.
func DefaultPodCIDRs() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("10.213.0.0/16"), netip.MustParsePrefix("fd6e:6f64:6561:6765::/64")}
}

// Config describes the network.
type Config struct {
	Name     string // of the instance: mark of all objects, name of the nftables table
	StateDir string // for what ends with the boot
	RootDir  string // address records are in RootDir/ipam
	// PodCIDRs: nil means those set last by SetPodCIDRs, or else DefaultPodCIDRs. SetPodCIDRs overrides them until
	// other ones are configured here.
	PodCIDRs []netip.Prefix
	MTU      int // bytes; 0: the smallest of the links with default routes, or else 1500
	// Masquerade hides what pods send to other than NoMasquerade and the pods' own ranges behind the host.
	Masquerade   bool
	NoMasquerade []netip.Prefix
	Quarantine   time.Duration // rest of an address, see package ipam
	HostNetns    string        // path of the host's namespace; "": the caller's
	// BeforeUp is called when a pod's link is complete but still down, so that policy can be
	// in force before the first packet. An error fails the attachment.
	BeforeUp func(ctx context.Context, sandboxID string, hostIfIndex int, ips []netip.Addr) error
	Log      *slog.Logger
}

// Network is the built-in network of one instance.
type Network struct {
	cfg  Config
	log  *slog.Logger
	host *netns.Handle // nil: the caller's
	rt   *rtnl.Conn    // in the host's namespace
	pool *ipam.Pool
	nat  *nat.Table

	group, dead uint32 // interface groups: links in use, links to be deleted

	running atomic.Bool   // Run is there to delete links
	reap    chan struct{} // there are links in the dead group
	stale   chan struct{} // there are connections to forget
	alive   chan struct{} // taken by Run, see Alive

	life sync.RWMutex // held shared by Attach, Detach, Prewire; alone by Reconcile

	mu   sync.Mutex // guards what follows
	warm map[string]*wired
	node *node // nil: not prepared
	cidr cidrs
}

// node is what was found and made on the host, the same for all pods.
type node struct {
	mtu    int
	v6     bool
	ranges [2][]ipam.Range // by family: 0 IPv4, 1 IPv6
	src    [2]netip.Addr   // the host's own address among the pods'
}

// New opens the network's files and sockets. Nothing of the host is changed before the first use.
func New(cfg Config) (n *Network, err error) {
	var errs []error
	if cfg.Name == "" || len(cfg.Name) > 64 {
		errs = append(errs, fmt.Errorf("name %q: must have 1 to 64 bytes: %w", cfg.Name, errdefs.ErrInvalidArgument))
	}
	for _, d := range []struct{ what, path string }{{"StateDir", cfg.StateDir}, {"RootDir", cfg.RootDir}} {
		if !filepath.IsAbs(d.path) {
			errs = append(errs, fmt.Errorf("%s %q: must be an absolute path: %w", d.what, d.path, errdefs.ErrInvalidArgument))
		}
	}
	if cfg.MTU != 0 && (cfg.MTU < 1280 || cfg.MTU > 65535) {
		errs = append(errs, fmt.Errorf("MTU %d: must be 0 or 1280 to 65535: %w", cfg.MTU, errdefs.ErrInvalidArgument))
	}
	if _, err := ipam.NewRanges(cfg.PodCIDRs); err != nil {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("configure built-in network: %w", err)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	n = &Network{cfg: cfg, log: cfg.Log, reap: make(chan struct{}, 1), stale: make(chan struct{}, 1), alive: make(chan struct{}), warm: map[string]*wired{}}
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	sum := sha256.Sum256([]byte(cfg.Name))
	mark := uint32(sum[0])<<8 | uint32(sum[1])
	n.group = 0x6e000000 | mark<<1
	n.dead = n.group | 1
	if cfg.HostNetns != "" {
		if n.host, err = netns.Open(cfg.HostNetns); err != nil {
			return nil, err
		}
	}
	if n.rt, err = rtnl.Dial(n.host); err != nil {
		return nil, err
	}
	if n.pool, err = ipam.Open(ipam.Config{Dir: filepath.Join(cfg.RootDir, "ipam"), Quarantine: cfg.Quarantine}); err != nil {
		return nil, err
	}
	stored, err := loadCIDRs(n.cidrFile())
	if err != nil {
		return nil, err
	}
	n.cidr = stored.choose(cfg.PodCIDRs)
	n.nat = nat.New(nat.Config{Table: cfg.Name, Group: n.group, Host: n.host, Lock: filepath.Join(cfg.RootDir, "ipam", "nat.lock"), Log: cfg.Log})
	return n, nil
}

// Close drops descriptors. What pods use stays; warm namespaces keep their links.
func (n *Network) Close() error {
	n.mu.Lock()
	for path, w := range n.warm {
		w.pod.Close()
		delete(n.warm, path)
	}
	n.mu.Unlock()
	var errs []error
	if n.nat != nil {
		n.nat.Close()
	}
	if n.pool != nil {
		errs = append(errs, n.pool.Close())
	}
	return errors.Join(append(errs, n.rt.Close(), n.host.Close())...)
}

// Run deletes the links of removed pods behind the callers' backs, several at a time, and sweeps
// address records, until ctx ends. Without it Detach deletes links itself.
func (n *Network) Run(ctx context.Context) error {
	n.running.Store(true)
	defer n.running.Store(false)
	tick := time.NewTicker(careInterval)
	defer tick.Stop()
	kick(n.reap)
	for {
		select {
		case <-ctx.Done():
			n.cleanUp()
			return nil
		case <-tick.C:
			n.care()
		case <-n.reap:
			// Wait for more: a group of links costs the kernel hardly more than one.
			select {
			case <-ctx.Done():
			case <-time.After(reapDelay):
			}
			n.cleanUp()
		case <-n.alive:
		case <-n.stale:
			n.forgetConnections()
		}
	}
}

// reapDelay is how long the links of removed pods are collected before they are deleted together. Deleting holds
// the kernel's route-netlink lock for some 20 ms, however many links they are. The namespaces of removed pods usually
// end within this time, and their links with them: then nothing is left to do.
const reapDelay = time.Second

// Alive returns once Run has come round. An error means that it did not before ctx ended.
func (n *Network) Alive(ctx context.Context) error {
	select {
	case n.alive <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the network's background work: %w", context.Cause(ctx))
	}
}

// careInterval is how often the address records are swept and the nftables table is looked for.
const careInterval = 30 * time.Second

func (n *Network) care() {
	if err := n.pool.Sweep(); err != nil {
		n.log.Warn("sweep of address records failed", "err", err)
	}
	switch repaired, err := n.nat.Repair(); {
	case err != nil:
		n.log.Error("nftables table was removed by somebody else and could not be laid again", "err", err)
	case repaired:
		n.log.Warn("nftables table was removed by somebody else and laid again")
	}
}

func (n *Network) cleanUp() {
	n.deleteDead()
	n.forgetConnections()
}

func (n *Network) forgetConnections() {
	if err := n.nat.ForgetConnections(); err != nil {
		n.log.Warn("clients of UDP host ports may be served by the former decision for a while", "err", err)
	}
}

func kick(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// deleteDead deletes every link of the dead group at once.
func (n *Network) deleteDead() {
	var b rtnl.Batch
	b.DelGroup(n.dead)
	if err := n.rt.Do(&b); err != nil {
		n.log.Warn("deletion of removed pods' links failed, it is tried again", "err", err)
	}
}

// Attachment says what to attach.
type Attachment struct {
	SandboxID string
	IfName    string // in the pod, "": eth0
	Netns     string // path
	// Key names the pair: the host end's name is made of it. It is known at Attach and Detach alike.
	Key   string
	Ports []nat.Port
	// Ingress and Egress limit what the pod receives and sends, in bits per second; 0: no limit.
	Ingress, Egress uint64
}

func (a Attachment) ifName() string {
	if a.IfName == "" {
		return "eth0"
	}
	return a.IfName
}

// Attached is the outcome.
type Attached struct {
	IPs           []netip.Addr // IPv4 first
	HostInterface string
	HostIndex     int
	HostMAC, MAC  net.HardwareAddr
	MTU           int
}

// LinkName is the name of the host end for key: "na" and 13 hexadecimal digits of a hash.
func (n *Network) LinkName(key string) string { return n.pair(key).Name }

// pair derives everything about a veth pair from its key. Both MACs are locally administered.
func (n *Network) pair(key string) rtnl.Veth {
	sum := sha256.Sum256([]byte(n.cfg.Name + "\x00" + key))
	mac := func(first byte, p []byte) net.HardwareAddr { return append(net.HardwareAddr{first}, p[:5]...) }
	return rtnl.Veth{
		Name:    "na" + hex.EncodeToString(sum[:7])[:13],
		MAC:     mac(0x0e, sum[8:]),
		PeerMAC: mac(0x0a, sum[16:]),
		Group:   n.group,
	}
}

// undo is a list of steps back, run in reverse on a context of their own.
type undo []func(context.Context) error

func (u *undo) add(f func(context.Context) error) { *u = append(*u, f) }

func (u undo) run(err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for i := len(u) - 1; i >= 0; i-- {
		if uerr := u[i](ctx); uerr != nil {
			err = errors.Join(err, fmt.Errorf("undo: %w", uerr))
		}
	}
	return err
}
