package main

import (
	"context"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// showStats redraws a table of both containers and the pod's network.
func (d *demo) showStats(ctx context.Context) error {
	d.screen.step("Live stats", "from the pod's cgroups and its network namespace")
	const interval = 500 * time.Millisecond
	last := map[string]*runtimeapi.ContainerStats{}
	drawn := false
	// Two samples at least: CPU is what was used in between.
	for end := time.Now().Add(max(d.watch, 3*interval)); time.Now().Before(end); {
		rows, now, err := d.sample(ctx, last)
		if err != nil {
			return err
		}
		if len(last) > 0 && (d.screen.terminal || time.Until(end) < interval) {
			d.screen.table(rows, drawn)
			drawn = true
		}
		last = now
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(interval):
		}
	}
	return nil
}

// sample asks for stats and puts them into rows.
func (d *demo) sample(ctx context.Context, last map[string]*runtimeapi.ContainerStats) ([][]string, map[string]*runtimeapi.ContainerStats, error) {
	rt := d.daemon.runtime
	list, err := rt.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{
		Filter: &runtimeapi.ContainerStatsFilter{PodSandboxId: d.pod.id}})
	if err != nil {
		return nil, nil, err
	}
	p, err := rt.PodSandboxStats(ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: d.pod.id})
	if err != nil {
		return nil, nil, err
	}
	now := map[string]*runtimeapi.ContainerStats{}
	for _, c := range list.Stats {
		now[c.GetAttributes().GetMetadata().GetName()] = c
	}
	rows := [][]string{{"CONTAINER", "CPU", "MEMORY", "WRITTEN"}}
	for _, name := range []string{"web", "counter"} {
		c := now[name]
		rows = append(rows, []string{
			name,
			cpuShare(last[name], c),
			size(c.GetMemory().GetWorkingSetBytes().GetValue()),
			size(c.GetWritableLayer().GetUsedBytes().GetValue()),
		})
	}
	linux := p.GetStats().GetLinux()
	net := linux.GetNetwork().GetDefaultInterface()
	rows = append(rows, []string{
		"pod network", "in " + size(net.GetRxBytes().GetValue()), "out " + size(net.GetTxBytes().GetValue()),
		fmt.Sprintf("%d processes", linux.GetProcess().GetProcessCount().GetValue()),
	})
	return rows, now, nil
}

// cpuShare is the part of one CPU used between two samples.
func cpuShare(a, b *runtimeapi.ContainerStats) string {
	used := int64(b.GetCpu().GetUsageCoreNanoSeconds().GetValue()) - int64(a.GetCpu().GetUsageCoreNanoSeconds().GetValue())
	time := b.GetCpu().GetTimestamp() - a.GetCpu().GetTimestamp()
	if a == nil || time <= 0 {
		return "…"
	}
	return fmt.Sprintf("%.1f %%", 100*float64(used)/float64(time))
}
