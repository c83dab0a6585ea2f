package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/nodeagent/nodeagent/certs"
	"github.com/nodeagent/nodeagent/cgroups"
	"github.com/nodeagent/nodeagent/cni"
	"github.com/nodeagent/nodeagent/config"
	"github.com/nodeagent/nodeagent/cri"
	"github.com/nodeagent/nodeagent/cri/images"
	"github.com/nodeagent/nodeagent/cri/namespaces"
	"github.com/nodeagent/nodeagent/cri/rootfs"
	"github.com/nodeagent/nodeagent/cri/spec"
	"github.com/nodeagent/nodeagent/cri/stream"
	"github.com/nodeagent/nodeagent/ebpf"
	"github.com/nodeagent/nodeagent/metrics"
	"github.com/nodeagent/nodeagent/shim"
)

// node is everything that runs, in the order in which it is built.
type node struct {
	log     logging
	cfg     config.Config // as it was at the start
	reloads *reloader
	close   []func() error // in order of building
	shim    *shim.Client
	runtime *runtimeOf
	images  *images.Store
	mounter *rootfs.Mounter
	network *cni.Manager
	policy  *ebpf.Engine // nil: off
	pool    *namespaces.Pool
	cri     *cri.Server
	streams *stream.Server
	certs   *certs.Manager      // nil: off
	metrics *metrics.Exposition // nil: not served
	service *service            // nil: no service manager
}

// runDaemon builds everything, runs it until ctx ends and stops it in reverse.
// Containers go on. cfg is what the file at path says; each hup has it read again.
func runDaemon(ctx context.Context, cfg config.Config, path string, log logging, hup <-chan os.Signal) error {
	d := &node{log: log, cfg: cfg}
	d.reloads = &reloader{path: path, cfg: cfg, log: log, notify: func(state string) { _ = sdNotify(state) }}
	d.reloads.notify("STATUS=starting")
	err := d.build(ctx)
	if err == nil {
		err = d.run(ctx, hup)
	}
	for i := len(d.close) - 1; i >= 0; i-- {
		err = errors.Join(err, d.close[i]())
	}
	return err
}

