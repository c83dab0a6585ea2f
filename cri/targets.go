package cri

import "github.com/nodeagent/nodeagent/metrics/sample"

// Targets are the pods that run now, as the sampler wants them: for the
// Prometheus exposition, which samples on its own account.
func (s *Server) Targets() []sample.PodTarget {
	pods := withContainers(s.readySandboxes())
	targets := make([]sample.PodTarget, len(pods))
	for i, p := range pods {
		targets[i] = p.target()
	}
	return targets
}
