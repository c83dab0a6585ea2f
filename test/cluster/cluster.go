// Package cluster gives tests a Kubernetes control plane: it starts
// bin/controlplane (make controlplane) as a process, waits until it is ready
// and stops it. Each one has its own directory, port and sockets, so that any
// number runs side by side; tests of one package may share one.
//
// It must not know what runs in the cluster. A Cluster is used by one
// goroutine at a time, its Admin configuration by any number.
package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	module       = "module github.com/nodeagent/nodeagent"
	readyTimeout = 3 * time.Minute // a loaded machine; 5 s on an idle one
	stopTimeout  = time.Minute
)

// Config says how a control plane starts. The zero value is a fresh one on
// loopback, in a directory of the test.
type Config struct {
	Dir             string        // default: a temporary one, removed at the end
	Keep            bool          // go on with the data, keys and port of the last run in Dir
	Listen          string        // address; default 127.0.0.1
	SigningDuration time.Duration // longest life of certificates from signing requests; default an hour, from 10 s on
	AuditPolicy     string        // file, audit.k8s.io/v1
	AuditWebhook    string        // URL that audit events are sent to
}

// Cluster is a running control plane.
type Cluster struct {
	Dir    string
	Server string // https://address:port
	// Kubeconfigs are paths by role: admin, bootstrap (a bootstrap token, for a
	// node's first certificate), kube-controller-manager, kube-scheduler,
	// kubelet-serving-approver.
	Kubeconfigs map[string]string
	// Admin may do everything, with a rate that does not hold a test up.
	Admin *rest.Config

	cfg    Config
	cmd    *exec.Cmd
	stdin  io.Closer // closed when this process ends, however it ends
	output *lockedBuffer
	ended  chan struct{} // closed when the process has ended
}

// Start starts a control plane and waits until it is ready. It is stopped at
// the end of the test.
func Start(t testing.TB, cfg Config) *Cluster {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
	}
	c, err := start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Stop(t)
		if t.Failed() {
			t.Logf("%s of the control plane ends with:\n%s", "controlplane.log", tail(filepath.Join(cfg.Dir, "controlplane.log")))
		}
	})
	return c
}

// Stop ends the control plane cleanly; its directory stays. A second call does
// nothing.
func (c *Cluster) Stop(t testing.TB) {
	t.Helper()
	if err := c.stop(); err != nil {
		t.Error(err)
	}
}

// Kill ends the process at once, as a crash would.
func (c *Cluster) Kill() {
	c.cmd.Process.Kill()
	<-c.ended
}

// Restart starts the control plane again, after Stop or Kill, on its data, with
// its keys and its port, so that earlier kubeconfigs stay valid. Whoever removes
// Dir/pki/ca.* in between gets a new authority.
func (c *Cluster) Restart(t testing.TB) {
	t.Helper()
	c.Stop(t)
	cfg := c.cfg
	cfg.Keep = true
	next, err := start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	*c = *next
}

// PID is the process that all of the control plane runs in.
func (c *Cluster) PID() int { return c.cmd.Process.Pid }

func start(cfg Config) (*Cluster, error) {
	binary, err := Binary()
	if err != nil {
		return nil, err
	}
	c := &Cluster{Dir: cfg.Dir, cfg: cfg, output: &lockedBuffer{}, ended: make(chan struct{})}
	c.cmd = exec.Command(binary, cfg.args()...)
	c.cmd.Stdout, c.cmd.Stderr = c.output, c.output
	// A signal to the test's process group is not for us: we end with stdin.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if c.stdin, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start control plane: %w", err)
	}
	go func() {
		c.cmd.Wait()
		close(c.ended)
	}()
	if err := c.waitReady(); err != nil {
		return nil, errors.Join(err, c.stop())
	}
	return c, nil
}

func (cfg Config) args() []string {
	args := []string{"--exit-with-stdin", "--dir", cfg.Dir}
	if cfg.Keep {
		args = append(args, "--keep")
	}
	if cfg.SigningDuration != 0 {
		args = append(args, "--signing-duration", cfg.SigningDuration.String())
	}
	for flag, value := range map[string]string{
		"--listen": cfg.Listen, "--audit-policy": cfg.AuditPolicy, "--audit-webhook": cfg.AuditWebhook,
	} {
		if value != "" {
			args = append(args, flag, value)
		}
	}
	return args
}

// Binary returns $CONTROLPLANE, or bin/controlplane at the top of the repository
// that the working directory is in.
func Binary() (string, error) {
	if p := os.Getenv("CONTROLPLANE"); p != "" {
		return p, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		data, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err != nil || !bytes.HasPrefix(data, []byte(module+"\n")) {
			continue
		}
		binary := filepath.Join(dir, "bin", "controlplane")
		if _, err := os.Stat(binary); err != nil {
			return "", fmt.Errorf("the control plane for tests is not built (%w): run make controlplane", err)
		}
		return binary, nil
	}
	return "", errors.New("the working directory is not in the repository, so bin/controlplane cannot be found (set CONTROLPLANE)")
}

// waitReady waits for ready.json, which this process of ours has written.
func (c *Cluster) waitReady() error {
	deadline := time.After(readyTimeout)
	for {
		err := c.readReady()
		if err == nil {
			return nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		select {
		case <-c.ended:
			return fmt.Errorf("the control plane ended before it was ready: %s\n%s",
				strings.TrimSpace(c.output.String()), tail(filepath.Join(c.Dir, "controlplane.log")))
		case <-deadline:
			return fmt.Errorf("the control plane in %s was not ready within %v: %s\n%s", c.Dir, readyTimeout,
				strings.TrimSpace(c.output.String()), tail(filepath.Join(c.Dir, "controlplane.log")))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (c *Cluster) readReady() error {
	data, err := os.ReadFile(filepath.Join(c.Dir, "ready.json"))
	if err != nil {
		return err
	}
	var ready struct {
		Server      string
		PID         int
		Kubeconfigs map[string]string
	}
	if err := json.Unmarshal(data, &ready); err != nil {
		return fmt.Errorf("read ready.json: %w", err)
	}
	if ready.PID != c.PID() {
		return fs.ErrNotExist // of an earlier run that was killed
	}
	c.Server, c.Kubeconfigs = ready.Server, ready.Kubeconfigs
	c.Admin, err = clientcmd.BuildConfigFromFlags("", ready.Kubeconfigs["admin"])
	if err != nil {
		return fmt.Errorf("read the admin's kubeconfig: %w", err)
	}
	c.Admin.QPS, c.Admin.Burst = 1000, 1000
	return nil
}

func (c *Cluster) stop() error {
	select {
	case <-c.ended:
		return nil
	default:
	}
	c.stdin.Close()
	select {
	case <-c.ended:
	case <-time.After(stopTimeout):
		c.Kill()
		return fmt.Errorf("the control plane did not stop within %v and was killed: %s", stopTimeout, c.output.String())
	}
	if !c.cmd.ProcessState.Success() {
		return fmt.Errorf("the control plane ended with %v: %s", c.cmd.ProcessState, c.output.String())
	}
	return nil
}

// tail returns the last lines of a log.
func tail(file string) string {
	data, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	lines := strings.SplitAfter(string(data), "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "")
}

// lockedBuffer collects what the process prints.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
