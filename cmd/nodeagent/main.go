// Command nodeagent is a Kubernetes node in one daemon, and the tool to look
// after it: `nodeagent run` is the daemon, the other commands ask it or the
// host. Each command has a file of its own name.
//
// The package is also the only wiring: it turns the configuration into the
// Config structs of the domain packages and joins them with small adapters
// (daemon.go, wire*.go). It must not hold logic of those packages.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends the process at once
	err := newRootCommand().ExecuteContext(ctx)
	stop()
	if err == nil {
		return
	}
	var exit exitError
	if errors.As(err, &exit) {
		os.Exit(exit.code)
	}
	fmt.Fprintf(os.Stderr, "nodeagent: %v\n", err)
	os.Exit(1)
}

// exitError ends the process with a code when all has been said already.
type exitError struct{ code int }

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", e.code) }
