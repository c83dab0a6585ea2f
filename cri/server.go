package cri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/spec"
	"github.com/nodeagent/nodeagent/cri/stats"
	"github.com/nodeagent/nodeagent/cri/store"
)

// MaxMessage is the largest gRPC message in bytes, the kubelet's own limit.
const MaxMessage = 16 << 20

// Config of a Server. Everything without a remark is required.
type Config struct {
	Socket string                                  // path of the unix socket
	Listen func(path string) (net.Listener, error) // nil: a new socket in place of a dead one
	State  string                                  // directory that dies with the boot
	Root   string                                  // directory that survives it

	BootIDPath string    // "": the kernel's
	Handlers   []Handler // besides the default one
	Version    string    // of this program, semver
	Effective  any       // configuration as Status shows it, JSON-encodable; may be nil
	PodsLogDir string    // unused directories are made below it; may be ""

	// ExecMaxOutput bounds each of stdout and stderr of ExecSync; 0 means
	// 16 MiB. Both together never exceed MaxMessage.
	ExecMaxOutput int

	Host     spec.HostInfo
	Defaults spec.Defaults
	CDI      spec.DeviceInjector // nil refuses containers with CDI devices

	Runtime    Runtime
	Network    Network
	Cgroups    Cgroups
	Namespaces Namespaces
	Images     Images
	Rootfs     Rootfs
	Stats      stats.Sampler // nil: stats and metrics are refused

	Log *slog.Logger // nil: none
}

// Handler is a runtime handler (RuntimeClass) by name.
type Handler struct{ Name string }

// Server is the CRI server.
type Server struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer

	cfg     Config
	log     *slog.Logger
	db      *store.DB
	boot    string
	streams Streams

	sandboxes      *store.Index[*sandbox]
	containers     *store.Index[*container]
	sandboxNames   *names
	containerNames *names
	events         *broadcaster
	janitor        *janitor

	life    context.Context // ends with Run; background work of containers
	endLife context.CancelFunc
	work    sync.WaitGroup  // background work of containers
	alive   chan struct{}   // taken by exitLoop, see Alive
	ready   chan struct{}   // closed when Recover is done
	refused map[string]bool // IDs of records that cannot be read; set by Recover
}

// New opens the records and checks cfg. It starts nothing; Close undoes it.
func New(cfg Config) (*Server, error) {
	var missing []error
	for name, absent := range map[string]bool{
		"Socket": cfg.Socket == "", "State": cfg.State == "", "Root": cfg.Root == "",
		"Runtime": cfg.Runtime == nil, "Network": cfg.Network == nil, "Cgroups": cfg.Cgroups == nil,
		"Namespaces": cfg.Namespaces == nil, "Images": cfg.Images == nil, "Rootfs": cfg.Rootfs == nil,
	} {
		if absent {
			missing = append(missing, fmt.Errorf("cri: %s is not set: %w", name, errdefs.ErrInvalidArgument))
		}
	}
	if err := errors.Join(missing...); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.BootIDPath == "" {
		cfg.BootIDPath = "/proc/sys/kernel/random/boot_id"
	}
	if cfg.Listen == nil {
		cfg.Listen = Listen
	}
	if cfg.ExecMaxOutput <= 0 || cfg.ExecMaxOutput > MaxMessage {
		cfg.ExecMaxOutput = MaxMessage
	}
	boot, err := readBootID(cfg.BootIDPath)
	if err != nil {
		return nil, err
	}
	db, err := store.Open(store.Config{Path: filepath.Join(cfg.Root, "state.db"), Log: cfg.Log})
	if err != nil {
		return nil, err
	}
	s := &Server{
		cfg: cfg, log: cfg.Log, db: db, boot: boot,
		sandboxes:      store.NewIndex[*sandbox]("sandbox"),
		containers:     store.NewIndex[*container]("container"),
		sandboxNames:   newNames("sandbox", cfg.Log),
		containerNames: newNames("container", cfg.Log),
		events:         newBroadcaster(),
		janitor:        newJanitor(cfg.Log),
		alive:          make(chan struct{}),
		ready:          make(chan struct{}), refused: map[string]bool{},
	}
	s.life, s.endLife = context.WithCancel(context.Background())
	return s, nil
}

// SetStreams gives the server what makes streaming URLs; before Run. (The
// streaming server needs the Server to run sessions, hence not in Config.)
func (s *Server) SetStreams(x Streams) { s.streams = x }

// Drain waits for work in flight, rollbacks included, and ends background
// work. Serve has returned; the runtime must still be there.
func (s *Server) Drain() {
	s.sandboxNames.wait()
	s.containerNames.wait()
	s.endLife()
	s.work.Wait()
}

// Close drains and closes the records.
func (s *Server) Close() error {
	s.Drain()
	return s.db.Close()
}

// Run recovers what an earlier process left, then serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	if err := s.Recover(ctx); err != nil {
		return err
	}
	return s.Serve(ctx, nil)
}

// Serve answers on the socket until ctx ends. Recover comes first. onReady,
// unless nil, is called once the socket accepts connections.
func (s *Server) Serve(ctx context.Context, onReady func()) error {
	select {
	case <-s.ready:
	default:
		return fmt.Errorf("serve CRI: Recover was not called: %w", errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ln, err := s.cfg.Listen(s.cfg.Socket)
	if err != nil {
		return err
	}
	e := edge{s.log}
	g := grpc.NewServer(
		grpc.MaxRecvMsgSize(MaxMessage), grpc.MaxSendMsgSize(MaxMessage),
		grpc.UnaryInterceptor(e.unary), grpc.StreamInterceptor(e.stream),
		grpc.WriteBufferSize(16<<10), grpc.ReadBufferSize(16<<10),
	)
	runtimeapi.RegisterRuntimeServiceServer(g, s)
	runtimeapi.RegisterImageServiceServer(g, s)

	var wg sync.WaitGroup
	wg.Go(func() { s.janitor.run(ctx) })
	wg.Go(func() {
		<-ctx.Done()
		s.events.close()
		stopped := time.AfterFunc(5*time.Second, g.Stop)
		g.GracefulStop()
		stopped.Stop()
	})
	if onReady != nil {
		onReady()
	}
	s.log.Info("serving CRI", "socket", s.cfg.Socket)
	err = g.Serve(ln)
	cancel()
	wg.Wait()
	if err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve CRI on %s: %w", s.cfg.Socket, err)
	}
	return nil
}

// Listen makes the CRI's socket at path. A dead one of an earlier process is replaced; the
// records' lock already keeps a second daemon away.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: remove the old socket: %w", path, err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o660); err != nil {
		ln.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return ln, nil
}

// phase marks a point of a call at which dying must be harmless. Operators see
// how far a call got; crash tests kill the process when the line appears.
func (s *Server) phase(ctx context.Context, name, id string) {
	s.log.DebugContext(ctx, "phase", "phase", name, "id", id)
}
