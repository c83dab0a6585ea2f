//go:build linux

package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	ciliumebpf "github.com/cilium/ebpf"
)

// The flags of a conntrack value; see bpf/policy.bpf.c.
const (
	ctOut     = 1
	ctIn      = 2
	ctReplied = 16
	ctClosing = 32
)

type ctKey4 struct {
	Where         uint32 // interface<<8 | protocol
	Local, Remote [4]byte
	LPort, RPort  uint16
}

type ctKey6 struct {
	Where         uint32
	Local, Remote [16]byte
	LPort, RPort  uint16
}

type ctValue struct {
	Last, Flags uint32
	Passed      [2]uint32 // why packets of each direction pass, and in which generation; 0: not known
}

// oldValue is that of layouts v1 and v2.
type oldValue struct{ Last, Flags uint32 }

func (v ctValue) now() ctValue  { return ctValue{Last: v.Last, Flags: v.Flags} } // other tables judged it
func (v oldValue) now() ctValue { return ctValue{Last: v.Last, Flags: v.Flags} }

// timeout of a flow in seconds, as the programs have it.
func (v ctValue) timeout(proto uint8) uint32 {
	switch proto {
	case 6, 132:
		switch {
		case v.Flags&ctClosing != 0:
			return 30
		case v.Flags&ctReplied != 0:
			return 21600
		}
		return 60
	case 17:
		if v.Flags&ctReplied != 0 {
			return 180
		}
		return 30
	case 1, 58:
		return 30
	}
	return 600
}

// Flow is one that a pod is known to have: what conntrack is told of it.
type Flow struct {
	Protocol      uint8
	Local, Remote netip.AddrPort
	Opened        bool // by the pod; else by its peer
}

// Seed notes flows that pods had before they were watched, unless they are
// known: which of the two directions policy has to allow depends on who opened
// them. A full table is no error: what does not fit is judged as unknown.
func (d *Datapath) Seed(ifindex int, list []Flow) error {
	now, err := d.jiffies()
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range list {
		v := ctValue{Last: now, Flags: ctIn | ctReplied}
		if f.Opened {
			v.Flags = ctOut | ctReplied
		}
		local, remote := f.Local.Addr().Unmap(), f.Remote.Addr().Unmap()
		where := uint32(ifindex)<<8 | uint32(f.Protocol)
		if local.Is4() && remote.Is4() {
			err = d.objs.Ct4.Update(ctKey4{where, local.As4(), remote.As4(), f.Local.Port(), f.Remote.Port()}, v, ciliumebpf.UpdateNoExist)
		} else {
			err = d.objs.Ct6.Update(ctKey6{where, local.As16(), remote.As16(), f.Local.Port(), f.Remote.Port()}, v, ciliumebpf.UpdateNoExist)
		}
		if err != nil && !errors.Is(err, ciliumebpf.ErrKeyExist) {
			errs = append(errs, fmt.Errorf("note flow %s %s: %w", f.Local, f.Remote, err))
		}
	}
	return errors.Join(errs...)
}

// jiffies is the programs' clock.
func (d *Datapath) jiffies() (uint32, error) {
	now, err := d.objs.NaClock.Run(&ciliumebpf.RunOptions{Data: make([]byte, 14)})
	if err != nil {
		return 0, fmt.Errorf("read the kernel's clock: %w", err)
	}
	return now, nil
}

// Conntrack is how full conntrack is, of both families together.
type Conntrack struct {
	Flows, Room int    // as of the last walk over the whole table
	Collected   uint64 // dead flows and those of pods that are gone, since the start
}

// collector walks over a conntrack map, a batch a call.
type collector struct {
	cursor ciliumebpf.MapBatchCursor
	seen   int
	flows  int // of the last whole walk
}

const (
	collectBatch = 4096 // entries read in a call
	collectKeys  = 64   // a run of na_collect
	collectV6    = 1
	collectAny   = 2
)

// Conntrack tells what Collect found.
func (d *Datapath) Conntrack() Conntrack {
	return Conntrack{Flows: d.walk4.flows + d.walk6.flows, Room: 2 * int(d.cfg.Conntrack), Collected: d.collected}
}

// Collect deletes flows that are dead or whose pod is gone among the next 4096
// of each family: a fraction of a millisecond. Nothing depends on it but how
// long dead flows take room from live ones: a program looks at the age of
// what it finds.
func (d *Datapath) Collect() error {
	now, err := d.jiffies()
	if err != nil {
		return err
	}
	here := map[uint32]bool{}
	for _, e := range d.eps {
		here[uint32(e.ifindex)&0xffffff] = true
	}
	return errors.Join(collect[ctKey4](d, &d.walk4, d.objs.Ct4, 0, now, here), collect[ctKey6](d, &d.walk6, d.objs.Ct6, collectV6, now, here))
}

type ctKey interface {
	ctKey4 | ctKey6
	where() uint32
}

func (k ctKey4) where() uint32 { return k.Where }
func (k ctKey6) where() uint32 { return k.Where }

