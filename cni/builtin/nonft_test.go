package builtin

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/cni/lab"
	"github.com/nodeagent/nodeagent/cni/nat"
	"golang.org/x/sys/unix"
)

const noNetfilter = "NODEAGENT_NO_NETFILTER"

// TestWithoutNftables runs itself again in a process for which the kernel has no netfilter sockets: what needs none works,
// the rest says clearly what is missing.
func TestWithoutNftables(t *testing.T) {
	if os.Getenv(noNetfilter) == "" {
		if os.Getuid() != 0 {
			t.Skip("needs root: network namespaces")
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestWithoutNftables$", "-test.v")
		cmd.Env = append(os.Environ(), noNetfilter+"=1")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestWithoutNftables") {
			t.Errorf("%v:\n%s", err, out)
		}
		return
	}
	l := lab.New(t)
	if err := refuseNetfilter(); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	n := newNetwork(t, l, func(c *Config) { c.Masquerade = false })
	if err := n.Status(ctx); err != nil {
		t.Fatal(err)
	}
	a := newPod(t, l, n, "a")
	if err := lab.Ping(l.Node, a.IPs[0]); err != nil {
		t.Error(err)
	}
	clear := func(err error) bool {
		return errors.Is(err, errdefs.ErrFailedPrecondition) && strings.Contains(err.Error(), "lacks nftables")
	}
	if _, err := attachPorts(t, l, n, "b", nat.Port{HostPort: 80, ContainerPort: 80}); !clear(err) {
		t.Errorf("host port: %v", err)
	}
	if got := len(l.Links("na")); got != 1 {
		t.Errorf("%d links", got)
	}
	n.care()
	if err := n.Reconcile(ctx, []Live{{Attachment: a.Attachment, IPs: a.IPs}}); err != nil {
		t.Error(err)
	}
	for _, ips := range [][]string{{"known"}, nil} {
		known := a.IPs
		if ips == nil {
			known = nil
		}
		if err := n.Detach(ctx, a.Attachment, known); err != nil {
			t.Error(err)
		}
	}
	if err := n.Remove(ctx); err != nil {
		t.Error(err)
	}
	masq := newNetwork(t, l, func(c *Config) { c.RootDir += "2" })
	if err := masq.Status(ctx); !clear(err) {
		t.Errorf("masquerade: %v", err)
	}
}

// refuseNetfilter makes socket(AF_NETLINK, ..., NETLINK_NETFILTER) fail in all threads of the process.
func refuseNetfilter() error {
	const (
		nr, arg0, arg2 = 0, 16, 32 // offsets in struct seccomp_data, little endian
		refuse         = unix.SECCOMP_RET_ERRNO | uint32(unix.EPROTONOSUPPORT)
	)
	load := func(off uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: off}
	}
	unless := func(k uint32, skip uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jf: skip}
	}
	prog := []unix.SockFilter{
		load(nr), unless(unix.SYS_SOCKET, 5),
		load(arg0), unless(unix.AF_NETLINK, 3),
		load(arg2), unless(unix.NETLINK_NETFILTER, 1),
		{Code: unix.BPF_RET | unix.BPF_K, K: refuse},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	f := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&f)))
	if errno != 0 {
		return errno
	}
	return nil
}
