package builtin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/cni/ipam"
	"github.com/nodeagent/nodeagent/cni/rtnl"
)

// cidrsVersion is the version of the file of pod ranges.
const cidrsVersion = 1

// cidrs are the pod ranges as they are on disk.
type cidrs struct {
	Version int            `json:"version"`
	Current []netip.Prefix `json:"current"`
	// Configured is what Config.PodCIDRs was when Current was chosen.
	Configured []netip.Prefix `json:"configured,omitempty"`
	// Former ranges, in which pods may still have addresses; dropped by Reconcile when none has.
	Former []netip.Prefix `json:"former,omitempty"`
}

func (c cidrs) all() []netip.Prefix { return append(slices.Clone(c.Current), c.Former...) }

func (n *Network) cidrFile() string { return filepath.Join(n.cfg.RootDir, "podcidrs.json") }

// cidrs are the ranges in use. The caller holds mu.
func (n *Network) cidrs() []netip.Prefix { return n.cidr.Current }

// decodeCIDRs reads the content of the file of pod ranges.
func decodeCIDRs(p []byte) (cidrs, error) {
	var c cidrs
	if err := json.Unmarshal(p, &c); err != nil {
		return cidrs{}, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if c.Version != cidrsVersion {
		return cidrs{}, fmt.Errorf("version %d, this program knows %d: %w", c.Version, cidrsVersion, errdefs.ErrFailedPrecondition)
	}
	if _, err := ipam.NewRanges(c.Current); err != nil {
		return cidrs{}, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	for _, p := range c.Former {
		if _, err := ipam.NewRange(p); err != nil {
			return cidrs{}, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
		}
	}
	return c, nil
}

func loadCIDRs(path string) (cidrs, error) {
	p, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return cidrs{Version: cidrsVersion}, nil
	}
	if err != nil {
		return cidrs{}, fmt.Errorf("read pod ranges: %w", err)
	}
	c, err := decodeCIDRs(p)
	if err != nil {
		return cidrs{}, fmt.Errorf("read pod ranges %s: %w", path, err)
	}
	return c, nil
}

// choose settles which ranges are in use at start. The latest statement counts: configured ranges if they are not those
// configured before, else those on disk (of the last SetPodCIDRs), else the default ones.
func (c cidrs) choose(configured []netip.Prefix) cidrs {
	want := c.Current
	if len(configured) > 0 && !slices.Equal(configured, c.Configured) || len(want) == 0 {
		want = configured
	}
	if len(want) == 0 {
		want = DefaultPodCIDRs()
	}
	out := c.replace(want)
	out.Configured = configured
	return out
}

// replace makes want the current ranges; those that go become former ones.
func (c cidrs) replace(want []netip.Prefix) cidrs {
	out := cidrs{Version: cidrsVersion, Current: slices.Clone(want), Configured: c.Configured}
	for _, p := range c.all() {
		if !slices.Contains(want, p) && !slices.Contains(out.Former, p) {
			out.Former = append(out.Former, p)
		}
	}
	return out
}

// SetPodCIDRs replaces the ranges for pods to come and remembers them durably. Pods that have addresses keep them.
//
// Errors: InvalidArgument if a range is not usable or two overlap; nothing is changed then.
func (n *Network) SetPodCIDRs(ctx context.Context, want []netip.Prefix) error {
	if len(want) == 0 {
		return fmt.Errorf("set pod ranges: none given: %w", errdefs.ErrInvalidArgument)
	}
	if _, err := ipam.NewRanges(want); err != nil {
		return fmt.Errorf("set pod ranges: %w", err)
	}
	n.mu.Lock()
	if slices.Equal(n.cidr.Current, want) {
		n.mu.Unlock()
		return nil
	}
	next := n.cidr.replace(want)
	if err := storeCIDRs(n.cidrFile(), next); err != nil {
		n.mu.Unlock()
		return err
	}
	n.cidr, n.node = next, nil
	n.mu.Unlock()
	if _, err := n.prepare(ctx); err != nil {
		return fmt.Errorf("set pod ranges: %w", err)
	}
	return nil
}

// PodCIDRs are the ranges that new pods get addresses of.
func (n *Network) PodCIDRs() []netip.Prefix {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.cidr.Current)
}

// keepCIDRs writes the ranges if they are not those on disk: a later process must know in which ranges pods may still
// have addresses. The caller holds mu.
func (n *Network) keepCIDRs() error {
	stored, err := loadCIDRs(n.cidrFile())
	if err != nil {
		return err
	}
	if slices.Equal(stored.Current, n.cidr.Current) && slices.Equal(stored.Former, n.cidr.Former) && slices.Equal(stored.Configured, n.cidr.Configured) {
		return nil
	}
	return storeCIDRs(n.cidrFile(), n.cidr)
}

// ChosenCIDRs are the ranges in use if somebody chose them, nil for the default ones.
func (n *Network) ChosenCIDRs() []netip.Prefix {
	if c := n.PodCIDRs(); !slices.Equal(c, DefaultPodCIDRs()) {
		return c
	}
	return nil
}

// storeCIDRs writes the file durably.
func storeCIDRs(path string, c cidrs) error {
	p, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("encode pod ranges: %w", err)
	}
	if err := writeDurable(path, p); err != nil {
		return fmt.Errorf("write pod ranges: %w", err)
	}
	return nil
}

func writeDurable(path string, p []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(p)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// dropFormer forgets former ranges in which nobody has an address, and removes what the host had of them.
// The caller holds mu.
func (n *Network) dropFormer(used func(netip.Prefix) bool) error {
	var keep, gone []netip.Prefix
	for _, p := range n.cidr.Former {
		if used(p) {
			keep = append(keep, p)
		} else {
			gone = append(gone, p)
		}
	}
	if len(gone) == 0 {
		return nil
	}
	var b rtnl.Batch
	for _, p := range gone {
		r, err := ipam.NewRange(p)
		if err != nil {
			continue
		}
		b.DelRoute(p, Protocol, "delete unreachable route "+p.String())
		b.DelAddr(loopbackIndex, host(r.Host()), "delete the host's address "+r.Host().String())
	}
	if err := n.rt.Do(&b); err != nil {
		return err
	}
	n.cidr.Former, n.node = keep, nil
	return storeCIDRs(n.cidrFile(), n.cidr)
}
