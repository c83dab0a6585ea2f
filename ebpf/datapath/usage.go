//go:build linux

package datapath

import (
	"errors"
	"fmt"

	ciliumebpf "github.com/cilium/ebpf"
)

// Room is how much of a table is in use, in entries.
type Room struct{ Used, Limit int }

// Rows tells the blocks of the row table. It belongs to who calls Apply.
func (d *Datapath) Rows() Room {
	free := uint32(0)
	for _, g := range d.slab.gaps {
		free += g.blocks
	}
	return Room{int(d.cfg.RowBlocks - free), int(d.cfg.RowBlocks)}
}

// Flows counts what conntrack holds, in both families, flows that are over and
// whose place nobody wanted among them. It takes a millisecond for some ten
// thousand. It may be called from any goroutine, but not beside Close.
func (d *Datapath) Flows() (Room, error) {
	n4, err4 := count[naCt4](d.objs.Ct4)
	n6, err6 := count[naCt6](d.objs.Ct6)
	out := Room{n4 + n6, int(d.objs.Ct4.MaxEntries() + d.objs.Ct6.MaxEntries())}
	if err := errors.Join(err4, err6); err != nil {
		return out, fmt.Errorf("count flows: %w", err)
	}
	return out, nil
}

func count[K any](m *ciliumebpf.Map) (int, error) {
	keys, values := make([]K, 4096), make([]naCtValue, 4096)
	var cursor ciliumebpf.MapBatchCursor
	for n := 0; ; {
		got, err := m.BatchLookup(&cursor, keys, values, nil)
		n += got
		if errors.Is(err, ciliumebpf.ErrKeyNotExist) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}
