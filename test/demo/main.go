// Command demo is a newcomer's first minute with nodeagent, run by `make run`:
// it starts the daemon, builds an image and serves it from a registry on
// loopback, pulls it, runs a pod of two containers on the built-in network and
// shows logs, an exec and live stats. Then it stays, until Ctrl-C takes all
// of it away again and the demo looks whether anything was left behind.
//
//	demo           stays up until Ctrl-C
//	demo --once    takes all away after the show; exit code 1 if anything went wrong or was left
//
// It drives the daemon as any client does: the CRI socket, and `nodeagent
// image pull` for its progress. It must not be linked into the product. One
// goroutine does everything; two more wait for the daemon's end and serve the
// registry.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/nodeagent/nodeagent/config"
	"golang.org/x/sys/unix"
)

// options are the command line.
type options struct {
	once     bool
	config   string        // of the daemon
	binaries string        // directory of nodeagent and nodeagent-shim
	tool     string        // the static test tool, which goes into the image
	watch    time.Duration // how long logs and stats are shown
}

func main() {
	var o options
	flag.BoolVar(&o.once, "once", false, "take everything away after the show instead of waiting for Ctrl-C")
	flag.StringVar(&o.config, "config", config.DefaultPath, "the daemon's configuration `file`")
	flag.StringVar(&o.binaries, "bin", "bin", "`directory` with the built binaries")
	flag.StringVar(&o.tool, "tool", "build/testtool", "the static test tool, a `file`")
	flag.DurationVar(&o.watch, "watch", 4*time.Second, "how long logs, and then stats, are shown")
	flag.Parse()
	// SIGPIPE is ignored so that `make run | head` still cleans up.
	signal.Ignore(unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	s := newScreen(os.Stdout)
	if err := run(ctx, o, s); err != nil {
		s.fail(err)
		os.Exit(1)
	}
}

// run shows everything and takes it away again, whatever happens.
func run(ctx context.Context, o options, s *screen) error {
	cfg, err := config.Load(o.config)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("the demo starts a daemon that makes namespaces and mounts: run `sudo make run`")
	}
	work, err := os.MkdirTemp("", "nodeagent-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	d := &demo{options: o, cfg: cfg, screen: s, work: work}
	before := takeSnapshot(cfg)
	showErr := d.show(ctx)
	if ctx.Err() != nil {
		showErr = nil // Ctrl-C in the middle is a wish, not a fault
	}
	if d.daemon == nil {
		return showErr // nothing was started, so nothing is taken away
	}
	if showErr != nil {
		s.fail(showErr)
		d.logTail()
	}
	// What follows must happen although ctx has ended.
	if err := d.takeDown(context.WithoutCancel(ctx), before); err != nil {
		return err
	}
	if showErr != nil {
		return errors.New("the demo failed, see above")
	}
	return nil
}

// demo is what has been started so far.
type demo struct {
	options
	cfg    config.Config
	screen *screen
	work   string // directory of this run: daemon log, container logs

	daemon   *daemon
	registry *imageServer
	pod      *pod
	madeDirs []string // of the daemon, which were not there before
}

func (d *demo) show(ctx context.Context) error {
	s := d.screen
	s.title("nodeagent", "a Kubernetes node in one daemon")
	if err := d.start(ctx); err != nil {
		return err
	}
	if err := d.pull(ctx); err != nil {
		return err
	}
	if err := d.runPod(ctx); err != nil {
		return err
	}
	if err := d.showLogs(ctx); err != nil {
		return err
	}
	if err := d.showExec(ctx); err != nil {
		return err
	}
	if err := d.showStats(ctx); err != nil {
		return err
	}
	if d.once {
		return nil
	}
	d.explain()
	select {
	case <-ctx.Done():
		return nil
	case <-d.daemon.ended:
		return errors.New("the daemon ended by itself")
	}
}

// explain says how to go on by oneself.
func (d *demo) explain() {
	s := d.screen
	s.step("It is yours", "")
	s.text("The pod runs on. In another terminal, with crictl from cri-tools:")
	s.text("")
	s.code("export CONTAINER_RUNTIME_ENDPOINT=unix://" + d.cfg.CRI.Socket)
	s.code("crictl ps")
	s.code("crictl exec -it " + short(d.pod.containers["counter"]) + " sh")
	s.code("crictl logs -f " + short(d.pod.containers["counter"]))
	s.code("crictl stats")
	s.code("crictl pull " + d.registry.ref)
	s.text("")
	s.text("Or look from outside: curl " + d.pod.url() + " ; " + filepath.Join(d.binaries, "nodeagent") + " image ls")
	s.text("")
	s.text("Ctrl-C removes the pod, stops the daemon and checks that nothing is left.")
}

func short(id string) string { return id[:min(13, len(id))] }

// logTail shows what the daemon said last.
func (d *demo) logTail() {
	if d.daemon == nil {
		return
	}
	fmt.Fprintf(os.Stderr, "\nThe daemon's last lines:\n%s\n", d.daemon.logTail(15))
}
