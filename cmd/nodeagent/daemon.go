package main

import (
	"context"
	"errors"
	"log/slog"

	"github.com/nodeagent/nodeagent/config"
)

// runDaemon builds everything, runs it until ctx ends and stops it.
func runDaemon(context.Context, config.Config, *slog.Logger) error {
	return errors.New("the daemon is not wired yet")
}
