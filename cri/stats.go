package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/stats"
	"github.com/nodeagent/nodeagent/metrics/sample"
)

// podOf groups containers by sandbox for one sampling.
type podOf struct {
	sandbox    *sandbox
	containers []*container
}

// target says where the figures of a pod are to be found.
func (p podOf) target() sample.PodTarget {
	r := p.sandbox.record()
	m := r.Config.GetMetadata()
	t := sample.PodTarget{
		ID: r.ID, Name: m.GetName(), Namespace: m.GetNamespace(), UID: m.GetUid(), CreatedAt: r.CreatedAt,
		CgroupParent: r.CgroupParent, Netns: r.Namespaces.Net,
	}
	if r.Network.Conf == builtinNetwork {
		t.HostInterface = r.Network.HostInterface
	}
	for _, c := range p.containers {
		r := c.record()
		ct := sample.ContainerTarget{ID: r.ID, Name: r.Config.GetMetadata().GetName(), Image: r.Image().GetImage()}
		if r.Started != nil && r.Exit == nil {
			ct.StartedAt, ct.Pid = r.Started.At, r.Started.Pid
		}
		t.Containers = append(t.Containers, ct)
	}
	return t
}

// builtinNetwork is what NetworkResult.Conf says of the network whose host
// interface carries all of a pod's traffic, and nothing else.
const builtinNetwork = "builtin"

func (s *Server) sample(ctx context.Context, pods []podOf, depth sample.Depth) ([]sample.Pod, error) {
	if s.cfg.Stats == nil {
		return nil, fmt.Errorf("sample pods: no sampler is configured: %w", errdefs.ErrFailedPrecondition)
	}
	if len(pods) == 0 {
		return nil, nil
	}
	targets := make([]sample.PodTarget, len(pods))
	for i, p := range pods {
		targets[i] = p.target()
	}
	return s.cfg.Stats.Sample(ctx, targets, depth)
}

// byPod groups containers, keeping their order.
func byPod(list []*container) (pods []podOf) {
	at := map[*sandbox]int{}
	for _, c := range list {
		i, ok := at[c.sb]
		if !ok {
			i = len(pods)
			at[c.sb] = i
			pods = append(pods, podOf{sandbox: c.sb})
		}
		pods[i].containers = append(pods[i].containers, c)
	}
	return pods
}

func running(list []*container) []*container {
	out := list[:0:0]
	for _, c := range list {
		if c.state() == runtimeapi.ContainerState_CONTAINER_RUNNING {
			out = append(out, c)
		}
	}
	return out
}

func (c *container) attributes() *runtimeapi.ContainerAttributes {
	r := c.record()
	return &runtimeapi.ContainerAttributes{Id: r.ID, Metadata: r.Config.GetMetadata(), Labels: r.Config.GetLabels(), Annotations: r.Config.GetAnnotations()}
}

// containerStats samples containers and pairs samples with attributes.
func (s *Server) containerStats(ctx context.Context, list []*container) ([]*runtimeapi.ContainerStats, error) {
	pods := byPod(list)
	samples, err := s.sample(ctx, pods, sample.Containers)
	if err != nil {
		return nil, err
	}
	out := make([]*runtimeapi.ContainerStats, 0, len(list))
	for i, p := range pods {
		for j, c := range p.containers {
			out = append(out, stats.Container(c.attributes(), samples[i].Containers[j]))
		}
	}
	return out, nil
}

// ContainerStats samples one container.
func (s *Server) ContainerStats(ctx context.Context, r *runtimeapi.ContainerStatsRequest) (*runtimeapi.ContainerStatsResponse, error) {
	c, err := s.findContainer(r.GetContainerId())
	if err != nil {
		return nil, fmt.Errorf("stats of container: %w", err)
	}
	list, err := s.containerStats(ctx, []*container{c})
	if err != nil {
		return nil, fmt.Errorf("stats of container %s: %w", c.id, err)
	}
	return &runtimeapi.ContainerStatsResponse{Stats: list[0]}, nil
}

// ListContainerStats samples all running containers that match.
func (s *Server) ListContainerStats(ctx context.Context, r *runtimeapi.ListContainerStatsRequest) (*runtimeapi.ListContainerStatsResponse, error) {
	list, err := s.listContainerStats(ctx, r.GetFilter())
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ListContainerStatsResponse{Stats: list}, nil
}

// StreamContainerStats is ListContainerStats in pieces.
func (s *Server) StreamContainerStats(r *runtimeapi.StreamContainerStatsRequest, out runtimeapi.RuntimeService_StreamContainerStatsServer) error {
	list, err := s.listContainerStats(out.Context(), r.GetFilter())
	if err != nil {
		return err
	}
	return inPieces(list, func(p []*runtimeapi.ContainerStats) error {
		return out.Send(&runtimeapi.StreamContainerStatsResponse{ContainerStats: p})
	})
}

func (s *Server) listContainerStats(ctx context.Context, f *runtimeapi.ContainerStatsFilter) ([]*runtimeapi.ContainerStats, error) {
	list, err := s.containerStats(ctx, running(s.selectContainers(f.GetId(), f.GetPodSandboxId(), f.GetLabelSelector())))
	if err != nil {
		return nil, fmt.Errorf("list container stats: %w", err)
	}
	return list, nil
}

