package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/nodeagent/nodeagent/cni/netns"
	"github.com/nodeagent/nodeagent/cni/plugin"
	"golang.org/x/sys/unix"
)

// executor runs CNI plugins for libcni: ours in this process, others as child processes in the host's
// network namespace. It implements invoke.Exec.
type executor struct {
	version.PluginDecoder
	host   *netns.Handle
	plugin plugin.Plugin
}

// inProcess is the directory of the path that stands for a plugin in this process. No file is there.
const inProcess = "/proc/self/nodeagent"

// FindInPath finds our own plugin without looking, others in paths.
func (e *executor) FindInPath(name string, paths []string) (string, error) {
	if name == plugin.Type {
		return filepath.Join(inProcess, name), nil
	}
	return invoke.FindInPath(name, paths)
}

// ExecPlugin runs one command.
func (e *executor) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	if path == filepath.Join(inProcess, plugin.Type) {
		return e.plugin.Exec(ctx, environ, stdin)
	}
	var out []byte
	err := netns.Do(e.host, func() (err error) {
		for range 5 {
			// Somebody is just writing the executable.
			if out, err = run(ctx, path, stdin, environ); !errors.Is(err, unix.ETXTBSY) {
				return err
			}
			select {
			case <-ctx.Done():
				return err
			case <-time.After(time.Second):
			}
		}
		return err
	})
	return out, err
}

// heldKey is the context key of the lock file that plugin processes keep open.
type heldKey struct{}

// holding makes plugins run with ctx keep f open, and their children too: a lock on it lasts as long as any of them.
func holding(ctx context.Context, f *os.File) context.Context {
	return context.WithValue(ctx, heldKey{}, f)
}

// drainTime is how long the output of a plugin that was killed is waited for: its children may hold it open.
const drainTime = 2 * time.Second

// run executes a plugin. Its own error message, a JSON object on standard output, becomes the error.
func run(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = environ, bytes.NewReader(stdin), &stdout, &stderr, drainTime
	if f, ok := ctx.Value(heldKey{}).(*os.File); ok {
		cmd.ExtraFiles = []*os.File{f}
	}
	err := cmd.Run()
	if err == nil {
		return stdout.Bytes(), nil
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("plugin %s was ended: %w", filepath.Base(path), context.Cause(ctx))
	}
	var said cnitypes.Error
	switch {
	case stdout.Len() > 0 && json.Unmarshal(stdout.Bytes(), &said) == nil && said.Code != 0:
		return nil, &said
	case stdout.Len()+stderr.Len() > 0:
		return nil, fmt.Errorf("plugin %s: %w: %s", filepath.Base(path), err, bytes.TrimSpace(append(stderr.Bytes(), stdout.Bytes()...)))
	}
	return nil, fmt.Errorf("plugin %s: %w", filepath.Base(path), err)
}
