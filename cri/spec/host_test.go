package spec

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The default profile is a port of containerd's; this finds the drift.
func TestDefaultSeccompIsContainerds(t *testing.T) {
	for name, caps := range map[string][]string{"default": DefaultCapabilities(), "none": nil, "all": allCaps()} {
		t.Run(name, func(t *testing.T) {
			theirs := seccomp.DefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: caps}}})
			got, want := flatten(DefaultSeccomp(caps)), flatten(theirs)
			for _, rule := range got {
				if !slices.Contains(want, rule) {
					t.Errorf("ours alone: %s", rule)
				}
			}
			for _, rule := range want {
				if !slices.Contains(got, rule) {
					t.Errorf("containerd's alone: %s", rule)
				}
			}
			if !slices.Equal(DefaultSeccomp(caps).Architectures, theirs.Architectures) {
				t.Errorf("architectures %v", DefaultSeccomp(caps).Architectures)
			}
		})
	}
}

// flatten lists each system call with its action and conditions.
func flatten(p *specs.LinuxSeccomp) (out []string) {
	for _, s := range p.Syscalls {
		for _, n := range s.Names {
			rule := n + " " + string(s.Action)
			for _, a := range s.Args {
				rule += fmt.Sprintf(" %s %d:%d:%d", a.Op, a.Index, a.Value, a.ValueTwo)
			}
			out = append(out, rule)
		}
	}
	slices.Sort(out)
	return out
}

