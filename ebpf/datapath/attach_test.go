//go:build linux

package datapath

import (
	"errors"
	"path/filepath"
	"testing"

	ciliumebpf "github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func programsOn(t *testing.T, ifindex uint32, at ciliumebpf.AttachType) int {
	t.Helper()
	q, err := link.QueryPrograms(link.QueryOptions{Target: int(ifindex), Attach: at})
	if err != nil {
		t.Fatal(err)
	}
	return len(q.Programs)
}

// TestAttachAdopts: a second process takes the links of the first, removes the
// strays of a crashed one and leaves other people's programs.
func TestAttachAdopts(t *testing.T) {
	ifs := inNamespace(t, 1)
	fs := filepath.Join(t.TempDir(), "bpf")
	if err := Mount(fs); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(fs, 0); err != nil {
			t.Error(err)
		}
	})
	cfg := Config{Dir: filepath.Join(fs, "na"), Conntrack: 1024, RowBlocks: 64}
	one := open(t, cfg)
	other, err := link.AttachTCX(link.TCXOptions{Interface: int(ifs[0]), Program: one.objs.NaClock, Attach: ciliumebpf.AttachTCXIngress})
	if errors.Is(err, ciliumebpf.ErrNotSupported) {
		t.Skip("no tcx before 6.6")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	stray, err := link.AttachTCX(link.TCXOptions{Interface: int(ifs[0]), Program: one.objs.NaFromPod, Attach: ciliumebpf.AttachTCXIngress})
	if err != nil {
		t.Fatal(err)
	}
	defer stray.Close()
	two := open(t, cfg)
	a, err := two.AttachPod(int(ifs[0]))
	if err != nil {
		t.Fatal(err)
	}
	if n := programsOn(t, ifs[0], ciliumebpf.AttachTCXIngress); n != 2 {
		t.Errorf("%d programs on ingress; want ours and the other's", n)
	}
	a.Close()
	two.Close()
	if n := programsOn(t, ifs[0], ciliumebpf.AttachTCXEgress); n != 1 {
		t.Errorf("%d programs on egress when the process is gone; want 1", n)
	}
	three := open(t, cfg)
	if a, err = three.AttachPod(int(ifs[0])); err != nil {
		t.Fatal(err)
	}
	if in, out := programsOn(t, ifs[0], ciliumebpf.AttachTCXIngress), programsOn(t, ifs[0], ciliumebpf.AttachTCXEgress); in != 2 || out != 1 {
		t.Errorf("%d and %d programs after taking over; want 2 and 1", in, out)
	}
	if err := three.Sweep(map[int]bool{int(ifs[0]): true}); err != nil {
		t.Fatal(err)
	}
	if err := three.Detach(int(ifs[0]), a); err != nil {
		t.Fatal(err)
	}
	if in, out := programsOn(t, ifs[0], ciliumebpf.AttachTCXIngress), programsOn(t, ifs[0], ciliumebpf.AttachTCXEgress); in != 1 || out != 0 {
		t.Errorf("%d and %d programs when detached; want only the other's", in, out)
	}
}

// TestClsact: what kernels without tcx use, replaced in place and taken off.
func TestClsact(t *testing.T) {
	ifs := inNamespace(t, 1)
	l, err := netlink.LinkByIndex(int(ifs[0]))
	if err != nil {
		t.Fatal(err)
	}
	count := func() (n int) {
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			list, err := netlink.FilterList(l, parent)
			if err != nil {
				t.Fatal(err)
			}
			n += len(list)
		}
		return n
	}
	var a *Attached
	for range 2 {
		d := open(t, Config{Conntrack: 1024, RowBlocks: 64})
		d.noTCX = true
		if a, err = d.AttachPod(int(ifs[0])); err != nil {
			t.Fatal(err)
		}
		if n := count(); n != 2 {
			t.Errorf("%d filters, want 2", n)
		}
	}
	d := open(t, Config{Conntrack: 1024, RowBlocks: 64})
	if err := d.Detach(int(ifs[0]), a); err != nil {
		t.Fatal(err)
	}
	if n := count(); n != 0 {
		t.Errorf("%d filters are left", n)
	}
}
