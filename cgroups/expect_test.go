package cgroups

import (
	"os"
	"testing"
	"time"
)

// ExpectProcess leaves this process in every group that it was in.
func TestExpectProcess(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("writes to cgroupfs, which needs root")
	}
	m, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	if file := m.ownProcs(); file == "" {
		t.Fatalf("no own group found in %q", before)
	} else if err := os.WriteFile(file, []byte("0"), 0); err != nil {
		t.Fatalf("the write that ExpectProcess makes: %v", err)
	}
	for range 20 {
		m.ExpectProcess()
	}
	for m.expecting.busy.Load() {
		time.Sleep(time.Millisecond)
	}
	after, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	if string(before) != string(after) {
		t.Errorf("groups before %q, after %q", before, after)
	}
}
