package netns_test

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/cni/lab"
	"github.com/nodeagent/nodeagent/cni/netns"
)

func own(t *testing.T) string {
	t.Helper()
	s, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestDoComesBack(t *testing.T) {
	l := lab.New(t)
	h, err := netns.Open(l.Node)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	before := own(t)
	want := errors.New("from inside")
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			err := netns.Do(h, func() error {
				if own(t) == before {
					t.Error("not inside")
				}
				return netns.Do(nil, func() error { return want })
			})
			if !errors.Is(err, want) {
				t.Errorf("error %v", err)
			}
			if own(t) != before {
				t.Error("not back")
			}
		})
	}
	wg.Wait()
	if own(t) != before {
		t.Error("not back")
	}
}

func TestOpenRefusesOthers(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(dir, "none"), file, "/proc/self/ns/uts", ""} {
		if h, err := netns.Open(path); !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("%q: %v, %v", path, h, err)
		}
	}
	var none *netns.Handle
	if none.FD() != -1 || none.Close() != nil {
		t.Error("the nil handle")
	}
}
