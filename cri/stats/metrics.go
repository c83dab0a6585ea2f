package stats

import (
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/metrics/sample"
	"github.com/nodeagent/nodeagent/metrics/series"
)

// Descriptors of the pod metrics, for ListMetricDescriptors. They do not change
// while the process lives.
func Descriptors() []*runtimeapi.MetricDescriptor {
	all := series.All()
	list := make([]*runtimeapi.MetricDescriptor, len(all))
	for i, m := range all {
		list[i] = &runtimeapi.MetricDescriptor{Name: m.Name, Help: m.Help, LabelKeys: m.Labels}
	}
	return list
}

// Metrics of a pod and its running containers, for ListPodSandboxMetrics; p
// has to be sampled with depth sample.Everything. A CRI metric is a whole
// number, so that seconds are cut.
func Metrics(p *sample.Pod) *runtimeapi.PodSandboxMetrics {
	msg := &runtimeapi.PodSandboxMetrics{PodSandboxId: p.Target.ID}
	series.Pod(p, func(pt series.Point) { msg.Metrics = append(msg.Metrics, metric(pt)) })
	for _, c := range p.Containers {
		cm := &runtimeapi.ContainerMetrics{ContainerId: c.Target.ID, Metrics: make([]*runtimeapi.Metric, 0, len(series.All()))}
		series.Container(p, c, func(pt series.Point) { cm.Metrics = append(cm.Metrics, metric(pt)) })
		if len(cm.Metrics) > 0 {
			msg.ContainerMetrics = append(msg.ContainerMetrics, cm)
		}
	}
	return msg
}

func metric(p series.Point) *runtimeapi.Metric {
	kind := runtimeapi.MetricType_COUNTER
	if p.Metric.Kind == series.Gauge {
		kind = runtimeapi.MetricType_GAUGE
	}
	return &runtimeapi.Metric{
		Name: p.Metric.Name, Timestamp: p.Time.UnixNano(), MetricType: kind,
		LabelValues: p.Labels, Value: value(uint64(max(0, p.Value))),
	}
}
