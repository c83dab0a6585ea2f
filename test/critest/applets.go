package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// buildApplets compiles the static program that the images contain.
func buildApplets(ctx context.Context, dir string) (string, error) {
	out := filepath.Join(dir, "applets")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "github.com/nodeagent/nodeagent/test/critest/applets")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build applets: %w: %s", err, text)
	}
	return out, nil
}
