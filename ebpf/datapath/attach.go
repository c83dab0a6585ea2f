//go:build linux

package datapath

import (
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	ciliumebpf "github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/ebpf/flows"
)

// Attached holds the links of one interface. Pinned ones stay when it is
// closed; others go.
type Attached struct {
	links   []link.Link
	filters []*netlink.BpfFilter
}

// Close lets go of the links. Filters of older kernels stay until the
// interface goes or Detach.
func (a *Attached) Close() error {
	var errs []error
	for _, l := range a.links {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// AttachPod puts the programs on a pod's host-side interface. Programs that an
// earlier process left there are replaced at one stroke each.
func (d *Datapath) AttachPod(ifindex int) (*Attached, error) {
	return d.attach(ifindex, flows.FromPod, flows.ToPod)
}

// AttachUplink puts the programs on a NIC. Without XDP, which is only early,
// everything is judged as well: that it could not be attached is logged.
func (d *Datapath) AttachUplink(ifindex int) (*Attached, error) {
	a, err := d.attach(ifindex, flows.UplinkIn, flows.UplinkOut)
	if err != nil {
		return nil, err
	}
	if err := d.xdp(a, ifindex); err != nil {
		d.cfg.Log.Warn("NIC drops packets later than it could", "interface", ifindex, "err", err)
	}
	return a, nil
}

func (d *Datapath) attach(ifindex int, ingress, egress flows.Hook) (*Attached, error) {
	d.inheritOnce()
	a := &Attached{}
	for _, h := range []struct {
		hook   flows.Hook
		at     ciliumebpf.AttachType
		parent uint32
		name   string
	}{
		{ingress, ciliumebpf.AttachTCXIngress, netlink.HANDLE_MIN_INGRESS, "in"},
		{egress, ciliumebpf.AttachTCXEgress, netlink.HANDLE_MIN_EGRESS, "out"},
	} {
		err := ciliumebpf.ErrNotSupported
		if !d.noTCX {
			err = d.tcx(a, ifindex, h.hook, h.at, h.name)
		}
		if errors.Is(err, ciliumebpf.ErrNotSupported) {
			d.noTCX = true
			err = d.clsact(a, ifindex, h.hook, h.parent)
		}
		if err != nil {
			a.Close()
			return nil, fmt.Errorf("attach %s to interface %d: %w", h.hook, ifindex, err)
		}
	}
	return a, nil
}

// inheritOnce takes over an earlier layout's flows as late as possible: its
// programs note new ones until they are replaced.
func (d *Datapath) inheritOnce() {
	if d.inherited {
		return
	}
	d.inherited = true
	if err := d.inherit(); err != nil {
		d.cfg.Log.Warn("flows of an earlier version are not known", "err", err)
	}
}

func (d *Datapath) tcx(a *Attached, ifindex int, hook flows.Hook, at ciliumebpf.AttachType, name string) error {
	prog := d.program(hook)
	path := ""
	if d.cfg.Dir != "" {
		path = d.pin("links", fmt.Sprintf("%d-%s", ifindex, name))
		for _, from := range d.pinsOf(path) {
			if l := adopt(from, path, ifindex, prog); l != nil {
				a.links = append(a.links, l)
				return d.sweep(ifindex, at, prog)
			}
		}
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: prog, Attach: at, Anchor: link.Tail()})
	if err != nil {
		return err
	}
	if path != "" {
		if err := l.Pin(path); err != nil {
			l.Close()
			return fmt.Errorf("pin: %w", err)
		}
	}
	a.links = append(a.links, l)
	return d.sweep(ifindex, at, prog)
}

// pinsOf are the places where a link may be pinned: path, and the same in
// other layouts' folders.
func (d *Datapath) pinsOf(path string) []string {
	list := []string{path}
	for _, dir := range d.others() {
		list = append(list, filepath.Join(dir, "links", filepath.Base(path)))
	}
	return list
}

// adopt takes over the link that is pinned at from, moves its pin to path and
// makes it run prog, if it is this interface's and alive; another is removed.
// nil: there is none.
func adopt(from, path string, ifindex int, prog *ciliumebpf.Program) link.Link {
	l, err := link.LoadPinnedLink(from, nil)
	if err != nil {
		_ = os.Remove(from)
		return nil
	}
	if on, err := ifindexOf(l); err == nil && on == ifindex && l.Update(prog) == nil && (from == path || l.Pin(path) == nil) {
		return l
	}
	_ = l.Unpin()
	l.Close()
	return nil
}

func ifindexOf(l link.Link) (int, error) {
	info, err := l.Info()
	if err != nil {
		return 0, err
	}
	if t := info.TCX(); t != nil {
		return int(t.Ifindex), nil
	}
	if x := info.XDP(); x != nil {
		return int(x.Ifindex), nil
	}
	return 0, errors.ErrUnsupported
}

// xdp attaches the early program as the configuration wants it; a pinned link
// is taken over, or removed if it is no longer wanted.
func (d *Datapath) xdp(a *Attached, ifindex int) error {
	path := ""
	if d.cfg.Dir != "" {
		path = d.pin("links", fmt.Sprintf("%d-xdp-%s", ifindex, d.cfg.XDP))
		if err := d.dropXDP(ifindex, path); err != nil {
			return err
		}
	}
	flags, err := d.xdpModes(ifindex)
	if err != nil || len(flags) == 0 {
		return err
	}
	if path != "" {
		for _, from := range d.pinsOf(path) {
			if l := adopt(from, path, ifindex, d.objs.NaXdp); l != nil {
				a.links = append(a.links, l)
				return nil
			}
		}
	}
	var l link.Link
	var errs []error
	for _, f := range flags {
		if l, err = link.AttachXDP(link.XDPOptions{Program: d.objs.NaXdp, Interface: ifindex, Flags: f}); err == nil {
			break
		}
		errs = append(errs, err)
	}
	if l == nil {
		return fmt.Errorf("attach XDP: %w", errors.Join(errs...))
	}
	if path != "" {
		if err := l.Pin(path); err != nil {
			l.Close()
			return fmt.Errorf("pin XDP: %w", err)
		}
	}
	a.links = append(a.links, l)
	return nil
}

// dropXDP ends links of an interface that were made for another configuration
// than the one pinned at keep. At once: a NIC has room for one.
func (d *Datapath) dropXDP(ifindex int, keep string) error {
	for _, dir := range append(d.others(), d.pin()) {
		found, err := filepath.Glob(filepath.Join(dir, "links", fmt.Sprintf("%d-xdp-*", ifindex)))
		if err != nil {
			return err
		}
		for _, path := range found {
			if filepath.Base(path) == filepath.Base(keep) {
				continue
			}
			if l, err := link.LoadPinnedLink(path, nil); err == nil {
				_ = l.Detach()
				l.Close()
			}
			if err := os.Remove(path); err != nil {
				return fmt.Errorf("remove pinned XDP link: %w", err)
			}
		}
	}
	return nil
}

// xdpModes are the ways to try, best first; none: XDP is not wanted here.
func (d *Datapath) xdpModes(ifindex int) ([]link.XDPAttachFlags, error) {
	switch d.cfg.XDP {
	case "native":
		return []link.XDPAttachFlags{link.XDPDriverMode}, nil
	case "generic":
		return []link.XDPAttachFlags{link.XDPGenericMode}, nil
	case "auto":
		l, err := netlink.LinkByIndex(ifindex)
		if err != nil {
			return nil, fmt.Errorf("look at interface %d: %w", ifindex, err)
		}
		if l.Type() == "veth" {
			return nil, nil
		}
		return []link.XDPAttachFlags{link.XDPDriverMode, link.XDPGenericMode}, nil
	}
	return nil, nil
}

// sweep detaches links that run a program of our name but are not the one just
// attached: left by a process that died before it could pin them.
func (d *Datapath) sweep(ifindex int, at ciliumebpf.AttachType, keep *ciliumebpf.Program) error {
	own, err := keep.Info()
	if err != nil {
		return err
	}
	id, _ := own.ID()
	found, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: at})
	if err != nil {
		return fmt.Errorf("look for stray programs: %w", err)
	}
	for _, p := range found.Programs {
		if p.ID == id {
			continue
		}
		name, err := programName(p.ID)
		if err != nil || name != own.Name {
			continue
		}
		lid, ok := p.LinkID()
		if !ok {
			continue
		}
		if l, err := link.NewFromID(lid); err == nil {
			err = l.Detach()
			l.Close()
			if err != nil {
				return fmt.Errorf("detach a stray program: %w", err)
			}
		}
	}
	return nil
}

