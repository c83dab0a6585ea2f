package cluster

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestNotBuilt: who has no control plane is told in one line how to get one.
func TestNotBuilt(t *testing.T) {
	top := t.TempDir()
	if err := os.WriteFile(filepath.Join(top, "go.mod"), []byte(module+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	below := filepath.Join(top, "test", "some")
	if err := os.MkdirAll(below, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(below)
	t.Setenv("CONTROLPLANE", "")
	_, err := start(Config{Dir: filepath.Join(top, "dir")})
	if err == nil || !strings.Contains(err.Error(), "run make controlplane") || strings.Contains(err.Error(), "\n") {
		t.Errorf("without bin/controlplane: %v", err)
	}
	if _, err := os.Stat(filepath.Join(top, "dir")); err == nil {
		t.Error("it left a directory")
	}
}
