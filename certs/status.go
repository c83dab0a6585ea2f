package certs

import (
	"fmt"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Status is what is known of one certificate. Times are absent as long as they
// are not known.
type Status struct {
	Name         string     `json:"name"` // client or serving
	Subject      string     `json:"subject,omitempty"`
	Names        []string   `json:"names,omitempty"` // DNS names, addresses
	Issuer       string     `json:"issuer,omitempty"`
	Serial       string     `json:"serial,omitempty"` // hexadecimal
	NotBefore    *time.Time `json:"notBefore,omitempty"`
	NotAfter     *time.Time `json:"notAfter,omitempty"`
	Renewal      *time.Time `json:"renewal,omitempty"` // when the next one is asked for
	File         string     `json:"file"`
	Renewals     int        `json:"renewals"` // since the daemon started
	Waiting      string     `json:"waiting,omitempty"`
	Request      string     `json:"request,omitempty"`  // a certificate request that waits for approval
	Failures     int        `json:"failures,omitempty"` // in a row
	LastError    string     `json:"lastError,omitempty"`
	LastReason   Reason     `json:"lastReason,omitempty"`
	LastErrorAt  *time.Time `json:"lastErrorAt,omitempty"`
	NextAttempt  *time.Time `json:"nextAttempt,omitempty"`
	FileProblem  string     `json:"fileProblem,omitempty"`
	ClockProblem string     `json:"clockProblem,omitempty"`
}

// Status tells of each certificate that is kept.
func (m *Manager) Status() []Status {
	var out []Status
	for _, r := range m.rotators() {
		out = append(out, r.status())
	}
	return out
}

func (r *rotator) status() Status {
	p := r.held.Load()
	s := describe(r.kind, r.store, p)
	r.mu.Lock()
	defer r.mu.Unlock()
	st := &r.state
	s.Renewals, s.Failures, s.Request, s.Waiting = st.renewals, st.failures, st.waiting, st.step.why
	if st.problem != nil {
		s.LastError, s.LastReason, s.LastErrorAt = st.problem.Error(), st.problem.Reason, &st.problemAt
		s.NextAttempt = &st.notUntil
	}
	if st.fileProblem != nil {
		s.FileProblem = st.fileProblem.Error()
	}
	if st.clock != nil {
		s.ClockProblem = st.clock.Error()
	}
	return s
}

func describe(k kind, st store, p *Pair) Status {
	s := Status{Name: k.name, File: st.current()}
	if p == nil {
		return s
	}
	l, renewal := p.Leaf(), renewAt(p)
	s.Subject, s.Issuer, s.Serial = l.Subject.String(), l.Issuer.String(), fmt.Sprintf("%x", l.SerialNumber)
	s.Names = slices.Clone(l.DNSNames)
	for _, ip := range l.IPAddresses {
		s.Names = append(s.Names, ip.String())
	}
	s.NotBefore, s.NotAfter, s.Renewal = &l.NotBefore, &l.NotAfter, &renewal
	return s
}

// Inspect tells what the files in dir hold, for when no daemon runs.
func Inspect(dir string, serving bool) []Status {
	kinds := []kind{clientKind}
	if serving {
		kinds = append(kinds, servingKind)
	}
	var out []Status
	for _, k := range kinds {
		st := store{dir, k.prefix}
		p, err := st.load()
		s := describe(k, st, p)
		if err != nil && !missing(err) {
			s.FileProblem = err.Error()
		}
		out = append(out, s)
	}
	return out
}

// metrics are the descriptions of what Collect sends.
type metrics struct{ expiry, renewal, renewals, failures, skew *prometheus.Desc }

func newMetrics() metrics {
	label := []string{"certificate"}
	return metrics{
		expiry:   prometheus.NewDesc("nodeagent_certificate_expiration_timestamp_seconds", "When the certificate in use expires.", label, nil),
		renewal:  prometheus.NewDesc("nodeagent_certificate_renewal_timestamp_seconds", "When the next certificate is asked for.", label, nil),
		renewals: prometheus.NewDesc("nodeagent_certificate_renewals_total", "Certificates that were issued to this daemon.", label, nil),
		failures: prometheus.NewDesc("nodeagent_certificate_renewal_failures_total", "Attempts that failed, by reason.", []string{"certificate", "reason"}, nil),
		skew:     prometheus.NewDesc("nodeagent_apiserver_clock_skew_seconds", "How far the API server's clock is ahead of this node's, to a second.", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (m *Manager) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.metrics.expiry, m.metrics.renewal, m.metrics.renewals, m.metrics.failures, m.metrics.skew} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *Manager) Collect(ch chan<- prometheus.Metric) {
	gauge, counter := prometheus.GaugeValue, prometheus.CounterValue
	unix := func(t time.Time) float64 { return float64(t.UnixNano()) / 1e9 }
	for _, r := range m.rotators() {
		if p := r.held.Load(); p != nil {
			ch <- prometheus.MustNewConstMetric(m.metrics.expiry, gauge, unix(p.Leaf().NotAfter), r.kind.name)
			ch <- prometheus.MustNewConstMetric(m.metrics.renewal, gauge, unix(renewAt(p)), r.kind.name)
		}
		r.mu.Lock()
		ch <- prometheus.MustNewConstMetric(m.metrics.renewals, counter, float64(r.state.renewals), r.kind.name)
		for reason, n := range r.state.failed {
			ch <- prometheus.MustNewConstMetric(m.metrics.failures, counter, float64(n), r.kind.name, string(reason))
		}
		r.mu.Unlock()
	}
	ch <- prometheus.MustNewConstMetric(m.metrics.skew, gauge, time.Duration(m.skew.Load()).Seconds())
}
