package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A part measures one thing on every runtime, in turns where it can.
type part struct {
	name, title string
	run         func(*bench, context.Context) error
}

var parts = []part{
	{"ladder", "memory, CPU, idle, lists at 0 to 200 pods", (*bench).ladderUp},
	{"start", "pods one by one", (*bench).oneByOne},
	{"batch", "50 pods at concurrency 1, 4, 10", (*bench).inBatches},
	{"exec", "ExecSync", (*bench).execs},
	{"log", "log throughput", (*bench).logs},
	{"pull", "pull and unpack of 100 MB in ten layers", (*bench).pulls100},
	{"end", "memory after all that", (*bench).atTheEnd},
}

func partNames() []string {
	return []string{"ladder", "start", "batch", "exec", "log", "pull", "end"}
}

func (b *bench) oneByOne(ctx context.Context) error {
	ts := make([]timings, len(b.runtimes))
	for range b.rounds {
		for i, r := range b.runtimes {
			p, err := b.start(ctx, r, b.idler(), &ts[i])
			if err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
			if err := b.stop(ctx, r, p, &ts[i]); err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
		}
	}
	for i, r := range b.runtimes {
		r.figures.timings(&ts[i])
	}
	return nil
}

func (b *bench) inBatches(ctx context.Context) error {
	for _, conc := range []int{1, 4, 10} {
		rates := make([][]float64, len(b.runtimes))
		cpus := make([][]float64, len(b.runtimes))
		machine := make([][]float64, len(b.runtimes))
		for range b.batches {
			for i, r := range b.runtimes {
				before, t := r.cpu(), time.Now()
				pods, err := b.startMany(ctx, r, b.idler(), b.batch, conc)
				d, used := time.Since(t), r.cpu().sub(before)
				if e := b.stopMany(ctx, r, pods, 4); err == nil {
					err = e
				}
				if err != nil {
					return fmt.Errorf("%s: %w", r.name, err)
				}
				n := float64(b.batch)
				rates[i] = append(rates[i], n/d.Seconds())
				cpus[i] = append(cpus[i], used.group/n*1000)
				machine[i] = append(machine[i], used.machine/n*1000)
			}
		}
		for i, r := range b.runtimes {
			r.figures.set(fmt.Sprintf("pods/s, %d at a time", conc), "1/s", median(rates[i]))
			if conc == 4 {
				r.figures.set("CPU per pod start", "ms", median(cpus[i]))
				r.figures.set("CPU per pod start, machine", "ms", median(machine[i]))
			}
		}
	}
	return nil
}

// ladderUp climbs on one runtime after the other: their interfaces and
// cgroups would slow each other down.
func (b *bench) ladderUp(ctx context.Context) error {
	for _, r := range b.runtimes {
		if err := b.climb(ctx, r); err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
	}
	return nil
}

const (
	idleAt = 50
	// settle is how long a runtime may tidy up before its memory is read and
	// its CPU at rest: the same for all.
	settle = 5 * time.Second
)

func (b *bench) atTheEnd(context.Context) error {
	time.Sleep(settle)
	for _, r := range b.runtimes {
		r.figures.set("memory (PSS), 0 pods, at the end", "MB", mb(r.memory().PSS))
	}
	return nil
}

func (b *bench) climb(ctx context.Context, r *runtime) (err error) {
	var pods []*pod
	defer func() {
		if e := b.stopMany(context.WithoutCancel(ctx), r, pods, 8); err == nil {
			err = e
		}
	}()
	time.Sleep(settle)
	zero := r.memory()
	r.figures.set("memory (PSS), 0 pods", "MB", mb(zero.PSS))
	r.figures.set("memory (RSS), 0 pods", "MB", mb(zero.RSS))
	r.figures.set("memory (PSS) of the daemon, 0 pods", "MB", mb(zero.Daemon))
	var first memory // with the first pods: what any pod needs is in memory then
	for _, n := range b.ladder {
		before := r.cpu()
		more, err := b.startMany(ctx, r, b.idler(), n-len(pods), 4)
		added := float64(len(more))
		used := r.cpu().sub(before)
		pods = append(pods, more...)
		if err != nil {
			return err
		}
		r.figures.set(fmt.Sprintf("CPU per pod start, up to %d pods", n), "ms", used.group/added*1000)
		time.Sleep(settle)
		m := r.memory()
		r.figures.set(fmt.Sprintf("memory (PSS) of the daemon, %d pods", n), "MB", mb(m.Daemon))
		r.figures.set(fmt.Sprintf("memory (PSS), %d pods", n), "MB", mb(m.PSS))
		r.figures.set(fmt.Sprintf("memory (RSS), %d pods", n), "MB", mb(m.RSS))
		r.figures.set(fmt.Sprintf("processes, %d pods", n), "", float64(m.Procs))
		if first.Procs == 0 {
			first = m
		} else {
			r.figures.set("memory per additional pod", "MB", mb(m.PSS-first.PSS)/float64(n-b.ladder[0]))
		}
		if n == idleAt || (b.quick && n == b.ladder[len(b.ladder)-1]) {
			if err := b.atRest(ctx, r, pods[0]); err != nil {
				return err
			}
		}
	}
	return nil
}

