package crash

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

var (
	rigs   atomic.Int32
	serial atomic.Int64
)

// rig is a node with a trap: a phase at which the daemon is to be killed.
type rig struct {
	*node.Node

	mu    sync.Mutex
	phase string // armed; "" none
	hit   bool
}

// onLog is called with each line of the daemon, before anything else happens
// to it.
func (r *rig) onLog(line string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase == "" || !strings.Contains(line, "phase="+r.phase+" ") {
		return
	}
	if pid := r.Pid(); pid != 0 {
		syscall.Kill(pid, syscall.SIGKILL)
		r.phase, r.hit = "", true
	}
}

func (r *rig) arm(phase string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.phase, r.hit = phase, false
}

func (r *rig) disarm() (hit bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.phase = ""
	return r.hit
}

// call bounds one request.
func call[Q, A any](f func(context.Context, *Q, ...grpc.CallOption) (*A, error), q *Q) (*A, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return f(ctx, q)
}

func (r *rig) pull(ctx context.Context) error {
	_, err := r.Images().PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	return err
}

// pod is what a kubelet knows of a pod: the configurations, and the ids once
// it has been told.
type pod struct {
	r         *rig
	config    *runtimeapi.PodSandboxConfig
	ctr       *runtimeapi.ContainerConfig
	id, ctrID string
	logPath   string
}

func (r *rig) newPod(command ...string) *pod {
	name := fmt.Sprintf("p%d", serial.Add(1))
	logs := filepath.Join(workDir, "logs", name)
	os.MkdirAll(logs, 0o755)
	ns := &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
	if len(command) == 0 {
		command = []string{"/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"}
	}
	return &pod{
		r: r,
		config: &runtimeapi.PodSandboxConfig{
			Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "crash", Uid: "uid-" + name},
			LogDirectory: logs,
			PortMappings: []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: int32(20000 + serial.Add(1)%20000)}},
			Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: filepath.Join(cgroupTop(), name),
				SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: ns}},
		},
		ctr: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "c"}, Image: &runtimeapi.ImageSpec{Image: image}, Command: command, LogPath: "c.log",
			Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: ns}},
		},
		logPath: filepath.Join(logs, "c.log"),
	}
}

// The calls, each idempotent from the caller's view as a kubelet needs them:
// asking again after the daemon died has to lead to the same end.

func (p *pod) sandbox() error {
	a, err := call(p.r.Runtime().RunPodSandbox, &runtimeapi.RunPodSandboxRequest{Config: p.config})
	if err == nil {
		p.id = a.PodSandboxId
	}
	return err
}

func (p *pod) create() error {
	a, err := call(p.r.Runtime().CreateContainer, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: p.ctr, SandboxConfig: p.config})
	if err == nil {
		p.ctrID = a.ContainerId
	}
	return err
}

// start asks for the start; a container that runs already was started by the
// call whose answer was lost.
func (p *pod) start() error {
	_, err := call(p.r.Runtime().StartContainer, &runtimeapi.StartContainerRequest{ContainerId: p.ctrID})
	if status.Code(err) == codes.FailedPrecondition {
		if s, e := p.status(); e == nil && s.State != runtimeapi.ContainerState_CONTAINER_CREATED {
			return nil
		}
	}
	return err
}

func (p *pod) stop() error {
	_, err := call(p.r.Runtime().StopContainer, &runtimeapi.StopContainerRequest{ContainerId: p.ctrID, Timeout: 2})
	return err
}

func (p *pod) removeCtr() error {
	_, err := call(p.r.Runtime().RemoveContainer, &runtimeapi.RemoveContainerRequest{ContainerId: p.ctrID})
	return err
}

func (p *pod) stopSandbox() error {
	_, err := call(p.r.Runtime().StopPodSandbox, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id})
	return err
}

func (p *pod) removeSandbox() error {
	_, err := call(p.r.Runtime().RemovePodSandbox, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id})
	return err
}

func (p *pod) update() error {
	_, err := call(p.r.Runtime().UpdateContainerResources, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: p.ctrID,
		Linux: &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 60000}})
	return err
}

