package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"
)

// results is what the machine said, by step.
type results struct {
	facts []string // lines of the table
	steps []stepResult
	took  time.Duration
	cpu   time.Duration // of qemu
}

type stepResult struct {
	name                  string
	passed, failed, skips int
	code, seconds         string // "" if it did not end
	failures              []string
}

// The machine marks its steps in the stream of test output.
const (
	markStep = "=== STEP "  // name
	markEnd  = "=== ENDED " // name code seconds
	markFact = "=== FACT "  // column: value
)

var testLine = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+)`)

func (r *results) read(in io.Reader, out io.Writer) error {
	s := bufio.NewScanner(in)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		line := strings.TrimRight(s.Text(), "\r")
		fmt.Fprintln(out, line)
		r.line(line)
	}
	return s.Err()
}

func (r *results) line(line string) {
	if name, ok := strings.CutPrefix(line, markStep); ok {
		r.steps = append(r.steps, stepResult{name: name})
		return
	}
	if fact, ok := strings.CutPrefix(line, markFact); ok {
		if !slices.Contains(r.facts, fact) {
			r.facts = append(r.facts, fact)
		}
		return
	}
	if len(r.steps) == 0 {
		return
	}
	step := &r.steps[len(r.steps)-1]
	if rest, ok := strings.CutPrefix(line, markEnd); ok {
		if f := strings.Fields(rest); len(f) == 3 {
			step.code, step.seconds = f[1], f[2]
		}
		return
	}
	m := testLine.FindStringSubmatch(line)
	if m == nil {
		return
	}
	switch m[1] {
	case "PASS":
		step.passed++
	case "SKIP":
		step.skips++
	case "FAIL":
		step.failed++
		step.failures = append(step.failures, m[2])
	}
}

// add appends those of another run.
func (r *results) add(o *results) {
	for _, f := range o.facts {
		if !slices.Contains(r.facts, f) {
			r.facts = append(r.facts, f)
		}
	}
	r.steps = append(r.steps, o.steps...)
	r.took += o.took
	r.cpu += o.cpu
}

func (r *results) failed() bool {
	return slices.ContainsFunc(r.steps, func(s stepResult) bool { return s.code != "0" })
}

// testFailed tells failures of tests from steps that did not end.
func (r *results) testFailed() bool {
	return slices.ContainsFunc(r.steps, func(s stepResult) bool { return s.failed > 0 || s.code != "" && s.code != "0" })
}

// print shows what was tested on what, as the README has it.
func (r *results) print(w io.Writer) {
	host := map[string]string{}
	for _, f := range r.facts {
		k, v, _ := strings.Cut(f, ": ")
		host[k] = v
	}
	fmt.Fprintf(w, "\n| what | kernel | cgroups | init | passed | failed | skipped | seconds |\n|---|---|---|---|---|---|---|---|\n")
	for _, s := range r.steps {
		fmt.Fprintf(w, "| %s | %s | %s | %s | %d | %d | %d | %s |\n",
			s.name, host["kernel"], host["cgroups"], host["init"], s.passed, s.failed, s.skips, s.seconds)
	}
	fmt.Fprintf(w, "\n%s in %v, %v of CPU\n", host["system"], r.took.Round(time.Second), r.cpu.Round(time.Second))
	for _, s := range r.steps {
		for _, f := range s.failures {
			fmt.Fprintf(w, "FAILED %s: %s\n", s.name, f)
		}
	}
}

// verdict is an error unless every step ended well and, if all of its tests
// were asked for, ran some.
func (r *results) verdict(want []step, all bool) error {
	var errs []error
	for _, w := range want {
		i := slices.IndexFunc(r.steps, func(s stepResult) bool { return s.name == w.name })
		switch {
		case w.tests == nil:
		case i < 0:
			errs = append(errs, fmt.Errorf("%s was not run", w.name))
		case r.steps[i].code != "0":
			errs = append(errs, fmt.Errorf("%s failed (exit code %q)", w.name, r.steps[i].code))
		case all && r.steps[i].passed == 0:
			errs = append(errs, fmt.Errorf("%s ran no test", w.name))
		}
	}
	return errors.Join(errs...)
}
