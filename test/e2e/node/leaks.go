package node

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Leaks is what the kernel and the disk hold on behalf of one node: for each
// kind (mount, link, cgroup, table, process, dir) the names of the objects.
type Leaks map[string][]string

// Snapshot counts what belongs to the node now. Objects are the node's when
// they lie below its directory, carry its network name, or (cgroups) its name.
// Warm namespaces are part of a running daemon: compare snapshots of a daemon
// in the same state, see WaitNoLeaks.
func (n *Node) Snapshot() Leaks {
	l := Leaks{}
	l["mount"] = mountsBelow(n.Config.Dir)
	l["link"] = n.links()
	l["cgroup"] = n.cgroups()
	l["table"] = n.tables()
	for _, pid := range n.Processes() {
		l["process"] = append(l["process"], fmt.Sprintf("%d %s", pid, cmdline(pid)))
	}
	for _, d := range []string{
		filepath.Join(n.Root, "containers"), filepath.Join(n.Root, "shim", "exits"),
		filepath.Join(n.State, "containers"), filepath.Join(n.State, "sandboxes"),
		filepath.Join(n.State, "shim", "c"), filepath.Join(n.State, "ns"),
	} {
		entries, _ := os.ReadDir(d)
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), ".") { // a trash directory is not a thing
				l["dir"] = append(l["dir"], filepath.Join(d, e.Name()))
			}
		}
	}
	for k, v := range l {
		slices.Sort(v)
		if len(v) == 0 {
			delete(l, k)
		}
	}
	return l
}

// Settled is a snapshot that did not change for a while: the daemon has filled
// its pool of warm namespaces and processes that start have started.
func (n *Node) Settled() Leaks {
	last, since := n.Snapshot(), time.Now()
	for deadline := since.Add(10 * time.Second); time.Now().Before(deadline); {
		time.Sleep(50 * time.Millisecond)
		now := n.Snapshot()
		if !maps.Equal(now.Counts(), last.Counts()) {
			since = time.Now()
		}
		last = now
		if time.Since(since) > 400*time.Millisecond {
			break
		}
	}
	return last
}

// Counts is the number of objects of each kind.
func (l Leaks) Counts() map[string]int {
	c := map[string]int{}
	for k, v := range l {
		c[k] = len(v)
	}
	return c
}

// Since lists, one per line, the kinds of which there are more than before and
// what is new of them; empty if nothing leaked. Names differ between warm
// namespaces of the same number, so the count decides and the names explain.
func (l Leaks) Since(before Leaks) string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(l)) {
		if len(l[k]) <= len(before[k]) {
			continue
		}
		fmt.Fprintf(&b, "%s: %d more than before (%d):\n", k, len(l[k])-len(before[k]), len(before[k]))
		for _, v := range l[k] {
			if !slices.Contains(before[k], v) {
				fmt.Fprintf(&b, "    %s\n", v)
			}
		}
	}
	return b.String()
}

