//go:build linux

package ebpf

import (
	"cmp"
	"path/filepath"

	"github.com/nodeagent/nodeagent/ebpf/datapath"
)

// Clear takes away what an engine with these two settings has attached and
// pinned, and enforcement with it. No engine of that name may run.
func Clear(bpffs, name string) error {
	return datapath.Clear(filepath.Join(cmp.Or(bpffs, "/sys/fs/bpf"), cmp.Or(name, "nodeagent")))
}