func (p *pod) status() (*runtimeapi.ContainerStatus, error) {
	a, err := call(p.r.Runtime().ContainerStatus, &runtimeapi.ContainerStatusRequest{ContainerId: p.ctrID})
	return a.GetStatus(), err
}

func (p *pod) waitExit(limit time.Duration) (*runtimeapi.ContainerStatus, error) {
	deadline := time.Now().Add(limit)
	for {
		s, err := p.status()
		if err == nil && s.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			return s, nil
		}
		if time.Now().After(deadline) {
			return s, fmt.Errorf("after %v the container is %v (%v)", limit, s.GetState(), err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// up runs the pod to the point where its container runs.
func (p *pod) up() error {
	for _, step := range []func() error{p.sandbox, p.create, p.start} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (p *pod) down() error {
	if p.id == "" {
		return nil
	}
	for _, step := range []func() error{p.stopSandbox, p.removeSandbox} {
		if err := step(); err != nil {
			return err
		}
	}
	os.RemoveAll(p.config.LogDirectory)
	return nil
}

// counter is the command of a container that prints the numbers from 1 on and
// ends with code at SIGTERM.
func counter(rate, code int) []string {
	return []string{"/bin/sh", "-c", fmt.Sprintf("trap 'kill $! ; wait $!; exit %d' TERM; /bin/testtool count -rate %d & wait $!", code, rate)}
}

// numbers checks that the log holds 1 to n, each once and in order, and
// returns n. A last line that is being written is not there or whole.
func (p *pod) numbers() (int, error) {
	b, err := os.ReadFile(p.logPath)
	if err != nil {
		return 0, err
	}
	n := 0
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(f) == 4 && f[1] == "stderr" {
			continue // the shell tells of the counter's end
		}
		if len(f) != 4 || f[1] != "stdout" || f[2] != "F" || !strings.HasSuffix(line, "\n") {
			return n, fmt.Errorf("%s: line after number %d is torn: %q", p.logPath, n, line)
		}
		n++
		if f[3] != fmt.Sprint(n) {
			return n, fmt.Errorf("%s: line %d says %q: lost, doubled or out of order", p.logPath, n, f[3])
		}
	}
	return n, nil
}

// goesOn checks that the log is right and grows.
func (p *pod) goesOn(t *testing.T) {
	t.Helper()
	first, err := p.numbers()
	if err != nil {
		t.Error(err)
		return
	}
	deadline := time.Now().Add(5 * time.Second)
	for {
		n, err := p.numbers()
		if err != nil {
			t.Error(err)
			return
		}
		if n > first {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("%s: the log stands still at %d", p.logPath, n)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// execWorks runs a command in the container.
func (p *pod) execWorks(t *testing.T) {
	t.Helper()
	a, err := call(p.r.Runtime().ExecSync, &runtimeapi.ExecSyncRequest{ContainerId: p.ctrID, Cmd: []string{"/bin/echo", "here"}, Timeout: 10})
	if err != nil || string(a.Stdout) != "here\n" || a.ExitCode != 0 {
		t.Errorf("exec in %s: %v, %v", p.config.Metadata.Name, a, err)
	}
}

// endsWith stops the container and wants this exit code.
func (p *pod) endsWith(t *testing.T, code int32) {
	t.Helper()
	if err := p.stop(); err != nil {
		t.Errorf("stop %s: %v", p.config.Metadata.Name, err)
		return
	}
	s, err := p.waitExit(5 * time.Second)
	if err != nil {
		t.Errorf("%s: %v", p.config.Metadata.Name, err)
		return
	}
	if s.ExitCode != code || s.FinishedAt <= s.StartedAt {
		t.Errorf("%s: exit code %d (%s %s), started %d, finished %d; want code %d", p.config.Metadata.Name, s.ExitCode, s.Reason, s.Message, s.StartedAt, s.FinishedAt, code)
	}
	if _, err := p.numbers(); err != nil {
		t.Error(err)
	}
}

// restart brings a dead daemon back.
func (r *rig) restart(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.Up(ctx); err != nil {
		t.Fatalf("the daemon does not come back: %v", err)
	}
}

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}
