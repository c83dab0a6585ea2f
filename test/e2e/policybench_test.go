package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// BenchmarkPolicyPodStart starts pods on two daemons in turn, one without policy
// and one that enforces it: sandbox, container, start.
func BenchmarkPolicyPodStart(b *testing.B) {
	dir := b.TempDir()
	fs := filepath.Join(dir, "bpf")
	b.Cleanup(func() { _ = unix.Unmount(fs, 0) })
	if err := os.WriteFile(filepath.Join(dir, "np.yaml"), fmt.Appendf(nil, webPolicy, "shop"), 0o644); err != nil {
		b.Fatal(err)
	}
	modes := map[string]*node.Node{
		"off": ownNode(b, nil),
		"enforce": ownNode(b, func(c *node.Config) {
			c.Extra = fmt.Sprintf("policy:\n  mode: enforce\n  dir: %s\n  bpffs: %s\n  uplinks: [none]\n", dir, fs)
		}),
	}
	took := map[string][]time.Duration{}
	for b.Loop() {
		for _, mode := range []string{"off", "enforce"} {
			c := podConfig(b)
			c.Metadata.Namespace, c.Labels = "shop", map[string]string{"app": "web"}
			began := time.Now()
			p := runPodOn(b, modes[mode], c)
			p.run(b)
			took[mode] = append(took[mode], time.Since(began))
			p.remove(b)
		}
	}
	for mode, list := range took {
		slices.Sort(list)
		b.ReportMetric(float64(list[len(list)/2].Microseconds())/1000, "ms-p50/"+mode)
	}
}
