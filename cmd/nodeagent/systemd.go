package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// statusPeriod is how often the status line is made anew.
const statusPeriod = 5 * time.Second

// sdNotify sends a state, and descriptors to keep, to the service manager
// (sd_notify(3)). Without one it does nothing.
func sdNotify(state string, keep ...*os.File) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	rights, err := rightsOf(keep)
	if err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	defer unix.Close(fd)
	// x/sys takes "@" for the abstract namespace, as systemd does.
	if err := unix.Sendmsg(fd, []byte(state), rights, &unix.SockaddrUnix{Name: path}, 0); err != nil {
		return fmt.Errorf("notify the service manager on %s: %w", path, err)
	}
	return nil
}

// service tells systemd what becomes of the daemon: READY once the CRI answers,
// a status line, WATCHDOG for as long as all loops come round, STOPPING at the
// end.
type service struct {
	log     *slog.Logger
	notify  func(state string)
	served  chan struct{} // closed when the CRI's socket accepts
	answers func(context.Context) error
	loops   map[string]func(context.Context) error // each returns once its loop has come round
	status  func(context.Context) string
}

// run works until ctx ends.
func (s *service) run(ctx context.Context) error {
	defer s.notify(daemon.SdNotifyStopping)
	select {
	case <-ctx.Done():
		return nil
	case <-s.served:
	}
	for s.answers(ctx) != nil {
		if ctx.Err() != nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		s.log.Warn("systemd watchdog is misconfigured", "err", err)
	}
	s.notify(daemon.SdNotifyReady + "\nSTATUS=" + s.status(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { s.tell(ctx) })
	if watchdog > 0 {
		wg.Go(func() { s.feed(ctx, watchdog/3) })
	}
	wg.Wait()
	return nil
}

// tell keeps the status line true.
func (s *service) tell(ctx context.Context) {
	last := ""
	for sleep(ctx, statusPeriod) {
		if line := s.status(ctx); line != last {
			s.notify("STATUS=" + line)
			last = line
		}
	}
}

// feed pings the watchdog once a period in which every loop came round. A
// daemon that hangs is thus restarted; its containers are not.
func (s *service) feed(ctx context.Context, period time.Duration) {
	for ok := true; ok; ok = sleep(ctx, period) {
		if s.progress(ctx, period) {
			s.notify(daemon.SdNotifyWatchdog)
		}
	}
}

// progress reports whether all loops came round within limit; those that did
// not are logged.
func (s *service) progress(ctx context.Context, limit time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	failed := make(chan bool, len(s.loops)+1)
	look := func(name string, alive func(context.Context) error) {
		err := alive(ctx)
		if err != nil && context.Cause(ctx) != context.Canceled {
			s.log.Error("no progress: if this lasts, the watchdog restarts the daemon", "loop", name, "err", err)
		}
		failed <- err != nil
	}
	go look("CRI", s.answers)
	for name, alive := range s.loops {
		go look(name, alive)
	}
	ok := true
	for range cap(failed) {
		ok = !<-failed && ok
	}
	return ok
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// newService is nil without a service manager to talk to.
func (d *node) newService() *service {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return nil
	}
	s := &service{
		log: d.log.Logger, served: make(chan struct{}), status: d.statusLine,
		notify: func(state string) {
			if err := sdNotify(state); err != nil {
				d.log.Warn("systemd is not told", "err", err)
			}
		},
		answers: func(ctx context.Context) error { return answers(ctx, d.cfg.CRI.Socket) },
		loops:   map[string]func(context.Context) error{"exits": d.cri.Alive, "network": d.network.Alive},
	}
	if d.policy != nil {
		s.loops["policy"] = d.policy.Alive
	}
	return s
}

// answers asks the CRI for its version.
func answers(ctx context.Context, socket string) error {
	conn, err := dialCRI(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = runtimeapi.NewRuntimeServiceClient(conn).Version(ctx, &runtimeapi.VersionRequest{})
	return err
}

// statusLine is what `systemctl status` shows.
func (d *node) statusLine(ctx context.Context) string {
	pods, err := d.cri.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
		State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}}})
	if err != nil {
		return "cannot list pods: " + err.Error()
	}
	ctrs, err := d.cri.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
		State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}}})
	if err != nil {
		return "cannot list containers: " + err.Error()
	}
	lastError, at := d.log.last.get()
	return statusText(len(pods.Items), len(ctrs.Containers), d.reloads.waiting(), lastError, at)
}

// maxStatusError bounds the error in the status line, in bytes.
const maxStatusError = 300

func statusText(pods, containers int, waiting []string, lastError string, at time.Time) string {
	text := fmt.Sprintf("%s, %s running", count(pods, "pod"), count(containers, "container"))
	if len(waiting) > 0 {
		text += "; a restart is needed for " + strings.Join(waiting, ", ")
	}
	if lastError == "" {
		return text
	}
	if len(lastError) > maxStatusError {
		lastError = strings.ToValidUTF8(lastError[:maxStatusError], "") + "..."
	}
	return text + "; last error " + at.Format("Jan 2 15:04:05") + ": " + strings.ReplaceAll(lastError, "\n", ": ")
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
