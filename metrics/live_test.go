package metrics_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cgroups"
	"github.com/nodeagent/nodeagent/cri/stats"
	"github.com/nodeagent/nodeagent/metrics"
	"github.com/nodeagent/nodeagent/metrics/sample"
)

// live makes pods with a process each in real groups, and a sampler of them.
func live(tb testing.TB, count int, maxAge time.Duration) (*metrics.Sampler, []sample.PodTarget) {
	tb.Helper()
	if os.Getuid() != 0 {
		tb.Skip("needs root")
	}
	m, err := cgroups.New(cgroups.Config{Driver: cgroups.CgroupFS, Name: "nalive" + strconv.Itoa(os.Getpid())})
	if err != nil {
		tb.Skip(err)
	}
	ctx := context.Background()
	var pods []sample.PodTarget
	for i := range count {
		parent, err := m.PodParent("", strconv.Itoa(i))
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() {
			if err := m.RemovePod(ctx, parent); err != nil {
				tb.Error(err)
			}
		})
		// The pod's group stands for the container's, whose group is the
		// shim's business: "c" below it.
		id := fmt.Sprintf("c%d", i)
		if err := m.EnsurePod(ctx, parent, nil); err != nil {
			tb.Fatal(err)
		}
		path, err := m.ContainerPath(parent, id)
		if err != nil {
			tb.Fatal(err)
		}
		if err := m.EnsurePod(ctx, path, nil); err != nil {
			tb.Fatal(err)
		}
		c := exec.Command("sleep", "600")
		if err := c.Start(); err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() {
			c.Process.Kill()
			c.Wait()
			if err := m.RemovePod(ctx, path); err != nil {
				tb.Error(err)
			}
		})
		for _, mount := range m.Host().Mounts {
			if err := os.WriteFile(mount+path+"/cgroup.procs", []byte(strconv.Itoa(c.Process.Pid)), 0); err != nil {
				tb.Fatal(mount, err)
			}
		}
		pods = append(pods, sample.PodTarget{
			ID: "pod" + strconv.Itoa(i), Name: "pod" + strconv.Itoa(i), Namespace: "default", CreatedAt: time.Now(),
			CgroupParent: parent, Netns: "/proc/self/ns/net", HostInterface: "lo",
			Containers: []sample.ContainerTarget{{ID: id, Name: "c", Image: "i", StartedAt: time.Now(), Pid: c.Process.Pid}},
		})
	}
	s, err := metrics.New(metrics.Config{
		Group:  func(parent, id string) (metrics.Group, error) { return m.Resolve(parent, id) },
		MaxAge: maxAge,
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	return s, pods
}

func TestLive(t *testing.T) {
	s, pods := live(t, 3, time.Nanosecond)
	got, err := s.Sample(context.Background(), pods, sample.Everything)
	if err != nil {
		t.Fatal(err)
	}
	for i := range got {
		p := &got[i]
		c := p.Containers[0]
		want := sample.Basic | sample.CPUDetail | sample.MemoryDetail | sample.Pids | sample.IO
		if c.Cgroup.Have&want&^sample.PSI != want&^sample.PSI || p.Cgroup.Have == 0 || !c.Rate.Valid {
			t.Errorf("have %b and %b, rate %+v", c.Cgroup.Have, p.Cgroup.Have, c.Rate)
		}
		if c.Process.Processes != 1 || c.Process.FDs < 3 || c.Process.OpenFilesSoft == 0 || p.Processes != 1 {
			t.Errorf("processes %+v, in the pod %d", c.Process, p.Processes)
		}
		if p.Network == nil || p.Network.Interfaces[0].Name != "eth0" {
			t.Errorf("network %+v", p.Network)
		}
		if len(stats.Metrics(p).ContainerMetrics[0].Metrics) < 48 {
			t.Errorf("metrics %v", stats.Metrics(p))
		}
	}
}

// A thousand samples of three pods leave no descriptor open.
func TestLiveLeaks(t *testing.T) {
	s, pods := live(t, 3, time.Nanosecond)
	count := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	s.Sample(context.Background(), pods, sample.Everything)
	before := count()
	for range 300 {
		if _, err := s.Sample(context.Background(), pods, sample.Everything); err != nil {
			t.Fatal(err)
		}
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors, then %d", before, after)
	}
}

func BenchmarkLive50(b *testing.B) {
	s, pods := live(b, 50, time.Nanosecond)
	ctx := context.Background()
	run := func(name string, depth sample.Depth, each func(*sample.Pod)) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			before := cpuTime()
			for b.Loop() {
				got, err := s.Sample(ctx, pods, depth)
				if err != nil {
					b.Fatal(err)
				}
				for i := range got {
					each(&got[i])
				}
			}
			b.ReportMetric(float64(cpuTime()-before)/float64(b.N)/1e6, "cpu-ms/op")
		})
	}
	attrs := &runtimeapi.ContainerAttributes{Id: "c"}
	run("ListContainerStats", sample.Containers, func(p *sample.Pod) { stats.Container(attrs, p.Containers[0]) })
	run("ListPodSandboxStats", sample.Pods, func(p *sample.Pod) {
		stats.Pod(nil, p, []*runtimeapi.ContainerStats{stats.Container(attrs, p.Containers[0])})
	})
	run("ListPodSandboxMetrics", sample.Everything, func(p *sample.Pod) { stats.Metrics(p) })
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
