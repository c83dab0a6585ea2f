package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// startNotifier tells systemd what becomes of the daemon: READY once the CRI
// answers on socket, WATCHDOG for as long as it does, STOPPING when ctx ends.
// The returned function waits for its goroutine. Without systemd
// (NOTIFY_SOCKET) nothing is started.
func startNotifier(ctx context.Context, socket string, log *slog.Logger) (stop func()) {
	if sent, err := daemon.SdNotify(false, "STATUS=starting"); !sent || err != nil {
		return func() {}
	}
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("systemd watchdog is misconfigured", "err", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		notify(ctx, socket, watchdog)
	}()
	return func() {
		cancel()
		<-done
	}
}

// notify polls fast until the CRI answers, then at a third of the watchdog's
// period. A daemon that hangs is thus restarted; its containers are not.
func notify(ctx context.Context, socket string, watchdog time.Duration) {
	defer daemon.SdNotify(false, daemon.SdNotifyStopping)
	period := 50 * time.Millisecond
	ready := false
	for {
		if answers(ctx, socket) {
			if !ready {
				daemon.SdNotify(false, daemon.SdNotifyReady+"\nSTATUS=serving CRI on "+socket)
				ready = true
				if watchdog == 0 {
					<-ctx.Done()
					return
				}
				period = watchdog / 3
			}
			daemon.SdNotify(false, daemon.SdNotifyWatchdog)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(period):
		}
	}
}

// answers asks the CRI for its version.
func answers(ctx context.Context, socket string) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := dialCRI(socket)
	if err != nil {
		return false
	}
	defer conn.Close()
	_, err = runtimeapi.NewRuntimeServiceClient(conn).Version(ctx, &runtimeapi.VersionRequest{})
	return err == nil
}
