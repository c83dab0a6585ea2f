package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// lingerTimeout is how long a client may go on sending after the pod has
// closed its side.
const lingerTimeout = 10 * time.Second

// forward joins stream with a TCP connection to port on the pod's localhost.
func (s *Server) forward(ctx context.Context, netns string, port int32, stream io.ReadWriteCloser) error {
	if err := checkPort(port); err != nil {
		return err
	}
	conn, err := dialLocalhost(ctx, netns, uint16(port))
	if err != nil {
		return err
	}
	defer conn.Close()
	unlink := context.AfterFunc(ctx, func() { conn.Close() })
	defer unlink()
	// The end of a client's input looks the same as the end of its connection,
	// and a pod that is silent would never write and fail.
	done := make(chan struct{})
	defer close(done)
	s.whenGone(ctx, done, func() { conn.Close() })

	// What the client sends. It ends when the client closes its side, or, after
	// this function, when the stream is closed.
	sent := make(chan struct{})
	s.background(func() {
		defer close(sent)
		if _, err := io.Copy(conn, onlyReader{stream}); err != nil {
			_, _ = io.Copy(io.Discard, onlyReader{stream})
			return
		}
		_ = conn.CloseWrite()
	})
	_, err = io.Copy(onlyWriter{stream}, conn)
	if ctx.Err() != nil {
		return errStopping()
	}
	if err != nil && !errors.Is(err, unix.ECONNRESET) {
		return fmt.Errorf("copy from port %d: %w", port, err)
	}
	if err != nil {
		return nil // the pod reset the connection: closed for both
	}
	// The pod has closed its side: tell the client, who may have more to say.
	_ = stream.Close()
	select {
	case <-sent:
	case <-ctx.Done():
	case <-time.After(lingerTimeout):
	}
	return nil
}

func checkPort(port int32) error {
	if port < 1 || port > 65535 {
		return fmt.Errorf("port is %d: allowed is 1 to 65535: %w", port, errdefs.ErrInvalidArgument)
	}
	return nil
}

// onlyWriter hides ReadFrom.
type onlyWriter struct{ io.Writer }

// dialLocalhost connects inside the namespace at netns ("" for the host's),
// first to 127.0.0.1, then to ::1.
//
// Errors: Unavailable when nothing listens.
func dialLocalhost(ctx context.Context, netns string, port uint16) (*net.TCPConn, error) {
	var failed error
	for _, host := range []string{"127.0.0.1", "::1"} {
		addr := netip.AddrPortFrom(netip.MustParseAddr(host), port)
		conn, err := dialIn(ctx, netns, addr)
		if err == nil {
			return conn, nil
		}
		err = fmt.Errorf("dial %s: %w", addr, err)
		if failed != nil {
			err = fmt.Errorf("%w; %w", failed, err)
		}
		failed = err
		if ctx.Err() != nil {
			break
		}
	}
	return nil, fmt.Errorf("connect to port %d of the pod: %w: %w", port, failed, errdefs.ErrUnavailable)
}

// dialIn makes the socket inside the namespace, where it stays, and connects it
// with the runtime's poller: no thread is held while it connects.
func dialIn(ctx context.Context, netns string, addr netip.AddrPort) (*net.TCPConn, error) {
	family, sa := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()})
	if addr.Addr().Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	fd, err := socketIn(netns, family)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "tcp:"+addr.String())
	defer f.Close() // net.FileConn duplicates it
	if err := connect(ctx, f, sa); err != nil {
		return nil, err
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// connect waits in the poller; f must be non-blocking.
func connect(ctx context.Context, f *os.File, sa unix.Sockaddr) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	unlink := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) })
	defer unlink()
	started := false
	var result error
	err = raw.Write(func(fd uintptr) bool {
		if !started {
			started = true
			result = unix.Connect(int(fd), sa)
			return !errors.Is(result, unix.EINPROGRESS) && !errors.Is(result, unix.EINTR)
		}
		var code int
		if code, result = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); result == nil && code != 0 {
			result = syscall.Errno(code)
		}
		if result == nil {
			// Woken without a result: not connected yet.
			if _, err := unix.Getpeername(int(fd)); errors.Is(err, unix.ENOTCONN) {
				return false
			}
		}
		return true
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(err, result)
}

// socketIn makes a non-blocking TCP socket in the namespace at netns. The
// thread that enters it goes back, or is thrown away when it cannot.
func socketIn(netns string, family int) (fd int, err error) {
	socket := func() (int, error) {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		return fd, os.NewSyscallError("socket", err)
	}
	if netns == "" {
		return socket()
	}
	ns, err := os.Open(netns)
	if err != nil {
		return -1, fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	onThread(func() (keep bool) {
		var home *os.File
		if home, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return true
		}
		defer home.Close()
		if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("enter network namespace %q: %w", netns, err)
			return true
		}
		fd, err = socket()
		return unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil
	})
	return fd, err
}

// onThread runs fn on an OS thread that does nothing else meanwhile and is
// thrown away unless fn says that it may be kept. It is never the main thread,
// whose namespaces /proc/<pid>/ns shows.
func onThread(fn func() (keep bool)) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			onThread(fn)
			runtime.UnlockOSThread()
			return
		}
		if fn() {
			runtime.UnlockOSThread()
		}
	}()
	<-done
}