func programName(id ciliumebpf.ProgramID) (string, error) {
	p, err := ciliumebpf.NewProgramFromID(id)
	if err != nil {
		return "", err
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return "", err
	}
	return info.Name, nil
}

// clsact is how kernels before 6.6 attach. A filter of our own handle and
// priority is replaced at one stroke.
func (d *Datapath) clsact(a *Attached, ifindex int, hook flows.Hook, parent uint32) error {
	qdisc := &netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("add clsact: %w", err)
	}
	f := &netlink.BpfFilter{
		FilterAttrs:  netlink.FilterAttrs{LinkIndex: ifindex, Parent: parent, Handle: handle(d.cfg.Dir), Protocol: unix.ETH_P_ALL, Priority: priority},
		Fd:           d.program(hook).FD(),
		Name:         "nodeagent",
		DirectAction: true,
	}
	if err := netlink.FilterReplace(f); err != nil {
		return fmt.Errorf("add filter: %w", err)
	}
	a.filters = append(a.filters, f)
	if _, err := os.Stat(filepath.Join(d.cfg.Dir, layoutV1)); d.cfg.Dir == "" || err != nil {
		return nil
	}
	return dropFilter(ifindex, parent, priority)
}

// layoutV1 is the folder of the first layout, whose filters all had the
// priority for a handle, of whatever instance they were.
const layoutV1 = "v1"

