package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/nodeagent/nodeagent/cgroups"
	"github.com/nodeagent/nodeagent/cni"
	"github.com/nodeagent/nodeagent/cri"
	"github.com/nodeagent/nodeagent/cri/images"
	"github.com/nodeagent/nodeagent/cri/namespaces"
	"github.com/nodeagent/nodeagent/cri/rootfs"
	"github.com/nodeagent/nodeagent/cri/store"
	"github.com/nodeagent/nodeagent/metrics"
)

// The adapters in wire*.go give domain packages, which do not know each other,
// the interfaces that package cri declares. They convert and decide nothing.

// networkOf is the network as the CRI server sees it.
type networkOf struct{ m *cni.Manager }

func (n networkOf) Setup(ctx context.Context, r cri.NetworkRequest) (cri.NetworkResult, error) {
	res, err := n.m.Setup(ctx, cniRequest(r))
	return cri.NetworkResult{IPs: res.IPs, HostInterface: res.HostInterface, Conf: res.Conf, Result: res.CNIResult}, err
}

func (n networkOf) Teardown(ctx context.Context, r cri.NetworkRequest, res cri.NetworkResult) error {
	return n.m.Teardown(ctx, cniRequest(r), cniResult(res))
}

func (n networkOf) Reconcile(ctx context.Context, live []cri.NetworkRequest, results map[string]cri.NetworkResult) error {
	requests := make([]cni.Request, len(live))
	for i, r := range live {
		requests[i] = cniRequest(r)
	}
	converted := make(map[string]cni.Result, len(results))
	for id, res := range results {
		converted[id] = cniResult(res)
	}
	return n.m.Reconcile(ctx, requests, converted)
}

func (n networkOf) Status(ctx context.Context) error { return n.m.Status(ctx) }

func (n networkOf) SetPodCIDRs(ctx context.Context, cidrs []netip.Prefix) error {
	return n.m.SetPodCIDRs(ctx, cidrs)
}

func cniRequest(r cri.NetworkRequest) cni.Request {
	out := cni.Request{
		SandboxID: r.SandboxID, PodNamespace: r.PodNamespace, PodName: r.PodName, PodUID: r.PodUID, Netns: r.Netns,
		Annotations: r.Annotations, CgroupParent: r.CgroupParent, DNS: cni.DNS(r.DNS),
	}
	for _, p := range r.Ports {
		out.PortMappings = append(out.PortMappings, cni.PortMapping(p))
	}
	return out
}

func cniResult(r cri.NetworkResult) cni.Result {
	return cni.Result{IPs: r.IPs, HostInterface: r.HostInterface, Conf: r.Conf, CNIResult: r.Result}
}

// cgroupsOf is the cgroup manager as the CRI server sees it.
type cgroupsOf struct{ *cgroups.Manager }

func (c cgroupsOf) Systemd() bool { return c.Driver() == cgroups.Systemd }

// namespacesOf is the pool of namespaces as the CRI server sees it.
type namespacesOf struct{ p *namespaces.Pool }

func (n namespacesOf) Get(ctx context.Context, w cri.NamespaceWant) (store.Namespaces, error) {
	set, err := n.p.Get(ctx, namespaces.Want(w))
	return store.Namespaces(set), err
}

func (n namespacesOf) Release(ctx context.Context, ns store.Namespaces) error {
	return n.p.Release(ctx, namespaces.Set(ns))
}

func (n namespacesOf) Reconcile(ctx context.Context, live []string) error {
	return n.p.Reconcile(ctx, live)
}

// rootfsOf mounts images of the store for containers. An owner in the store is
// a container's ID, or "<id>/<n>" for its n-th image volume.
type rootfsOf struct {
	images  *images.Store
	mounter *rootfs.Mounter
	root    string
	log     *slog.Logger

	mu      sync.Mutex
	volumes map[string]int // image volumes by container; none: not in the map
}

func newRootfs(store *images.Store, mounter *rootfs.Mounter, root string, log *slog.Logger) *rootfsOf {
	return &rootfsOf{images: store, mounter: mounter, root: root, log: log, volumes: map[string]int{}}
}

func (r *rootfsOf) Mount(ctx context.Context, id, imageID string, o cri.RootfsOptions) (string, error) {
	layers, err := r.images.Rootfs(ctx, id, imageID)
	if err != nil {
		return "", err
	}
	return r.mounter.Mount(ctx, id, layers, rootfs.Options{ReadOnly: o.ReadOnly, IDMap: idMap(o), Label: o.Label})
}

func (r *rootfsOf) MountImage(ctx context.Context, id string, n int, imageID, subpath string, o cri.RootfsOptions) (string, error) {
	r.mu.Lock()
	r.volumes[id] = max(r.volumes[id], n+1)
	r.mu.Unlock()
	layers, err := r.images.Rootfs(ctx, volumeOwner(id, n), imageID)
	if err != nil {
		return "", err
	}
	return r.mounter.MountImage(ctx, id, layers, rootfs.ImageOptions{Subpath: subpath, IDMap: idMap(o), Label: o.Label})
}

func (r *rootfsOf) Unmount(ctx context.Context, id string) error {
	if err := r.mounter.UnmountImages(ctx, id); err != nil {
		return err
	}
	if err := r.mounter.Unmount(ctx, id); err != nil {
		return err
	}
	r.mu.Lock()
	n := r.volumes[id]
	delete(r.volumes, id)
	r.mu.Unlock()
	r.images.Release(id)
	for i := range n {
		r.images.Release(volumeOwner(id, i))
	}
	return nil
}

func (r *rootfsOf) Restore(ctx context.Context, live map[string][]string) error {
	pins, ids := map[string]string{}, map[string]bool{}
	for id, held := range live {
		ids[id] = true
		for i, image := range held {
			if i == 0 {
				pins[id] = image
				continue
			}
			pins[volumeOwner(id, i-1)] = image
			r.volumes[id] = i
		}
	}
	// An image that was lost does not keep the others from being served.
	if err := r.images.Restore(pins); errdefs.IsNotFound(err) {
		r.log.Error("containers stand on images that are gone", "err", err)
	} else if err != nil {
		return err
	}
	return r.mounter.Reconcile(ctx, ids)
}

func (r *rootfsOf) VolumeDir(id string) string {
	return filepath.Join(r.root, "containers", id, "volumes")
}

func volumeOwner(id string, n int) string { return id + "/" + strconv.Itoa(n) }

func idMap(o cri.RootfsOptions) rootfs.IDMap {
	return rootfs.IDMap{UIDMap: o.UIDMap, GIDMap: o.GIDMap, UserNS: o.UserNS}
}

// cgroupDriver translates the configuration's word.
func cgroupDriver(word string) (cgroups.Driver, error) {
	switch word {
	case "", "auto":
		return "", nil
	case "systemd":
		return cgroups.Systemd, nil
	case "cgroupfs":
		return cgroups.CgroupFS, nil
	}
	return "", fmt.Errorf("cgroup driver %q: want auto, systemd or cgroupfs", word)
}

// groupsOf resolves control groups for the sampler.
func groupsOf(m *cgroups.Manager) func(parent, id string) (metrics.Group, error) {
	return func(parent, id string) (metrics.Group, error) { return m.Resolve(parent, id) }
}