func TestParseCapabilities(t *testing.T) {
	got, err := parseCapabilities([]byte("Name:\tx\nCapInh:\t0\nCapEff:\t0000000000000003\nCapBnd:\t000001fffffffffe\n"))
	if err != nil || !slices.Equal(got, []string{"CAP_DAC_OVERRIDE"}) {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := parseCapabilities([]byte("CapEff:\tzz\n")); err == nil {
		t.Error("accepted garbage")
	}
}

func TestOOMFloor(t *testing.T) {
	if got, err := oomFloor(allCaps()); got != -1000 || err != nil {
		t.Errorf("with CAP_SYS_RESOURCE: %d, %v", got, err)
	}
	own, err := oomFloor(nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := (HostInfo{OOMScoreFloor: own}).oomScore(-2000); got != own {
		t.Errorf("got %d, want the floor %d", got, own)
	}
}

func TestCgroupOptions(t *testing.T) {
	info := "30 1 0:1 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n31 1 0:2 / /x rw - tmpfs tmpfs rw,nsdelegate\n"
	if got := cgroupOptions([]byte(info), "/sys/fs/cgroup"); !slices.Equal(got, []string{"nsdelegate", "memory_recursiveprot"}) {
		t.Errorf("got %v", got)
	}
}

func TestFindPropagation(t *testing.T) {
	info := `1 0 8:1 / / rw shared:1 - ext4 /dev/a rw
2 1 8:1 / /mnt rw master:5 - ext4 /dev/a rw
3 2 8:1 / /mnt/with\040space rw shared:7 master:5 propagate_from:2 - ext4 /dev/a rw
4 1 8:1 / /mnt rw - ext4 shared:not rw
short line
`
	for path, want := range map[string]Propagation{
		"/":                 {Mountpoint: "/", Shared: true},
		"/mntx":             {Mountpoint: "/", Shared: true},
		"/mnt":              {Mountpoint: "/mnt"}, // the later one is on top
		"/mnt/a":            {Mountpoint: "/mnt"},
		"/mnt/with space/a": {Mountpoint: "/mnt/with space", Shared: true, Slave: true},
	} {
		if got, err := findPropagation(strings.NewReader(info), path); err != nil || got != want {
			t.Errorf("%s: got %+v, %v; want %+v", path, got, err, want)
		}
	}
	if _, err := findPropagation(strings.NewReader(""), "/"); err == nil {
		t.Error("found a mount in nothing")
	}
}

func TestAppArmor(t *testing.T) {
	got, err := parseAppArmorProfiles(strings.NewReader("a (enforce)\nwith space (b) (complain)\nbroken\n"))
	if err != nil || len(got) != 2 || !got["a"] || !got["with space (b)"] {
		t.Errorf("got %v, %v", got, err)
	}
	dir := t.TempDir()
	mustDo(t, os.MkdirAll(filepath.Join(dir, "tunables"), 0o755))
	mustDo(t, os.WriteFile(filepath.Join(dir, "tunables/global"), nil, 0o644))
	mustDo(t, os.WriteFile(filepath.Join(dir, "current"), []byte("nodeagent (enforce)\n"), 0o644))
	text, err := appArmorText(localAppArmor(dir, filepath.Join(dir, "current")))
	for _, want := range []string{"#include <tunables/global>\n", "profile nodeagent-default flags=", "signal (receive) peer=nodeagent,", "deny mount,"} {
		if err != nil || !strings.Contains(string(text), want) {
			t.Errorf("profile lacks %q, %v", want, err)
		}
	}
	for _, not := range []string{"abi <", "abstractions/base", "{{"} {
		if strings.Contains(string(text), not) {
			t.Errorf("profile has %q", not)
		}
	}
}

// An image may try to make us read files of the host, or hang.
func TestReadInRootfs(t *testing.T) {
	root, outside := t.TempDir(), t.TempDir()
	mustDo(t, os.WriteFile(filepath.Join(outside, "secret"), []byte("host"), 0o644))
	mustDo(t, os.MkdirAll(filepath.Join(root, "etc"), 0o755))
	mustDo(t, os.MkdirAll(filepath.Join(root, outside), 0o755))
	mustDo(t, os.WriteFile(filepath.Join(root, outside, "secret"), []byte("inside"), 0o644))
	link := func(name, target string) { mustDo(t, os.Symlink(target, filepath.Join(root, "etc", name))) }
	link("absolute", filepath.Join(outside, "secret"))
	link("relative", "../../../../../../../../"+outside+"/secret")
	link("dir", "/")
	link("loop", "loop")
	link("magic", "/proc/self/root/etc/passwd")
	link("nowhere", "/no/such")
	mustDo(t, unix.Mkfifo(filepath.Join(root, "etc/fifo"), 0o644))
	mustDo(t, os.Truncate(touch(t, root, "etc/huge"), maxUserFile+1))
	for name, want := range map[string]string{"/etc/absolute": "inside", "/etc/relative": "inside", "/etc/dir/" + outside + "/secret": "inside"} {
		for how, read := range readers() {
			if got, err := read(root, name); err != nil || string(got) != want {
				t.Errorf("%s %s: %q, %v; want %q", how, name, got, err, want)
			}
		}
	}
	for _, name := range []string{"/etc/loop", "/etc/magic", "/etc/nowhere", "/etc/fifo", "/etc", "/etc/huge", "/none", "/etc/huge/x"} {
		for how, read := range readers() {
			if got, err := read(root, name); err == nil {
				t.Errorf("%s %s: read %d bytes", how, name, len(got))
			}
		}
	}
}

func readers() map[string]func(root, name string) ([]byte, error) {
	slow := func(root, name string) ([]byte, error) {
		f, err := openSlow(root, name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY)
		if err != nil {
			return nil, err
		}
		return readRegular(f, name)
	}
	return map[string]func(root, name string) ([]byte, error){"openat2": hostKernel{}.ReadInRootfs, "slow": slow}
}

func touch(t *testing.T, root, name string) string {
	t.Helper()
	p := filepath.Join(root, name)
	mustDo(t, os.WriteFile(p, nil, 0o644))
	return p
}

func TestHostDevices(t *testing.T) {
	k := hostKernel{}
	got, err := k.Devices("/dev/null")
	if err != nil || len(got) != 1 || got[0].Path != "/dev/null" || got[0].Type != "c" || got[0].Major != 1 || got[0].Minor != 3 {
		t.Errorf("got %+v, %v", got, err)
	}
	all, err := k.Devices("/dev")
	if err != nil || len(all) < 5 {
		t.Errorf("got %d devices, %v", len(all), err)
	}
	for _, d := range all {
		if strings.HasPrefix(d.Path, "/dev/pts/") || d.Path == "/dev/console" {
			t.Errorf("has %s", d.Path)
		}
	}
	dir := t.TempDir()
	mustDo(t, os.Symlink("/dev/zero", filepath.Join(dir, "link")))
	got, err = k.Devices(filepath.Join(dir, "link"))
	if err != nil || len(got) != 1 || got[0].Path != filepath.Join(dir, "link") || got[0].Minor != 5 {
		t.Errorf("through a link: %+v, %v", got, err)
	}
	if _, err := k.Devices(touch(t, dir, "file")); err == nil {
		t.Error("a file is no device")
	}
	if _, err := k.Devices("/dev/no-such"); !os.IsNotExist(err) {
		t.Errorf("got %v", err)
	}
}

const cdiSpec = `{"cdiVersion":"0.6.0","kind":"vendor.com/class","devices":[
 {"name":"one","containerEdits":{"env":["ONE=1"],"deviceNodes":[{"path":"/dev/one","hostPath":"/dev/null","permissions":"rw"}],"mounts":[{"hostPath":"/usr","containerPath":"/one"}]}},
 {"name":"two","containerEdits":{"env":["TWO=2"]}}],
 "containerEdits":{"env":["ALL=1"],"hooks":[{"hookName":"createContainer","path":"/bin/true"}]}}`

func TestCDI(t *testing.T) {
	dir := t.TempDir()
	mustDo(t, os.WriteFile(filepath.Join(dir, "v.json"), []byte(cdiSpec), 0o644))
	in := testInput()
	in.CDI = NewCDI(dir)
	in.Container.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/class=one"}, {Name: "vendor.com/class=one"}}
	in.Container.Annotations = map[string]string{"cdi.k8s.io/p_1": "vendor.com/class=two,vendor.com/class=one", "other": "x"}
	s, _, err := Container(in)
	if err != nil {
		t.Fatal(err)
	}
	for _, env := range []string{"ONE=1", "TWO=2", "ALL=1"} {
		if !slices.Contains(s.Process.Env, env) {
			t.Errorf("environment %v lacks %s", s.Process.Env, env)
		}
	}
	if len(s.Linux.Devices) != 1 || s.Linux.Devices[0].Path != "/dev/one" || len(s.Linux.Resources.Devices) != 2 {
		t.Errorf("devices %+v, rules %+v", s.Linux.Devices, s.Linux.Resources.Devices)
	}
	if s.Hooks == nil || len(s.Hooks.CreateContainer) != 1 || !slices.ContainsFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == "/one" }) {
		t.Errorf("hooks %+v", s.Hooks)
	}
	in.Container.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/class=three"}}
	if _, _, err := Container(in); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "vendor.com/class=three") {
		t.Errorf("got %v, want NotFound with the name", err)
	}
}

