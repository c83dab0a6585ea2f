// Package stream serves exec, attach and port-forward: the CRI hands a client
// (kubelet, crictl) a URL with a random one-time token, and the client comes
// back on it with SPDY or WebSocket. The protocols are k8s.io/cri-streaming's;
// what it lacks and kubectl's and crictl's WebSocket clients insist on is here:
// v5.channel.k8s.io for exec and attach, SPDY within a WebSocket for
// port-forward.
//
// The back end gives and takes pipes: the package joins each stream of a
// client with a pipe, closes what the other side closed (half-close), passes
// terminal sizes on and turns exit codes into what kubectl and crictl show.
// Ports are dialled from inside the pod's network namespace, without helper
// programs.
//
// It must not: know what runs behind [Runtime], keep state beyond a session, or
// let a client that went away hold a descriptor or goroutine.
// Callers: cri/ for the URLs, main for Run.
//
// Goroutines: one per open connection, up to four copies per session. Run waits
// for the sessions when it ends. Kernel: nothing special.
package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

// Runtime is what sessions run on; the CRI core meets it.
type Runtime interface {
	// Exec starts cmd in a running container. It uses the files while it runs
	// (the caller closes its copies afterwards) and hands them on as they are.
	//
	// Errors: NotFound, FailedPrecondition (not running), InvalidArgument.
	Exec(ctx context.Context, containerID string, cmd []string, p Pipes) (Session, error)
	// Attach connects to the stdio of a container's first process.
	Attach(ctx context.Context, containerID string, p Pipes) (Session, error)
	// Netns is the path of a ready sandbox's network namespace, "" for the
	// host's.
	Netns(ctx context.Context, sandboxID string) (path string, err error)
}

// Pipes are the ends that the process gets; nil is not wanted.
type Pipes struct {
	Stdin, Stdout, Stderr *os.File
	Terminal              bool
}

// Session is a running exec or an attach.
type Session interface {
	Resize(width, height uint16) error
	// Wait returns when the process has ended (its exit code) or the attach has
	// (0).
	Wait(ctx context.Context) (code int, err error)
	// Close kills the exec, or detaches. After Wait it only frees.
	Close() error
}

// Config of a Server.
type Config struct {
	// Addr to listen on; "": 127.0.0.1:0. Clients are kubelet and crictl on
	// this node.
	Addr string
	// BaseURL is what URLs start with, when clients reach the server by another
	// name than Addr. nil: from the address that is listened on.
	BaseURL *url.URL
	TLS     *tls.Config // nil: plain HTTP

	IdleTimeout     time.Duration // closes a silent connection; 0: 4 h
	CreationTimeout time.Duration // for a client to open its streams; 0: 30 s
	// DrainTimeout is how long output may be silent after the process has ended
	// while somebody else (a background child) keeps it open. 0: 500 ms.
	DrainTimeout time.Duration

	Log *slog.Logger // nil: slog.Default
}

// Server answers Get requests with URLs and serves them.
type Server struct {
	cfg     Config
	log     *slog.Logger
	runtime Runtime

	tickets tickets

	mu     sync.Mutex
	base   *url.URL // nil unless Run is listening
	cancel context.CancelFunc
	ctx    context.Context // of Run: ends every session
	open   sync.WaitGroup  // sessions and their copies
}

// New checks c and starts nothing.
func New(c Config, r Runtime) (*Server, error) {
	if c.Addr == "" {
		c.Addr = "127.0.0.1:0"
	}
	if _, _, err := net.SplitHostPort(c.Addr); err != nil {
		return nil, fmt.Errorf("streaming address %q: allowed is host:port: %w: %w", c.Addr, err, errdefs.ErrInvalidArgument)
	}
	if r == nil {
		return nil, fmt.Errorf("streaming without a runtime: %w", errdefs.ErrInvalidArgument)
	}
	defaultTo(&c.IdleTimeout, 4*time.Hour)
	defaultTo(&c.CreationTimeout, remotecommand.DefaultStreamCreationTimeout)
	defaultTo(&c.DrainTimeout, 500*time.Millisecond)
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return &Server{cfg: c, log: c.Log, runtime: r}, nil
}

func defaultTo(d *time.Duration, def time.Duration) {
	if *d == 0 {
		*d = def
	}
}

