//go:build linux

package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim/api"
)

// Leave ends shim and reaper, if they have no container, and waits until they
// are gone. For a daemon that goes and leaves nothing behind: Run must have
// ended, or it would start them anew.
//
// Errors: FailedPrecondition if there is a container.
func (c *Client) Leave(ctx context.Context) error {
	nc, err := dial(ctx, c.cfg.StateDir, "shim.sock")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil // none runs
	}
	if err != nil {
		return err
	}
	conn := newConnection(nc)
	defer conn.ttrpc.Close()
	held, err := conn.svc.List(ctx, &api.Empty{})
	if err != nil {
		return local(err)
	}
	if n := len(held.Containers); n > 0 {
		return fmt.Errorf("end the shim: it has %d containers: %w", n, errdefs.ErrFailedPrecondition)
	}
	// The shim may be gone before its answer is here; the locks tell.
	if _, err := conn.svc.Shutdown(ctx, &api.Empty{}); err != nil && !errdefs.IsUnavailable(local(err)) {
		return local(err)
	}
	for _, lock := range []string{"lock", "reaper.lock"} {
		if err := c.waitFree(ctx, lock); err != nil {
			return err
		}
	}
	return nil
}

// waitFree waits until nobody holds a lock of the state directory.
func (c *Client) waitFree(ctx context.Context, name string) error {
	for {
		held, err := locked(filepath.Join(c.cfg.StateDir, name))
		if err != nil || !held {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the shim to end: %w", ctx.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
}
