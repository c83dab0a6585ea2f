package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// ownNode starts a daemon for one test, with the images of busybox, and
// destroys it at the end.
func ownNode(t testing.TB, change func(*node.Config)) *node.Node {
	t.Helper()
	name := nodeName(fmt.Sprintf("o%c", 'a'+serial.Add(1)%26))
	c := node.Config{
		Dir: filepath.Join(os.TempDir(), "n"+name), Binary: shared.Config.Binary, Name: name, LogLevel: "debug",
		RegistryDirs: []string{hub.hostsDir()},
	}
	if change != nil {
		change(&c)
	}
	n := node.StartTest(t, c)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := pull(ctx, n, busybox); err != nil {
		t.Fatal(err)
	}
	return n
}

func deleteLink(name string) {
	if l, err := netlink.LinkByName(name); err == nil {
		netlink.LinkDel(l)
	}
}
