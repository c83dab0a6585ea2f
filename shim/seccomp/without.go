//go:build !linux || !cgo || !seccomp

package seccomp

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"github.com/opencontainers/runc/libcontainer/configs"
)

// Cache is empty without libseccomp.
type Cache struct{}

// NewCache returns a cache that keeps nothing.
func NewCache(string, *slog.Logger) (*Cache, error) { return &Cache{}, nil }

// Run waits for the end of ctx.
func (*Cache) Run(ctx context.Context) { <-ctx.Done() }

// Want does nothing.
func (*Cache) Want(*configs.Seccomp) {}

// Program has none.
func (*Cache) Program(*configs.Seccomp) (program []byte, flags uint64, ok bool) { return nil, 0, false }

// Compile says that it cannot.
func Compile() {
	fmt.Fprintln(os.Stderr, "built without the tag seccomp")
	os.Exit(1)
}
