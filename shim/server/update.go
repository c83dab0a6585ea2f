//go:build linux

package server

import (
	"fmt"
	"maps"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// update changes the resources that res names; others stay.
func (s *Server) update(id string, res *specs.LinuxResources) error {
	c, err := s.get(id)
	if err != nil {
		return err
	}
	c.op.Lock()
	defer c.op.Unlock()
	select {
	case <-c.exited:
		return fmt.Errorf("update container %q, which has exited: %w", id, errdefs.ErrFailedPrecondition)
	default:
	}
	want, err := specconv.CreateCgroupConfig(&specconv.CreateOpts{
		CgroupName: id,
		Spec:       &specs.Spec{Linux: &specs.Linux{Resources: res}},
	}, nil)
	if err != nil {
		return fmt.Errorf("update container %q: %w: %w", id, err, errdefs.ErrInvalidArgument)
	}
	cfg := c.lc.Config()
	group := *cfg.Cgroups
	merged := merge(*group.Resources, want.Resources)
	// The device rules do not change: spare the kernel from writing them.
	merged.SkipDevices = true
	group.Resources = &merged
	cfg.Cgroups = &group
	err = c.lc.Set(cfg)
	merged.SkipDevices = false // libcontainer refuses to exec with it
	if err != nil {
		return fmt.Errorf("update container %q: %w", id, startError(err))
	}
	return nil
}

// merge returns r with what n sets.
func merge(r cgroups.Resources, n *cgroups.Resources) cgroups.Resources {
	set(&r.Memory, n.Memory)
	set(&r.MemoryReservation, n.MemoryReservation)
	set(&r.MemorySwap, n.MemorySwap)
	set(&r.CpuShares, n.CpuShares)
	set(&r.CpuWeight, n.CpuWeight)
	set(&r.CpuQuota, n.CpuQuota)
	set(&r.CpuPeriod, n.CpuPeriod)
	set(&r.CpuBurst, n.CpuBurst)
	set(&r.CpuRtRuntime, n.CpuRtRuntime)
	set(&r.CpuRtPeriod, n.CpuRtPeriod)
	set(&r.CpusetCpus, n.CpusetCpus)
	set(&r.CpusetMems, n.CpusetMems)
	set(&r.CPUIdle, n.CPUIdle)
	set(&r.PidsLimit, n.PidsLimit)
	set(&r.BlkioWeight, n.BlkioWeight)
	set(&r.MemorySwappiness, n.MemorySwappiness)
	if len(n.HugetlbLimit) > 0 {
		r.HugetlbLimit = n.HugetlbLimit
	}
	if len(n.Unified) > 0 {
		all := maps.Clone(r.Unified)
		if all == nil {
			all = map[string]string{}
		}
		maps.Copy(all, n.Unified)
		r.Unified = all
	}
	return r
}

func set[T comparable](dst *T, src T) {
	var zero T
	if src != zero {
		*dst = src
	}
}
