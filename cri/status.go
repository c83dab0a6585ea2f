package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// RuntimeName is what Version answers.
const RuntimeName = "nodeagent"

// Version says who answers.
func (s *Server) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	v := s.cfg.Version
	if v == "" {
		v = "0.0.0"
	}
	return &runtimeapi.VersionResponse{Version: "0.1.0", RuntimeName: RuntimeName, RuntimeVersion: v, RuntimeApiVersion: "v1"}, nil
}

// statusPatience is how long Status waits for a shim that is being restarted.
const statusPatience = 500 * time.Millisecond

// Status tells whether pods can be run, and what they may ask for.
func (s *Server) Status(ctx context.Context, r *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	ready := &runtimeapi.RuntimeCondition{Type: runtimeapi.RuntimeReady, Status: true}
	sctx, cancel := context.WithTimeout(ctx, statusPatience)
	defer cancel()
	if err := s.cfg.Runtime.Ready(sctx); err != nil {
		ready.Status, ready.Reason, ready.Message = false, "ShimNotReady", "the shim does not answer: "+err.Error()
	}
	network := &runtimeapi.RuntimeCondition{Type: runtimeapi.NetworkReady, Status: true}
	if err := s.cfg.Network.Status(ctx); err != nil {
		network.Status, network.Reason, network.Message = false, "NetworkNotReady", err.Error()
	}
	resp := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{ready, network}},
		Features: &runtimeapi.RuntimeFeatures{
			SupplementalGroupsPolicy: true, UserNamespacesHostNetwork: true, MountOptions: true,
		},
	}
	for _, h := range append([]Handler{{}}, s.cfg.Handlers...) {
		resp.RuntimeHandlers = append(resp.RuntimeHandlers, &runtimeapi.RuntimeHandler{
			Name: h.Name,
			Features: &runtimeapi.RuntimeHandlerFeatures{
				RecursiveReadOnlyMounts: s.cfg.Host.RecursiveReadOnly, UserNamespaces: s.cfg.Host.IDMappedMounts,
			},
		})
	}
	if r.GetVerbose() {
		info, err := s.statusInfo()
		if err != nil {
			return nil, err
		}
		resp.Info = info
	}
	return resp, nil
}

func (s *Server) statusInfo() (map[string]string, error) {
	values := map[string]any{
		"config":  map[string]any{"rootDir": s.cfg.Root, "stateDir": s.cfg.State, "socket": s.cfg.Socket, "nodeagent": s.cfg.Effective},
		"golang":  runtime.Version(),
		"host":    s.cfg.Host,
		"counts":  map[string]int{"sandboxes": s.sandboxes.Len(), "containers": s.containers.Len()},
		"bootID":  s.boot,
		"version": s.cfg.Version,
	}
	info := map[string]string{}
	for k, v := range values {
		data, err := json.Marshal(v)
		if err != nil {
			return nil, fmt.Errorf("encode verbose status: %s: %w", k, err)
		}
		info[k] = string(data)
	}
	return info, nil
}

// RuntimeConfig tells the kubelet which cgroup driver is in use.
func (s *Server) RuntimeConfig(context.Context, *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	d := runtimeapi.CgroupDriver_CGROUPFS
	if s.cfg.Cgroups.Systemd() {
		d = runtimeapi.CgroupDriver_SYSTEMD
	}
	return &runtimeapi.RuntimeConfigResponse{Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: d}}, nil
}

// UpdateRuntimeConfig takes the node's pod CIDRs, comma separated.
func (s *Server) UpdateRuntimeConfig(ctx context.Context, r *runtimeapi.UpdateRuntimeConfigRequest) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	text := r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr()
	if text == "" {
		return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
	}
	var cidrs []netip.Prefix
	var errs []error
	for _, part := range strings.Split(text, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(part))
		if err != nil {
			errs = append(errs, badField("runtime_config.network_config.pod_cidr", part, "CIDRs such as 10.1.0.0/24, separated by commas"))
			continue
		}
		cidrs = append(cidrs, p.Masked())
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("update runtime config: %w", err)
	}
	if err := s.cfg.Network.SetPodCIDRs(ctx, cidrs); err != nil {
		return nil, fmt.Errorf("update runtime config: set pod CIDRs %s: %w", text, err)
	}
	return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
}

func notYet(what string) error {
	return fmt.Errorf("%s: checkpoints are not implemented: %w", what, errdefs.ErrNotImplemented)
}

// CheckpointContainer is not implemented.
func (s *Server) CheckpointContainer(context.Context, *runtimeapi.CheckpointContainerRequest) (*runtimeapi.CheckpointContainerResponse, error) {
	return nil, notYet("checkpoint container")
}

// CheckpointPod is not implemented.
func (s *Server) CheckpointPod(context.Context, *runtimeapi.CheckpointPodRequest) (*runtimeapi.CheckpointPodResponse, error) {
	return nil, notYet("checkpoint pod")
}

// RestorePod is not implemented.
func (s *Server) RestorePod(context.Context, *runtimeapi.RestorePodRequest) (*runtimeapi.RestorePodResponse, error) {
	return nil, notYet("restore pod")
}
