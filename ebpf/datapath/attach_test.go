//go:build linux

package datapath

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
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

// bpffs is a BPF filesystem of the test's own.
func bpffs(t *testing.T) string {
	t.Helper()
	fs := filepath.Join(t.TempDir(), "bpf")
	if err := Mount(fs); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(fs, 0); err != nil {
			t.Error(err)
		}
	})
	return fs
}

// TestSideBySide: daemons on one machine have their programs on one NIC, with
// links as with filters; neither takes the other's for its own, be it that it
// starts, starts again with strays of a crashed process, sweeps or is cleared.
func TestSideBySide(t *testing.T) {
	ifs := inNamespace(t, 1)
	nic := int(ifs[0])
	fs := bpffs(t)
	for _, noTCX := range []bool{false, true} {
		if _, err := link.QueryPrograms(link.QueryOptions{Target: nic, Attach: ciliumebpf.AttachTCXIngress}); err != nil && !noTCX {
			continue // before 6.6
		}
		count := func() int {
			if noTCX {
				return len(filtersOn(t, nic))
			}
			return programsOn(t, ifs[0], ciliumebpf.AttachTCXIngress) + programsOn(t, ifs[0], ciliumebpf.AttachTCXEgress)
		}
		start := func(dir string) {
			t.Helper()
			cfg := Config{Dir: dir, Conntrack: 1024, RowBlocks: 64}
			d := open(t, cfg)
			d.noTCX = noTCX
			if !noTCX { // of a process that died before it could pin it
				dead := open(t, cfg)
				stray, err := link.AttachTCX(link.TCXOptions{Interface: nic, Program: dead.objs.NaUplinkIn, Attach: ciliumebpf.AttachTCXIngress})
				if err != nil {
					t.Fatal(err)
				}
				defer stray.Close()
			}
			a, err := d.AttachUplink(nic)
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Sweep(map[int]bool{nic: true}); err != nil {
				t.Fatal(err)
			}
			a.Close()
			d.Close()
		}
		one, two := filepath.Join(fs, "one"), filepath.Join(fs, "two")
		start(one)
		if n := count(); n != 2 {
			t.Errorf("without tcx %v: %d programs of one daemon, want 2", noTCX, n)
		}
		start(two)
		for range 2 {
			start(one)
			start(two)
			if n := count(); n != 4 {
				t.Errorf("without tcx %v: %d programs of two daemons, want 4", noTCX, n)
			}
		}
		if err := Clear(one); err != nil {
			t.Fatal(err)
		}
		until(t, "one's are gone, two's are there", func() bool { return count() == 2 })
		start(two)
		if n := count(); n != 2 {
			t.Errorf("without tcx %v: %d programs, want two's", noTCX, n)
		}
		if err := Clear(two); err != nil {
			t.Fatal(err)
		}
		until(t, "all are gone", func() bool { return count() == 0 })
	}
}

// filtersOn are the handles of an interface's filters.
func filtersOn(t *testing.T, ifindex int) (handles []uint32) {
	t.Helper()
	l, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		t.Fatal(err)
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		list, err := netlink.FilterList(l, parent)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range list {
			handles = append(handles, f.Attrs().Handle)
		}
	}
	return handles
}

// TestFirstLayoutsFilters: filters that layout v1 left, all under one handle, go
// when ours are there, and when policy is cleared; another's stay, and so does
// such a filter where this instance has nothing of v1.
func TestFirstLayoutsFilters(t *testing.T) {
	ifs := inNamespace(t, 1)
	pod := int(ifs[0])
	fs := bpffs(t)
	dir := filepath.Join(fs, "na")
	leave := func(handle uint32) {
		t.Helper()
		d := open(t, Config{Conntrack: 1024, RowBlocks: 64})
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			f := &netlink.BpfFilter{
				FilterAttrs: netlink.FilterAttrs{LinkIndex: pod, Parent: parent, Handle: handle, Protocol: unix.ETH_P_ALL, Priority: priority},
				Fd:          d.objs.NaClock.FD(), Name: "nodeagent", DirectAction: true,
			}
			if err := netlink.FilterReplace(f); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := func(what string, handles ...uint32) {
		t.Helper()
		got := filtersOn(t, pod)
		slices.Sort(got)
		slices.Sort(handles)
		if !slices.Equal(got, handles) {
			t.Errorf("%s: filters %#x, want %#x", what, got, handles)
		}
	}
	attach := func() {
		t.Helper()
		d := open(t, Config{Dir: dir, Conntrack: 1024, RowBlocks: 64})
		d.noTCX = true
		if _, err := d.AttachPod(pod); err != nil {
			t.Fatal(err)
		}
	}
	const another = 0x77
	own := handle(dir)
	attach()
	leave(priority)
	leave(another)
	attach()
	want("nothing of v1", own, own, priority, priority, another, another)
	if err := os.MkdirAll(filepath.Join(dir, "v1", "ct"), 0o700); err != nil {
		t.Fatal(err)
	}
	attach()
	want("after an upgrade", own, own, another, another)
	leave(priority)
	if err := Clear(dir); err != nil {
		t.Fatal(err)
	}
	want("cleared", another, another)
}

// TestAttachAdopts: a second process takes the links of the first, removes the
// strays of a crashed one and leaves other people's programs.
func TestAttachAdopts(t *testing.T) {
	ifs := inNamespace(t, 1)
	cfg := Config{Dir: filepath.Join(bpffs(t), "na"), Conntrack: 1024, RowBlocks: 64}
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
