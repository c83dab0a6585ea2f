// Command controlplane is a Kubernetes control plane for tests: etcd,
// kube-apiserver, kube-controller-manager and kube-scheduler, the real ones, in
// one process and one directory. Package test/cluster of the main module starts
// it from tests.
//
// It must not be used for anything that has to be kept: etcd does not sync its
// writes, and whoever reads the directory is admin.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/controller/certificates/authority"
)

const (
	readyTimeout = 2 * time.Minute
	stopTimeout  = 30 * time.Second
)

// config is what the command line says.
type config struct {
	dir             string // absolute
	listen          net.IP
	port            int
	keep, stdin     bool
	signingDuration time.Duration
	auditPolicy     []byte // nil: the default
	auditWebhook    string // URL or ""
}

func main() {
	cfg, err := parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err == nil {
		err = run(context.Background(), cfg)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "controlplane:", err)
		os.Exit(1)
	}
}

func parse(args []string) (cfg config, err error) {
	set := flag.NewFlagSet("controlplane", flag.ContinueOnError)
	set.StringVar(&cfg.dir, "dir", "", "directory for data, keys, kubeconfigs and logs (required)")
	set.TextVar(&cfg.listen, "listen", net.IPv4(127, 0, 0, 1), "address that the API server listens on")
	set.IntVar(&cfg.port, "port", 0, "port of the API server; 0: the one it had before (--keep), or a free one")
	set.BoolVar(&cfg.keep, "keep", false, "go on with the data of the last run in this directory")
	set.BoolVar(&cfg.stdin, "exit-with-stdin", false, "stop when standard input is closed")
	set.DurationVar(&cfg.signingDuration, "signing-duration", time.Hour, "longest life of certificates for signing requests")
	set.Func("audit-policy", "audit policy `file` (audit.k8s.io/v1) instead of the default", func(file string) (err error) {
		cfg.auditPolicy, err = os.ReadFile(file)
		return err
	})
	set.StringVar(&cfg.auditWebhook, "audit-webhook", "", "`URL` that audit events are sent to, beside audit.log")
	if err := set.Parse(args); err != nil {
		return cfg, err
	}
	if set.NArg() > 0 {
		return cfg, fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	if cfg.dir == "" {
		return cfg, errors.New("--dir is required")
	}
	if cfg.listen == nil {
		return cfg, errors.New("--listen: an address is required; 0.0.0.0 are all of the host's")
	}
	if cfg.signingDuration < 10*time.Second {
		return cfg, fmt.Errorf("--signing-duration %v: at least 10s", cfg.signingDuration)
	}
	cfg.dir, err = filepath.Abs(cfg.dir)
	return cfg, err
}

// run builds everything, starts it in order, says that it is ready, and stops
// it in reverse when a signal comes or a part fails.
func run(ctx context.Context, cfg config) (err error) {
	begin := time.Now()
	ctx, cancel := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	if cfg.stdin {
		go func() {
			io.Copy(io.Discard, os.Stdin)
			cancel()
		}()
	}
	if err := enter(cfg.dir, cfg.keep); err != nil {
		return err
	}
	if err := logTo("controlplane.log"); err != nil {
		return err
	}
	listener, err := listen(ctx, cfg)
	if err != nil {
		return fmt.Errorf("open the API server's port: %w", err)
	}
	cfg.port = listener.Addr().(*net.TCPAddr).Port
	auth, err := prepare(cfg)
	if err != nil {
		return err
	}
	token := newToken()
	server := cfg.serverURL()
	kubeconfigs, err := writeKubeconfigs(server, token, auth.cluster)
	if err != nil {
		return err
	}

	etcd, err := startEtcd(ctx)
	if err != nil {
		return err
	}
	defer etcd.Close()
	parts := newParts()
	defer func() { err = errors.Join(err, parts.stop()) }()

	parts.start("kube-apiserver", func(ctx context.Context) error { return runAPIServer(ctx, cfg, listener) })
	ctx = parts.orFailed(ctx)
	client, err := adminClient()
	if err != nil {
		return err
	}
	if err := waitServed(ctx, client); err != nil {
		return err
	}
	if err := bootstrap(ctx, client, token); err != nil {
		return err
	}
	parts.start("kube-controller-manager", func(ctx context.Context) error { return runControllerManager(ctx, cfg) })
	parts.start("kube-scheduler", runScheduler)
	ca := authority.CertificateAuthority{Certificate: auth.cluster.Cert, PrivateKey: auth.cluster.Key}
	parts.start("csr", func(ctx context.Context) error { return runCSR(ctx, cfg, ca) })
	if err := waitControlled(ctx, client); err != nil {
		return err
	}
	if err := (ready{server, os.Getpid(), kubeconfigs}).write(); err != nil {
		return err
	}
	defer os.Remove(readyFile)
	fmt.Printf("ready in %.1f s: %s\n", time.Since(begin).Seconds(), server)
	for _, role := range slices.Sorted(maps.Keys(kubeconfigs)) {
		fmt.Printf("  %-24s %s\n", role, kubeconfigs[role])
	}
	<-ctx.Done()
	if failed := new(failure); errors.As(context.Cause(ctx), failed) {
		return failed
	}
	return nil
}

// prepare writes keys, certificates and configuration.
func prepare(cfg config) (authorities, error) {
	if err := writeConfigs(cfg); err != nil {
		return authorities{}, err
	}
	if err := os.WriteFile(portFile, []byte(strconv.Itoa(cfg.port)), 0o644); err != nil {
		return authorities{}, err
	}
	return writePKI(cfg.listen)
}

// serverURL is where clients on this host find the API server.
func (c config) serverURL() string {
	host := c.listen.String()
	if c.listen.IsUnspecified() {
		host = "localhost"
	}
	return "https://" + net.JoinHostPort(host, strconv.Itoa(c.port))
}

func adminClient() (kubernetes.Interface, error) {
	rest, err := restConfig(kubeconfigFile("admin"))
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(rest)
}

// logTo sends what the components log to a file.
func logTo(file string) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	klog.SetSlogLogger(slog.New(slog.NewTextHandler(f, nil)))
	return nil
}
