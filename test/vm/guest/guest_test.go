package guest

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

const (
	payload  = "/payload"
	socket   = "/run/nodeagent/nodeagent.sock"
	image    = "example.test/busybox:1" // test/vm makes it
	patience = 4 * time.Minute          // qemu emulates the CPU, on hosts that do other things too
)

// machine skips a test outside the virtual machine.
func machine(t *testing.T) context.Context {
	t.Helper()
	if os.Getenv("NODEAGENT_GUEST") == "" {
		t.Skip("not in the virtual machine of test/vm (make test-vm)")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// service skips a test unless the package is installed; it installs it.
func service(t *testing.T) context.Context {
	ctx := machine(t)
	if _, err := os.Stat("/usr/bin/nodeagent"); err != nil {
		install(t, "nodeagent.deb")
	}
	waitActive(t)
	importImage(t)
	return ctx
}

func command(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func install(t testing.TB, deb string) {
	t.Helper()
	t.Logf("%s", command(t, "dpkg", "--force-confnew", "-i", filepath.Join(payload, deb)))
}

// installed is the version of the package.
func installed(t testing.TB) string {
	t.Helper()
	return command(t, "dpkg-query", "-W", "-f", "${Version}", "nodeagent")
}

// property of the unit, as systemctl show prints it.
func property(t testing.TB, name string) string {
	t.Helper()
	return command(t, "systemctl", "show", "-P", name, "nodeagent.service")
}

func mainPID(t testing.TB) int {
	t.Helper()
	pid, err := strconv.Atoi(property(t, "MainPID"))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func eventually(t testing.TB, what string, ok func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

// waitActive waits until systemd calls the service active: it has said READY.
func waitActive(t testing.TB) {
	t.Helper()
	eventually(t, "the service is active", func() error {
		if s := property(t, "ActiveState"); s != "active" {
			return fmt.Errorf("ActiveState=%s Result=%s", s, property(t, "Result"))
		}
		return nil
	})
}

func runtime(t testing.TB) runtimeapi.RuntimeServiceClient {
	t.Helper()
	conn, err := node.Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return runtimeapi.NewRuntimeServiceClient(conn)
}

// importImage gives the service the image of the payload.
func importImage(t testing.TB) {
	t.Helper()
	command(t, "nodeagent", "image", "import", filepath.Join(payload, "image.tar"))
}

// pod is a pod with one container.
type pod struct {
	rt      runtimeapi.RuntimeServiceClient
	id, ctr string
	log     string
	parent  string
	config  *runtimeapi.PodSandboxConfig
}

const logDir = "/var/log/pods-test"

// run starts a pod with one container; what is nil is left out.
func run(t testing.TB, name, script string, res *runtimeapi.LinuxContainerResources, change func(*runtimeapi.ContainerConfig)) *pod {
	t.Helper()
	p, err := tryRun(t, name, script, res, change)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func tryRun(t testing.TB, name, script string, res *runtimeapi.LinuxContainerResources, change func(*runtimeapi.ContainerConfig)) (*pod, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	parent := ""
	if name != "" {
		parent = fmt.Sprintf("/guest.slice/guest-%s.slice", name)
	}
	p := &pod{rt: runtime(t), log: filepath.Join(logDir, name+".log"), parent: parent}
	if err := os.MkdirAll(logDir, 0o755); err != nil {
		return nil, err
	}
	ns := &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
	p.config = &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "guest", Uid: "uid-" + name}, LogDirectory: logDir,
		Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: parent, SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: ns}},
	}
	cfg := p.container("c", script, res)
	if change != nil {
		change(cfg)
	}
	p.config.Linux.SecurityContext.Privileged = cfg.Linux.SecurityContext.Privileged
	made, err := p.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		return nil, fmt.Errorf("RunPodSandbox: %w", err)
	}
	p.id = made.PodSandboxId
	return p, p.start(ctx, cfg)
}

// container is the configuration of one that runs script.
func (p *pod) container(name, script string, res *runtimeapi.LinuxContainerResources) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name}, Image: &runtimeapi.ImageSpec{Image: image},
		Command: []string{"sh", "-c", script}, LogPath: filepath.Base(p.log),
		Linux: &runtimeapi.LinuxContainerConfig{Resources: res, SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: p.config.Linux.SecurityContext.NamespaceOptions,
		}},
	}
}

