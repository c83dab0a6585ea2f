// Package stats turns samples of the node's sampler into CRI messages. It is
// pure: no I/O, no goroutines, no state, so there is nothing to construct. It
// must not choose what to sample; filters are the CRI core's, its one caller.
package stats

import (
	"context"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

// Sampler is where the samples come from; metrics.Sampler is one.
type Sampler interface {
	Sample(ctx context.Context, targets []sample.PodTarget, depth sample.Depth) ([]sample.Pod, error)
}

// Container makes the message of one container. c may be nil or a sample of a
// container that does not run; the message then has no figures but (if known)
// those of the writable layer.
func Container(attrs *runtimeapi.ContainerAttributes, c *sample.Container) *runtimeapi.ContainerStats {
	s := &runtimeapi.ContainerStats{Attributes: attrs}
	if c == nil {
		return s
	}
	g := &c.Cgroup
	s.Cpu, s.Memory, s.Swap, s.Io = cpu(g, c.Rate), memory(g), swap(g), io(g)
	if w := c.Writable; w != nil {
		s.WritableLayer = &runtimeapi.FilesystemUsage{
			Timestamp:  w.Time.UnixNano(),
			FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: w.Mountpoint},
			UsedBytes:  value(w.UsedBytes),
			InodesUsed: value(w.UsedInodes),
		}
	}
	return s
}

// Pod makes the message of a pod and its containers. A pod without a group of
// its own (the kubelet gave none that is its alone, or it is gone) gets the sum
// of its containers.
func Pod(attrs *runtimeapi.PodSandboxAttributes, p *sample.Pod, containers []*runtimeapi.ContainerStats) *runtimeapi.PodSandboxStats {
	s := &runtimeapi.LinuxPodSandboxStats{Containers: containers}
	g, rate, processes := &p.Cgroup, p.Rate, p.Processes
	if g.Have == 0 {
		g, rate, processes = sum(p.Containers)
	}
	s.Cpu, s.Memory, s.Io = cpu(g, rate), memory(g), io(g)
	if g.Have != 0 && processes > 0 {
		s.Process = &runtimeapi.ProcessUsage{Timestamp: g.Time.UnixNano(), ProcessCount: value(processes)}
	}
	s.Network = network(p.Network)
	return &runtimeapi.PodSandboxStats{Attributes: attrs, Linux: s}
}

// sum adds up containers, except what does not add up: limits and pressure.
// Processes are only counted in a full sample.
func sum(containers []*sample.Container) (*sample.Cgroup, sample.Rate, uint64) {
	var g sample.Cgroup
	var rate sample.Rate
	var processes uint64
	g.Memory.Limit, g.Memory.SwapLimit = sample.Unlimited, sample.Unlimited
	for _, c := range containers {
		from := &c.Cgroup
		if from.Have == 0 {
			continue
		}
		g.Have |= from.Have &^ sample.PSI
		g.Time = from.Time
		g.CPU.Usage += from.CPU.Usage
		m := &from.Memory
		g.Memory.Usage += m.Usage
		g.Memory.WorkingSet += m.WorkingSet
		g.Memory.RSS += m.RSS
		g.Memory.PageFaults += m.PageFaults
		g.Memory.MajorPageFaults += m.MajorPageFaults
		rate.Valid = rate.Valid || c.Rate.Valid
		rate.NanoCores += c.Rate.NanoCores
		processes += c.Process.Processes
	}
	return &g, rate, processes
}

func value(n uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: n} }

func cpu(g *sample.Cgroup, r sample.Rate) *runtimeapi.CpuUsage {
	if g.Have&sample.CPU == 0 {
		return nil
	}
	u := &runtimeapi.CpuUsage{
		Timestamp:            g.Time.UnixNano(),
		UsageCoreNanoSeconds: value(g.CPU.Usage),
		Psi:                  psi(g, &g.PSI.CPU),
	}
	if r.Valid {
		u.UsageNanoCores = value(r.NanoCores)
	}
	return u
}

func memory(g *sample.Cgroup) *runtimeapi.MemoryUsage {
	if g.Have&sample.Memory == 0 {
		return nil
	}
	m := &g.Memory
	return &runtimeapi.MemoryUsage{
		Timestamp:       g.Time.UnixNano(),
		WorkingSetBytes: value(m.WorkingSet),
		AvailableBytes:  available(m.Limit, m.WorkingSet),
		UsageBytes:      value(m.Usage),
		RssBytes:        value(m.RSS),
		PageFaults:      value(m.PageFaults),
		MajorPageFaults: value(m.MajorPageFaults),
		Psi:             psi(g, &g.PSI.Memory),
	}
}

func swap(g *sample.Cgroup) *runtimeapi.SwapUsage {
	if g.Have&sample.Memory == 0 {
		return nil
	}
	return &runtimeapi.SwapUsage{
		Timestamp:          g.Time.UnixNano(),
		SwapAvailableBytes: available(g.Memory.SwapLimit, g.Memory.Swap),
		SwapUsageBytes:     value(g.Memory.Swap),
	}
}

// available is what is left of a limit; without a limit there is no such
// number (and zero would read as "none left").
func available(limit, used uint64) *runtimeapi.UInt64Value {
	if limit == sample.Unlimited {
		return nil
	}
	return value(limit - min(limit, used))
}

func io(g *sample.Cgroup) *runtimeapi.IoUsage {
	p := psi(g, &g.PSI.IO)
	if p == nil {
		return nil
	}
	return &runtimeapi.IoUsage{Timestamp: g.Time.UnixNano(), Psi: p}
}

func psi(g *sample.Cgroup, p *sample.Pressure) *runtimeapi.PsiStats {
	if g.Have&sample.PSI == 0 {
		return nil
	}
	return &runtimeapi.PsiStats{Some: psiData(p.Some), Full: psiData(p.Full)}
}

// psiData: CRI wants nanoseconds, the kernel counts microseconds.
func psiData(l sample.PressureLine) *runtimeapi.PsiData {
	return &runtimeapi.PsiData{Total: l.Total * uint64(time.Microsecond), Avg10: l.Avg10, Avg60: l.Avg60, Avg300: l.Avg300}
}

func network(n *sample.Network) *runtimeapi.NetworkUsage {
	if n == nil {
		return nil
	}
	u := &runtimeapi.NetworkUsage{Timestamp: n.Time.UnixNano()}
	for i, from := range n.Interfaces {
		usage := &runtimeapi.NetworkInterfaceUsage{
			Name:     from.Name,
			RxBytes:  value(from.Rx.Bytes),
			RxErrors: value(from.Rx.Errors),
			TxBytes:  value(from.Tx.Bytes),
			TxErrors: value(from.Tx.Errors),
		}
		if i == 0 {
			u.DefaultInterface = usage
		} else {
			u.Interfaces = append(u.Interfaces, usage)
		}
	}
	return u
}
