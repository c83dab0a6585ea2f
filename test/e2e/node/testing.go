package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

var ofTests atomic.Int32

// StartTest starts a daemon for one test and destroys it at the end; the test
// fails if anything of it is left then. Name, Dir and Binary have defaults. It
// skips without root and, if no Binary is named, where none is built. With
// $KEEP set, the node of a failed test is left to look at.
func StartTest(t testing.TB, c Config) *Node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if c.Binary == "" {
		binary, err := Binary()
		if err != nil {
			t.Skip(err)
		}
		c.Binary = binary
	}
	if c.Name == "" { // at most 9 bytes
		c.Name = fmt.Sprintf("x%c%d", 'a'+ofTests.Add(1)%26, os.Getpid()%1000000)
	}
	if c.Dir == "" { // a short path: sockets are below it
		c.Dir = filepath.Join(os.TempDir(), "n"+c.Name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	n, err := Start(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the daemon's log ends:\n%s", n.LogTail(60))
			if os.Getenv("KEEP") != "" {
				return
			}
		}
		if err := n.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return n
}
