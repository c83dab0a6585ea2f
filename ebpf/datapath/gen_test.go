//go:build linux

package datapath

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestGenerated: the committed object is what its source compiles to, where
// the pinned compiler is installed.
func TestGenerated(t *testing.T) {
	if _, err := exec.LookPath("clang-14"); err != nil {
		t.Skip("clang-14 is not installed")
	}
	source, err := os.ReadFile("gen.go")
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(source), "//go:generate ")
	line, _, _ = strings.Cut(line, "\n")
	before, after, _ := strings.Cut(line, "bpf2go ")
	dir := t.TempDir()
	cmd := exec.Command("sh", "-c", before+"bpf2go -output-dir "+dir+" "+after)
	cmd.Env = append(os.Environ(), "GOPACKAGE=datapath")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"na_bpfel.o", "na_bpfel.go"} {
		want, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what bpf/policy.bpf.c compiles to: go generate ./ebpf/datapath", name)
		}
	}
}
