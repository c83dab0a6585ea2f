//go:build linux

package ebpf

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/ebpf/lab"
	"github.com/nodeagent/nodeagent/ebpf/objects"
	"github.com/nodeagent/nodeagent/ebpf/source"
)

// BenchmarkScale enforces 10,000 policies and 100,000 pods, 110 of them on
// this node, with programs on their interfaces, and measures: how long that
// takes and what memory it holds, the time from a change to its enforcement,
// and the processor's share of 100 changes of remote pods a second. The
// figures are metrics of one run; ns/op says nothing.
func BenchmarkScale(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skip("needs root")
	}
	if os.Getenv("NODEAGENT_TEST_ALONE") == "" { // again with a network and mounts of its own
		cmd := exec.Command("/proc/self/exe", "-test.run=^$", "-test.bench=^BenchmarkScale$", "-test.benchtime=1x")
		cmd.Env = append(os.Environ(), "NODEAGENT_TEST_ALONE=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		out, err := cmd.CombinedOutput()
		if err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
		adopt(b, string(out))
		return
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		scale(b)
	}
}

// adopt reports the metrics that the process alone has printed.
func adopt(b *testing.B, out string) {
	for _, line := range strings.Split(out, "\n") {
		f := strings.Fields(line)
		if !strings.HasPrefix(line, "BenchmarkScale") || len(f) < 4 {
			continue
		}
		for i := 2; i+1 < len(f); i += 2 {
			var v float64
			if _, err := fmt.Sscan(f[i], &v); err == nil && f[i+1] != "ns/op" {
				b.ReportMetric(v, f[i+1])
			}
		}
	}
	b.ReportMetric(0, "ns/op")
}

func scale(b *testing.B) {
	cl := lab.Big()
	runtime.GC()
	before := heap()
	fs := filepath.Join(b.TempDir(), "bpf")
	e, err := New(Config{BPFFS: fs})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
		if err := unix.Unmount(fs, 0); err != nil {
			b.Error(err)
		}
	}()
	var live []Pod
	for i := range 110 {
		p := &cl.Pods[i*37]
		live = append(live, Pod{SandboxID: fmt.Sprint(i), PodKey: p.PodKey, Created: time.Unix(int64(i), 0), Interface: veth(b, i), IPs: p.IPs})
	}
	local := map[objects.PodKey]bool{}
	for _, p := range live {
		local[p.PodKey] = true
	}
	change := objects.Lists{Namespaces: cl.Namespaces, Pods: cl.Pods, Policies: cl.Policies}.Whole()
	began := time.Now()
	if err := e.Change(ctx, change); err != nil {
		b.Fatal(err)
	}
	if err := e.Reconcile(ctx, live); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(time.Since(began).Seconds(), "s/full")
	runtime.GC()
	b.ReportMetric(float64(heap()-before)/(1<<20), "MB-heap")
	st, err := e.Status(ctx)
	if err != nil || !st.Ready || len(st.Problems) > 0 {
		b.Fatalf("%v %+v", err, st.Problems)
	}

	var all []time.Duration
	measure := func(what string, n int, make func(i int) objects.Change) {
		took := timed(b, n, func(i int) error { return e.Change(ctx, make(i)) })
		all = append(all, took...)
		slices.Sort(took)
		b.ReportMetric(ms(took[len(took)*99/100]), "ms-p99/"+what)
	}
	measure("pod-label", 300, func(i int) (c objects.Change) { put(&c, lab.BigPod(5000+i, (i+3)%7), local); return })
	measure("policy", 300, func(i int) (c objects.Change) {
		q := *cl.Policies[(i%110)*37%1000]
		q.Spec = lab.BigSpec(i*1000 + i + 13)
		c.Policies.Set(objects.PodKey{Namespace: q.Namespace, Name: q.Name}, &q)
		return
	})
	measure("namespace-label", 100, func(i int) (c objects.Change) {
		ns := cl.Namespaces[i]
		ns.Labels = map[string]string{"team": fmt.Sprint("t", (i+1)%50)}
		c.Namespaces.Set(ns.Name, &ns)
		return
	})
	slices.Sort(all)
	b.ReportMetric(ms(all[len(all)*99/100]), "ms-p99/change")
	b.ReportMetric(churn(b, e, local), "%core/churn")
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func timed(b *testing.B, n int, do func(i int) error) []time.Duration {
	out := make([]time.Duration, n)
	for i := range n {
		began := time.Now()
		if err := do(i); err != nil {
			b.Fatal(err)
		}
		out[i] = time.Since(began)
		time.Sleep(10 * time.Millisecond) // one by one, as they come
	}
	return out
}

func put(c *objects.Change, p *objects.Pod, local map[objects.PodKey]bool) {
	if !local[p.PodKey] {
		c.Pods.Set(p.PodKey, p)
	}
}

// churn changes 100 remote pods a second for ten seconds, handed over as the
// API server's source does; and returns the percentage of a core that this process took.
func churn(b *testing.B, e *Engine, local map[objects.PodKey]bool) float64 {
	used := func() time.Duration {
		var r unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
			b.Fatal(err)
		}
		return time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	runtime.GC()
	cpu, began := used(), time.Now()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	var c objects.Change
	told := began
	for i := range 1000 {
		<-tick.C
		switch p := lab.BigPod(8000+i, i%7); {
		case i%3 == 0:
			put(&c, lab.BigPod(200_000+i, i%7), local) // comes
		case i%3 == 1:
			put(&c, lab.BigPod(6000+i, (i+2)%7), local) // other labels
		case !local[p.PodKey]:
			c.Pods.Delete(p.PodKey)
		}
		if time.Since(told) < source.Pace || c.Empty() {
			continue // the source gathers
		}
		if err := e.Change(b.Context(), c); err != nil {
			b.Fatal(err)
		}
		c, told = objects.Change{}, time.Now()
	}
	return 100 * float64(used()-cpu) / float64(time.Since(began))
}

func heap() int64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// veth makes a pod's interface; it stays down.
func veth(b *testing.B, i int) int {
	name := fmt.Sprint("s", i)
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: fmt.Sprint("q", i)}); err != nil {
		b.Fatal(err)
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		b.Fatal(err)
	}
	return l.Attrs().Index
}
