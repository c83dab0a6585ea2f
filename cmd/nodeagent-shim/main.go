//go:build linux

// Command nodeagent-shim is the parent of the containers of a node. By its
// first argument it is
//
//	reaper STATEDIR EXITDIR   the parent of the shim (shim/reaper, in C)
//	serve STATEDIR EXITDIR    the shim (shim/server)
//	init                      libcontainer's init in a new container (shim/initmode)
//	seccomp-compile           compiles one seccomp profile and ends (shim/seccomp)
//
// The daemon starts the first, which starts the second. Keep its imports few:
// every container starts through this binary.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runc/libcontainer/exeseal"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	_ "github.com/nodeagent/nodeagent/shim/initmode"
	"github.com/nodeagent/nodeagent/shim/join"
	"github.com/nodeagent/nodeagent/shim/pause"
	"github.com/nodeagent/nodeagent/shim/reaper"
	"github.com/nodeagent/nodeagent/shim/seccomp"
	"github.com/nodeagent/nodeagent/shim/server"
)

// exitOther tells the reaper that another shim serves this directory.
const exitOther = 75

var errOther = errors.New("another shim serves this state directory")

func main() {
	if len(os.Args) == 2 && os.Args[1] == seccomp.Arg {
		seccomp.Compile()
	}
	if len(os.Args) != 4 || os.Args[1] != "serve" {
		fmt.Fprintln(os.Stderr, "usage: nodeagent-shim reaper|serve STATEDIR EXITDIR")
		os.Exit(2)
	}
	// libcontainer's goroutines enter containers' mount namespaces and end
	// with their thread. The main thread cannot end: on it, such a goroutine
	// would leave this process in a container's namespace for good and keep
	// its mounts alive. So nothing but this goroutine, which waits, gets it;
	// at the first statements of main it still runs there.
	runtime.LockOSThread()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	result := make(chan error, 1)
	go func() { result <- run(log, os.Args[2], os.Args[3]) }()
	switch err := <-result; {
	case errors.Is(err, errOther):
		os.Exit(exitOther)
	case err != nil:
		log.Error("shim", "err", err)
		os.Exit(1)
	}
}

func run(log *slog.Logger, state, exits string) error {
	if err := seal(); err != nil {
		log.Warn("run from a sealed copy; every start copies the program instead", "err", err)
	}
	debug.SetMemoryLimit(64 << 20)
	// libcontainer waits in system calls; the monitor that gives the
	// processor of such a wait to others comes late here (see reaper.c).
	runtime.GOMAXPROCS(max(4, runtime.NumCPU()))
	// libcontainer hands this to the init process, which has one thread to run.
	os.Setenv("GOMAXPROCS", "1")
	quietLogrus(log)
	filters, err := seccomp.NewCache("/proc/self/exe", log)
	if err != nil {
		return err
	}
	unix.Umask(0o022)
	if err := os.Chdir("/"); err != nil {
		return err
	}
	for _, dir := range []string{filepath.Join(state, "c"), exits} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	lock, err := takeLock(filepath.Join(state, "lock"))
	if err != nil {
		return err
	}
	defer lock.Close()
	conn, kept, err := reaper.Connect()
	if err != nil {
		log.Warn("no reaper; exits while no shim runs may be unknown", "err", err)
	}
	joiner, err := join.New()
	if err != nil {
		log.Warn("every exec goes by way of libcontainer, which is slower", "err", err)
	}
	s, err := server.New(server.Config{StateDir: state, ExitDir: exits, Reaper: conn, Kept: kept, Log: log, Seccomp: filters, Joiner: joiner})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go filters.Run(ctx)
	if err := pause.WriteRoot(filepath.Join(state, "pause")); err != nil {
		return err
	}
	if err := s.Adopt(context.Background()); err != nil {
		return err
	}
	return serve(s, state)
}

// seal replaces this process by itself from a sealed copy in memory, once: the
// containers' init then needs no copy of its own to be safe from them.
func seal() error {
	if exeseal.IsSelfExeCloned() || os.Getenv("NODEAGENT_SEALED") != "" {
		return os.Unsetenv("NODEAGENT_SEALED")
	}
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer self.Close()
	fi, err := self.Stat()
	if err != nil {
		return err
	}
	copied, err := exeseal.CloneBinary(self, fi.Size(), "nodeagent-shim", os.TempDir())
	if err != nil {
		return err
	}
	env := append(os.Environ(), "NODEAGENT_SEALED=1")
	return unix.Exec(fmt.Sprintf("/proc/self/fd/%d", copied.Fd()), os.Args, env)
}

// takeLock waits a little for a shim that is about to die.
func takeLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for range 100 {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if err != unix.EWOULDBLOCK {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	f.Close()
	if err == unix.EWOULDBLOCK {
		return nil, errOther
	}
	return nil, fmt.Errorf("lock %s: %w", path, err)
}

// quietLogrus sends libcontainer's own log into ours.
func quietLogrus(log *slog.Logger) {
	logrus.SetLevel(logrus.WarnLevel)
	logrus.SetOutput(io.Discard)
	logrus.AddHook(logrusHook{log})
}

type logrusHook struct{ log *slog.Logger }

func (logrusHook) Levels() []logrus.Level { return logrus.AllLevels }

func (h logrusHook) Fire(e *logrus.Entry) error {
	h.log.Warn("libcontainer", "text", e.Message)
	return nil
}

func serve(s *server.Server, state string) error {
	files, err := listen(state, "fd.sock")
	if err != nil {
		return err
	}
	main, err := listen(state, "shim.sock")
	if err != nil {
		return err
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	s.Register(srv)
	failed := make(chan error, 2)
	go func() { failed <- s.ServeFiles(files) }()
	go func() { failed <- srv.Serve(context.Background(), main) }()
	debug.FreeOSMemory()
	select {
	case err := <-failed:
		return err
	case <-s.Stopped():
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		_ = srv.Shutdown(ctx)
		return nil
	}
}

// listen listens on a socket in dir, whatever the length of its path.
func listen(dir, name string) (*net.UnixListener, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	old := unix.Umask(0o177)
	defer unix.Umask(old)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name)})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", filepath.Join(dir, name), err)
	}
	l.SetUnlinkOnClose(false)
	return l, nil
}
