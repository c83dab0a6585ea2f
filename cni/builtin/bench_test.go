package builtin

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nodeagent/nodeagent/cni/lab"
)

// The namespaces are made ahead: their making is not what is measured.
func benchPods(b *testing.B, l *lab.Lab) []Attachment {
	b.Helper()
	var as []Attachment
	for i := range b.N {
		path := l.Netns(fmt.Sprint("pod", i))
		as = append(as, Attachment{SandboxID: fmt.Sprint("sandbox", i), Netns: path, Key: path})
	}
	return as
}

func benchNetwork(b *testing.B, l *lab.Lab) *Network {
	b.Helper()
	n := newNetwork(b, l, func(c *Config) {
		c.RootDir = filepath.Join(l.Dir, "root")
		c.Log = slog.New(slog.DiscardHandler)
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = n.Run(ctx) }()
	for !n.running.Load() {
		time.Sleep(time.Millisecond)
	}
	b.Cleanup(func() { cancel(); <-done })
	if _, err := n.prepare(ctx); err != nil {
		b.Fatal(err)
	}
	return n
}

func BenchmarkAttachCold(b *testing.B) {
	l := lab.New(b)
	n := benchNetwork(b, l)
	as := benchPods(b, l)
	b.ResetTimer()
	for _, a := range as {
		if _, err := n.Attach(b.Context(), a); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAttachWarm(b *testing.B) {
	l := lab.New(b)
	n := benchNetwork(b, l)
	as := benchPods(b, l)
	for _, a := range as {
		if err := n.Prewire(b.Context(), a.Netns); err != nil {
			b.Fatal(err)
		}
	}
	b.ResetTimer()
	for _, a := range as {
		if _, err := n.Attach(b.Context(), a); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDetach(b *testing.B) {
	l := lab.New(b)
	n := benchNetwork(b, l)
	as := benchPods(b, l)
	var got []Attached
	for _, a := range as {
		g, err := n.Attach(b.Context(), a)
		if err != nil {
			b.Fatal(err)
		}
		got = append(got, g)
	}
	b.ResetTimer()
	for i, a := range as {
		if err := n.Detach(b.Context(), a, got[i].IPs); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkChurn is what a busy node does: four workers make a namespace, attach, detach and destroy it. Reported beside
// the time of the whole: that of Attach and Detach alone, whose tail is the kernel destroying
// other namespaces meanwhile.
func BenchmarkChurn(b *testing.B) {
	l := lab.New(b)
	n := benchNetwork(b, l)
	var mu sync.Mutex
	var attach, detach []time.Duration
	var next atomic.Int64
	b.ResetTimer()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
				path := filepath.Join(l.Dir, fmt.Sprint("pod", i))
				if err := lab.Pin(path); err != nil {
					b.Error(err)
					return
				}
				a := Attachment{SandboxID: fmt.Sprint("sandbox", i), Netns: path, Key: path}
				start := time.Now()
				got, err := n.Attach(context.Background(), a)
				t1 := time.Since(start)
				if err != nil {
					b.Error(err)
					return
				}
				start = time.Now()
				if err := n.Detach(context.Background(), a, got.IPs); err != nil {
					b.Error(err)
				}
				t2 := time.Since(start)
				lab.Unpin(path)
				mu.Lock()
				attach, detach = append(attach, t1), append(detach, t2)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for what, d := range map[string][]time.Duration{"attach": attach, "detach": detach} {
		slices.Sort(d)
		b.ReportMetric(float64(d[len(d)/2].Microseconds()), what+"-p50-µs")
		b.ReportMetric(float64(d[len(d)*95/100].Microseconds()), what+"-p95-µs")
	}
}
