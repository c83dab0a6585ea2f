package cri

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/images"
	"github.com/nodeagent/nodeagent/cri/spec"
	"github.com/nodeagent/nodeagent/cri/store"
)

// world is a host at the edges of the package: it holds what was made, and
// fails or blocks where a test wants it to.
type world struct {
	dir string

	mu     sync.Mutex
	held   map[string]bool // "net:<id>", "ns:<id>", ...
	calls  []string        // in order, "net.Setup"
	failAt int             // the call with this number fails, once; 0: none
	onCall func(n int, name string)
	stall  string // calls of this name wait until they are cancelled
	exits  chan ProcessExit
	procs  map[string]*Process
	exitDB map[string]ProcessExit // exit records that were not forgotten
	limits map[string]*specs.LinuxResources
	seq    int
}

var errInjected = fmt.Errorf("injected: %w", errdefs.ErrInternal)

func newWorld(t testing.TB) *world {
	if os.Getuid() != 0 {
		t.Skip("mounts a tmpfs per sandbox: needs root")
	}
	return &world{
		dir: t.TempDir(), held: map[string]bool{}, exits: make(chan ProcessExit, 64), procs: map[string]*Process{},
		exitDB: map[string]ProcessExit{}, limits: map[string]*specs.LinuxResources{},
	}
}

// call counts a call and says whether it fails. Calls that give back do not
// count.
func (w *world) call(ctx context.Context, name string) error {
	w.mu.Lock()
	w.calls = append(w.calls, name)
	n := len(w.calls)
	fail, on, stall := w.failAt == n, w.onCall, w.stall == name
	w.mu.Unlock()
	if on != nil {
		on(n, name)
	}
	if fail {
		return fmt.Errorf("%s: %w", name, errInjected)
	}
	if stall {
		<-ctx.Done()
	}
	return ctx.Err()
}

func (w *world) hold(what string, on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if on {
		w.held[what] = true
	} else {
		delete(w.held, what)
	}
}

// holding lists what is held, sorted.
func (w *world) holding() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := []string{}
	for k := range w.held {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

func (w *world) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.calls)
}

// Network.
type fakeNet struct{ *world }

