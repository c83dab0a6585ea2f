// Command vm tests the package on a stock Debian 12: its own kernel, systemd,
// cgroup v2. It makes a root file system with debootstrap (kept in the cache
// directory), boots it in qemu, hands it the package and compiled tests on a
// second disk, and prints what the tests print. Some suites boot two machines
// with a wire between them.
//
// It must not need KVM, nor a network for the machines; it must not change the
// host beyond its cache directory. Called by `make test-vm`. Root is needed,
// for debootstrap.
//
// Goroutines: one a machine; in each, one copies its results and one waits for
// qemu. qemu is ended by its pid when the time is up or this program is told
// to end.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

type options struct {
	cache, pkg, bins, suites, accel, previous string
	limit                                     time.Duration
	memory, cpus                              int
}

func main() {
	var o options
	flag.StringVar(&o.cache, "cache", "build/vm", "`directory` of the root file system and the machines' files")
	flag.StringVar(&o.pkg, "package", "", "the Debian package under test")
	flag.StringVar(&o.bins, "bin", "bin", "`directory` of the binaries under test")
	flag.StringVar(&o.previous, "previous", previousCommit, "`commit` whose package is upgraded")
	flag.StringVar(&o.suites, "suites", "service,v2,reboot,systemd,cgroupfs,policy,purge,nodes", "comma-separated suites: "+strings.Join(suiteNames(), ", "))
	flag.DurationVar(&o.limit, "limit", 2*time.Hour, "of a machine's life")
	// Within other virtual machines KVM may be there and not work.
	flag.StringVar(&o.accel, "accel", "tcg", "qemu's accelerator: tcg or kvm")
	flag.IntVar(&o.memory, "m", 2048, "memory of a machine in MiB")
	flag.IntVar(&o.cpus, "smp", 2, "CPUs of a machine")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	if o.cache, err = filepath.Abs(o.cache); err != nil {
		return err
	}
	steps, err := stepsOf(strings.Split(o.suites, ","))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.cache, 0o755); err != nil {
		return err
	}
	img, err := ensureImage(ctx, o.cache)
	if err != nil {
		return fmt.Errorf("make the machine's root file system: %w", err)
	}
	previous := ""
	if slices.ContainsFunc(steps[1], func(s step) bool { return s.name == upgradeStep }) {
		if previous, err = ensurePrevious(ctx, o.cache, o.previous); err != nil {
			return fmt.Errorf("make the package that is upgraded: %w", err)
		}
	}
	all := &results{}
	var errs []error
	for _, n := range slices.Sorted(maps.Keys(steps)) {
		payload := filepath.Join(o.cache, fmt.Sprintf("payload-%d.tar", n))
		if err := writePayload(ctx, payload, o, previous, steps[n]); err != nil {
			return fmt.Errorf("make the machine's payload: %w", err)
		}
		got, err := runMachines(ctx, o, img, payload, n)
		all.add(got)
		errs = append(errs, err, got.verdict(steps[n]))
		if ctx.Err() != nil {
			break
		}
	}
	all.print(os.Stdout)
	return errors.Join(errs...)
}

// runMachines boots n machines that do the same steps and returns the results
// of the first. What the others print is shown if one of them fails.
func runMachines(ctx context.Context, o options, img image, payload string, n int) (*results, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, o.limit, fmt.Errorf("the machine ran longer than %v", o.limit))
	defer cancel()
	got, errs := make([]*results, n), make([]error, n)
	logs := make([]strings.Builder, n)
	done := make(chan int)
	for i := range n {
		m := machine{image: img, payload: payload, accel: o.accel, memory: o.memory / n, cpus: o.cpus, dir: filepath.Join(o.cache, fmt.Sprintf("machine-%d-%d", n, i))}
		if n > 1 {
			m.role = string(rune('a' + i))
			m.wire = [2]string{filepath.Join(o.cache, fmt.Sprint("wire-", i)), filepath.Join(o.cache, fmt.Sprint("wire-", 1-i))}
		}
		go func() {
			if i == 0 {
				got[i], errs[i] = m.run(ctx, os.Stdout)
			} else {
				got[i], errs[i] = m.run(ctx, &logs[i])
			}
			done <- i
		}()
	}
	for range n {
		i := <-done
		if i > 0 && (errs[i] != nil || got[i].failed()) {
			fmt.Printf("--- machine %c:\n%s", 'a'+i, logs[i].String())
			errs[i] = errors.Join(errs[i], fmt.Errorf("machine %c failed", 'a'+i))
		}
	}
	return got[0], errors.Join(errs...)
}
