package cni

import (
	"context"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/nodeagent/nodeagent/cni/netns"
	"github.com/nodeagent/nodeagent/cni/plugin"
)

// executor runs CNI plugins for libcni: ours in this process, others as child processes in the host's
// network namespace. It implements invoke.Exec.
type executor struct {
	version.PluginDecoder
	raw    invoke.RawExec
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
	return e.raw.FindInPath(name, paths)
}

// ExecPlugin runs one command.
func (e *executor) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	if path == filepath.Join(inProcess, plugin.Type) {
		return e.plugin.Exec(ctx, environ, stdin)
	}
	var out []byte
	err := netns.Do(e.host, func() (err error) {
		out, err = e.raw.ExecPlugin(ctx, path, stdin, environ)
		return err
	})
	return out, err
}
