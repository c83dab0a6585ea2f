//go:build linux

package shim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim/api"
)

// maxLog is the size in bytes of the shim's own log beyond which a new one is
// begun when a shim starts.
const maxLog = 1 << 20

// connection is one connection to one shim.
type connection struct {
	ttrpc *ttrpc.Client
	svc   api.ShimClient
	lost  chan struct{} // closed when the connection ends
}

// Run keeps a shim running and this client connected to it, until ctx ends.
// The shim goes on then.
func (c *Client) Run(ctx context.Context) error {
	for _, dir := range []string{c.cfg.StateDir, c.cfg.ExitDir} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return fmt.Errorf("make shim directory: %w", err)
		}
	}
	delay := time.Duration(0)
	for ctx.Err() == nil {
		began := time.Now()
		if err := c.session(ctx); err != nil && ctx.Err() == nil {
			c.cfg.Log.Error("shim", "err", err)
		}
		if time.Since(began) > 5*time.Second {
			delay = 0
		}
		select {
		case <-ctx.Done():
		case <-time.After(delay):
		}
		delay = min(max(2*delay, 5*time.Millisecond), time.Second)
	}
	return nil
}

// session connects, starting a shim if there is none, and follows the exits
// until the connection is lost.
func (c *Client) session(ctx context.Context) error {
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	c.set(conn)
	defer func() {
		c.set(nil)
		conn.ttrpc.Close()
	}()
	stop := context.AfterFunc(ctx, func() { conn.ttrpc.Close() })
	defer stop()
	stream, err := conn.svc.Exits(ctx, &api.Empty{})
	if err != nil {
		return fmt.Errorf("follow exits: %w", err)
	}
	for {
		ev, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("connection to the shim is lost: %w", err)
		}
		if ev.Exit == nil {
			continue
		}
		select {
		case c.exits <- *exitOf(ev.Exit):
		case <-ctx.Done():
			return nil
		}
	}
}

func (c *Client) set(conn *connection) {
	c.mu.Lock()
	defer c.mu.Unlock()
	had := c.conn != nil
	if c.conn = conn; conn != nil {
		close(c.ready)
	} else if had {
		c.ready = make(chan struct{})
	}
}

// drop forgets conn, which is lost, before Run notices.
func (c *Client) drop(conn *connection) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == conn {
		c.conn, c.ready = nil, make(chan struct{})
	}
}

// connect reaches the shim. When nobody answers and no reaper lives that would
// start one, it starts a reaper, which starts the shim.
func (c *Client) connect(ctx context.Context) (*connection, error) {
	var started bool
	complain := time.Now().Add(5 * time.Second)
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		nc, err := dial(ctx, c.cfg.StateDir, "shim.sock")
		if err == nil {
			return newConnection(nc), nil
		}
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ECONNREFUSED) {
			return nil, err
		}
		if !started || wait >= 100*time.Millisecond {
			if started, err = c.startReaper(); err != nil {
				return nil, err
			}
		}
		if time.Now().After(complain) {
			// It is tried again for ever; whoever waits should know for what.
			c.cfg.Log.Warn("no shim answers; one is being started again and again", "path", c.cfg.StateDir)
			complain = time.Now().Add(time.Minute)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
}

func newConnection(nc net.Conn) *connection {
	conn := &connection{lost: make(chan struct{})}
	conn.ttrpc = ttrpc.NewClient(nc, ttrpc.WithOnClose(func() { close(conn.lost) }))
	conn.svc = api.NewShimClient(conn.ttrpc)
	return conn
}

// dial connects to a socket in dir, whatever the length of its path.
func dial(ctx context.Context, dir, name string) (*net.UnixConn, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var dialer net.Dialer
	nc, err := dialer.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", filepath.Join(dir, name), err)
	}
	return nc.(*net.UnixConn), nil
}

// startReaper starts a reaper unless one lives. It reports whether it did.
func (c *Client) startReaper() (bool, error) {
	if alive, err := locked(filepath.Join(c.cfg.StateDir, "reaper.lock")); alive || err != nil {
		return false, err
	}
	if alive, err := locked(filepath.Join(c.cfg.StateDir, "lock")); alive || err != nil {
		return false, err // a shim without a reaper, about to listen
	}
	path := filepath.Join(c.cfg.StateDir, "shim.log")
	if fi, err := os.Stat(path); err == nil && fi.Size() > maxLog {
		_ = os.Rename(path, path+".old") // one generation; without it we only log less
	}
	log, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return false, fmt.Errorf("open log of the shim: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(c.cfg.Binary, "reaper", c.cfg.StateDir, c.cfg.ExitDir)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = detached()
	if err := cmd.Start(); err != nil {
		return false, fmt.Errorf("start the shim: %w", err)
	}
	// It outlives us, normally. When it does not, it must not stay a zombie.
	go cmd.Wait()
	return true, nil
}

// locked says whether a process holds the lock at path.
func locked(path string) (bool, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == unix.EWOULDBLOCK {
		return true, nil
	}
	return false, err
}

// Ready waits until there is a connection to a shim.
func (c *Client) Ready(ctx context.Context) error {
	_, err := c.get(ctx)
	return err
}

func (c *Client) get(ctx context.Context) (*connection, error) {
	for {
		c.mu.Lock()
		conn, ready := c.conn, c.ready
		c.mu.Unlock()
		if conn != nil {
			return conn, nil
		}
		select {
		case <-ready:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for the shim: %w: %w", ctx.Err(), errdefs.ErrUnavailable)
		}
	}
}
