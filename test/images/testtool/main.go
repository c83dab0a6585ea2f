// Command testtool is the program inside test images: one small static binary
// with subcommands that count, serve, dial, print, allocate, and tell in JSON
// what a process sees of itself. It must run in an otherwise empty image, as
// any user, without any capability.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
)

// command is one subcommand: its arguments as shown in the usage, and what it
// does.
type command struct {
	usage string
	run   func(args []string) error
}

func commands() map[string]command {
	return map[string]command{
		"count":   {"[-from N] [-to N] [-rate LINES/S] [-prefix S] [-both]: print numbers, one per line", count},
		"spew":    {"[-line BYTES] [-stderr] BYTES: print so much as fast as possible", spew},
		"serve":   {"[-tcp ADDR] [-udp ADDR] [-http ADDR]: echo, and answer http with what it knows", serve},
		"dial":    {"[-timeout D] tcp|udp|http ADDR [MESSAGE]: send and print the answer", dial},
		"meet":    {"[-listen PORT] [-every D] ADDR...: say who is heard, and who answers to what is sent on UDP and TCP", meet},
		"sleep":   {"[DURATION]: wait (for ever), ending with 0 at SIGTERM", sleep},
		"exit":    {"N [DURATION]: end with this code (after a while)", exit},
		"mem":     {"BYTES [DURATION]: allocate, touch and hold", mem},
		"cpu":     {"DURATION: keep one processor busy", cpu},
		"fork":    {"N [DURATION]: start N children that sleep, print their pids, wait", fork},
		"orphan":  {"[DURATION]: start a child in its own session and end at once", orphan},
		"signal":  {"[-ignore]: print the signals that arrive; SIGTERM ends with 0 unless ignored", signals},
		"env":     {": the environment as JSON", dump(environment)},
		"id":      {": uid, gid, groups, supplementary groups as JSON", dump(identity)},
		"caps":    {": capabilities, seccomp, no_new_privs, LSM as JSON", dump(capabilities)},
		"ns":      {": namespaces as JSON", dump(namespaces)},
		"mounts":  {": mountinfo as JSON", dump(mounts)},
		"limits":  {": rlimits, oom_score_adj, cgroup as JSON", dump(limits)},
		"info":    {": all of the above as JSON", dump(everything)},
		"stat":    {"PATH...: type, mode, owner, link, xattrs as JSON", stat},
		"read":    {"PATH: print a file", read},
		"write":   {"PATH TEXT: write a file", write},
		"append":  {"PATH TEXT: append a line and sync", appendLine},
		"echo":    {"TEXT...: print to stdout", echo},
		"cat":     {": copy stdin to stdout, and say on stderr when it ends", cat},
		"tty":     {": print whether stdin is a terminal, and its size each time it changes", tty},
		"open":    {"N: open so many descriptors, print how many could be", openMany},
		"resolve": {"NAME: look up addresses", resolve},
		"sysctl":  {"NAME...: print values", sysctl},
	}
}

func main() {
	args := os.Args[1:]
	all := commands()
	if len(args) == 0 {
		usage(all)
		os.Exit(2)
	}
	c, ok := all[args[0]]
	if !ok {
		usage(all)
		os.Exit(2)
	}
	if err := c.run(args[1:]); err != nil {
		var code exitCode
		if errors.As(err, &code) {
			os.Exit(int(code))
		}
		fmt.Fprintf(os.Stderr, "testtool %s: %v\n", args[0], err)
		os.Exit(1)
	}
}

func usage(all map[string]command) {
	w := bufio.NewWriter(os.Stderr)
	defer w.Flush()
	fmt.Fprintln(w, "usage: testtool COMMAND ARGS")
	var names []string
	for name := range all {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		sep := " "
		if strings.HasPrefix(all[name].usage, ":") {
			sep = ""
		}
		fmt.Fprintf(w, "  %s%s%s\n", name, sep, all[name].usage)
	}
}

// exitCode ends the program with itself and without a message.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// flags makes a flag set that reports errors instead of exiting.
func flags() *flag.FlagSet { return flag.NewFlagSet("", flag.ContinueOnError) }

// need checks the number of arguments left.
func need(fs *flag.FlagSet, args []string, least int) ([]string, error) {
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if fs.NArg() < least {
		return nil, fmt.Errorf("%d more arguments are needed", least-fs.NArg())
	}
	return fs.Args(), nil
}

// dump makes a command of a function that collects something.
func dump(collect func() (any, error)) func([]string) error {
	return func([]string) error {
		v, err := collect()
		if err != nil {
			return err
		}
		return printJSON(v)
	}
}

func printJSON(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(append(b, '\n'))
	return err
}
