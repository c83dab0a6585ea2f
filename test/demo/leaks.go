package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nodeagent/nodeagent/cni/builtin"
	"github.com/nodeagent/nodeagent/config"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// cgroupName is the group that the pod of this demo runs under.
func cgroupName() string { return fmt.Sprintf("nodeagent-demo-%d", os.Getpid()) }

// snapshot is what of the kernel a nodeagent could hold: kind -> names. Only
// objects that bear a mark of this configuration count, since other programs
// of the machine make and remove theirs meanwhile.
type snapshot map[string][]string

func takeSnapshot(c config.Config) snapshot {
	s := snapshot{}
	table, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if len(f) > 4 && (below(f[4], c.State) || below(f[4], c.Root)) {
			kind := "mount"
			if strings.Contains(line, " - nsfs ") {
				kind = "namespace"
			}
			s[kind] = append(s[kind], f[4])
		}
		if before, after, ok := strings.Cut(line, " - "); ok && strings.HasPrefix(after, "cgroup") {
			s["cgroup"] = append(s["cgroup"], cgroupsOf(strings.Fields(before)[4], c)...)
		}
	}
	links, _ := netlink.LinkList()
	for _, l := range links {
		if a := l.Attrs(); strings.Contains(a.Alias+" ", "instance="+c.Network.Name+" ") {
			s["link"] = append(s["link"], a.Name)
		}
	}
	s["route"], s["address"] = routesAndAddresses(c)
	tables, _ := exec.Command("nft", "list", "tables").Output()
	for line := range strings.Lines(string(tables)) {
		if f := strings.Fields(line); len(f) == 3 && f[2] == c.Network.Name {
			s["nft table"] = append(s["nft table"], strings.TrimSpace(line))
		}
	}
	s["process"] = processesOf(c)
	return s
}

// routesAndAddresses are those within the pods' ranges.
func routesAndAddresses(c config.Config) (routes, addrs []string) {
	ranges := c.Network.PodCIDRs
	if len(ranges) == 0 {
		ranges = builtin.DefaultPodCIDRs()
	}
	ours := func(n *net.IPNet) bool {
		if n == nil {
			return false
		}
		a, ok := netip.AddrFromSlice(n.IP)
		return ok && slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(a.Unmap()) })
	}
	all, _ := netlink.RouteList(nil, netlink.FAMILY_ALL)
	for _, r := range all {
		if ours(r.Dst) {
			routes = append(routes, r.Dst.String())
		}
	}
	held, _ := netlink.AddrList(nil, netlink.FAMILY_ALL)
	for _, a := range held {
		if ours(a.IPNet) {
			addrs = append(addrs, a.IPNet.String())
		}
	}
	return routes, addrs
}

// cgroupsOf finds the groups that bear our name in one hierarchy.
func cgroupsOf(root string, c config.Config) []string {
	names := []string{cgroupName(), strings.ReplaceAll(cgroupName(), "-", "_") + ".slice", c.Network.Name, c.Network.Name + ".slice"}
	var found []string
	filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && slices.Contains(names, d.Name()) {
			found = append(found, path)
			return fs.SkipDir
		}
		return nil // groups come and go
	})
	return found
}

// processesOf finds shims of ours, by the directory on their command line, and
// what lives in a root file system of ours. The daemon is waited for.
func processesOf(c config.Config) []string {
	var found []string
	own, _ := os.Readlink("/proc/self/ns/mnt")
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || pid == os.Getppid() {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		command := strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " "))
		shim := strings.Contains(command, "nodeagent-shim") && strings.Contains(command, c.State)
		if shim || inContainer(e.Name(), own, c) {
			found = append(found, fmt.Sprintf("%d %s", pid, command))
		}
	}
	return found
}

// inContainer: another mount namespace, whose root lies on a layer of ours.
func inContainer(pid, ownNamespace string, c config.Config) bool {
	ns, err := os.Readlink(filepath.Join("/proc", pid, "ns/mnt"))
	if err != nil || ns == ownNamespace {
		return false
	}
	table, _ := os.ReadFile(filepath.Join("/proc", pid, "mountinfo"))
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if len(f) > 4 && f[4] == "/" {
			return strings.Contains(line, c.Root+"/") || strings.Contains(line, c.State+"/")
		}
	}
	return false
}

func below(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// since lists what is here and was not before, by kind.
func (s snapshot) since(before snapshot) snapshot {
	left := snapshot{}
	for kind, names := range s {
		for _, n := range names {
			if !slices.Contains(before[kind], n) {
				left[kind] = append(left[kind], n)
			}
		}
	}
	return left
}

// takeDown removes the pod, stops the daemon and looks what is left. A second
// Ctrl-C meanwhile is noted and does nothing.
func (d *demo) takeDown(ctx context.Context, before snapshot) error {
	signal.Ignore(os.Interrupt, unix.SIGTERM, unix.SIGHUP)
	s := d.screen
	s.step("Taking it all away", "")
	var errs []error
	if err := d.takeAwayPod(ctx); err != nil {
		errs = append(errs, fmt.Errorf("remove the pod: %w", err))
	} else {
		s.done("pod and image removed")
	}
	s.began = time.Now()
	if err := d.daemon.stop(); err != nil {
		errs = append(errs, err)
	} else {
		s.done("daemon stopped")
	}
	if d.registry != nil {
		errs = append(errs, d.registry.server.Close())
	}
	s.began = time.Now()
	if left := d.settle(before); len(left) > 0 {
		for _, kind := range slices.Sorted(maps.Keys(left)) {
			for _, name := range left[kind] {
				s.output(kind, s.red(name))
			}
		}
		errs = append(errs, errors.New("this was left behind"))
	} else {
		errs = append(errs, d.removeDirs())
		s.done("nothing left behind: no mount, namespace, link, address, route, cgroup, nft table, process")
	}
	return errors.Join(errs...)
}

// settle waits for the kernel: a link goes some time after its namespace.
func (d *demo) settle(before snapshot) snapshot {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		left := takeSnapshot(d.cfg).since(before)
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
	}
}

// removeDirs removes the daemon's directories if this run made them. Nothing
// is mounted below them any more.
func (d *demo) removeDirs() error {
	var errs []error
	for _, dir := range d.madeDirs {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}
