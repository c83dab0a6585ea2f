package images

import (
	"context"
	"path/filepath"
	"testing"

	testimages "github.com/nodeagent/nodeagent/test/images"
	"github.com/nodeagent/nodeagent/test/registry"
)

// BenchmarkPull pulls and unpacks 100 MB in ten layers over loopback.
func BenchmarkPull(b *testing.B) {
	needRoot(b)
	for name, c := range map[string]testimages.Compression{"gzip": testimages.Gzip, "zstd": testimages.Zstd} {
		b.Run(name, func(b *testing.B) {
			reg := must(registry.Start(registry.Config{Dir: b.TempDir()}))(b)
			defer reg.Close()
			img := must(testimages.Bench(100<<20, 10, c, 1))(b)
			ref := reg.Addr + "/bench:v1"
			if err := testimages.Push(b.Context(), ref, img); err != nil {
				b.Fatal(err)
			}
			s := must(New(Config{Root: filepath.Join(b.TempDir(), "images")}))(b)
			ctx, cancel := context.WithCancel(b.Context())
			done := make(chan error)
			go func() { done <- s.Run(ctx) }()
			if err := s.Restore(nil); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if _, err := s.Pull(b.Context(), PullOptions{Ref: ref}); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := s.Remove(b.Context(), ref); err != nil {
					b.Fatal(err)
				}
				if err := s.GC(b.Context()); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			cancel()
			<-done
			if err := s.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}