// WaitNoLeaks waits up to half a minute for the node to hold no more than before,
// and returns what it holds too much otherwise.
func (n *Node) WaitNoLeaks(before Leaks) string {
	deadline := time.Now().Add(30 * time.Second)
	for {
		s := n.Snapshot().Since(before)
		if s == "" || time.Now().After(deadline) {
			return s
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// FDs is the number of descriptors the daemon has open, 0 if it does not run.
func (n *Node) FDs() int { return CountFDs(n.Pid()) }

func CountFDs(pid int) int {
	if pid == 0 {
		return 0
	}
	e, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(e)
}

func mountsBelow(dir string) []string {
	var out []string
	b, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 4 && (f[4] == dir || strings.HasPrefix(f[4], dir+"/")) {
			out = append(out, f[4])
		}
	}
	return out
}

// links of the host namespace that carry the node's mark.
func (n *Node) links() []string {
	all, err := netlink.LinkList()
	if err != nil {
		return nil
	}
	var out []string
	for _, l := range all {
		a := l.Attrs()
		if n.owns(a) {
			out = append(out, a.Name+" "+a.Alias)
		}
	}
	return out
}

// cgroups below any hierarchy whose path contains the node's name.
func (n *Node) cgroups() []string {
	var out []string
	for _, root := range CgroupRoots() {
		top, _ := os.ReadDir(root)
		for _, e := range top {
			if !e.IsDir() || !strings.Contains(e.Name(), n.Config.Name) {
				continue
			}
			filepath.WalkDir(filepath.Join(root, e.Name()), func(p string, d fs.DirEntry, err error) error {
				if err != nil || !d.IsDir() {
					return fs.SkipDir
				}
				out = append(out, p)
				return nil
			})
		}
	}
	return out
}

// CgroupRoots are the mount points of the cgroup hierarchies.
func CgroupRoots() []string {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	var out []string
	for line := range strings.Lines(string(b)) {
		before, after, ok := strings.Cut(line, " - ")
		if ok && strings.HasPrefix(after, "cgroup") {
			out = append(out, strings.Fields(before)[4])
		}
	}
	return out
}

// RemoveCgroups removes the empty cgroups at and below rel in each hierarchy.
func RemoveCgroups(rel string) {
	for _, root := range CgroupRoots() {
		var dirs []string
		filepath.WalkDir(filepath.Join(root, rel), func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		slices.Reverse(dirs)
		for _, d := range dirs {
			unix.Rmdir(d)
		}
	}
}

func (n *Node) tables() []string {
	b, _ := exec.Command("nft", "list", "tables").Output()
	var out []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && strings.Contains(f[2], n.Config.Name) {
			out = append(out, f[1]+" "+f[2])
		}
	}
	return out
}

func (n *Node) deleteTables() {
	for _, t := range n.tables() {
		exec.Command("nft", append([]string{"delete", "table"}, strings.Fields(t)...)...).Run()
	}
}

// Processes of the node besides the daemon: the shim and its reaper (their
// command line names the node's directory) and the containers (their root is
// an overlay below it).
func (n *Node) Processes() []int {
	daemon := n.Pid()
	var out []int
	for _, pid := range pids() {
		if pid == daemon || pid == os.Getpid() {
			continue
		}
		if n.isHelper(pid) || n.isContainer(pid) {
			out = append(out, pid)
		}
	}
	return out
}

// Shims are the processes of the node that are neither daemon nor container,
// reaper first.
func (n *Node) Shims() []int {
	daemon := n.Pid()
	var out []int
	for _, pid := range pids() {
		if pid != daemon && pid != os.Getpid() && n.isHelper(pid) && !n.isContainer(pid) {
			out = append(out, pid)
		}
	}
	return out
}

// Containers are the processes of the node that run inside a container.
func (n *Node) Containers() []int {
	return slices.DeleteFunc(n.Processes(), func(pid int) bool { return !n.isContainer(pid) })
}

func (n *Node) isHelper(pid int) bool {
	c := cmdline(pid)
	return strings.Contains(c, n.Config.Dir) && strings.Contains(c, "nodeagent")
}

func (n *Node) isContainer(pid int) bool {
	mine, _ := os.Readlink("/proc/self/ns/mnt")
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil || theirs == mine {
		return false
	}
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) > 4 && string(f[4]) == "/" && bytes.Contains(line, []byte(n.Config.Dir)) {
			return true
		}
	}
	return false
}

func pids() []int {
	d, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	var out []int
	for _, s := range names {
		if pid, err := strconv.Atoi(s); err == nil {
			out = append(out, pid)
		}
	}
	slices.Sort(out)
	return out
}

func cmdline(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
}

// KillShim ends the node's shim, its reaper and every process left in its
// containers with SIGKILL, by pid, and waits until they are gone.
func (n *Node) KillShim(ctx context.Context) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		left := n.Processes()
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("end processes of %s: %v still there", n.Config.Dir, left)
		}
		for _, pid := range left {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// ProcessesNaming lists the processes whose command line contains s, this one
// excepted.
func ProcessesNaming(s string) []int {
	var out []int
	for _, pid := range pids() {
		if pid != os.Getpid() && strings.Contains(cmdline(pid), s) {
			out = append(out, pid)
		}
	}
	return out
}

// UnmountBelow detaches every mount at or below dir.
func UnmountBelow(dir string) error {
	for range 10 {
		m := mountsBelow(dir)
		if len(m) == 0 {
			return nil
		}
		slices.Reverse(m)
		for _, p := range m {
			unix.Unmount(p, unix.MNT_DETACH)
		}
	}
	return fmt.Errorf("unmount below %s: %v still mounted", dir, mountsBelow(dir))
}

// ForgetNetwork removes what the node keeps in the host's network namespace:
// links, the addresses of its pod ranges on lo, nftables tables. It is for a
// node that is over, or to simulate a reboot.
func (n *Node) ForgetNetwork() {
	links, _ := netlink.LinkList()
	for _, l := range links {
		if n.owns(l.Attrs()) {
			netlink.LinkDel(l)
		}
	}
	n.deleteTables()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return
	}
	addrs, _ := netlink.AddrList(lo, netlink.FAMILY_ALL)
	for _, a := range addrs {
		for _, c := range n.Config.PodCIDRs {
			if p, err := netip.ParsePrefix(c); err == nil {
				if ip, ok := netip.AddrFromSlice(a.IP); ok && p.Contains(ip.Unmap()) {
					netlink.AddrDel(lo, &a)
				}
			}
		}
	}
}

// owns tells the node's links by the mark in their alias.
func (n *Node) owns(a *netlink.LinkAttrs) bool {
	return strings.HasPrefix(a.Alias, "nodeagent ") && (strings.Contains(a.Alias+" ", " instance="+n.Config.Name+" ") || strings.Contains(a.Alias, n.Config.Dir))
}

// OwnsAddress tells whether an address is from the node's pod ranges.
func (n *Node) OwnsAddress(s string) bool {
	a, err := netip.ParseAddr(s)
	for _, c := range n.Config.PodCIDRs {
		if p, e := netip.ParsePrefix(c); err == nil && e == nil && p.Contains(a) {
			return true
		}
	}
	return false
}
