package spec

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	_ "github.com/opencontainers/cgroups/devices" // device rules
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/configs/validate"
	_ "github.com/opencontainers/runc/libcontainer/nsenter"
	"github.com/opencontainers/runc/libcontainer/seccomp"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/namespaces"
)

// The main thread is kept for main: libcontainer moves a thread into the mount
// namespace of a container with idmapped mounts and throws it away, which Go
// cannot do with the main thread; /proc/self would then show the container.
func init() { runtime.LockOSThread() }

// libcontainer starts every container through its caller's binary.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		libcontainer.Init()
	}
	os.Exit(m.Run())
}

// convert does what the shim does.
func convert(t *testing.T, s *specs.Spec) *configs.Config {
	t.Helper()
	c, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: "test", Spec: s})
	if err != nil {
		t.Fatalf("convert: %v", err)
	}
	if err := validate.Validate(c); err != nil {
		t.Fatalf("validate: %v", err)
	}
	return c
}

// running is a container of this test.
type running struct {
	*libcontainer.Container
	out, errs bytes.Buffer
	process   *libcontainer.Process
}

// start runs s; the container is gone after the test.
func start(t *testing.T, s *specs.Spec) *running {
	t.Helper()
	var id [6]byte
	_, _ = rand.Read(id[:])
	name := "nodeagent-spec-test-" + hex.EncodeToString(id[:])
	s.Linux.CgroupsPath = "/" + name
	c, err := libcontainer.Create(t.TempDir(), name, convert(t, s))
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	r := &running{Container: c}
	t.Cleanup(func() {
		if r.process != nil {
			_ = c.Signal(unix.SIGKILL)
			_, _ = r.process.Wait()
		}
		if err := c.Destroy(); err != nil {
			t.Errorf("destroy: %v", err)
		}
	})
	r.process = r.run(t, s.Process, true)
	return r
}

func (r *running) run(t *testing.T, p *specs.Process, init bool) *libcontainer.Process {
	t.Helper()
	lp := &libcontainer.Process{
		Init: init, Args: p.Args, Env: p.Env, UID: int(p.User.UID), GID: int(p.User.GID), Cwd: p.Cwd,
		NoNewPrivileges: &p.NoNewPrivileges, Stdout: &r.out, Stderr: &r.errs,
		Capabilities: &configs.Capabilities{
			Bounding: p.Capabilities.Bounding, Effective: p.Capabilities.Effective, Permitted: p.Capabilities.Permitted,
			Inheritable: p.Capabilities.Inheritable, Ambient: p.Capabilities.Ambient,
		},
	}
	for _, g := range p.User.AdditionalGids {
		lp.AdditionalGroups = append(lp.AdditionalGroups, int(g))
	}
	if err := r.Run(lp); err != nil {
		t.Fatalf("run %q: %v", p.Args, err)
	}
	return lp
}

// output runs s to its end and returns what it wrote.
func output(t *testing.T, s *specs.Spec) string {
	t.Helper()
	r := start(t, s)
	_, err := r.process.Wait()
	if err != nil || r.errs.Len() > 0 {
		t.Errorf("process: %v: %s", err, r.errs.String())
	}
	return r.out.String()
}

