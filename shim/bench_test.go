//go:build linux

package shim_test

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/contrib/seccomp"

	"github.com/nodeagent/nodeagent/shim"
)

// pod is a spec with what an ordinary container of a pod has.
func (n *node) pod(id string, args ...string) shim.Spec {
	s := n.spec(id, args...)
	s.OCI.Linux.Seccomp = seccomp.DefaultProfile(s.OCI)
	s.OCI.Linux.MaskedPaths = []string{"/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"}
	s.OCI.Linux.ReadonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
	return s
}

// report prints percentiles of the durations.
func report(b *testing.B, what string, d []time.Duration) {
	slices.Sort(d)
	b.ReportMetric(float64(d[len(d)/2].Microseconds())/1000, what+"-p50-ms")
	b.ReportMetric(float64(d[len(d)*95/100].Microseconds())/1000, what+"-p95-ms")
}

// cpu is the time that the shim and all its dead children have computed. It says
// more than the clock on a machine that does other things too.
func (n *node) cpu() time.Duration {
	var ticks int64
	for _, p := range n.find("serve") {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p))
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		for _, v := range f[11:15] {
			t, _ := strconv.ParseInt(v, 10, 64)
			ticks += t
		}
	}
	return time.Duration(ticks) * time.Second / 100
}

func (n *node) reportCPU(b *testing.B, before time.Duration) {
	b.ReportMetric(float64((n.cpu()-before).Microseconds())/1000/float64(b.N), "cpu-ms/op")
}

func BenchmarkStart(b *testing.B) {
	n := newNode(b)
	before := n.cpu()
	defer func() { n.reportCPU(b, before) }()
	var start, del []time.Duration
	i := 0
	for b.Loop() {
		id := "c" + strconv.Itoa(i)
		i++
		spec := n.pod(id, "sleep", "1000")
		t := time.Now()
		n.start(spec)
		start = append(start, time.Since(t))
		t = time.Now()
		if _, err := n.client.Delete(n.ctx(), id); err != nil {
			b.Fatal(err)
		}
		del = append(del, time.Since(t))
	}
	report(b, "start", start)
	report(b, "delete", del)
}

func BenchmarkStartParallel4(b *testing.B) {
	n := newNode(b)
	var next atomic.Int64
	var wg sync.WaitGroup
	for b.Loop() {
		const batch = 40
		next.Store(0)
		t := time.Now()
		for range 4 {
			wg.Go(func() {
				for {
					i := next.Add(1)
					if i > batch {
						return
					}
					n.start(n.pod("c"+strconv.FormatInt(i, 10), "sleep", "1000"))
				}
			})
		}
		wg.Wait()
		b.ReportMetric(batch/time.Since(t).Seconds(), "starts/s")
		b.StopTimer()
		for i := range batch {
			id := "c" + strconv.Itoa(i+1)
			if _, err := n.client.Delete(n.ctx(), id); err != nil {
				b.Fatal(err)
			}
			_ = n.client.Forget(n.ctx(), id)
		}
		b.StartTimer()
	}
}

func BenchmarkExecSync(b *testing.B) {
	n := newNode(b)
	n.start(n.pod("c", "sleep", "1000"))
	var d []time.Duration
	before := n.cpu()
	defer func() { n.reportCPU(b, before) }()
	for b.Loop() {
		t := time.Now()
		r, err := n.client.ExecSync(n.ctx(), "c", shim.ExecOptions{Process: n.process("true")})
		if err != nil || r.Code != 0 {
			b.Fatal(r, err)
		}
		d = append(d, time.Since(t))
	}
	report(b, "exec", d)
}

// BenchmarkLog measures from the start of a container that prints 100-byte
// lines at full speed to its end, with all of it in the log.
func BenchmarkLog(b *testing.B) {
	n := newNode(b)
	const size = 200 << 20
	block := strings.Repeat(strings.Repeat("x", 99)+"\n", size/100/16)
	f, err := os.Create(n.rootfs + "/data")
	if err != nil {
		b.Fatal(err)
	}
	for range 16 {
		if _, err := f.WriteString(block); err != nil {
			b.Fatal(err)
		}
	}
	f.Close()
	before := n.cpu()
	i := 0
	for b.Loop() {
		id := "c" + strconv.Itoa(i)
		i++
		n.start(n.spec(id, "cat", "/data"))
		if x := n.wait(id); x.Code != 0 {
			b.Fatal(x)
		}
		b.SetBytes(size)
		b.StopTimer()
		_ = os.Remove(n.logPath(id))
		if _, err := n.client.Delete(n.ctx(), id); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	n.reportCPU(b, before)
}

// BenchmarkMemory reports the PSS of shim and reaper with no container and what
// each of 100 adds.
func BenchmarkMemory(b *testing.B) {
	n := newNode(b)
	time.Sleep(200 * time.Millisecond)
	for b.Loop() {
		before := n.pss()
		const containers = 100
		for i := range containers {
			n.start(n.pod("c"+strconv.Itoa(i), "sleep", "1000"))
		}
		time.Sleep(3 * time.Second)
		b.ReportMetric(float64(before)/1024, "idle-MB")
		b.ReportMetric(float64(n.pss()-before)/containers, "kB/container")
		for i := range containers {
			id := "c" + strconv.Itoa(i)
			if _, err := n.client.Delete(n.ctx(), id); err != nil {
				b.Fatal(err)
			}
			_ = n.client.Forget(n.ctx(), id)
		}
	}
}

// pss is the memory of shim and reaper in kB.
func (n *node) pss() int {
	total := 0
	for _, p := range n.pids() {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", p))
		for line := range strings.Lines(string(b)) {
			var kb int
			if _, err := fmt.Sscanf(line, "Pss: %d kB", &kb); err == nil {
				total += kb
			}
		}
	}
	return total
}
