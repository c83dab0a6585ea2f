//go:build linux

package datapath

import (
	"encoding/binary"
	"fmt"

	ciliumebpf "github.com/cilium/ebpf"

	"github.com/nodeagent/nodeagent/ebpf/flows"
)

// Hook names a program.
type Hook = flows.Hook

func (d *Datapath) program(h Hook) *ciliumebpf.Program {
	switch h {
	case flows.FromPod:
		return d.objs.NaFromPod
	case flows.ToPod:
		return d.objs.NaToPod
	case flows.UplinkIn:
		return d.objs.NaUplinkIn
	case flows.XDP:
		return d.objs.NaXdp
	}
	return d.objs.NaUplinkOut
}

// Input is a packet as a program meets it. The interface must exist in the
// caller's network namespace.
type Input struct {
	Packet         []byte // from the Ethernet header on
	Ifindex        uint32
	IngressIfindex uint32 // 0: the host sends it
	Mark           uint32
	Dry            bool // judge only: no conntrack, no counters, no events
}

// Output is what a program said.
type Output struct {
	Pass    bool
	Mark    uint32
	Reason  flows.Reason // of a dry run, as are Class and Profile
	Class   uint32
	Profile uint32
}

const (
	dry         = 0x61647279 // the low half of "nadry"
	contextSize = 192        // struct __sk_buff
)

// Run has the loaded program of a hook judge a packet on the live tables.
func (d *Datapath) Run(h Hook, in Input) (Output, error) {
	var ctx, out [contextSize]byte
	binary.NativeEndian.PutUint32(ctx[8:], in.Mark)
	binary.NativeEndian.PutUint32(ctx[36:], in.IngressIfindex)
	binary.NativeEndian.PutUint32(ctx[40:], in.Ifindex)
	if in.Dry {
		binary.NativeEndian.PutUint32(ctx[48:], dry)
	}
	ret, err := d.program(h).Run(&ciliumebpf.RunOptions{Data: in.Packet, Context: &ctx, ContextOut: &out, Repeat: 1})
	if err != nil {
		return Output{}, fmt.Errorf("run the program of hook %s: %w", h, err)
	}
	return Output{
		Pass: int32(ret) != 2, Mark: binary.NativeEndian.Uint32(out[8:]), Reason: flows.Reason(binary.NativeEndian.Uint32(out[52:])),
		Class: binary.NativeEndian.Uint32(out[56:]), Profile: binary.NativeEndian.Uint32(out[60:]),
	}, nil
}
