package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/nodeagent/nodeagent/metrics/sample"
	"github.com/nodeagent/nodeagent/metrics/series"
)

// ExpositionConfig of an Exposition.
type ExpositionConfig struct {
	Sampler *Sampler                  // required
	Targets func() []sample.PodTarget // what runs now; required
	Version string                    // of the daemon
	Timeout time.Duration             // of one scrape's sample; 0: 10 s
	Log     *slog.Logger
}

// Exposition serves the container metrics (those of package series, in full
// precision) and the daemon's own to Prometheus. It has a registry of its own
// and no goroutine; a scrape takes a sample.
type Exposition struct {
	cfg      ExpositionConfig
	registry *prometheus.Registry
	descs    map[*series.Metric]*prometheus.Desc
	requests *prometheus.HistogramVec
	scrape   prometheus.Histogram
}

// NewExposition registers everything.
func NewExposition(cfg ExpositionConfig) (*Exposition, error) {
	if cfg.Sampler == nil || cfg.Targets == nil {
		return nil, fmt.Errorf("metrics: ExpositionConfig needs Sampler and Targets: %w", errdefs.ErrInvalidArgument)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 10 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	e := &Exposition{cfg: cfg, registry: prometheus.NewRegistry(), descs: map[*series.Metric]*prometheus.Desc{}}
	all := series.All()
	for i := range all {
		e.descs[&all[i]] = prometheus.NewDesc(all[i].Name, all[i].Help, all[i].Labels, nil)
	}
	e.requests = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "nodeagent_cri_request_duration_seconds", Help: "Duration of CRI requests.",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60},
	}, []string{"method", "code"})
	e.scrape = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "nodeagent_sample_duration_seconds", Help: "Duration of the sample that a scrape takes.",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, 1},
	})
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "nodeagent_build_info", Help: "Always 1; the labels say what runs.",
		ConstLabels: prometheus.Labels{"version": cfg.Version, "goversion": runtime.Version()},
	})
	build.Set(1)
	count := func(result string, from func() uint64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "nodeagent_sampler_groups_total", Help: "Control groups that were asked for: read anew, or young enough to be reused.",
			ConstLabels: prometheus.Labels{"result": result},
		}, func() float64 { return float64(from()) })
	}
	var errs []error
	for _, c := range []prometheus.Collector{
		e, e.requests, e.scrape, build,
		count("read", cfg.Sampler.taken.Load), count("reused", cfg.Sampler.reused.Load),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		errs = append(errs, e.registry.Register(c))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	return e, nil
}

// Register adds the metrics of another part of the daemon.
func (e *Exposition) Register(c prometheus.Collector) error { return e.registry.Register(c) }

// Handler answers scrapes, in the text format or OpenMetrics.
func (e *Exposition) Handler() http.Handler {
	return promhttp.HandlerFor(e.registry, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(e.cfg.Log.Handler(), slog.LevelError),
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: 4,
		EnableOpenMetrics:   true,
	})
}

// ObserveRequest counts one CRI request.
func (e *Exposition) ObserveRequest(method, code string, d time.Duration) {
	e.requests.WithLabelValues(method, code).Observe(d.Seconds())
}

// Describe implements prometheus.Collector.
func (e *Exposition) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range e.descs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (e *Exposition) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), e.cfg.Timeout)
	defer cancel()
	begin := time.Now()
	pods, err := e.cfg.Sampler.Sample(ctx, e.cfg.Targets(), sample.Everything)
	e.scrape.Observe(time.Since(begin).Seconds())
	if err != nil {
		e.cfg.Log.Error("sample for a scrape", "err", err)
		return
	}
	emit := func(p series.Point) { e.send(ch, p) }
	for i := range pods {
		series.Pod(&pods[i], emit)
		for _, c := range pods[i].Containers {
			series.Container(&pods[i], c, emit)
		}
	}
}

func (e *Exposition) send(ch chan<- prometheus.Metric, p series.Point) {
	kind := prometheus.CounterValue
	if p.Metric.Kind == series.Gauge {
		kind = prometheus.GaugeValue
	}
	m, err := prometheus.NewConstMetric(e.descs[p.Metric], kind, p.Value, p.Labels...)
	if err != nil {
		// Not UTF-8: a path on disk may be anything.
		labels := make([]string, len(p.Labels))
		for i, l := range p.Labels {
			labels[i] = strings.ToValidUTF8(l, "\uFFFD")
		}
		if m, err = prometheus.NewConstMetric(e.descs[p.Metric], kind, p.Value, labels...); err != nil {
			e.cfg.Log.Error("expose metric", "metric", p.Metric.Name, "err", err)
			return
		}
	}
	ch <- m
}
