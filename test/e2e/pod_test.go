package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

var serial atomic.Int64

// callLimit is how long any single call may take; nothing here is slow.
const callLimit = 30 * time.Second

func callCtx(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	t.Cleanup(cancel)
	return ctx
}

type pod struct {
	node   *node.Node
	id     string
	config *runtimeapi.PodSandboxConfig
}

type container struct {
	pod    *pod
	id     string
	config *runtimeapi.ContainerConfig
}

type (
	podOption       func(*runtimeapi.PodSandboxConfig)
	containerOption func(*runtimeapi.ContainerConfig)
)

// podConfig is a complete configuration with a name, a log directory and a
// cgroup parent of its own.
func podConfig(t testing.TB, opts ...podOption) *runtimeapi.PodSandboxConfig {
	t.Helper()
	name := fmt.Sprintf("p%d", serial.Add(1))
	logs := filepath.Join(workDir, "logs", name)
	if err := os.MkdirAll(logs, 0o755); err != nil {
		t.Fatal(err)
	}
	c := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "e2e", Uid: "uid-" + name},
		LogDirectory: logs,
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    podCgroup(name),
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}},
		},
	}
	for _, o := range opts {
		o(c)
	}
	return c
}

// runPod starts a pod on the shared daemon and removes it when the test ends.
func runPod(t testing.TB, opts ...podOption) *pod {
	t.Helper()
	return runPodOn(t, shared, podConfig(t, opts...))
}

func runPodOn(t testing.TB, n *node.Node, c *runtimeapi.PodSandboxConfig) *pod {
	t.Helper()
	r, err := n.Runtime().RunPodSandbox(callCtx(t), &runtimeapi.RunPodSandboxRequest{Config: c})
	if err != nil {
		t.Fatalf("RunPodSandbox %s: %v", c.Metadata.Name, err)
	}
	p := &pod{node: n, id: r.PodSandboxId, config: c}
	t.Cleanup(func() { p.remove(t) })
	return p
}

// remove stops and removes the pod; it may have gone already.
func (p *pod) remove(t testing.TB) {
	t.Helper()
	if p.node.Pid() == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	if _, err := p.node.Runtime().StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Errorf("StopPodSandbox %s: %v", p.config.Metadata.Name, err)
	}
	if _, err := p.node.Runtime().RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Errorf("RemovePodSandbox %s: %v", p.config.Metadata.Name, err)
	}
	os.RemoveAll(p.config.LogDirectory)
}

func (p *pod) status(t testing.TB) *runtimeapi.PodSandboxStatus {
	t.Helper()
	s, err := p.node.Runtime().PodSandboxStatus(callCtx(t), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		t.Fatalf("PodSandboxStatus %s: %v", p.config.Metadata.Name, err)
	}
	return s.Status
}

// sleeper is the command of a container that waits to be stopped, and obeys.
var sleeper = []string{"/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"}

// containerConfig is a busybox that sleeps, with a log.
func containerConfig(opts ...containerOption) *runtimeapi.ContainerConfig {
	name := fmt.Sprintf("c%d", serial.Add(1))
	c := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: busybox},
		Command:  sleeper,
		LogPath:  name + ".log",
		Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{}, Resources: &runtimeapi.LinuxContainerResources{}},
	}
	for _, o := range opts {
		o(c)
	}
	return c
}

func command(args ...string) containerOption {
	return func(c *runtimeapi.ContainerConfig) { c.Command, c.Args = args, nil }
}

func script(s string) containerOption { return command("/bin/sh", "-c", s) }

func image(ref string) containerOption {
	return func(c *runtimeapi.ContainerConfig) { c.Image.Image = ref }
}

func security(f func(*runtimeapi.LinuxContainerSecurityContext)) containerOption {
	return func(c *runtimeapi.ContainerConfig) { f(c.Linux.SecurityContext) }
}

func resources(r *runtimeapi.LinuxContainerResources) containerOption {
	return func(c *runtimeapi.ContainerConfig) { c.Linux.Resources = r }
}

func mount(m *runtimeapi.Mount) containerOption {
	return func(c *runtimeapi.ContainerConfig) { c.Mounts = append(c.Mounts, m) }
}

