package main

import (
	"bytes"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nodeagent/nodeagent/config"
)

// TestPolicyMode: by default a host that cannot enforce has a daemon, which says
// that policy is not enforced and why, and so has one without a place for
// policies; where policy must be enforced there is none.
func TestPolicyMode(t *testing.T) {
	cfg := config.Default()
	if cfg.Policy.Mode != "auto" {
		t.Errorf("policy.mode is %s by default", cfg.Policy.Mode)
	}
	cfg.Policy.BPFFS = "/proc/no/such" // nothing can be made there
	cfg.Policy.Dir = filepath.Join(t.TempDir(), "none")
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	engine, err := newPolicy(cfg, logger)
	if engine != nil || err != nil || !strings.Contains(log.String(), cfg.Policy.Dir) || strings.Contains(log.String(), "WARN") {
		t.Errorf("auto without policies: engine %v, error %v, log %s", engine, err, &log)
	}
	cfg.Policy.Dir = t.TempDir()
	log.Reset()
	engine, err = newPolicy(cfg, logger)
	if engine != nil || err != nil || !strings.Contains(log.String(), "/proc/no") || !strings.Contains(log.String(), "not enforced") {
		t.Errorf("auto: engine %v, error %v, log %s", engine, err, &log)
	}
	cfg.Policy.Mode = "enforce"
	if engine, err = newPolicy(cfg, logger); engine != nil || err == nil || !strings.Contains(err.Error(), "/proc/no") {
		t.Errorf("enforce: engine %v, error %v", engine, err)
	}
	log.Reset()
	cfg.Policy.Mode = "off"
	if engine, err = newPolicy(cfg, logger); engine != nil || err != nil || log.Len() > 0 {
		t.Errorf("off: engine %v, error %v, log %s", engine, err, &log)
	}
}