func TestPrepare(t *testing.T) {
	root, vols, host := t.TempDir(), filepath.Join(t.TempDir(), "v"), t.TempDir()
	in := testInput()
	in.Rootfs, in.VolumeDir = root, vols
	mustDo(t, os.MkdirAll(filepath.Join(root, "real/sub"), 0o700))
	mustDo(t, os.WriteFile(filepath.Join(root, "real/sub/f"), []byte("x"), 0o640))
	mustDo(t, os.Symlink("/real", filepath.Join(root, "linked")))
	mustDo(t, os.Symlink("/etc", filepath.Join(root, "evil")))
	in.Image.Config.Volumes = map[string]struct{}{"/linked": {}, "/new": {}, "/evil": {}}
	in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "/m", HostPath: filepath.Join(host, "a/b")}, {ContainerPath: "/i", Image: &runtimeapi.ImageSpec{Image: "x"}}}
	for range 2 {
		mustDo(t, Prepare(context.Background(), in))
	}
	st, err := os.Stat(filepath.Join(host, "a/b"))
	if err != nil || !st.IsDir() || st.Mode().Perm() != 0o755 {
		t.Errorf("host path: %v, %v", st, err)
	}
	data, err := os.ReadFile(filepath.Join(vols, "001/sub/f"))
	if err != nil || string(data) != "x" {
		t.Errorf("volume of /linked: %q, %v", data, err)
	}
	for _, empty := range []string{"000", "002"} { // /evil has no /etc in the rootfs
		if e, err := os.ReadDir(filepath.Join(vols, empty)); err != nil || len(e) != 0 {
			t.Errorf("volume %s: %v, %v", empty, e, err)
		}
	}
	mustDo(t, os.Symlink("/no/such/place", filepath.Join(host, "dangling")))
	in.Container.Mounts[0].HostPath = filepath.Join(host, "dangling")
	if err := Prepare(context.Background(), in); !errdefs.IsInvalidArgument(err) {
		t.Errorf("dangling link: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	in.Container.Mounts = nil
	if err := Prepare(ctx, in); err == nil {
		t.Error("went on after the end of its context")
	}
}

func FuzzUserFiles(f *testing.F) {
	f.Add("root:x:0:0::/:/bin/sh\nweb:x:1000:1001:::", "tape:x:26:web,root\n", "web:tape")
	f.Add("a:b", "::::", "-1:+2")
	f.Fuzz(func(t *testing.T, passwd, group, ask string) {
		files := &userFiles{kernel: fakeKernel{rootfs: map[string]string{"/etc/passwd": passwd, "/etc/group": group}}}
		u, err := lookupUser(ask, true, files)
		if err != nil {
			return
		}
		if u.UID > maxID || u.GID > maxID {
			t.Fatalf("%q: ids out of range: %+v", ask, u)
		}
		// Nobody becomes root through a line without a proper id.
		name, _, _ := strings.Cut(ask, ":")
		if u.UID == 0 && name != "" && strings.Trim(name, "0") != "" && !strings.Contains(passwd, name+":") {
			t.Fatalf("%q became root", ask)
		}
	})
}

func FuzzAnnotations(f *testing.F) {
	f.Add("cdi.k8s.io/x", "vendor.com/class=one")
	f.Add("cdi.k8s.io/", "a=b,,c")
	f.Fuzz(func(t *testing.T, key, val string) {
		in := testInput()
		in.Container.Annotations = map[string]string{key: val}
		in.CDI = NewCDI("/no/such/directory")
		s, _, err := Container(in)
		if err == nil && len(s.Annotations) != 7 {
			t.Fatalf("annotation %q got into the spec", key)
		}
	})
}

func FuzzPropagation(f *testing.F) {
	f.Add("1 0 8:1 / /a\\040b rw shared:1 - x y z\n", "/a b")
	f.Fuzz(func(t *testing.T, info, path string) {
		p, err := findPropagation(strings.NewReader(info), path)
		if err == nil && !within(path, p.Mountpoint) {
			t.Fatalf("%q is not within %q", path, p.Mountpoint)
		}
	})
}

func FuzzKernelFiles(f *testing.F) {
	f.Add("Name:\tx\nCapInh:\t0\nCapEff:\t000001ffffffffff\nCapBnd:\t000001ffffffffff\n")
	f.Add("docker-default (enforce)\nnodeagent-default (complain)\n(x\n")
	f.Add("CapBnd:\tzz\n")
	f.Fuzz(func(t *testing.T, text string) {
		caps, err := parseCapabilities([]byte(text))
		if err != nil && caps != nil {
			t.Errorf("%q: %v, %v", text, caps, err)
		}
		for _, c := range caps {
			if !strings.HasPrefix(c, "CAP_") {
				t.Errorf("%q: capability %q", text, c)
			}
		}
		profiles, err := parseAppArmorProfiles(strings.NewReader(text))
		for name := range profiles {
			if err == nil && !strings.Contains(text, name) {
				t.Errorf("%q: profile %q", text, name)
			}
		}
	})
}

func FuzzSignal(f *testing.F) {
	f.Add("SIGRTMIN+3")
	f.Fuzz(func(t *testing.T, s string) {
		if n, ok := ParseSignal(s); ok && (n <= 0 || n > sigRTMax) {
			t.Fatalf("%q is %d", s, n)
		}
	})
}

func BenchmarkContainer(b *testing.B) {
	in := testInput()
	in.Rootfs, in.Kernel = b.TempDir(), nil
	in.Container.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{}
	in.Container.Mounts = []*runtimeapi.Mount{{ContainerPath: "/etc/hosts", HostPath: "/etc/hosts"}}
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := Container(in); err != nil {
			b.Fatal(err)
		}
	}
}
