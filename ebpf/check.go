//go:build linux

package ebpf

import (
	"time"

	"github.com/nodeagent/nodeagent/ebpf/flows"
	"github.com/nodeagent/nodeagent/ebpf/frame"
	"github.com/nodeagent/nodeagent/ebpf/objects"
	"github.com/nodeagent/nodeagent/ebpf/reference"
)

// checkShare bounds the self-check: after each it rests so many times as long
// as it took, so that it takes less than half a percent of a core, however
// many pods there are.
const checkShare = 200

// checkable says whether an event tells of a flow's first packet that a pod's
// policies decided, so that it can be judged again.
func checkable(ev *flows.Event) bool {
	opens := ev.Protocol == objects.UDP || ev.Protocol == objects.TCP && ev.TCP&(frame.SYN|frame.ACK) == frame.SYN
	if !opens || ev.Hook > flows.ToPod || ev.Hook == flows.ToPod && ev.Ingress == 0 {
		return false
	}
	switch ev.Reason {
	case flows.Policy, flows.Open, flows.DeniedIn, flows.DeniedOut:
		return true
	}
	return false
}

// selfCheck has a flow that was seen judged again by the loaded program and by
// the reference.
func (s *state) selfCheck(draw func() (flows.Event, bool)) {
	if !s.ready || len(s.problems) > 0 || time.Now().Before(s.rest) {
		return
	}
	if ev, ok := draw(); ok {
		began := time.Now()
		s.check(ev)
		s.rest = time.Now().Add(checkShare * time.Since(began))
	}
}

func (s *state) check(ev flows.Event) {
	d := reference.Egress
	if ev.Hook == flows.ToPod {
		d = reference.Ingress
	}
	v, known, err := s.ask(s.cluster(), d, ev.Src, ev.Dst, Question{Protocol: ev.Protocol, Port: ev.DstPort})
	if err != nil || !known {
		return // the pod has gone
	}
	s.checked++
	if v.Disagreement {
		s.drift++
		s.cfg.Log.Error("the loaded network policy is not what the objects say: restart the daemon, and please report this",
			"pod", v.Subject.String(), "direction", string(v.Direction), "src", ev.Src.String(), "dst", ev.Dst.String(), "port", ev.DstPort, "protocol", ev.Protocol,
			"loaded", word(v.Loaded), "reason", v.Reason.String(), "objects", word(v.Allowed), "why", v.Why)
	}
}

func word(allowed bool) string {
	if allowed {
		return "allows"
	}
	return "denies"
}
