// Command vm tests the package on a stock Debian 12: its own kernel, systemd,
// cgroup v2. It makes a root file system with debootstrap (kept in the cache
// directory), boots it in qemu, hands it the package and compiled tests on a
// second disk, and prints what the tests print.
//
// It must not need KVM, nor a network for the machine; it must not change the
// host beyond its cache directory. Called by `make test-vm`. Root is needed,
// for debootstrap.
//
// Goroutines: one copies the machine's results, one waits for qemu. qemu is
// ended by its pid when the time is up or this program is told to end.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

type options struct {
	cache, pkg, bins, suites, accel string
	limit                           time.Duration
	memory, cpus                    int
}

func main() {
	var o options
	flag.StringVar(&o.cache, "cache", "build/vm", "`directory` of the root file system and the machine's files")
	flag.StringVar(&o.pkg, "package", "", "the Debian package under test")
	flag.StringVar(&o.bins, "bin", "bin", "`directory` of the binaries under test")
	flag.StringVar(&o.suites, "suites", "service,v2,reboot,systemd,cgroupfs,purge", "comma-separated suites: "+strings.Join(suiteNames(), ", "))
	flag.DurationVar(&o.limit, "limit", 30*time.Minute, "of the machine's life")
	// Within other virtual machines KVM may be there and not work.
	flag.StringVar(&o.accel, "accel", "tcg", "qemu's accelerator: tcg or kvm")
	flag.IntVar(&o.memory, "m", 2048, "memory of the machine in MiB")
	flag.IntVar(&o.cpus, "smp", 2, "CPUs of the machine")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	cache, err := filepath.Abs(o.cache)
	if err != nil {
		return err
	}
	steps, err := stepsOf(strings.Split(o.suites, ","))
	if err != nil {
		return err
	}
	img, err := ensureImage(ctx, cache)
	if err != nil {
		return fmt.Errorf("make the machine's root file system: %w", err)
	}
	payload := filepath.Join(cache, "payload.tar")
	if err := writePayload(ctx, payload, o, steps); err != nil {
		return fmt.Errorf("make the machine's payload: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, o.limit, fmt.Errorf("the machine ran longer than %v", o.limit))
	defer cancel()
	m := machine{image: img, payload: payload, dir: cache, accel: o.accel, memory: o.memory, cpus: o.cpus}
	results, err := m.run(ctx, os.Stdout)
	results.print(os.Stdout)
	if err != nil {
		return err
	}
	if err := results.verdict(steps); err != nil {
		return err
	}
	return keep(o)
}

// keep makes the package that has passed the one that the next build upgrades.
func keep(o options) error {
	if o.pkg == "" {
		return nil
	}
	return command(context.Background(), "cp", o.pkg, filepath.Join(o.cache, previousName))
}
