// Command policy measures what policy costs flows between two network
// namespaces that this machine routes between: without any rules, with the
// policy engine and with nftables rules that allow and deny the same, in turns;
// and with programs on the engine's hooks that do nothing, which is the least that
// one may cost. It prints medians, and the median of the rounds' ratios to none. Called by `make bench-policy`.
//
// It works in network and mount namespaces of its own; the engine lives in a
// process of its own, as it does beside pods. A loop of a measurement is a thread,
// tied to a CPU, which waits in the kernel and not in Go's scheduler, and gets no
// signals of it: what is left to compare is the kernel's way. Root is needed, and
// nft for that column.
package main

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	inside   = "NODEAGENT_POLICY_BENCH" // what this process is; empty: the outermost
	engineOf = "engine"
)

func main() {
	rounds := flag.Int("rounds", 9, "of all measurements")
	span := flag.Duration("span", time.Second, "of a measurement of throughput")
	trips := flag.Int("trips", 20_000, "round trips of a measurement")
	flag.Parse()
	err := func() error {
		switch os.Getenv(inside) {
		case "":
			return again()
		case engineOf:
			return serve(flag.Args())
		}
		runtime.GOMAXPROCS(8) // threads that wait in the kernel keep what they run on
		debug.SetGCPercent(-1)
		return run(*rounds, load{*span, *trips})
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "policy:", err)
		os.Exit(1)
	}
}

// again runs this program in namespaces of its own.
func again() error {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1", "GODEBUG=asyncpreemptoff=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	return cmd.Run()
}

func run(rounds int, l load) error {
	s, err := newSite()
	if err != nil {
		return err
	}
	defer s.close()
	modes := []mode{{"none", s.nothing}, {"empty", s.empty}, {"policy", s.policy}, {"nftables", s.nftables}}
	values := map[string]map[string][]float64{} // measure, mode
	for round := range rounds {
		for i := range modes {
			m := modes[(i+round)%len(modes)] // each is first as often
			stop, err := m.start()
			if err != nil {
				return fmt.Errorf("start %s: %w", m.name, err)
			}
			for _, q := range measures {
				v, err := q.measure(s, l)
				if err != nil {
					return fmt.Errorf("%s with %s: %w", q.name, m.name, err)
				}
				if values[q.name] == nil {
					values[q.name] = map[string][]float64{}
				}
				values[q.name][m.name] = append(values[q.name][m.name], v)
			}
			if err := stop(); err != nil {
				return fmt.Errorf("stop %s: %w", m.name, err)
			}
		}
	}
	fmt.Printf("medians of %d rounds, and of their ratios to none; in brackets the spread of none\n\n", rounds)
	fmt.Printf("| | unit | none |")
	for _, m := range modes[1:] {
		fmt.Printf(" %s | ratio |", m.name)
	}
	fmt.Printf("\n|---|---|---|%s\n", strings.Repeat("---|---|", len(modes)-1))
	for _, q := range measures {
		v := values[q.name]
		none := median(v["none"])
		fmt.Printf("| %s | %s | %.4g (%.4g to %.4g) |", q.name, q.unit, none, slices.Min(v["none"]), slices.Max(v["none"]))
		for _, m := range modes[1:] {
			fmt.Printf(" %.4g | %.3f |", median(v[m.name]), median(ratios(v[m.name], v["none"])))
		}
		fmt.Println()
	}
	return nil
}

// ratios are those of the rounds, by which a machine that is faster at times
// does not matter.
func ratios(list, base []float64) []float64 {
	out := make([]float64, len(list))
	for i := range list {
		out[i] = list[i] / base[i]
	}
	return out
}

// mode is a state of the node; start returns how it is left.
type mode struct {
	name  string
	start func() (stop func() error, err error)
}

func median[T cmp.Ordered](list []T) T {
	list = slices.Sorted(slices.Values(list))
	return list[len(list)/2]
}
