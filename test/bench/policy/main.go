// Command policy measures what policy costs flows between two network
// namespaces that this machine routes between: without any rules, with the
// policy engine and with nftables rules that allow and deny the same, in turns.
// It prints medians and the ratio of each to none. Called by `make bench-policy`.
//
// It works in network and mount namespaces of its own. A loop of a measurement
// is a thread of its own, tied to a CPU, which waits in the kernel and not in
// Go's scheduler: what is left to compare is the kernel's way. Root is needed,
// and nft for that column.
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
	"syscall"
	"time"
)

const inside = "NODEAGENT_POLICY_BENCH"

func main() {
	rounds := flag.Int("rounds", 9, "of all measurements")
	span := flag.Duration("span", time.Second, "of a measurement of throughput")
	trips := flag.Int("trips", 20_000, "round trips of a measurement")
	flag.Parse()
	err := func() error {
		if os.Getenv(inside) == "" {
			return again()
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
	cmd.Env = append(os.Environ(), inside+"=1")
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
	modes := []mode{{"none", s.nothing}, {"policy", s.policy}, {"nftables", s.nftables}}
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
	fmt.Printf("medians of %d rounds, and the ratio to none; in brackets the spread of none\n\n", rounds)
	fmt.Printf("| | unit | none | policy | ratio | nftables | ratio |\n|---|---|---|---|---|---|---|\n")
	for _, q := range measures {
		v := values[q.name]
		none := median(v["none"])
		fmt.Printf("| %s | %s | %.4g (%.4g to %.4g) | %.4g | %.3f | %.4g | %.3f |\n", q.name, q.unit, none, slices.Min(v["none"]), slices.Max(v["none"]),
			median(v["policy"]), median(v["policy"])/none, median(v["nftables"]), median(v["nftables"])/none)
	}
	return nil
}

// mode is a state of the node; start returns how it is left.
type mode struct {
	name  string
	start func() (stop func() error, err error)
}

func median[T cmp.Ordered](list []T) T {
	slices.Sort(list)
	return list[len(list)/2]
}
