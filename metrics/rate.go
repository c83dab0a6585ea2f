package metrics

import (
	"time"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

// point is a reading of cumulative CPU use.
type point struct {
	at    time.Time
	usage uint64 // ns
}

// meter turns readings of cumulative CPU use into a rate.
//
// The rate of a reading is taken over the time since the last reading that is
// at least minWindow old: a client that asks every ten seconds gets the average
// of these, and two clients that ask in turn do not shorten each other's
// window to nothing. Before there is such a reading the start of the container
// counts as one: it had used nothing then. So the first answer is the average
// of its life, which is what clients that draw a first value want, and is
// exact for a young container.
type meter struct {
	older, last point
}

// minWindow: CPU accounting is exact to the tick (1 to 10 ms) for some
// kernels, so a second bounds the error at one percent.
const minWindow = time.Second

// add takes a reading; started is when usage was zero, or zero if unknown.
func (m *meter) add(p point, started time.Time) sample.Rate {
	if p.usage < m.last.usage {
		*m = meter{} // the group was made anew
	}
	base := m.last
	if age := p.at.Sub(base.at); age < minWindow && (age < minWindow/10 || !m.older.at.IsZero()) {
		base = m.older
	}
	if base.at.IsZero() {
		base = point{at: started}
	}
	if m.last.at.IsZero() || p.at.Sub(m.last.at) >= minWindow {
		m.older, m.last = m.last, p
	}
	window := p.at.Sub(base.at)
	if base.at.IsZero() || window <= 0 || p.usage < base.usage {
		return sample.Rate{}
	}
	perSecond := float64(p.usage-base.usage) / window.Seconds()
	return sample.Rate{Valid: true, NanoCores: uint64(perSecond), Window: window}
}
