package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type bench struct {
	options
	images   *images
	runtimes []*runtime
}

// pod is one sandbox with one container.
type pod struct {
	sandbox, container string
	config             *runtimeapi.PodSandboxConfig
	started            time.Time // when StartContainer was asked
}

type workload struct {
	image   string
	command []string
	log     bool
}

func (b *bench) idler() workload {
	return workload{image: b.images.ref("pause"), command: []string{"/pause", workloadArg}}
}

func (b *bench) shell() workload {
	return workload{image: b.images.ref("busybox"), command: []string{"/bin/busybox", "sleep", "1000000", "0"}}
}

// prepare pulls what the runtime will run, and starts and removes two pods so
// that nothing measured is a first time.
func (b *bench) prepare(ctx context.Context, r *runtime) error {
	r.figures = figures{}
	for _, i := range []string{"pause", "busybox", "log"} {
		if err := r.pull(ctx, b.images.ref(i)); err != nil {
			return err
		}
	}
	for _, w := range []workload{b.idler(), b.shell()} {
		p, err := b.start(ctx, r, w, nil)
		if err != nil {
			return err
		}
		if err := b.stop(ctx, r, p, nil); err != nil {
			return err
		}
	}
	return nil
}

func (r *runtime) pull(ctx context.Context, ref string) error {
	_, err := r.is.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		return fmt.Errorf("pull %s: %w", ref, err)
	}
	return nil
}

// timings collects durations by call name; nil collects nothing.
type timings struct {
	mu sync.Mutex
	by map[string][]float64 // milliseconds
}

func (t *timings) add(name string, d time.Duration) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.by == nil {
		t.by = map[string][]float64{}
	}
	t.by[name] = append(t.by[name], float64(d.Microseconds())/1000)
}

func (t *timings) time(name string, f func() error) error {
	start := time.Now()
	err := f()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	t.add(name, time.Since(start))
	return nil
}

var seqMu sync.Mutex

func (r *runtime) next() int {
	seqMu.Lock()
	defer seqMu.Unlock()
	r.seq++
	return r.seq
}

// start runs a pod of one container; t receives each call and their sum. One
// that fails in a runtime that is not ours is tried once more and counted: a
// long run on a busy machine shall not end for it.
func (b *bench) start(ctx context.Context, r *runtime, w workload, t *timings) (*pod, error) {
	p, err := b.tryStart(ctx, r, w, t)
	if err == nil || r.name == ours || ctx.Err() != nil {
		return p, err
	}
	fmt.Fprintf(os.Stderr, "   %s: %v; trying once more\n", r.name, err)
	r.failed.Add(1)
	return b.tryStart(ctx, r, w, t)
}

func (b *bench) tryStart(ctx context.Context, r *runtime, w workload, t *timings) (*pod, error) {
	id := fmt.Sprintf("p%d", r.next())
	// What a kubelet sends for a pod that says nothing about namespaces.
	ns := &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
	seccomp := &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	cfg := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: id, Namespace: "bench", Uid: r.name + id},
		Linux:    &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: ns, Seccomp: seccomp}},
	}
	if g := r.podsCgroup(); g != "" {
		cfg.Linux.CgroupParent = g + "/" + id
	}
	cc := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "c"},
		Image:    &runtimeapi.ImageSpec{Image: w.image},
		Command:  w.command,
		Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: ns, Seccomp: seccomp}},
	}
	if w.log {
		cfg.LogDirectory = filepath.Join(b.dir, "logs", r.name+id)
		if err := os.MkdirAll(cfg.LogDirectory, 0o755); err != nil {
			return nil, err
		}
		cc.LogPath = "c.log"
	}
	p := &pod{config: cfg}
	begin := time.Now()
	err := t.time("RunPodSandbox", func() error {
		s, err := r.rs.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg, RuntimeHandler: r.handler})
		if err == nil {
			p.sandbox = s.PodSandboxId
		}
		return err
	})
	if err == nil {
		err = t.time("CreateContainer", func() error {
			c, err := r.rs.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.sandbox, Config: cc, SandboxConfig: cfg})
			if err == nil {
				p.container = c.ContainerId
			}
			return err
		})
	}
	if err == nil {
		p.started = time.Now()
		err = t.time("StartContainer", func() error {
			_, err := r.rs.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: p.container})
			return err
		})
	}
	if err != nil {
		if p.sandbox != "" {
			_, _ = r.rs.RemovePodSandbox(context.WithoutCancel(ctx), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
		}
		return nil, fmt.Errorf("start pod %s: %w", id, err)
	}
	t.add("pod start", time.Since(begin))
	return p, nil
}

// stop stops and removes the pod, without grace.
func (b *bench) stop(ctx context.Context, r *runtime, p *pod, t *timings) error {
	begin := time.Now()
	for _, c := range []struct {
		name string
		f    func() error
	}{
		{"StopContainer", func() error {
			_, err := r.rs.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: p.container})
			return err
		}},
		{"RemoveContainer", func() error {
			_, err := r.rs.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: p.container})
			return err
		}},
		{"StopPodSandbox", func() error {
			_, err := r.rs.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
			return err
		}},
		{"RemovePodSandbox", func() error {
			_, err := r.rs.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
			return err
		}},
	} {
		if err := t.time(c.name, c.f); err != nil {
			return err
		}
	}
	t.add("pod stop+remove", time.Since(begin))
	return nil
}

// startMany starts n pods, at most conc at a time.
func (b *bench) startMany(ctx context.Context, r *runtime, w workload, n, conc int) ([]*pod, error) {
	pods := make([]*pod, n)
	return pods, parallel(n, conc, func(i int) (err error) {
		pods[i], err = b.start(ctx, r, w, nil)
		return err
	})
}

func (b *bench) stopMany(ctx context.Context, r *runtime, pods []*pod, conc int) error {
	return parallel(len(pods), conc, func(i int) error {
		if pods[i] == nil {
			return nil
		}
		return b.stop(ctx, r, pods[i], nil)
	})
}

func parallel(n, conc int, f func(i int) error) error {
	var wg sync.WaitGroup
	next := make(chan int)
	errs := make(chan error, n)
	for range conc {
		wg.Go(func() {
			for i := range next {
				if err := f(i); err != nil {
					errs <- err
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
	close(errs)
	return <-errs
}

func unimplemented(err error) bool { return status.Code(err) == codes.Unimplemented }