func (w fakeNet) Setup(ctx context.Context, r NetworkRequest) (NetworkResult, error) {
	if err := w.call(ctx, "net.Setup"); err != nil {
		return NetworkResult{}, err
	}
	w.hold("net:"+r.SandboxID, true)
	return NetworkResult{IPs: []netip.Addr{netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fd00::7")}, Conf: "builtin"}, nil
}
func (w fakeNet) Teardown(_ context.Context, r NetworkRequest, _ NetworkResult) error {
	w.hold("net:"+r.SandboxID, false)
	return nil
}
func (w fakeNet) Reconcile(_ context.Context, live []NetworkRequest, _ map[string]NetworkResult) error {
	keep := map[string]bool{}
	for _, r := range live {
		keep["net:"+r.SandboxID] = true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for k := range w.held {
		if strings.HasPrefix(k, "net:") && !keep[k] {
			delete(w.held, k)
		}
	}
	return nil
}
func (w fakeNet) Status(context.Context) error                      { return nil }
func (w fakeNet) SetPodCIDRs(context.Context, []netip.Prefix) error { return nil }

// Cgroups.
type fakeCgroups struct{ *world }

func (w fakeCgroups) PodParent(parent, id string) (string, error) {
	if parent == "" {
		parent = "/fake/pod" + id
	}
	return parent, nil
}
func (w fakeCgroups) ContainerPath(parent, id string) (string, error) {
	return filepath.Join(parent, id), nil
}
func (w fakeCgroups) EnsurePod(ctx context.Context, parent string, res *specs.LinuxResources) error {
	if err := w.call(ctx, "cgroup.EnsurePod"); err != nil {
		return err
	}
	w.hold("cgroup:"+parent, true)
	return nil
}
func (w fakeCgroups) UpdatePod(ctx context.Context, parent string, res *specs.LinuxResources) error {
	return w.call(ctx, "cgroup.UpdatePod")
}
func (w fakeCgroups) RemovePod(_ context.Context, parent string) error {
	w.hold("cgroup:"+parent, false)
	return nil
}
func (w fakeCgroups) ExpectProcess() {}
func (w fakeCgroups) Systemd() bool  { return false }

// Namespaces.
type fakeNS struct{ *world }

func (w fakeNS) Get(ctx context.Context, want NamespaceWant) (store.Namespaces, error) {
	if err := w.call(ctx, "ns.Get"); err != nil {
		return store.Namespaces{}, err
	}
	w.mu.Lock()
	w.seq++
	id := fmt.Sprintf("ns%d", w.seq)
	w.mu.Unlock()
	w.hold("ns:"+id, true)
	return store.Namespaces{ID: id, Net: "/proc/self/ns/net", IPC: "/proc/self/ns/ipc", UTS: "/proc/self/ns/uts"}, nil
}
func (w fakeNS) Release(_ context.Context, ns store.Namespaces) error {
	w.hold("ns:"+ns.ID, false)
	return nil
}
func (w fakeNS) Reconcile(_ context.Context, live []string) error {
	keep := map[string]bool{}
	for _, id := range live {
		keep["ns:"+id] = true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for k := range w.held {
		if strings.HasPrefix(k, "ns:") && !keep[k] {
			delete(w.held, k)
		}
	}
	return nil
}

// Images.
type fakeImages struct{ *world }

func (w fakeImages) Get(ctx context.Context, ref string) (images.Image, error) {
	if err := w.call(ctx, "images.Get"); err != nil {
		return images.Image{}, err
	}
	if ref == "absent" {
		return images.Image{}, fmt.Errorf("image %q: %w", ref, errdefs.ErrNotFound)
	}
	return images.Image{ID: "sha256:1234", RepoTags: []string{"docker.io/library/busybox:1"}, RepoDigests: []string{"docker.io/library/busybox@sha256:99"}}, nil
}
func (w fakeImages) List(context.Context) ([]images.Image, error) { return nil, nil }
func (w fakeImages) Pull(context.Context, images.PullOptions) (images.Image, error) {
	return images.Image{ID: "sha256:1234"}, nil
}
func (w fakeImages) Remove(context.Context, string) error { return nil }
func (w fakeImages) FsInfo(context.Context) (images.FsUsage, error) {
	return images.FsUsage{Mountpoint: "/"}, nil
}

// Rootfs.
type fakeRootfs struct{ *world }

func (w fakeRootfs) Mount(ctx context.Context, id, imageID string, _ RootfsOptions) (string, error) {
	if err := w.call(ctx, "rootfs.Mount"); err != nil {
		return "", err
	}
	w.hold("rootfs:"+id, true)
	dir := filepath.Join(w.dir, "rootfs")
	return dir, os.MkdirAll(dir, 0o755)
}
func (w fakeRootfs) MountImage(ctx context.Context, id string, n int, imageID, sub string, _ RootfsOptions) (string, error) {
	if err := w.call(ctx, "rootfs.MountImage"); err != nil {
		return "", err
	}
	w.hold("rootfs:"+id, true)
	return filepath.Join(w.dir, "volume"), os.MkdirAll(filepath.Join(w.dir, "volume"), 0o755)
}
func (w fakeRootfs) Unmount(_ context.Context, id string) error {
	w.hold("rootfs:"+id, false)
	return nil
}
func (w fakeRootfs) Restore(_ context.Context, live map[string][]string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for k := range w.held {
		if id, ok := strings.CutPrefix(k, "rootfs:"); ok && live[id] == nil {
			delete(w.held, k)
		}
	}
	return nil
}
func (w fakeRootfs) VolumeDir(string) string { return "" }

// Runtime.
type fakeRuntime struct{ *world }

func (w fakeRuntime) Ready(context.Context) error { return nil }
func (w fakeRuntime) Start(ctx context.Context, s StartSpec) (Process, error) {
	if err := w.call(ctx, "runtime.Start"); err != nil {
		return Process{}, err
	}
	w.hold("process:"+s.ID, true)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seq++
	p := &Process{ID: s.ID, SandboxID: s.SandboxID, Pid: os.Getpid(), StartedAt: time.Now()}
	w.procs[s.ID] = p
	return *p, nil
}

// exit lets a process end.
func (w *world) exit(id string, code, signal int) {
	w.mu.Lock()
	p := w.procs[id]
	if p == nil || p.Exit != nil {
		w.mu.Unlock()
		return
	}
	e := ProcessExit{ID: id, Pid: p.Pid, Code: code, Signal: signal, Known: true, At: time.Now()}
	p.Exit = &e
	w.exitDB[id] = e
	w.mu.Unlock()
	w.exits <- e
}

func (w fakeRuntime) Signal(ctx context.Context, id string, sig syscall.Signal, all bool) error {
	w.mu.Lock()
	p := w.procs[id]
	gone := p == nil || p.Exit != nil
	w.mu.Unlock()
	if gone {
		return fmt.Errorf("signal %s: %w", id, errdefs.ErrNotFound)
	}
	if sig == syscall.SIGKILL || sig == syscall.SIGTERM {
		w.exit(id, 128+int(sig), int(sig))
	}
	return nil
}
func (w fakeRuntime) Delete(ctx context.Context, id string) (ProcessExit, error) {
	w.mu.Lock()
	p := w.procs[id]
	w.mu.Unlock()
	if p != nil {
		w.exit(id, 137, 9)
	}
	w.mu.Lock()
	delete(w.procs, id)
	e, ok := w.exitDB[id]
	w.mu.Unlock()
	w.hold("process:"+id, false)
	if !ok {
		return ProcessExit{}, fmt.Errorf("delete %s: %w", id, errdefs.ErrNotFound)
	}
	return e, nil
}
func (w fakeRuntime) Forget(_ context.Context, id string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.procs[id] != nil {
		return errdefs.ErrFailedPrecondition
	}
	delete(w.exitDB, id)
	return nil
}
func (w fakeRuntime) State(context.Context, string) (Process, error) {
	return Process{}, errdefs.ErrNotFound
}
func (w fakeRuntime) List(context.Context) ([]Process, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []Process
	for _, p := range w.procs {
		out = append(out, *p)
	}
	return out, nil
}
func (w fakeRuntime) Exits() <-chan ProcessExit { return w.exits }
func (w fakeRuntime) Update(ctx context.Context, id string, r *specs.LinuxResources) error {
	if err := w.call(ctx, "runtime.Update"); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.limits[id] = r
	return nil
}
func (w fakeRuntime) ReopenLog(ctx context.Context, id string) error {
	return w.call(ctx, "runtime.ReopenLog")
}
func (w fakeRuntime) ExecSync(context.Context, string, ExecOptions) (ExecResult, error) {
	return ExecResult{Stdout: []byte("out"), Code: 3}, nil
}
func (w fakeRuntime) Exec(context.Context, string, StreamOptions) (Session, error) {
	return nil, errdefs.ErrNotImplemented
}
func (w fakeRuntime) Attach(context.Context, string, StreamOptions) (Session, error) {
	return nil, errdefs.ErrNotImplemented
}
func (w fakeRuntime) PauseRootfs() string { return w.dir }

// start returns a recovered server on the world; the socket is not served.
func (w *world) start(t testing.TB) *Server {
	t.Helper()
	return w.startBoot(t, "boot-1")
}

func (w *world) startBoot(t testing.TB, boot string) *Server {
	t.Helper()
	bootPath := filepath.Join(w.dir, "boot_id")
	if err := os.WriteFile(bootPath, []byte(boot+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{
		Socket: filepath.Join(w.dir, "sock"), State: filepath.Join(w.dir, "state"), Root: filepath.Join(w.dir, "root"),
		BootIDPath: bootPath, Handlers: []Handler{{Name: "other"}}, Host: spec.HostInfo{Seccomp: false},
		Runtime: fakeRuntime{w}, Network: fakeNet{w}, Cgroups: fakeCgroups{w}, Namespaces: fakeNS{w},
		Images: fakeImages{w}, Rootfs: fakeRootfs{w},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // unless the test has done so
		if err := s.Close(); err != nil && !errors.Is(err, errdefs.ErrUnavailable) {
			t.Error(err)
		}
		for _, b := range s.sandboxes.All() {
			unmountShm(b.record().Dir)
		}
	})
	return s
}

func podConfig(name string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "ns", Uid: "uid-" + name},
		Hostname: name, LogDirectory: "/tmp", Labels: map[string]string{"app": name}, Annotations: map[string]string{"a": "ü\x01"},
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}
}

func sharedPid(c *runtimeapi.PodSandboxConfig) *runtimeapi.PodSandboxConfig {
	c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	return c
}

func containerConfig(name string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name}, Image: &runtimeapi.ImageSpec{Image: "busybox:1", UserSpecifiedImage: "busybox:1"},
		Command: []string{"sleep", "1"}, Labels: map[string]string{"c": name},
		Envs: []*runtimeapi.KeyValue{{Key: "E", Value: []byte("v")}},
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuShares: 100},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			},
		},
	}
}