func dropFilter(ifindex int, parent, handle uint32) error {
	f := &netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{LinkIndex: ifindex, Parent: parent, Handle: handle, Protocol: unix.ETH_P_ALL, Priority: priority}}
	if err := netlink.FilterDel(f); err != nil && !noFilter(err) {
		return fmt.Errorf("take filter %#x off interface %d: %w", handle, ifindex, err)
	}
	return nil
}

// priority is that of our filters; a handle tells instances apart.
const priority = 0x6e61

func handle(dir string) uint32 { return priority<<16 | uint32(instance(dir)) }

// instance is a number for a folder of pins: daemons that live side by side
// must not take each other's programs for their own.
func instance(dir string) uint16 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(dir))
	return uint16(h.Sum32() ^ h.Sum32()>>16)
}

// Clear takes off what an instance with these pins has attached, whether it
// runs or not, and the pins.
func Clear(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("list interfaces: %w", err)
	}
	handles := []uint32{handle(dir)}
	if _, err := os.Stat(filepath.Join(dir, layoutV1)); err == nil {
		handles = append(handles, priority)
	}
	for _, l := range links {
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			for _, h := range handles {
				if err := dropFilter(l.Attrs().Index, parent, h); err != nil {
					return err
				}
			}
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove pinned policy: %w", err)
	}
	return nil
}

// noFilter: the interface, its clsact or the filter is not there.
func noFilter(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL)
}

// Detach takes our programs off an interface that may be gone.
func (d *Datapath) Detach(ifindex int, a *Attached) error {
	var errs []error
	for _, f := range a.filters {
		if err := netlink.FilterDel(f); err != nil && !noFilter(err) {
			errs = append(errs, err)
		}
	}
	for _, l := range a.links {
		if d.cfg.Dir != "" {
			_ = l.Unpin()
		}
		errs = append(errs, l.Close())
	}
	a.links, a.filters = nil, nil
	return errors.Join(errs...)
}

// Sweep removes the pins of interfaces that are not in keep, whose links go
// with them, and what another version has pinned: all of it that serves has
// been taken over.
func (d *Datapath) Sweep(keep map[int]bool) error {
	if d.cfg.Dir == "" {
		return nil
	}
	Grace() // programs that were replaced may have judged by other tables until here
	d.changed()
	if err := d.inherit(); err != nil { // once more: flows that came while programs were replaced
		d.cfg.Log.Warn("flows of an earlier version are not known", "err", err)
	}
	for _, dir := range d.others() {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("remove what an earlier version has pinned: %w", err)
		}
	}
	entries, err := os.ReadDir(d.pin("links"))
	if err != nil {
		return fmt.Errorf("list pinned links: %w", err)
	}
	for _, e := range entries {
		number, _, _ := strings.Cut(e.Name(), "-")
		if i, err := strconv.Atoi(number); err == nil && keep[i] {
			continue
		}
		if err := os.Remove(filepath.Join(d.pin("links"), e.Name())); err != nil {
			return fmt.Errorf("remove pinned link: %w", err)
		}
	}
	return nil
}
