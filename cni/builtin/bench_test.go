package builtin

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
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
