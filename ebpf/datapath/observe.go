//go:build linux

package datapath

import (
	"context"
	"errors"
	"fmt"

	"github.com/cilium/ebpf/ringbuf"

	"github.com/nodeagent/nodeagent/ebpf/flows"
)

// Counter is what a hook has seen for a reason.
type Counter struct {
	Hook           flows.Hook
	Reason         flows.Reason
	Packets, Bytes uint64
}

type perCPU struct{ Packets, Bytes uint64 }

// knownBy are the directions that recent of bpf/policy.bpf.c counts, by hook.
var knownBy = map[flows.Hook]int{flows.ToPod: 0, flows.FromPod: 1}

// Counters reads those that are not zero. It may be called from any goroutine.
func (d *Datapath) Counters() ([]Counter, error) {
	var out []Counter
	var known []naRecent
	if err := d.objs.Recent.Lookup(uint32(0), &known); err != nil {
		return nil, fmt.Errorf("read counters of known flows: %w", err)
	}
	for key := range uint32(160) {
		var values []perCPU
		if err := d.objs.Counters.Lookup(key, &values); err != nil {
			return nil, fmt.Errorf("read counter %d: %w", key, err)
		}
		c := Counter{Hook: flows.Hook(key / 32), Reason: flows.Reason(key % 32)}
		for _, v := range values {
			c.Packets += v.Packets
			c.Bytes += v.Bytes
		}
		if dir, ok := knownBy[c.Hook]; ok && int(c.Reason) < len(known[0].Counters[dir]) {
			for _, k := range known {
				c.Packets += k.Counters[dir][c.Reason].Packets
				c.Bytes += k.Counters[dir][c.Reason].Bytes
			}
		}
		if c.Packets > 0 {
			out = append(out, c)
		}
	}
	return out, nil
}

// Events calls f with each event until ctx ends.
func (d *Datapath) Events(ctx context.Context, f func(flows.Event)) error {
	r, err := ringbuf.NewReader(d.objs.Events)
	if err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { r.Close() })
	defer func() {
		stop()
		r.Close()
	}()
	var record ringbuf.Record
	for {
		if err := r.ReadInto(&record); err != nil {
			if errors.Is(err, ringbuf.ErrClosed) {
				return nil
			}
			return fmt.Errorf("read events: %w", err)
		}
		if e, err := flows.Parse(record.RawSample); err == nil {
			f(e)
		}
	}
}