func (d *node) build(ctx context.Context) error {
	cfg, log := d.cfg, d.log.Logger
	driver, err := cgroupDriver(cfg.CRI.CgroupDriver)
	if err != nil {
		return err
	}
	groups, err := cgroups.New(cgroups.Config{Driver: driver, Name: cfg.Network.Name, Log: log})
	if err != nil {
		return err
	}
	host, err := d.host(ctx)
	if err != nil {
		return err
	}
	binary, err := shimBinary()
	if err != nil {
		return err
	}
	if d.shim, err = shim.New(shim.Config{
		Binary: binary, StateDir: filepath.Join(cfg.State, "shim"), ExitDir: filepath.Join(cfg.Root, "shim", "exits"),
		Log: log, SystemdCgroup: groups.Driver() == cgroups.Systemd,
	}); err != nil {
		return err
	}
	d.runtime = newRuntime(d.shim, int(cfg.CRI.MaxLogLineSize))
	if d.images, err = images.New(images.Config{
		Root: filepath.Join(cfg.Root, "images"), Settings: imageSettings(cfg), MaxParallelUnpacks: cfg.Images.MaxParallelUnpacks, Log: log,
	}); err != nil {
		return err
	}
	d.close = append(d.close, d.images.Close)
	d.reloads.images = d.images.Configure
	d.mounter = rootfs.New(rootfs.Config{Root: cfg.Root, State: cfg.State, Log: log})
	if d.policy, err = newPolicy(cfg, log); err != nil {
		return err
	}
	policed := newPolicedNetwork(cfg, d.policy, log)
	var beforeUp func(context.Context, string, int, []netip.Addr) error
	if d.policy != nil {
		beforeUp = policed.beforeUp
		d.reloads.uplinks = d.policy.SetUplinks
	}
	if d.network, err = cni.New(cni.Config{
		Name: cfg.Network.Name, ConfDir: cfg.Network.CNIConfDir, BinDirs: cfg.Network.CNIBinDirs,
		StateDir: cfg.State, RootDir: cfg.Root, PodCIDRs: cfg.Network.PodCIDRs, MTU: cfg.Network.MTU,
		Masquerade: cfg.Network.Masquerade, BeforeUp: beforeUp, Log: log,
	}); err != nil {
		return err
	}
	d.close = append(d.close, d.network.Close)
	var network cri.Network = networkOf{d.network}
	if d.policy != nil {
		policed.Network, network = network, policed
		policed.builtin = func() bool {
			name, err := d.network.Network()
			return err == nil && name == cni.Builtin
		}
	}
	if d.pool, err = namespaces.New(namespaces.Config{
		Dir: filepath.Join(cfg.State, "ns"), Warm: cfg.Network.WarmNamespaces,
		Prewire: d.network.Prewire, Unwire: d.network.Unwire, Log: log,
	}); err != nil {
		return err
	}
	sampler, err := metrics.New(metrics.Config{
		Group: groupsOf(groups), Writable: d.mounter.Usage, WritableDir: filepath.Join(cfg.Root, "containers"), Log: log,
	})
	if err != nil {
		return err
	}
	d.close = append(d.close, sampler.Close)
	var listen func(string) (net.Listener, error)
	if kept := newKeptSocket(log); kept != nil {
		listen = kept.listen
	}
	if d.cri, err = cri.New(cri.Config{
		Socket: cfg.CRI.Socket, Listen: listen, State: cfg.State, Root: cfg.Root, Handlers: handlers(cfg), Version: semver(readVersion().Version),
		Effective: d.reloads, ExecMaxOutput: int(cfg.CRI.ExecSyncMaxOutput), Host: host, Defaults: specDefaults(cfg),
		CDI: spec.NewCDI(cfg.CRI.CDISpecDirs...), Runtime: d.runtime, Network: network, Cgroups: cgroupsOf{groups},
		Namespaces: namespacesOf{d.pool}, Images: d.images, Rootfs: newRootfs(d.images, d.mounter, cfg.Root, log), Stats: sampler, Log: log,
	}); err != nil {
		return err
	}
	d.close = append(d.close, d.cri.Close)
	if d.streams, err = stream.New(stream.Config{
		Addr: net.JoinHostPort(cfg.CRI.Streaming.Address.String(), strconv.Itoa(cfg.CRI.Streaming.Port)), Log: log,
	}, d.cri.Sessions()); err != nil {
		return err
	}
	d.cri.SetStreams(d.streams)
	d.service = d.newService()
	if d.certs, err = newCerts(cfg, log); err != nil {
		return err
	}
	return d.buildMetrics(sampler)
}

// buildMetrics makes what is served on one address, or two.
func (d *node) buildMetrics(sampler *metrics.Sampler) (err error) {
	if d.cfg.Metrics.Address == "" && d.certs == nil {
		return nil
	}
	if d.metrics, err = metrics.NewExposition(metrics.ExpositionConfig{
		Sampler: sampler, Targets: d.cri.Targets, Version: readVersion().Version, Log: d.log.Logger,
	}); err == nil && d.policy != nil {
		err = d.metrics.Register(d.policy.Collector())
	}
	if err == nil && d.certs != nil {
		err = d.metrics.Register(d.certs)
	}
	return err
}

// imageSettings are those that may change while the daemon runs.
func imageSettings(cfg config.Config) images.Settings {
	return images.Settings{
		RegistryConfigDirs: cfg.Images.RegistryConfigDirs, MaxParallelDownloads: cfg.Images.MaxParallelDownloads,
		ProgressTimeout: cfg.Images.ProgressTimeout, Pinned: cfg.Images.Pinned,
	}
}

// host finds out what containers may be given here.
func (d *node) host(ctx context.Context) (spec.HostInfo, error) {
	host, err := spec.Detect()
	if err != nil {
		return host, err
	}
	if host.AppArmor {
		if host.AppArmorDefault, err = spec.LoadAppArmor(ctx); err != nil {
			d.log.Warn("there is no AppArmor profile for containers that want the default one", "err", err)
		}
	}
	return host, nil
}