func (p *pod) tryCreate(ctx context.Context, opts ...containerOption) (*container, error) {
	c := containerConfig(opts...)
	// As a kubelet does: the container inherits the pod's namespace options.
	if sc := c.Linux.GetSecurityContext(); sc != nil && sc.NamespaceOptions == nil {
		sc.NamespaceOptions = p.config.Linux.GetSecurityContext().GetNamespaceOptions()
	}
	r, err := p.node.Runtime().CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: c, SandboxConfig: p.config})
	if err != nil {
		return nil, err
	}
	return &container{pod: p, id: r.ContainerId, config: c}, nil
}

func (p *pod) create(t testing.TB, opts ...containerOption) *container {
	t.Helper()
	c, err := p.tryCreate(callCtx(t), opts...)
	if err != nil {
		t.Fatalf("CreateContainer: %v", err)
	}
	return c
}

// run creates and starts a container.
func (p *pod) run(t testing.TB, opts ...containerOption) *container {
	t.Helper()
	c := p.create(t, opts...)
	c.start(t)
	return c
}

func (c *container) start(t testing.TB) {
	t.Helper()
	if err := c.tryStart(callCtx(t)); err != nil {
		t.Fatalf("StartContainer: %v", err)
	}
}

func (c *container) tryStart(ctx context.Context) error {
	_, err := c.pod.node.Runtime().StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.id})
	return err
}

func (c *container) stop(t testing.TB, grace int64) {
	t.Helper()
	if _, err := c.pod.node.Runtime().StopContainer(callCtx(t), &runtimeapi.StopContainerRequest{ContainerId: c.id, Timeout: grace}); err != nil {
		t.Fatalf("StopContainer: %v", err)
	}
}

func (c *container) remove(t testing.TB) {
	t.Helper()
	if _, err := c.pod.node.Runtime().RemoveContainer(callCtx(t), &runtimeapi.RemoveContainerRequest{ContainerId: c.id}); err != nil {
		t.Fatalf("RemoveContainer: %v", err)
	}
}

func (c *container) status(t testing.TB) *runtimeapi.ContainerStatus {
	t.Helper()
	s, err := c.pod.node.Runtime().ContainerStatus(callCtx(t), &runtimeapi.ContainerStatusRequest{ContainerId: c.id})
	if err != nil {
		t.Fatalf("ContainerStatus: %v", err)
	}
	return s.Status
}

// waitExit waits until the container has exited.
func (c *container) waitExit(t testing.TB) *runtimeapi.ContainerStatus {
	t.Helper()
	var s *runtimeapi.ContainerStatus
	eventually(t, func() error {
		if s = c.status(t); s.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("container is %v, want exited", s.State)
		}
		return nil
	})
	return s
}

func (c *container) logPath() string {
	return filepath.Join(c.pod.config.LogDirectory, c.config.LogPath)
}

func (c *container) execSync(t testing.TB, cmd ...string) *runtimeapi.ExecSyncResponse {
	t.Helper()
	r, err := c.pod.node.Runtime().ExecSync(callCtx(t), &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: cmd, Timeout: 20})
	if err != nil {
		t.Fatalf("ExecSync %q: %v", cmd, err)
	}
	return r
}

// sh runs a script in the container that must succeed, and returns stdout
// without surrounding space.
func (c *container) sh(t testing.TB, script string) string {
	t.Helper()
	r := c.execSync(t, "/bin/sh", "-c", script)
	if r.ExitCode != 0 {
		t.Fatalf("exec %q: exit code %d, stdout %q, stderr %q", script, r.ExitCode, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(string(r.Stdout))
}

// shFails runs a script that must fail and returns stdout and stderr.
func (c *container) shFails(t testing.TB, script string) string {
	t.Helper()
	r := c.execSync(t, "/bin/sh", "-c", script)
	if r.ExitCode == 0 {
		t.Fatalf("exec %q: succeeded with stdout %q, want it to fail", script, r.Stdout)
	}
	return string(r.Stdout) + string(r.Stderr)
}

// patience is how long a test waits for what must come: long enough for a
// machine that does other things, and one whose CPU is emulated.
const patience = 2 * time.Minute

// eventually calls f until it returns nil, for at most patience.
func eventually(t testing.TB, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", patience, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func wantCode(t testing.TB, what string, err error, want ...codes.Code) {
	t.Helper()
	got := status.Code(err)
	for _, w := range want {
		if got == w {
			return
		}
	}
	t.Errorf("%s: code %v (%v), want %v", what, got, err, want)
}

func equal[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func contains(t testing.TB, what, got, want string) {
	t.Helper()
	if !strings.Contains(got, want) {
		t.Errorf("%s: got %q, want it to contain %q", what, got, want)
	}
}
