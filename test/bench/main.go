// Command bench compares container runtimes through their CRI sockets.
//
//	go run ./test/bench                         ours, Debian's containerd with runc and with crun
//	go run ./test/bench -runtime x=/run/x.sock  any CRI socket (repeatable; only these)
//	go run ./test/bench -quick                  fewer rounds, to see that it works
//
// It starts the runtimes it compares itself, each with directories, a network
// and cgroups of its own, works on them in turns so that a disturbance of the
// machine hits all alike, prints a table with the ratios against containerd
// with runc, and writes all figures as JSON.
//
// How memory is counted: PSS (smaps_rollup) of every process that descends
// from the runtime's daemon or names its directory on the command line, except
// processes inside containers. Pause processes count as the runtime's: the pod
// did not ask for them.
//
// How CPU is counted: each runtime and all its pods live below one cgroup, and
// the group's own counter (cpuacct.usage, cpu.stat) is read before and after.
// It includes children that lived for a millisecond and containers' start-up
// code, whoever their parent was. For a socket the harness did not start, and
// as a cross-check, the machine's counter is used.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

type options struct {
	runtimes []string
	only     string
	skip     string
	dir      string
	out      string
	daemon   string
	rounds   int
	batch    int
	ladder   []int
	batches  int
	idle     time.Duration
	pulls    int
	logMB    int
	quick    bool
}

func main() {
	var o options
	flag.Func("runtime", "`name=socket` of a runtime that runs already; only such are measured then", func(s string) error {
		if !strings.Contains(s, "=") {
			return fmt.Errorf("want name=socket, got %q", s)
		}
		o.runtimes = append(o.runtimes, s)
		return nil
	})
	flag.StringVar(&o.only, "only", "", "comma-separated `names` of the built-in runtimes to measure: nodeagent, containerd-runc, containerd-crun")
	flag.StringVar(&o.skip, "skip", "", "comma-separated `parts` to leave out: "+strings.Join(partNames(), ", "))
	flag.StringVar(&o.dir, "dir", "", "working `directory`, default a new one in the temporary directory")
	flag.StringVar(&o.out, "out", "bench-results.json", "`file` for the figures as JSON")
	flag.StringVar(&o.daemon, "nodeagent", "", "the nodeagent `binary`, default bin/nodeagent of this repository")
	flag.IntVar(&o.rounds, "rounds", 40, "pod starts and execs measured one by one")
	flag.IntVar(&o.batches, "batches", 1, "repetitions of each 50-pod batch; the median counts")
	flag.Func("pods", "comma-separated `numbers` of pods to climb to (default 10,50,200)", func(s string) error {
		for _, f := range strings.Split(s, ",") {
			n, err := strconv.Atoi(f)
			if err != nil {
				return err
			}
			o.ladder = append(o.ladder, n)
		}
		return nil
	})
	flag.BoolVar(&o.quick, "quick", false, "few rounds, small ladder: shows that it works, not how fast")
	flag.Parse()
	o.batch, o.idle, o.pulls, o.logMB = 50, 10*time.Second, 3, 64
	if o.ladder == nil {
		o.ladder = []int{10, 50, 200}
	}
	if o.quick {
		o.rounds, o.batch, o.ladder, o.idle, o.pulls, o.logMB, o.batches = 5, 8, []int{4, 8}, time.Second, 1, 16, 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		log.Fatal("bench: ", err)
	}
}

func run(ctx context.Context, o options) (err error) {
	if os.Getuid() != 0 {
		return fmt.Errorf("start runtimes: must be root")
	}
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "nabench-"); err != nil {
			return err
		}
		defer os.RemoveAll(o.dir)
	}
	images, err := serveImages(o)
	if err != nil {
		return err
	}
	defer images.Close()

	rts, stopAll, err := startRuntimes(ctx, o, images)
	defer func() { stopAll() }()
	if err != nil {
		return err
	}
	b := &bench{options: o, images: images, runtimes: rts}
	for _, r := range rts {
		if err := b.prepare(ctx, r); err != nil {
			return fmt.Errorf("prepare %s: %w", r.name, err)
		}
	}
	for _, p := range parts {
		if strings.Contains(","+o.skip+",", ","+p.name+",") {
			continue
		}
		fmt.Fprintf(os.Stderr, "== %s\n", p.title)
		t := time.Now()
		if e := p.run(b, ctx); e != nil {
			// The other parts' figures are still worth having, those until an interruption too.
			e = fmt.Errorf("%s: %w", p.name, e)
			fmt.Fprintln(os.Stderr, "   failed:", e)
			if err = errors.Join(err, e); ctx.Err() != nil {
				break
			}
		}
		fmt.Fprintf(os.Stderr, "   %.1fs\n", time.Since(t).Seconds())
	}
	for _, r := range rts {
		if n := r.failed.Load(); n > 0 {
			r.figures.set("failed pod starts", "", float64(n))
		}
	}
	rep := b.report()
	rep.print(os.Stdout)
	j, e := json.MarshalIndent(rep, "", "  ")
	if e != nil {
		return errors.Join(err, e)
	}
	out, _ := filepath.Abs(o.out)
	if e := os.WriteFile(out, append(j, '\n'), 0o644); e != nil {
		return errors.Join(err, e)
	}
	fmt.Printf("\nfigures: %s\n", out)
	return err
}
