package metrics

import (
	"testing"
	"time"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

func TestMeter(t *testing.T) {
	start := time.Unix(1000, 0)
	at := func(s float64) time.Time { return start.Add(time.Duration(s * float64(time.Second))) }
	type step struct {
		at     float64 // s after start
		usage  float64 // s of CPU
		cores  float64 // wanted; -1 none
		window float64
	}
	for _, c := range []struct {
		name    string
		started time.Time
		steps   []step
	}{
		{"the first is the average of the life", start, []step{{10, 5, 0.5, 10}}},
		{"then from sample to sample", start, []step{{10, 5, 0.5, 10}, {20, 5, 0, 10}, {22, 7, 1, 2}}},
		{"start unknown", time.Time{}, []step{{10, 5, -1, 0}, {20, 10, 0.5, 10}}},
		{"asked at once again", start, []step{{10, 5, 0.5, 10}, {10.001, 5, 0.5, 10.001}, {10.5, 5.5, 1, 0.5}, {11, 6, 1, 1}}},
		{"two clients in turn keep a window of a second", start,
			[]step{{10, 0, 0, 10}, {11, 1, 1, 1}, {11.2, 1.2, 1, 1.2}, {12, 2, 1, 1}, {12.1, 2.1, 1, 1.1}}},
		{"the group was made anew", start, []step{{10, 5, 0.5, 10}, {20, 1, 0.05, 20}}},
		{"four cores", start, []step{{1, 0, 0, 1}, {2, 4, 4, 1}}},
	} {
		var m meter
		for _, s := range c.steps {
			got := m.add(point{at(s.at), uint64(s.usage * 1e9)}, c.started)
			want := sample.Rate{}
			if s.cores >= 0 {
				want = sample.Rate{Valid: true, NanoCores: uint64(s.cores * 1e9), Window: time.Duration(s.window * float64(time.Second))}
			}
			// A millicore for the rounding of the times in the table.
			diff := int64(got.NanoCores - want.NanoCores)
			if got.Valid != want.Valid || diff > 1e6 || diff < -1e6 || (got.Window-want.Window).Abs() > time.Microsecond {
				t.Errorf("%s at %v: %+v, want %+v", c.name, s.at, got, want)
			}
		}
	}
}