// run starts what recovery needs, recovers, then starts the rest and serves
// until ctx ends or a part fails. What the CRI server stands on ends after it,
// so that calls that are cut off can be undone.
func (d *node) run(ctx context.Context, hup <-chan os.Signal) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	below, endBelow := context.WithCancel(context.WithoutCancel(ctx))
	defer endBelow()
	var upper, lower sync.WaitGroup
	start := func(wg *sync.WaitGroup, ctx context.Context, what string, run func(context.Context) error) {
		wg.Go(func() {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("%s: %w", what, err))
			}
		})
	}
	start(&lower, below, "shim", d.shim.Run)
	start(&lower, below, "exits", d.runtime.run)
	if d.policy != nil {
		start(&lower, below, "policy", d.policy.Run)
	}
	recovered := d.cri.Recover(ctx)
	if recovered != nil {
		cancel(recovered)
	} else {
		start(&lower, below, "network", d.network.Run)
		start(&lower, below, "images", d.images.Run)
		start(&lower, below, "root filesystems", d.mounter.Run)
		start(&upper, ctx, "namespaces", d.pool.Run)
		start(&upper, ctx, "streaming", d.streams.Run)
		start(&upper, ctx, "administration", func(ctx context.Context) error {
			return serveAdmin(ctx, d.cfg.AdminSocket(), d.images, d.handleMore, d.log.Logger)
		})
		if d.certs != nil {
			start(&upper, ctx, "certificates", d.certs.Run)
		}
		if d.certs != nil && d.cfg.Node.Listen != "" {
			start(&upper, ctx, "node endpoint", d.serveEndpoint)
		}
		if d.policy != nil {
			start(&upper, ctx, "policy administration", func(ctx context.Context) error {
				return servePolicy(ctx, policySocket(d.cfg), d.policy, d.log.Logger)
			})
		}
		if d.cfg.Metrics.Address != "" {
			start(&upper, ctx, "metrics", func(ctx context.Context) error {
				return serveMetrics(ctx, d.cfg.Metrics.Address, d.metrics, d.log.Logger)
			})
		}
		start(&upper, ctx, "memory", d.trimAtRest)
		start(&upper, ctx, "reloads", func(ctx context.Context) error { return d.reloads.onSignal(ctx, hup) })
		var served func()
		if d.service != nil {
			served = func() { close(d.service.served) }
			start(&upper, ctx, "systemd", d.service.run)
		}
		start(&upper, ctx, "CRI", func(ctx context.Context) error { return d.cri.Serve(ctx, served) })
	}
	<-ctx.Done()
	upper.Wait()
	d.cri.Drain()
	endBelow()
	lower.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return d.leave(context.WithoutCancel(ctx), recovered == nil)
}

// shimBinary is beside this program, or in the search path.
func shimBinary() (string, error) {
	const name = "nodeagent-shim"
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find %s: %w", name, err)
	}
	beside := filepath.Join(filepath.Dir(self), name)
	if _, err := os.Stat(beside); err == nil {
		return beside, nil
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("find %s beside %s or in PATH: %w; install both from the same build", name, self, err)
	}
	return filepath.Abs(path)
}

func handlers(cfg config.Config) (out []cri.Handler) {
	for _, name := range cfg.CRI.RuntimeHandlers {
		out = append(out, cri.Handler{Name: name})
	}
	return out
}

func specDefaults(cfg config.Config) spec.Defaults {
	d := spec.Defaults{UnprivilegedPorts: true, UnprivilegedICMP: true}
	if cfg.CRI.UnsetSeccompProfile == "RuntimeDefault" {
		d.SeccompUnset = spec.SeccompUnsetRuntimeDefault
	}
	return d
}

// semver is what the CRI wants; a build from a work tree has no version.
func semver(v string) string {
	if len(v) > 1 && v[0] == 'v' && v[1] >= '0' && v[1] <= '9' {
		return v[1:]
	}
	return "0.0.0-dev"
}
