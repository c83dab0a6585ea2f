package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/ebpf"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// leaveTimeout bounds what a stopping daemon does about what it leaves.
const leaveTimeout = 10 * time.Second

// leave takes away what serves all pods together, if there is none: the shim,
// the network's tables, addresses and routes, and what of policy is pinned. With pods it does nothing,
// since they go on. Nothing of ours serves any more when it is called.
//
// A daemon that was stopped before it had recovered does not know of pods; it
// only ends a shim that has no containers.
func (d *node) leave(ctx context.Context, recovered bool) error {
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
	defer cancel()
	if recovered {
		pods, err := d.cri.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
		if err != nil {
			return fmt.Errorf("look for pods that go on: %w", err)
		}
		if n := len(pods.Items); n > 0 {
			d.log.Info("pods go on without the daemon", "pods", n)
			return nil
		}
	}
	switch err := d.shim.Leave(ctx); {
	case errdefs.IsFailedPrecondition(err):
		d.log.Info("containers go on without the daemon", "err", err)
		return nil
	case err != nil:
		return err
	case !recovered:
		return nil
	}
	err := d.network.Remove(ctx)
	if d.policy != nil {
		err = errors.Join(err, ebpf.Clear(d.cfg.Policy.BPFFS, policyName(d.cfg)))
	}
	return err
}