// realInput is an input with a root filesystem of busybox, in namespaces of
// its own.
func realInput(t *testing.T, script string, want namespaces.Want) Input {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	host, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	in := testInput()
	in.Kernel, in.Host = nil, host
	in.Rootfs = busyboxRootfs(t)
	in.Files = SandboxFiles{}
	in.Image = &ocispec.Image{}
	in.Container.Command = []string{"/bin/sh", "-c", script}
	pool, err := namespaces.New(namespaces.Config{Dir: filepath.Join(t.TempDir(), "ns")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	set, err := pool.Get(ctx, want)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pool.Release(context.Background(), set); err != nil {
			t.Error(err)
		}
		cancel() // Run only tidies up
		if err := pool.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	in.Namespaces = Namespaces{Net: set.Net, IPC: set.IPC, UTS: set.UTS, User: set.User}
	return in
}

func podNamespaces() namespaces.Want {
	return namespaces.Want{Net: true, IPC: true, UTS: true, Hostname: "pod-host"}
}

func busyboxRootfs(t *testing.T) string {
	t.Helper()
	box, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs /bin/busybox, static")
	}
	root := t.TempDir()
	for _, d := range []string{"bin", "etc", "proc", "dev", "sys", "tmp", "data"} {
		mustDo(t, os.Mkdir(filepath.Join(root, d), 0o755))
	}
	mustDo(t, os.WriteFile(filepath.Join(root, "bin/busybox"), box, 0o755))
	for _, name := range strings.Fields("sh cat id ls sleep hostname stat grep mount touch echo mkdir umount test wc ps dd true") {
		mustDo(t, os.Symlink("busybox", filepath.Join(root, "bin", name)))
	}
	mustDo(t, os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0::/:/bin/sh\nweb:x:1000:1001::/:/bin/sh\n"), 0o644))
	mustDo(t, os.WriteFile(filepath.Join(root, "etc/group"), []byte("root:x:0:\nweb:x:1001:\ntape:x:26:web\n"), 0o644))
	// The directories above are 0700 or so: mapped users must get through.
	for d := root; d != "/" && d != "/tmp"; d = filepath.Dir(d) {
		mustDo(t, os.Chmod(d, 0o755))
	}
	return root
}

func mustDo(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func build(t *testing.T, in Input) *specs.Spec {
	t.Helper()
	mustDo(t, Prepare(t.Context(), in))
	s, _, err := Container(in)
	if err != nil {
		t.Fatal(err)
	}
	mustDo(t, Relabel(in, s))
	return s
}

func TestRunOrdinary(t *testing.T) {
	in := realInput(t, `pwd; hostname; id -u; id -g; id -G; grep -E "Cap(Eff|Amb)|NoNewPrivs" /proc/self/status; echo $HOSTNAME; echo $$
		cat /data/f; touch /x 2>/dev/null || echo read-only; ls /proc/acpi /proc/kcore 2>/dev/null | wc -l`, podNamespaces())
	in.Container.WorkingDir = "/made/here"
	sc := in.Container.Linux.SecurityContext
	sc.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
	sc.SupplementalGroups = []int64{5000}
	sc.NoNewPrivs, sc.ReadonlyRootfs = true, true
	sc.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}, AddAmbientCapabilities: []string{"NET_BIND_SERVICE"}}
	sc.MaskedPaths = []string{"/data/secret"}
	src := t.TempDir()
	mustDo(t, os.WriteFile(filepath.Join(src, "f"), []byte("from the host\n"), 0o644))
	in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "/data", HostPath: src}}
	want := `/made/here
pod-host
1000
1001
1001 26 5000
CapEff:	0000000000000400
CapAmb:	0000000000000400
NoNewPrivs:	1
pod-host
1
from the host
read-only
`
	if got := output(t, build(t, in)); !strings.HasPrefix(got, want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestRunPrivileged(t *testing.T) {
	in := realInput(t, `grep CapEff /proc/self/status; grep -E " /sys(/fs/cgroup)? " /proc/mounts | grep -c "[ ,]rw"; ls /dev | wc -l`, podNamespaces())
	in.Sandbox.Linux = &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{Privileged: true}}
	in.Container.Linux.SecurityContext.Privileged = true
	s := build(t, in)
	own, err := os.ReadFile("/proc/self/status")
	mustDo(t, err)
	_, eff, _ := strings.Cut(string(own), "CapEff:\t")
	eff, _, _ = strings.Cut(eff, "\n")
	lines := strings.Fields(output(t, s))
	if len(lines) != 4 || lines[1] != eff {
		t.Fatalf("got %q, want all capabilities %s", lines, eff)
	}
	if lines[2] == "0" {
		t.Error("sysfs is not writable")
	}
	if n := len(s.Linux.Devices); n < 5 {
		t.Errorf("%d host devices", n)
	}
}

// idMapped are mappings of 65536 ids from host.
func mapped(host uint32) ([]*runtimeapi.IDMapping, []specs.LinuxIDMapping) {
	return []*runtimeapi.IDMapping{{HostId: host, Length: 65536}}, []specs.LinuxIDMapping{{HostID: host, Size: 65536}}
}

func userInput(t *testing.T, script string, hostNetwork bool) Input {
	t.Helper()
	cri, oci := mapped(1 << 20)
	w := podNamespaces()
	w.User, w.UIDMap, w.GIDMap = true, oci, oci
	if hostNetwork {
		w.Net = false
		w.UTS, w.Hostname = false, ""
	}
	in := realInput(t, script, w)
	user := &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: cri, Gids: cri}
	in.Sandbox.Linux = &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
		NamespaceOptions: &runtimeapi.NamespaceOption{UsernsOptions: user},
	}}
	in.Container.Linux.SecurityContext.NamespaceOptions.UsernsOptions = user
	mustDo(t, filepath.WalkDir(in.Rootfs, func(p string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(p, 1<<20, 1<<20)
	}))
	return in
}

