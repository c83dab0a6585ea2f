package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/nodeagent/nodeagent/cmd/nodeagent/internal/probe"
	"github.com/nodeagent/nodeagent/config"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newRunCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "run",
		Short: "Run the daemon",
		Long: `Runs the daemon in the foreground until SIGTERM or SIGINT. Containers keep
running when it ends; the next daemon takes them over.

SIGHUP, like "nodeagent reload", has it read the configuration file again.

Under systemd (Type=notify) it reports when it is ready, keeps a status line,
writes to the journal with fields, and feeds the watchdog for as long as the CRI
answers and its loops make progress.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return errors.New("the daemon needs root: start it with sudo or as a systemd service")
			}
			if err := probe.OwnRoot(); err != nil {
				return err
			}
			release, err := claim(cfg)
			if err != nil {
				return err
			}
			defer release()
			hup := make(chan os.Signal, 1)
			signal.Notify(hup, unix.SIGHUP)
			defer signal.Stop(hup)
			log := newLogging(os.Stderr, cfg.Log, journalOfService())
			adoptLibraryLogs(log.Logger)
			return runDaemon(cmd.Context(), cfg, a.configPath, log, hup)
		},
	}
}

// claim makes this process the only daemon on cfg's two directories. The
// locks go with the process, so a crash leaves nothing to clean.
func claim(cfg config.Config) (release func(), err error) {
	var held []*os.File
	release = func() {
		for _, f := range held {
			f.Close()
		}
	}
	for _, dir := range []string{cfg.State, cfg.Root} {
		f, err := lockDir(dir)
		if err != nil {
			release()
			return nil, err
		}
		held = append(held, f)
	}
	return release, nil
}

// lockDir makes dir and takes the lock file in it, in which the owner's pid is
// written.
func lockDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make directory: %w", err)
	}
	path := filepath.Join(dir, "daemon.lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		pid, _ := os.ReadFile(path)
		f.Close()
		return nil, fmt.Errorf("another nodeagent (pid %s) uses %s: stop it first, or give this one its own root, state and network.name in a file for --config",
			strings.TrimSpace(string(pid)), dir)
	}
	if err := f.Truncate(0); err != nil {
		f.Close()
		return nil, fmt.Errorf("write lock file: %w", err)
	}
	if _, err := fmt.Fprintln(f, os.Getpid()); err != nil {
		f.Close()
		return nil, fmt.Errorf("write lock file: %w", err)
	}
	return f, nil
}