// atRest measures what an idle node with its pods costs, and what asking
// about them does.
func (b *bench) atRest(ctx context.Context, r *runtime, p *pod) error {
	before := r.cpu()
	t := time.Now()
	select {
	case <-time.After(b.idle):
	case <-ctx.Done():
		return ctx.Err()
	}
	used := r.cpu().sub(before)
	r.figures.set("idle CPU, 50 pods", "% of a core", used.group/time.Since(t).Seconds()*100)
	var ts timings
	skip := map[string]bool{}
	for range min(b.rounds, 20) { // containerd's stats of 50 pods take a second
		for _, c := range []struct {
			name string
			f    func() error
		}{
			{floorCall, func() error {
				_, err := r.rs.Version(ctx, &runtimeapi.VersionRequest{})
				return err
			}},
			{"ListPodSandbox, 50 pods", func() error {
				_, err := r.rs.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
				return err
			}},
			{"ListContainers, 50 pods", func() error {
				_, err := r.rs.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
				return err
			}},
			{"PodSandboxStatus", func() error {
				_, err := r.rs.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.sandbox})
				return err
			}},
			{"ContainerStatus", func() error {
				_, err := r.rs.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: p.container})
				return err
			}},
			{"ListContainerStats, 50 pods", func() error {
				_, err := r.rs.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
				return err
			}},
			{"ListPodSandboxStats, 50 pods", func() error {
				_, err := r.rs.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
				return err
			}},
			{"ListPodSandboxMetrics, 50 pods", func() error {
				_, err := r.rs.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
				return err
			}},
		} {
			if skip[c.name] {
				continue
			}
			if err := ts.time(c.name, c.f); err != nil {
				if !unimplemented(err) {
					return err
				}
				skip[c.name] = true
			}
		}
		// Lists may be answered from samples of a second; ask like a kubelet
		// that is in a hurry, not like a loop.
		time.Sleep(50 * time.Millisecond)
	}
	r.figures.timings(&ts)
	return nil
}

func (b *bench) execs(ctx context.Context) error {
	pods := make([]*pod, len(b.runtimes))
	ts := make([]timings, len(b.runtimes))
	used := make([]cpu, len(b.runtimes))
	for i, r := range b.runtimes {
		p, err := b.start(ctx, r, b.shell(), nil)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		pods[i] = p
		defer b.stop(context.WithoutCancel(ctx), r, p, nil)
	}
	for range b.rounds {
		for i, r := range b.runtimes {
			before := r.cpu()
			err := ts[i].time("ExecSync", func() error {
				res, err := r.rs.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: pods[i].container, Cmd: []string{"/bin/true"}, Timeout: 10})
				if err == nil && res.ExitCode != 0 {
					err = fmt.Errorf("exit code %d: %s", res.ExitCode, res.Stderr)
				}
				return err
			})
			if err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
			d := r.cpu().sub(before)
			used[i].group += d.group
		}
	}
	for i, r := range b.runtimes {
		r.figures.timings(&ts[i])
		r.figures.set("CPU per ExecSync", "ms", used[i].group/float64(b.rounds)*1000)
	}
	return nil
}

// logs has a container print a file of 100-byte lines as fast as it can, and
// divides what it printed by the time until it is all in the log file.
func (b *bench) logs(ctx context.Context) error {
	w := workload{image: b.images.ref("log"), command: []string{"/bin/cat", "/log"}, log: true}
	lines := b.logMB << 20 / logLine
	want := int64(lines * (logLine + len("2006-01-02T15:04:05.000000000Z stdout F ")))
	rates := make([][]float64, len(b.runtimes))
	cpus := make([][]float64, len(b.runtimes))
	for range b.pulls {
		for i, r := range b.runtimes {
			before := r.cpu()
			p, err := b.start(ctx, r, w, nil)
			if err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
			path := filepath.Join(p.config.LogDirectory, "c.log")
			if err := waitSize(ctx, path, want-int64(lines)*10); err != nil { // times may be shorter by trailing digits
				return fmt.Errorf("%s: %w", r.name, err)
			}
			d := time.Since(p.started)
			used := r.cpu().sub(before)
			rates[i] = append(rates[i], float64(b.logMB)/d.Seconds())
			cpus[i] = append(cpus[i], used.group/float64(b.logMB)*1000)
			if err := b.stop(ctx, r, p, nil); err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
			os.RemoveAll(p.config.LogDirectory)
		}
	}
	for i, r := range b.runtimes {
		r.figures.set("log throughput", "MB/s", median(rates[i]))
		r.figures.set("CPU per MB of log", "ms", median(cpus[i]))
	}
	return nil
}

// waitSize waits until the file has at least size bytes and has stopped
// growing.
func waitSize(ctx context.Context, path string, size int64) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	for {
		st, err := os.Stat(path)
		if err == nil && st.Size() >= size {
			return nil
		}
		select {
		case <-ctx.Done():
			var have int64
			if st != nil {
				have = st.Size()
			}
			return fmt.Errorf("wait for %d bytes in %s: it has %d", size, path, have)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func (b *bench) pulls100(ctx context.Context) error {
	times := make([][]float64, len(b.runtimes))
	cpus := make([][]float64, len(b.runtimes))
	for round := range b.pulls {
		ref, err := b.images.pushBig(uint64(round + 1))
		if err != nil {
			return err
		}
		for i, r := range b.runtimes {
			before, t := r.cpu(), time.Now()
			if err := r.pull(ctx, ref); err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
			d := time.Since(t)
			used := r.cpu().sub(before)
			times[i] = append(times[i], float64(d.Milliseconds()))
			cpus[i] = append(cpus[i], used.group*1000)
			if _, err := r.is.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}}); err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
		}
	}
	for i, r := range b.runtimes {
		r.figures.set("pull+unpack 100 MB", "ms", median(times[i]))
		r.figures.set("CPU of pull+unpack", "ms", median(cpus[i]))
	}
	return nil
}

func mb(bytes int64) float64 { return float64(bytes) / (1 << 20) }
