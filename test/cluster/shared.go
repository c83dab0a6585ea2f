package cluster

import (
	"fmt"
	"os"
	"sync"
	"testing"
)

// shared is the control plane of this test process, made when first asked for.
var shared struct {
	mu      sync.Mutex
	inMain  bool
	cluster *Cluster
	err     error
}

// Shared returns the one control plane of this run of a package's tests: they
// keep apart by namespaces and names. The package's TestMain has to be
//
//	func TestMain(m *testing.M) { os.Exit(cluster.Main(m)) }
func Shared(t testing.TB) *Cluster {
	t.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if !shared.inMain {
		t.Fatal("a shared control plane needs TestMain to call cluster.Main, which stops it")
	}
	if shared.cluster == nil && shared.err == nil {
		shared.cluster, shared.err = startShared()
	}
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.cluster
}

func startShared() (*Cluster, error) {
	dir, err := os.MkdirTemp("", "controlplane-")
	if err != nil {
		return nil, err
	}
	c, err := start(Config{Dir: dir})
	if err != nil {
		os.RemoveAll(dir)
	}
	return c, err
}

// Main runs a package's tests and then stops the shared control plane, if one
// of them asked for it. It returns the exit code.
func Main(m *testing.M) int {
	shared.inMain = true
	code := m.Run()
	if shared.cluster == nil {
		return code
	}
	if err := shared.cluster.stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	if code != 0 {
		fmt.Fprintf(os.Stderr, "controlplane.log ends with:\n%s", tail(shared.cluster.Dir+"/controlplane.log"))
	}
	os.RemoveAll(shared.cluster.Dir)
	return code
}