func collect[K ctKey](d *Datapath, w *collector, m *ciliumebpf.Map, mode, now uint32, here map[uint32]bool) error {
	keys, values := make([]K, collectBatch), make([]ctValue, collectBatch)
	n, err := m.BatchLookup(&w.cursor, keys, values, nil)
	end := errors.Is(err, ciliumebpf.ErrKeyNotExist)
	if err != nil && !end {
		w.cursor, w.seen = ciliumebpf.MapBatchCursor{}, 0
		return fmt.Errorf("walk over conntrack: %w", err)
	}
	var dead, gone []K
	for i, k := range keys[:n] {
		age := now - values[i].Last
		switch {
		case !here[k.where()>>8]:
			gone = append(gone, k)
		case age > values[i].timeout(uint8(k.where()))*d.hz && age < 1<<31: // else it is younger than now
			dead = append(dead, k)
		default:
			w.seen++
		}
	}
	if end {
		w.flows, w.seen, w.cursor = w.seen, 0, ciliumebpf.MapBatchCursor{}
	}
	return errors.Join(d.drop(encode(dead), len(dead), mode), d.drop(encode(gone), len(gone), mode|collectAny))
}

func encode[K ctKey](keys []K) []byte {
	b, _ := binary.Append(nil, binary.NativeEndian, keys) // of fixed size: it cannot fail
	return b
}

// drop has na_collect delete n keys.
func (d *Datapath) drop(keys []byte, n int, mode uint32) error {
	if n == 0 {
		return nil
	}
	size := len(keys) / n
	for len(keys) > 0 {
		part := keys[:min(len(keys), collectKeys*size)]
		keys = keys[len(part):]
		var ctx [contextSize]byte
		binary.NativeEndian.PutUint32(ctx[8:], mode)
		deleted, err := d.objs.NaCollect.Run(&ciliumebpf.RunOptions{Data: append(make([]byte, 16), part...), Context: &ctx})
		if err != nil {
			return fmt.Errorf("delete dead flows: %w", err)
		}
		d.collected += uint64(deleted)
	}
	return nil
}

// inherit takes over the flows of an earlier layout, and what has come since
// the last call; newer knowledge stays.
func (d *Datapath) inherit() error {
	var errs []error
	for _, dir := range d.others() {
		errs = append(errs, inherit(d.objs.Ct4, filepath.Join(dir, "ct", "ct4")), inherit(d.objs.Ct6, filepath.Join(dir, "ct", "ct6")))
	}
	return errors.Join(errs...)
}

// The keys of layout v1.
type oldKey4 struct {
	Ifindex       uint32
	Local, Remote [4]byte
	LPort, RPort  uint16
	Proto         uint32
}

type oldKey6 struct {
	Ifindex       uint32
	Local, Remote [16]byte
	LPort, RPort  uint16
	Proto         uint32
}

func (k oldKey4) now() any {
	return ctKey4{k.Ifindex<<8 | k.Proto&0xff, k.Local, k.Remote, k.LPort, k.RPort}
}

func (k oldKey6) now() any {
	return ctKey6{k.Ifindex<<8 | k.Proto&0xff, k.Local, k.Remote, k.LPort, k.RPort}
}

func (k ctKey4) now() any { return k }
func (k ctKey6) now() any { return k }

// inherit copies the flows of another map, of this layout or an earlier one.
func inherit(to *ciliumebpf.Map, path string) error {
	from, err := ciliumebpf.LoadPinnedMap(path, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open conntrack of an earlier version: %w", err)
	}
	defer from.Close()
	switch [2]int{int(from.KeySize()), int(from.ValueSize())} {
	case sizes(ctKey4{}, ctValue{}):
		return copyFlows[ctKey4, ctValue](to, from)
	case sizes(ctKey6{}, ctValue{}):
		return copyFlows[ctKey6, ctValue](to, from)
	case sizes(ctKey4{}, oldValue{}):
		return copyFlows[ctKey4, oldValue](to, from)
	case sizes(ctKey6{}, oldValue{}):
		return copyFlows[ctKey6, oldValue](to, from)
	case sizes(oldKey4{}, oldValue{}):
		return copyFlows[oldKey4, oldValue](to, from)
	case sizes(oldKey6{}, oldValue{}):
		return copyFlows[oldKey6, oldValue](to, from)
	}
	return fmt.Errorf("conntrack %s has keys of %d bytes and values of %d, unknown to this version: %w", path, from.KeySize(), from.ValueSize(), errors.ErrUnsupported)
}

func sizes(key, value any) [2]int { return [2]int{binary.Size(key), binary.Size(value)} }

func copyFlows[K interface{ now() any }, V interface{ now() ctValue }](to, from *ciliumebpf.Map) error {
	var cursor ciliumebpf.MapBatchCursor
	keys, values := make([]K, collectBatch), make([]V, collectBatch)
	for {
		n, err := from.BatchLookup(&cursor, keys, values, nil)
		end := errors.Is(err, ciliumebpf.ErrKeyNotExist)
		if err != nil && !end {
			return fmt.Errorf("read conntrack of an earlier version: %w", err)
		}
		for i, k := range keys[:n] {
			if err := to.Update(k.now(), values[i].now(), ciliumebpf.UpdateNoExist); err != nil && !errors.Is(err, ciliumebpf.ErrKeyExist) {
				return fmt.Errorf("take over a flow: %w", err)
			}
		}
		if end {
			return nil
		}
	}
}

// others are the folders of other layouts, left by another version.
func (d *Datapath) others() (list []string) {
	if d.cfg.Dir == "" {
		return nil
	}
	entries, err := os.ReadDir(d.cfg.Dir)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() && e.Name() != layout {
			list = append(list, filepath.Join(d.cfg.Dir, e.Name()))
		}
	}
	return list
}