func TestRunInUserNamespace(t *testing.T) {
	for _, hostNetwork := range []bool{false, true} {
		t.Run(fmt.Sprintf("host network %v", hostNetwork), func(t *testing.T) {
			in := userInput(t, `id -u; cat /proc/self/uid_map; stat -c %u /data/f; stat -c %u /etc/resolv.conf; touch /data/new; ls /sys/class/net; cat /volume/f`, hostNetwork)
			src, files := t.TempDir(), t.TempDir()
			mustDo(t, os.WriteFile(filepath.Join(src, "f"), nil, 0o600))
			mustDo(t, os.WriteFile(filepath.Join(files, "resolv.conf"), nil, 0o644))
			cri, _ := mapped(1 << 20)
			in.Files.ResolvConf = filepath.Join(files, "resolv.conf")
			in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "/data", HostPath: src, UidMappings: cri, GidMappings: cri}}
			mustDo(t, os.Mkdir(filepath.Join(in.Rootfs, "volume"), 0o700))
			mustDo(t, os.WriteFile(filepath.Join(in.Rootfs, "volume/f"), []byte("in the image\n"), 0o600))
			mustDo(t, os.Lchown(filepath.Join(in.Rootfs, "volume"), 1<<20, 1<<20))
			mustDo(t, os.Lchown(filepath.Join(in.Rootfs, "volume/f"), 1<<20, 1<<20))
			in.Image.Config.Volumes = map[string]struct{}{"/volume": {}}
			in.VolumeDir = filepath.Join(t.TempDir(), "volumes")
			mustDo(t, os.Chmod(filepath.Dir(in.VolumeDir), 0o755))
			got := strings.Fields(output(t, build(t, in)))
			want := "0 0 1048576 65536 0 0"
			if s := strings.Join(got, " "); !strings.HasPrefix(s, want) || !strings.Contains(s, " lo") || !strings.HasSuffix(s, "in the image") {
				t.Errorf("got %q, want it to begin with %q and to have lo", s, want)
			}
			var st unix.Stat_t
			mustDo(t, unix.Stat(filepath.Join(src, "new"), &st))
			if st.Uid != 0 {
				t.Errorf("written through the idmapped mount as %d", st.Uid)
			}
		})
	}
}

func mountTmpfs(t *testing.T, dir string) {
	t.Helper()
	mustDo(t, unix.Mount("test", dir, "tmpfs", 0, ""))
	t.Cleanup(func() { mustDo(t, unix.Unmount(dir, unix.MNT_DETACH)) })
}

func TestRunReadOnlyMounts(t *testing.T) {
	for name, tc := range map[string]struct {
		recursive bool
		want      string
	}{
		"plain":     {false, "top ro\n"},
		"recursive": {true, "top ro\nsub ro\n"},
	} {
		t.Run(name, func(t *testing.T) {
			in := realInput(t, "touch /data/x 2>/dev/null || echo top ro; touch /data/sub/x 2>/dev/null || echo sub ro", podNamespaces())
			src := t.TempDir()
			mustDo(t, os.Mkdir(filepath.Join(src, "sub"), 0o755))
			mountTmpfs(t, filepath.Join(src, "sub"))
			in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "/data", HostPath: src, Readonly: true, RecursiveReadOnly: tc.recursive}}
			if got := output(t, build(t, in)); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestRunMountOptionsAndMissingHostPath(t *testing.T) {
	in := realInput(t, "grep ' /data ' /proc/mounts", podNamespaces())
	src := filepath.Join(t.TempDir(), "not", "yet")
	in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "data", HostPath: src, MountOptions: []string{"noexec", "nosuid"}}}
	got := output(t, build(t, in))
	if !strings.Contains(got, "nosuid,noexec") && !strings.Contains(got, "nosuid,nodev,noexec") {
		t.Errorf("mounted as %q", got)
	}
}