// PodSandboxStats samples one pod.
func (s *Server) PodSandboxStats(ctx context.Context, r *runtimeapi.PodSandboxStatsRequest) (*runtimeapi.PodSandboxStatsResponse, error) {
	b, err := s.findSandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, fmt.Errorf("stats of sandbox: %w", err)
	}
	list, err := s.podStats(ctx, []*sandbox{b})
	if err != nil {
		return nil, fmt.Errorf("stats of sandbox %s: %w", b.id, err)
	}
	return &runtimeapi.PodSandboxStatsResponse{Stats: list[0]}, nil
}

// ListPodSandboxStats samples all ready pods that match.
func (s *Server) ListPodSandboxStats(ctx context.Context, r *runtimeapi.ListPodSandboxStatsRequest) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	list, err := s.listPodStats(ctx, r.GetFilter())
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ListPodSandboxStatsResponse{Stats: list}, nil
}

// StreamPodSandboxStats is ListPodSandboxStats in pieces.
func (s *Server) StreamPodSandboxStats(r *runtimeapi.StreamPodSandboxStatsRequest, out runtimeapi.RuntimeService_StreamPodSandboxStatsServer) error {
	list, err := s.listPodStats(out.Context(), r.GetFilter())
	if err != nil {
		return err
	}
	return inPieces(list, func(p []*runtimeapi.PodSandboxStats) error {
		return out.Send(&runtimeapi.StreamPodSandboxStatsResponse{PodSandboxStats: p})
	})
}

func (s *Server) listPodStats(ctx context.Context, f *runtimeapi.PodSandboxStatsFilter) ([]*runtimeapi.PodSandboxStats, error) {
	candidates := s.readySandboxes()
	if f.GetId() != "" {
		b, err := s.findSandbox(f.GetId())
		if err != nil || b.usable() != nil {
			return nil, nil // matches nothing
		}
		candidates = []*sandbox{b}
	}
	list := candidates[:0:0]
	for _, b := range candidates {
		if matches(f.GetLabelSelector(), b.record().Config.GetLabels()) {
			list = append(list, b)
		}
	}
	out, err := s.podStats(ctx, list)
	if err != nil {
		return nil, fmt.Errorf("list sandbox stats: %w", err)
	}
	return out, nil
}

func (s *Server) readySandboxes() []*sandbox {
	all := s.sandboxes.All()
	out := all[:0:0]
	for _, b := range all {
		if b.usable() == nil {
			out = append(out, b)
		}
	}
	return out
}

func withContainers(list []*sandbox) []podOf {
	pods := make([]podOf, len(list))
	for i, b := range list {
		pods[i] = podOf{b, running(b.members())}
	}
	return pods
}

func (s *Server) podStats(ctx context.Context, list []*sandbox) ([]*runtimeapi.PodSandboxStats, error) {
	pods := withContainers(list)
	samples, err := s.sample(ctx, pods, sample.Pods)
	if err != nil {
		return nil, err
	}
	out := make([]*runtimeapi.PodSandboxStats, len(pods))
	for i, p := range pods {
		containers := make([]*runtimeapi.ContainerStats, len(p.containers))
		for j, c := range p.containers {
			containers[j] = stats.Container(c.attributes(), samples[i].Containers[j])
		}
		r := p.sandbox.record()
		out[i] = stats.Pod(&runtimeapi.PodSandboxAttributes{
			Id: r.ID, Metadata: r.Config.GetMetadata(), Labels: r.Config.GetLabels(), Annotations: r.Config.GetAnnotations(),
		}, &samples[i], containers)
	}
	return out, nil
}

// ListMetricDescriptors describes what ListPodSandboxMetrics returns.
func (s *Server) ListMetricDescriptors(context.Context, *runtimeapi.ListMetricDescriptorsRequest) (*runtimeapi.ListMetricDescriptorsResponse, error) {
	return &runtimeapi.ListMetricDescriptorsResponse{Descriptors: stats.Descriptors()}, nil
}

// ListPodSandboxMetrics samples all that is known about ready pods.
func (s *Server) ListPodSandboxMetrics(ctx context.Context, _ *runtimeapi.ListPodSandboxMetricsRequest) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	list, err := s.podMetrics(ctx)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ListPodSandboxMetricsResponse{PodMetrics: list}, nil
}

// StreamPodSandboxMetrics is ListPodSandboxMetrics in pieces.
func (s *Server) StreamPodSandboxMetrics(_ *runtimeapi.StreamPodSandboxMetricsRequest, out runtimeapi.RuntimeService_StreamPodSandboxMetricsServer) error {
	list, err := s.podMetrics(out.Context())
	if err != nil {
		return err
	}
	return inPieces(list, func(p []*runtimeapi.PodSandboxMetrics) error {
		return out.Send(&runtimeapi.StreamPodSandboxMetricsResponse{PodSandboxMetrics: p})
	})
}

func (s *Server) podMetrics(ctx context.Context) ([]*runtimeapi.PodSandboxMetrics, error) {
	samples, err := s.sample(ctx, withContainers(s.readySandboxes()), sample.Everything)
	if err != nil {
		return nil, fmt.Errorf("list sandbox metrics: %w", err)
	}
	out := make([]*runtimeapi.PodSandboxMetrics, len(samples))
	for i := range samples {
		out[i] = stats.Metrics(&samples[i])
	}
	return out, nil
}