// start makes a container in the pod's sandbox and starts it.
func (p *pod) start(ctx context.Context, cfg *runtimeapi.ContainerConfig) error {
	created, err := p.rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
	if err != nil {
		return fmt.Errorf("CreateContainer: %w", err)
	}
	p.ctr = created.ContainerId
	if _, err := p.rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: p.ctr}); err != nil {
		return fmt.Errorf("StartContainer: %w", err)
	}
	return nil
}

// beside runs another container in the pod.
func (p *pod) beside(t testing.TB, name, script string, res *runtimeapi.LinuxContainerResources) *pod {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	other := *p
	other.log = p.log + "-" + name
	if err := other.start(ctx, other.container(name, script, res)); err != nil {
		t.Fatal(err)
	}
	return &other
}

func (p *pod) remove(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := p.rt.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Errorf("StopPodSandbox: %v", err)
	}
	if _, err := p.rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Errorf("RemovePodSandbox: %v", err)
	}
	os.Remove(p.log)
}

func (p *pod) status(t testing.TB) *runtimeapi.ContainerStatus {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := p.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: p.ctr})
	if err != nil {
		t.Fatalf("ContainerStatus: %v", err)
	}
	return r.Status
}

func (p *pod) waitExit(t testing.TB) *runtimeapi.ContainerStatus {
	t.Helper()
	eventually(t, "the container ends", func() error {
		if s := p.status(t).State; s != runtimeapi.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("it is %v", s)
		}
		return nil
	})
	return p.status(t)
}

// sh runs a script in the container and returns what it prints.
func (p *pod) sh(t testing.TB, script string) string {
	t.Helper()
	out, code := p.exec(t, script)
	if code != 0 {
		t.Fatalf("exec %q: exit code %d: %s", script, code, out)
	}
	return out
}

func (p *pod) exec(t testing.TB, script string) (string, int32) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := p.rt.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: p.ctr, Cmd: []string{"sh", "-c", script}, Timeout: 200})
	if err != nil {
		t.Fatalf("exec %q: %v", script, err)
	}
	return strings.TrimSpace(string(r.Stdout) + string(r.Stderr)), r.ExitCode
}

// counting is a container that prints a number ten times a second.
const counting = `i=0; while :; do i=$((i+1)); echo n $i; sleep 0.1; done`

// counted checks that the log has every number once, in order, and returns
// the last.
func (p *pod) counted(t testing.TB) int {
	t.Helper()
	data, err := os.ReadFile(p.log)
	if err != nil {
		t.Fatal(err)
	}
	last := 0
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) != 5 || !strings.HasSuffix(line, "\n") {
			continue // being written
		}
		n, err := strconv.Atoi(f[4])
		if err != nil || n != last+1 {
			t.Fatalf("log line %q after number %d", line, last)
		}
		last = n
	}
	return last
}

// countsOn waits for further numbers.
func (p *pod) countsOn(t testing.TB) {
	t.Helper()
	from := p.counted(t)
	eventually(t, "the container counts on", func() error {
		if n := p.counted(t); n <= from+3 {
			return fmt.Errorf("at %d, was at %d", n, from)
		}
		return nil
	})
}

// groupFile reads a file of the container's cgroup, "-" if it is not there.
func (p *pod) groupFile(t testing.TB, name string) string {
	t.Helper()
	found := ""
	filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.Contains(d.Name(), p.ctr) && found == "" {
			found = path
		}
		return nil
	})
	b, err := os.ReadFile(filepath.Join(found, name))
	if found == "" || err != nil {
		return "-"
	}
	return strings.TrimSpace(string(b))
}

func equal[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}