func TestRunPropagation(t *testing.T) {
	in := realInput(t, "mount -t tmpfs inside /data/inside; while ! test -e /data/outside/f; do sleep 0.01; done; echo seen", podNamespaces())
	src := t.TempDir()
	for _, d := range []string{"inside", "outside"} {
		mustDo(t, os.Mkdir(filepath.Join(src, d), 0o755))
	}
	mustDo(t, unix.Mount(src, src, "", unix.MS_BIND, ""))
	t.Cleanup(func() { mustDo(t, unix.Unmount(src, unix.MNT_DETACH)) })
	in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "/data", HostPath: src, Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL}}
	mustDo(t, unix.Mount("", src, "", unix.MS_PRIVATE, ""))
	if _, _, err := Container(in); err == nil || !strings.Contains(err.Error(), "not shared") {
		t.Errorf("on a private mount: %v", err)
	}
	mustDo(t, unix.Mount("", src, "", unix.MS_SHARED, ""))
	in.Sandbox.Linux = &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{Privileged: true}}
	in.Container.Linux.SecurityContext.Privileged = true
	r := start(t, build(t, in))
	waitFor(t, func() bool {
		data, _ := os.ReadFile("/proc/self/mountinfo")
		return strings.Contains(string(data), filepath.Join(src, "inside"))
	})
	mustDo(t, unix.Mount("outside", filepath.Join(src, "outside"), "tmpfs", 0, ""))
	mustDo(t, os.WriteFile(filepath.Join(src, "outside/f"), nil, 0o644))
	if _, err := r.process.Wait(); err != nil || r.out.String() != "seen\n" {
		t.Errorf("got %q, %v: %s", r.out.String(), err, r.errs.String())
	}
	for _, d := range []string{"inside", "outside"} {
		mustDo(t, unix.Unmount(filepath.Join(src, d), unix.MNT_DETACH))
	}
}

func TestRunDevices(t *testing.T) {
	in := realInput(t, "dd if=/dev/mine/log of=/dev/null count=1 2>/dev/null || echo no read; stat -c %t,%T /dev/mine/log; test -e /dev/kmsg || echo not there", podNamespaces())
	in.Container.Devices = []*runtimeapi.Device{{HostPath: "/dev/kmsg", ContainerPath: "/dev/mine/log", Permissions: "w"}}
	r := start(t, build(t, in))
	_, _ = r.process.Wait()
	if got := r.out.String(); got != "no read\n1,b\nnot there\n" {
		t.Errorf("got %q: %s", got, r.errs.String())
	}
}

func TestRunExecAndSharedPIDs(t *testing.T) {
	in := realInput(t, "sleep 1000", podNamespaces())
	in.Container.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
	pause, err := Pause(PauseInput{ID: "s", Rootfs: in.Rootfs, Namespaces: in.Namespaces, Sandbox: in.Sandbox, Host: in.Host})
	mustDo(t, err)
	pause.Linux.Seccomp = nil // tests are built without libseccomp
	pause.Process.Args = []string{"/bin/sleep", "1000"}
	holder := start(t, pause)
	st, err := holder.State()
	mustDo(t, err)
	in.Namespaces.PID = fmt.Sprintf("/proc/%d/ns/pid", st.InitProcessPid)
	in.Container.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	s := build(t, in)
	r := start(t, s)
	p := r.run(t, Exec(s, []string{"/bin/sh", "-c", "id -u; id -G; until test $(ps -o args | grep -c 'sleep 100[0]') = 2; do sleep 0.01; done; exit 3"}, false), false)
	state, err := p.Wait()
	if state == nil || state.ExitCode() != 3 || r.out.String() != "1000\n1001 26\n" {
		t.Errorf("exec: %q, %v, %v: %s", r.out.String(), state, err, r.errs.String())
	}
}

func TestRunSeccomp(t *testing.T) {
	if !seccomp.Enabled {
		t.Skip("built without libseccomp (tag seccomp)")
	}
	in := realInput(t, "mkdir /m; mount -t tmpfs x /m 2>/dev/null || echo denied; grep Seccomp: /proc/self/status", podNamespaces())
	sc := in.Container.Linux.SecurityContext
	sc.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	if got := output(t, build(t, in)); got != "denied\nSeccomp:\t2\n" {
		t.Errorf("got %q", got)
	}
}

func waitFor(t *testing.T, cond func() bool) {
	t.Helper()
	for range 500 {
		if cond() {
			return
		}
		_ = unix.Nanosleep(&unix.Timespec{Nsec: 10e6}, nil)
	}
	t.Fatal("not in time")
}
