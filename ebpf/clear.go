//go:build linux

package ebpf

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
)

// Clear takes away what an engine with these two settings has pinned; links
// without a pin end, and enforcement with them. Filters of kernels before 6.6
// stay on NICs. No engine of that name may run.
func Clear(bpffs, name string) error {
	dir := filepath.Join(cmp.Or(bpffs, "/sys/fs/bpf"), cmp.Or(name, "nodeagent"))
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove pinned policy: %w", err)
	}
	return nil
}
