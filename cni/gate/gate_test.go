package gate

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestGate: nothing passes while it is closed, everything before and after.
func TestGate(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	runtime.LockOSThread() // the thread and its namespace end with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	reaches := func(wait time.Duration) bool {
		c, err := net.DialTimeout("tcp", ln.Addr().String(), wait)
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	if !reaches(10 * time.Second) {
		t.Fatal("nothing passes an open gate")
	}
	for range 2 {
		if err := Close(path); err != nil {
			t.Skip("no nftables here:", err)
		}
	}
	if reaches(200 * time.Millisecond) {
		t.Error("a closed gate lets pass")
	}
	for range 2 {
		if err := Open(path); err != nil {
			t.Fatal(err)
		}
	}
	if !reaches(10 * time.Second) {
		t.Error("an opened gate does not let pass")
	}
	if err := Close(path + "-none"); err == nil {
		t.Error("a namespace that is not there is closed")
	}
}