// Run listens and serves until ctx ends, then ends every session: execs are
// killed, attaches detached.
func (s *Server) Run(ctx context.Context) error {
	l, err := net.Listen("tcp", s.cfg.Addr)
	if err != nil {
		return fmt.Errorf("listen for streams: %w", err)
	}
	base := s.cfg.BaseURL
	if base == nil {
		base = &url.URL{Scheme: "http", Host: l.Addr().String()}
		if s.cfg.TLS != nil {
			base.Scheme = "https"
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.start(ctx, cancel, base)
	conns := watch(l)
	defer s.stop(conns)

	srv := &http.Server{
		Handler:           s.handler(),
		TLSConfig:         s.cfg.TLS,
		ReadHeaderTimeout: 30 * time.Second,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       withConnection,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	stopped := context.AfterFunc(ctx, func() { srv.Close() })
	defer stopped()
	if s.cfg.TLS != nil {
		err = srv.ServeTLS(conns, "", "")
	} else {
		err = srv.Serve(conns)
	}
	if errors.Is(err, http.ErrServerClosed) && ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serve streams on %s: %w", l.Addr(), err)
}

func (s *Server) start(ctx context.Context, cancel context.CancelFunc, base *url.URL) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ctx, s.cancel, s.base = ctx, cancel, base
}

// sayGoodbye is how long sessions have to tell their clients why they end.
const sayGoodbye = time.Second

// stop refuses new sessions, ends the open ones and waits for them.
func (s *Server) stop(conns *watchedListener) {
	s.mu.Lock()
	s.cancel()
	s.base = nil
	s.mu.Unlock()
	cut := time.AfterFunc(sayGoodbye, conns.closeAll)
	s.open.Wait()
	if cut.Stop() {
		conns.closeAll() // port-forwards without a stream
	}
}

// begin counts a session in; false when the server has stopped. ctx ends with
// the client's request or the server.
func (s *Server) begin(req context.Context) (ctx context.Context, end func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.base == nil || s.ctx.Err() != nil {
		return nil, nil, false
	}
	s.open.Add(1)
	ctx, cancel := context.WithCancel(req)
	unlink := context.AfterFunc(s.ctx, cancel)
	return ctx, func() {
		unlink()
		cancel()
		s.open.Done()
	}, true
}

// url makes a ticket for request r and says where it is good.
func (s *Server) url(kind string, r any) (string, error) {
	s.mu.Lock()
	base := s.base
	s.mu.Unlock()
	if base == nil {
		return "", fmt.Errorf("streaming server is not listening: %w", errdefs.ErrUnavailable)
	}
	token, err := s.tickets.add(kind, r, time.Now())
	if err != nil {
		return "", err
	}
	return base.JoinPath(kind, token).String(), nil
}

// Kinds of request: the first element of a URL's path.
const (
	kindExec        = "exec"
	kindAttach      = "attach"
	kindPortForward = "portforward"
)

// GetExec returns a URL that is good for one connection within a minute.
//
// Errors: InvalidArgument for wrong requests, Unavailable before Run,
// ResourceExhausted with 1,000 unused URLs.
func (s *Server) GetExec(r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	if err := checkStreams("container_id", r.GetContainerId(), r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTty()); err != nil {
		return nil, err
	}
	u, err := s.url(kindExec, r)
	if err != nil {
		return nil, fmt.Errorf("exec in container %q: %w", r.GetContainerId(), err)
	}
	return &runtimeapi.ExecResponse{Url: u}, nil
}

// GetAttach is like GetExec.
func (s *Server) GetAttach(r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	if err := checkStreams("container_id", r.GetContainerId(), r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTty()); err != nil {
		return nil, err
	}
	u, err := s.url(kindAttach, r)
	if err != nil {
		return nil, fmt.Errorf("attach to container %q: %w", r.GetContainerId(), err)
	}
	return &runtimeapi.AttachResponse{Url: u}, nil
}

// GetPortForward is like GetExec.
func (s *Server) GetPortForward(r *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	if err := checkStreams("pod_sandbox_id", r.GetPodSandboxId(), true, true, false, false); err != nil {
		return nil, err
	}
	for _, p := range r.GetPort() {
		if err := checkPort(p); err != nil {
			return nil, err
		}
	}
	u, err := s.url(kindPortForward, r)
	if err != nil {
		return nil, fmt.Errorf("forward ports of sandbox %q: %w", r.GetPodSandboxId(), err)
	}
	return &runtimeapi.PortForwardResponse{Url: u}, nil
}

func checkStreams(field, id string, stdin, stdout, stderr, tty bool) error {
	switch {
	case id == "":
		return fmt.Errorf("%s is empty: allowed is an id: %w", field, errdefs.ErrInvalidArgument)
	case tty && stderr:
		return fmt.Errorf("stderr is true: allowed with tty is false, a terminal is one stream: %w", errdefs.ErrInvalidArgument)
	case !stdin && !stdout && !stderr:
		return fmt.Errorf("stdin, stdout and stderr are false: allowed is at least one of them: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func errStopping() error {
	return fmt.Errorf("streaming server is stopping: %w", errdefs.ErrUnavailable)
}
