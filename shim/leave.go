//go:build linux

package shim

import (
	"context"
	"errors"
	"fmt"
	"net"
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
	nc, err := c.dialLast(ctx)
	if nc == nil {
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

// startGrace is how long a reaper that Run has just started may take to lock
// its directory.
const startGrace = 100 * time.Millisecond

// dialLast connects to the shim, also to one that is only about to listen; nil
// if there is none.
func (c *Client) dialLast(ctx context.Context) (net.Conn, error) {
	for began := time.Now(); ; {
		nc, err := dial(ctx, c.cfg.StateDir, "shim.sock")
		if err == nil {
			return nc, nil
		}
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ECONNREFUSED) {
			return nil, err
		}
		alive, err := locked(filepath.Join(c.cfg.StateDir, "reaper.lock"))
		if err != nil {
			return nil, err
		}
		if !alive && time.Since(began) > startGrace {
			return nil, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for the shim to listen: %w", ctx.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
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
