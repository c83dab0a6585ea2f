//go:build linux

package datapath

import (
	"errors"
	"fmt"
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

// AttachUplink puts the programs on a NIC.
func (d *Datapath) AttachUplink(ifindex int) (*Attached, error) {
	return d.attach(ifindex, flows.UplinkIn, flows.UplinkOut)
}

func (d *Datapath) attach(ifindex int, ingress, egress flows.Hook) (*Attached, error) {
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

func (d *Datapath) tcx(a *Attached, ifindex int, hook flows.Hook, at ciliumebpf.AttachType, name string) error {
	prog := d.program(hook)
	path := ""
	if d.cfg.Dir != "" {
		path = d.pin("links", fmt.Sprintf("%d-%s", ifindex, name))
		if l := adopt(path, ifindex, prog); l != nil {
			a.links = append(a.links, l)
			return d.sweep(ifindex, at, prog)
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

// adopt takes over a pinned link if it is this interface's and alive; another
// is removed. nil: there is none.
func adopt(path string, ifindex int, prog *ciliumebpf.Program) link.Link {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		_ = os.Remove(path)
		return nil
	}
	info, err := l.Info()
	if err == nil && info.TCX() != nil && int(info.TCX().Ifindex) == ifindex && l.Update(prog) == nil {
		return l
	}
	_ = l.Unpin()
	l.Close()
	return nil
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
		FilterAttrs:  netlink.FilterAttrs{LinkIndex: ifindex, Parent: parent, Handle: 0x6e61, Protocol: unix.ETH_P_ALL, Priority: 0x6e61},
		Fd:           d.program(hook).FD(),
		Name:         "nodeagent",
		DirectAction: true,
	}
	if err := netlink.FilterReplace(f); err != nil {
		return fmt.Errorf("add filter: %w", err)
	}
	a.filters = append(a.filters, f)
	return nil
}

// Detach takes our programs off an interface that may be gone.
func (d *Datapath) Detach(ifindex int, a *Attached) error {
	var errs []error
	for _, f := range a.filters {
		if err := netlink.FilterDel(f); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
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

// Sweep removes the pins of interfaces that are not in keep: their links go
// with them.
func (d *Datapath) Sweep(keep map[int]bool) error {
	if d.cfg.Dir == "" {
		return nil
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
