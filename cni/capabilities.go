package cni

import (
	"fmt"
	"math"
	"math/big"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
)

// Annotations that limit a pod's bandwidth, in bits per second as a Kubernetes quantity.
const (
	ingressBandwidth = "kubernetes.io/ingress-bandwidth"
	egressBandwidth  = "kubernetes.io/egress-bandwidth"
)

// Arguments of the CNI capabilities, as the conventions have them.
type (
	portMapping struct {
		HostPort      int    `json:"hostPort"`
		ContainerPort int    `json:"containerPort"`
		Protocol      string `json:"protocol"`
		HostIP        string `json:"hostIP,omitempty"`
	}
	bandwidth struct {
		IngressRate  uint64 `json:"ingressRate,omitempty"` // bits per second
		IngressBurst uint64 `json:"ingressBurst,omitempty"`
		EgressRate   uint64 `json:"egressRate,omitempty"`
		EgressBurst  uint64 `json:"egressBurst,omitempty"`
	}
	dnsArgs struct {
		Servers  []string `json:"servers,omitempty"`
		Searches []string `json:"searches,omitempty"`
		Options  []string `json:"options,omitempty"`
	}
	ipRange struct {
		Subnet netip.Prefix `json:"subnet"`
	}
)

// capabilityArgs is what plugins may ask for by their capabilities; libcni hands each only what it asks for.
// ranges are the pod ranges that somebody set, nil if nobody did.
func (r Request) capabilityArgs(ranges []netip.Prefix) (map[string]any, error) {
	args := map[string]any{}
	var ports []portMapping
	for _, p := range r.PortMappings {
		if p.HostPort == 0 {
			continue
		}
		m := portMapping{HostPort: int(p.HostPort), ContainerPort: int(p.ContainerPort), Protocol: strings.ToLower(p.Protocol)}
		if m.Protocol == "" {
			m.Protocol = "tcp"
		}
		if p.HostIP.IsValid() {
			m.HostIP = p.HostIP.String()
		}
		ports = append(ports, m)
	}
	if len(ports) > 0 {
		args["portMappings"] = ports
	}
	bw, err := r.bandwidth()
	if err != nil {
		return nil, err
	}
	if bw != (bandwidth{}) {
		args["bandwidth"] = bw
	}
	if len(r.DNS.Servers)+len(r.DNS.Searches)+len(r.DNS.Options) > 0 {
		args["dns"] = dnsArgs(r.DNS)
	}
	var sets [][]ipRange
	for _, p := range ranges {
		sets = append(sets, []ipRange{{p}})
	}
	if len(sets) > 0 {
		args["ipRanges"] = sets
	}
	if r.CgroupParent != "" {
		args["cgroupPath"] = r.CgroupParent
	}
	if len(r.Annotations) > 0 {
		args["io.kubernetes.cri.pod-annotations"] = r.Annotations
	}
	return args, nil
}

// bandwidth reads the annotations. The burst is left to be as large as the plugin can.
func (r Request) bandwidth() (bandwidth, error) {
	var bw bandwidth
	for _, a := range []struct {
		key         string
		rate, burst *uint64
	}{{ingressBandwidth, &bw.IngressRate, &bw.IngressBurst}, {egressBandwidth, &bw.EgressRate, &bw.EgressBurst}} {
		s, ok := r.Annotations[a.key]
		if !ok {
			continue
		}
		rate, err := quantity(s)
		if err != nil {
			return bandwidth{}, fmt.Errorf("annotation %s: %w", a.key, err)
		}
		if rate < 1e3 || rate > 1e15 {
			return bandwidth{}, fmt.Errorf("annotation %s: %q: must be 1k to 1P bits per second: %w", a.key, s, errdefs.ErrInvalidArgument)
		}
		*a.rate, *a.burst = rate, math.MaxUint32
	}
	return bw, nil
}

// quantity parses a Kubernetes resource quantity ("10M", "1.5Gi", "2e6", "500") and rounds it up.
func quantity(s string) (uint64, error) {
	bad := fmt.Errorf("%q: not a quantity like 10M: %w", s, errdefs.ErrInvalidArgument)
	end := strings.LastIndexAny(s, "0123456789.") + 1
	number, suffix := s[:end], s[end:]
	factor, ok := map[string]*big.Rat{
		"": rat(1, 0), "k": rat(10, 3), "M": rat(10, 6), "G": rat(10, 9), "T": rat(10, 12), "P": rat(10, 15), "E": rat(10, 18),
		"Ki": rat(2, 10), "Mi": rat(2, 20), "Gi": rat(2, 30), "Ti": rat(2, 40), "Pi": rat(2, 50), "Ei": rat(2, 60),
		"m": new(big.Rat).Inv(rat(10, 3)),
	}[suffix]
	// big.Rat also knows fractions, hexadecimal and underscores; a quantity does not. The exponent is bounded.
	if !ok || len(s) > 64 || strings.Trim(number, "0123456789.eE+-") != "" || strings.ContainsAny(number, "eE") && suffix != "" {
		return 0, bad
	}
	if i := strings.IndexAny(number, "eE"); i >= 0 && len(number)-i > 4 {
		return 0, bad
	}
	v, ok := new(big.Rat).SetString(number)
	if !ok || v.Sign() < 0 {
		return 0, bad
	}
	v.Mul(v, factor)
	q, rest := new(big.Int).QuoRem(v.Num(), v.Denom(), new(big.Int))
	if rest.Sign() > 0 {
		q.Add(q, big.NewInt(1))
	}
	if !q.IsUint64() {
		return 0, bad
	}
	return q.Uint64(), nil
}

func rat(base, exp int64) *big.Rat {
	return new(big.Rat).SetInt(new(big.Int).Exp(big.NewInt(base), big.NewInt(exp), nil))
}
