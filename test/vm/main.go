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
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

type options struct {
	cache, pkg, bins, suites, pattern, accel, previous string
	limit, within                                      time.Duration
	memory, cpus                                       int
}

func main() {
	var o options
	flag.StringVar(&o.cache, "cache", "build/vm", "`directory` of the root file system and the machines' files")
	flag.StringVar(&o.pkg, "package", "", "the Debian package under test")
	flag.StringVar(&o.bins, "bin", "bin", "`directory` of the binaries under test")
	flag.StringVar(&o.previous, "previous", previousCommit, "`commit` whose package is upgraded")
	flag.StringVar(&o.suites, "suites", "service,v2,packages,reboot,systemd,cgroupfs,policy,purge,nodes", "comma-separated suites: "+strings.Join(suiteNames(), ", "))
	flag.StringVar(&o.pattern, "run", "", "`pattern` of tests, in place of the suites' own")
	flag.DurationVar(&o.limit, "limit", 2*time.Hour, "of the whole run")
	flag.DurationVar(&o.within, "within", 0, "skip, and say so, what this host cannot do within this `time`, for want of programs, of a mirror or of speed; tests that fail still fail (0: never skip)")
	// Within other virtual machines KVM may be there and not work.
	flag.StringVar(&o.accel, "accel", "tcg", "qemu's accelerator: tcg or kvm")
	flag.IntVar(&o.memory, "m", 2048, "memory of a machine in MiB")
	flag.IntVar(&o.cpus, "smp", 2, "CPUs of a machine")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := bounded(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		stop()
		os.Exit(1)
	}
}

// errSlow and errNoMachine are reasons to skip; see options.within.
var (
	errSlow      = errors.New("the time is up")
	errNoMachine = errors.New("no machine can be made here")
)

// bounded runs within the limits. It skips only before a test has failed.
func bounded(ctx context.Context, o options) error {
	limit := o.limit
	if o.within > 0 {
		limit = min(limit, o.within)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errSlow)
	defer cancel()
	all := &results{}
	err := run(ctx, o, all)
	slow := errors.Is(context.Cause(ctx), errSlow)
	if slow && err != nil {
		err = errors.Join(fmt.Errorf("%w after %v", errSlow, limit), err)
	}
	if o.within > 0 && (slow || errors.Is(err, errNoMachine)) && !all.testFailed() {
		fmt.Printf("SKIPPED the virtual machine, which `make test-vm` runs without a limit: %v\n", err)
		return nil
	}
	return err
}

func run(ctx context.Context, o options, all *results) (err error) {
	if o.cache, err = filepath.Abs(o.cache); err != nil {
		return err
	}
	steps, err := stepsOf(strings.Split(o.suites, ","))
	if err != nil {
		return err
	}
	for _, s := range slices.Concat(steps[1], steps[2]) {
		if s.tests != nil && o.pattern != "" {
			s.tests.run = o.pattern
		}
	}
	if err := os.MkdirAll(o.cache, 0o755); err != nil {
		return err
	}
	for _, program := range []string{"qemu-system-x86_64", "debootstrap", "mke2fs"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("%w: %w", errNoMachine, err)
		}
	}
	if runtime.GOARCH != "amd64" {
		return fmt.Errorf("%w: the machine is amd64, the programs are %s", errNoMachine, runtime.GOARCH)
	}
	img, err := ensureImage(ctx, o.cache)
	if err != nil {
		return fmt.Errorf("%w: make its root file system: %w", errNoMachine, err)
	}
	previous := ""
	if slices.ContainsFunc(steps[1], func(s step) bool { return s.name == upgradeStep }) {
		if previous, err = ensurePrevious(ctx, o.cache, o.previous); err != nil {
			return fmt.Errorf("make the package that is upgraded: %w", err)
		}
	}
	var errs []error
	for _, n := range slices.Sorted(maps.Keys(steps)) {
		payload := filepath.Join(o.cache, fmt.Sprintf("payload-%d.tar", n))
		if err := writePayload(ctx, payload, o, previous, steps[n]); err != nil {
			return fmt.Errorf("make the machine's payload: %w", err)
		}
		got, err := runMachines(ctx, o, img, payload, n)
		all.add(got)
		errs = append(errs, err, got.verdict(steps[n], o.pattern == ""))
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
	got, errs := make([]*results, n), make([]error, n)
	logs := make([]strings.Builder, n)
	done := make(chan int)
	for i := range n {
		m := machine{image: img, payload: payload, accel: o.accel, memory: o.memory, cpus: o.cpus, dir: filepath.Join(o.cache, fmt.Sprintf("machine-%d-%d", n, i))}
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
