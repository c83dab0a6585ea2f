package main

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"
)

// TestBounded: a host that cannot do it is a reason to skip only where a bound
// was asked for.
func TestBounded(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	o := options{cache: t.TempDir(), suites: "smoke", limit: time.Minute}
	if err := bounded(context.Background(), o); err == nil || !strings.Contains(err.Error(), "qemu-system-x86_64") {
		t.Errorf("without qemu: %v", err)
	}
	o.within = time.Minute
	if err := bounded(context.Background(), o); err != nil {
		t.Errorf("without qemu, bounded: %v", err)
	}
	o.suites = "smok"
	if err := bounded(context.Background(), o); err == nil {
		t.Error("a suite that is not there was skipped")
	}
}

const said = `=== FACT kernel: 6.1.0
=== STEP one
--- PASS: TestA (0.00s)
    --- PASS: TestA/b (0.00s)
--- SKIP: TestC (0.00s)
=== ENDED one 0 12
=== STEP two
--- FAIL: TestD (0.00s)
=== ENDED two 1 3
=== STEP three
PASS
=== ENDED three 0 1
=== STEP four
--- PASS: TestE (0.00s)
`

func TestVerdict(t *testing.T) {
	var r results
	var out strings.Builder
	if err := r.read(strings.NewReader(said), &out); err != nil || out.String() != said {
		t.Fatalf("%v, %q", err, out.String())
	}
	var table strings.Builder
	r.print(&table)
	for _, row := range []string{"| one | 6.1.0 |  |  | 2 | 0 | 1 | 12 |", "| two | 6.1.0 |  |  | 0 | 1 | 0 | 3 |", "FAILED two: TestD"} {
		if !strings.Contains(table.String(), row) {
			t.Errorf("no %q in %s", row, table.String())
		}
	}
	for name, want := range map[string]string{
		"one": "", "two": `two failed (exit code "1")`, "three": "three ran no test", "four": `four failed (exit code "")`, "five": "five was not run",
	} {
		got := ""
		if err := r.verdict([]step{{name: name, tests: &goTest{}}}, true); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if err := r.verdict([]step{{name: "three", tests: &goTest{}}}, false); err != nil {
		t.Errorf("a pattern that meets no test of a step: %v", err)
	}
	if !r.testFailed() {
		t.Error("a test has failed")
	}
	var slow results
	if err := slow.read(strings.NewReader("=== STEP one\n--- PASS: TestA (0.00s)\n"), io.Discard); err != nil || slow.testFailed() {
		t.Error("a step that did not end is no failed test")
	}
}
