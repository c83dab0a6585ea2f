package source

import (
	"net/netip"

	core "k8s.io/api/core/v1"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// Namespace slims a namespace down. It has the label with its name that the
// API server would give it.
func Namespace(n *core.Namespace) objects.Namespace {
	out := objects.Namespace{Name: n.Name, Labels: map[string]string{core.LabelMetadataName: n.Name}}
	for k, v := range n.Labels {
		out.Labels[k] = v
	}
	return out
}

// Pod slims a pod down. Ports are those of containers, then of sidecars.
func Pod(p *core.Pod) objects.Pod {
	out := objects.Pod{
		PodKey: objects.PodKey{Namespace: p.Namespace, Name: p.Name}, UID: string(p.UID), Created: p.CreationTimestamp.UnixNano(),
		Labels: p.Labels, HostNetwork: p.Spec.HostNetwork,
		Finished: p.Status.Phase == core.PodSucceeded || p.Status.Phase == core.PodFailed,
	}
	if p.CreationTimestamp.IsZero() {
		out.Created = 0
	}
	if uid := p.Annotations[core.MirrorPodAnnotationKey]; uid != "" {
		out.UID = uid // a static pod's mirror: the runtime knows the pod by this one
	}
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			out.IPs = append(out.IPs, a.Unmap())
		}
	}
	if len(out.IPs) == 0 {
		if a, err := netip.ParseAddr(p.Status.PodIP); err == nil {
			out.IPs = append(out.IPs, a.Unmap())
		}
	}
	add := func(c *core.Container) {
		for _, port := range c.Ports {
			if port.Name == "" {
				continue
			}
			proto := objects.TCP
			switch port.Protocol {
			case core.ProtocolUDP:
				proto = objects.UDP
			case core.ProtocolSCTP:
				proto = objects.SCTP
			}
			out.Ports = append(out.Ports, objects.NamedPort{Name: port.Name, Protocol: proto, Port: uint16(port.ContainerPort)})
		}
	}
	for i := range p.Spec.Containers {
		add(&p.Spec.Containers[i])
	}
	for i := range p.Spec.InitContainers {
		if c := &p.Spec.InitContainers[i]; c.RestartPolicy != nil && *c.RestartPolicy == core.ContainerRestartPolicyAlways {
			add(c)
		}
	}
	return out
}
