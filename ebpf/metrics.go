//go:build linux

package ebpf

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/nodeagent/nodeagent/ebpf/policy"
)

// newEnforced measures the time from a change's arrival to its enforcement.
func newEnforced() *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "nodeagent_policy_enforcement_duration_seconds",
		Help: "From when a change was heard of (objects), or a pod's start asked for its rows (pod), until it was enforced.",
		// up to the design's 50 ms finely, then coarsely
		Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, 1, 10, 60},
	}, []string{"cause"})
}

// collector exposes an Engine's measures.
type collector struct {
	engine *Engine

	packets, bytes, tables, limits, pods, faults, problems, ready, checks, lost *prometheus.Desc
}

// Collector gives the engine's metrics to Prometheus. A scrape asks the engine
// and waits for its answer, ten seconds at most.
func (e *Engine) Collector() prometheus.Collector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("nodeagent_policy_"+name, help, labels, nil)
	}
	return &collector{
		engine:   e,
		packets:  desc("packets_total", "Packets that the programs judged, by hook, verdict and reason.", "hook", "verdict", "reason"),
		bytes:    desc("bytes_total", "Bytes of the packets that the programs judged.", "hook", "verdict", "reason"),
		tables:   desc("table_entries", "Entries of policy tables, and objects behind them.", "table"),
		limits:   desc("table_limit", "Entries that a policy table has room for.", "table"),
		pods:     desc("pods", "Pods of this node whose traffic is judged."),
		faults:   desc("faulty_policies", "Policies of which a part cannot be used, and matches nothing."),
		problems: desc("problems", "Limits that were met: something is denied that should not be."),
		ready:    desc("ready", "1 when all objects and pods are known and enforced."),
		checks:   desc("checked_flows_total", "Flows that the self-check had judged again, by whether the loaded program and the objects agree.", "result"),
		lost:     desc("flows_lost_total", "Flow events that a reader was too slow for."),
	}
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.packets, c.bytes, c.tables, c.limits, c.pods, c.faults, c.problems, c.ready, c.checks, c.lost} {
		ch <- d
	}
	c.engine.enforced.Describe(ch)
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	c.engine.enforced.Collect(ch)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	st, err := c.engine.Status(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(c.ready, err)
		return
	}
	send := func(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, kind, v, labels...)
	}
	gauge, counter := prometheus.GaugeValue, prometheus.CounterValue
	for _, n := range st.Counters {
		verdict := "passed"
		if n.Reason.Drops() {
			verdict = "denied" // dropped, unless the namespace is only watched
		}
		send(c.packets, counter, float64(n.Packets), n.Hook.String(), verdict, n.Reason.String())
		send(c.bytes, counter, float64(n.Bytes), n.Hook.String(), verdict, n.Reason.String())
	}
	t := st.Tables
	for _, r := range []struct {
		table       string
		used, limit int
	}{
		{"row_blocks", st.Rows.Used, st.Rows.Limit}, {"classes", t.Classes, int(st.Limits.Classes)}, {"profiles", t.Profiles, int(st.Limits.Profiles)},
		{"port_classes", t.PortClasses, policy.MaxPortClasses}, {"conntrack", st.Conntrack.Flows, st.Conntrack.Room},
		{"addresses", t.Exact, 0}, {"prefixes", t.Prefixes, 0}, {"pods", t.Pods, 0}, {"policies", t.Policies, 0}, {"policies_in_use", t.Active, 0},
	} {
		send(c.tables, gauge, float64(r.used), r.table)
		if r.limit > 0 {
			send(c.limits, gauge, float64(r.limit), r.table)
		}
	}
	send(c.pods, gauge, float64(st.Pods))
	send(c.faults, gauge, float64(len(st.Faults)))
	send(c.problems, gauge, float64(len(st.Problems)))
	send(c.ready, gauge, flag(st.Ready))
	send(c.checks, counter, float64(st.Checked-st.Drift), "agree")
	send(c.checks, counter, float64(st.Drift), "drift")
	send(c.lost, counter, float64(st.Lost))
}

func flag(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