func runPod(t testing.TB, s *Server, c *runtimeapi.PodSandboxConfig) string {
	t.Helper()
	r, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: c})
	if err != nil {
		t.Fatal(err)
	}
	return r.PodSandboxId
}

func create(t testing.TB, s *Server, pod string, c *runtimeapi.ContainerConfig) string {
	t.Helper()
	r, err := s.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: c})
	if err != nil {
		t.Fatal(err)
	}
	return r.ContainerId
}

func startContainer(t testing.TB, s *Server, id string) {
	t.Helper()
	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
}

func removePod(t testing.TB, s *Server, id string) {
	t.Helper()
	if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Fatal(err)
	}
}

func statusOf(t testing.TB, s *Server, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	r, err := s.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	return r.Status
}

// eventually waits for what happens in the background.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("%s: did not happen in 60 s", what)
}

// leftovers lists what is on disk and in memory, apart from empty directories.
func leftovers(t testing.TB, s *Server) []string {
	t.Helper()
	out := []string{}
	for _, dir := range []string{s.intentDir(), filepath.Join(s.cfg.State, "sandboxes")} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			out = append(out, filepath.Join(filepath.Base(dir), e.Name()))
		}
	}
	sandboxes, containers, refused, err := s.db.Load()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range sandboxes {
		out = append(out, "record of sandbox "+r.ID)
	}
	for _, r := range containers {
		out = append(out, "record of container "+r.ID)
	}
	if n := len(refused); n > 0 {
		out = append(out, fmt.Sprintf("%d refused records", n))
	}
	return out
}
