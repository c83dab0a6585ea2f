package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"golang.org/x/sys/unix"
)

func hostDir(t testing.TB, name string) string {
	t.Helper()
	d := filepath.Join(workDir, "vol", t.Name(), name)
	if err := os.MkdirAll(d, 0o755); err != nil {
		t.Fatal(err)
	}
	return d
}

func writeFile(t testing.TB, path, data string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestMounts(t *testing.T) {
	p := runPod(t)
	rw, ro := hostDir(t, "rw"), hostDir(t, "ro")
	writeFile(t, filepath.Join(rw, "in"), "from host")
	file := filepath.Join(hostDir(t, "f"), "file")
	writeFile(t, file, "single")
	link := filepath.Join(hostDir(t, "l"), "link")
	if err := os.Symlink(rw, link); err != nil {
		t.Fatal(err)
	}
	c := p.run(t,
		mount(&runtimeapi.Mount{ContainerPath: "/rw", HostPath: rw}),
		mount(&runtimeapi.Mount{ContainerPath: "/ro/deep/path", HostPath: ro, Readonly: true}),
		mount(&runtimeapi.Mount{ContainerPath: "/etc/file", HostPath: file}),
		mount(&runtimeapi.Mount{ContainerPath: "/link", HostPath: link, MountOptions: []string{"noexec"}}))
	equal(t, "file from the host", c.sh(t, "cat /rw/in"), "from host")
	c.sh(t, "echo from container > /rw/out")
	b, err := os.ReadFile(filepath.Join(rw, "out"))
	if err != nil || strings.TrimSpace(string(b)) != "from container" {
		t.Errorf("on the host: %q, %v", b, err)
	}
	contains(t, "write to a read-only mount", c.shFails(t, "touch /ro/deep/path/x"), "Read-only")
	equal(t, "single file", c.sh(t, "cat /etc/file"), "single")
	equal(t, "symbolic link as host path", c.sh(t, "cat /link/in"), "from host")
	c.sh(t, "cp /bin/busybox /link/cat")
	contains(t, "program on a noexec mount", c.shFails(t, "/link/cat in"), "Permission denied")
	// A missing host path becomes a directory, as other runtimes have it.
	made := filepath.Join(hostDir(t, "made"), "not", "yet")
	p.run(t, mount(&runtimeapi.Mount{ContainerPath: "/m", HostPath: made})).sh(t, "touch /m/x")
	if _, err := os.Stat(filepath.Join(made, "x")); err != nil {
		t.Error(err)
	}
	m := c.status(t).Mounts
	if len(m) != 4 {
		t.Fatalf("status has %d mounts: %v", len(m), m)
	}
	equal(t, "status of the read-only mount", m[1].Readonly, true)
}

func TestMountPropagation(t *testing.T) {
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		t.Skip(err)
	}
	base := hostDir(t, "base")
	if err := unix.Mount(base, base, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(base, unix.MNT_DETACH)
	if err := unix.Mount("", base, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"host", "ctr"} {
		if err := os.MkdirAll(filepath.Join(base, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p := runPod(t, func(c *runtimeapi.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	run := func(m runtimeapi.MountPropagation) *container {
		return p.run(t, mount(&runtimeapi.Mount{ContainerPath: "/m", HostPath: base, Propagation: m}),
			security(func(s *secCtx) { s.Privileged = true }))
	}
	private := run(runtimeapi.MountPropagation_PROPAGATION_PRIVATE)
	slave := run(runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER)
	shared := run(runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL)
	if err := unix.Mount("none", filepath.Join(base, "host"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(filepath.Join(base, "host"), unix.MNT_DETACH)
	writeFile(t, filepath.Join(base, "host", "x"), "")
	equal(t, "a later mount of the host, seen private", private.sh(t, "ls /m/host"), "")
	equal(t, "seen host-to-container", slave.sh(t, "ls /m/host"), "x")
	equal(t, "seen bidirectional", shared.sh(t, "ls /m/host"), "x")
	slave.sh(t, "mount -t tmpfs none /m/ctr && touch /m/ctr/slave")
	if _, err := os.Stat(filepath.Join(base, "ctr", "slave")); err == nil {
		t.Error("a mount made in a host-to-container mount reached the host")
	}
	shared.sh(t, "mount -t tmpfs none /m/ctr && touch /m/ctr/both")
	if _, err := os.Stat(filepath.Join(base, "ctr", "both")); err != nil {
		t.Errorf("a mount made in a bidirectional mount did not reach the host: %v", err)
	}
	unix.Unmount(filepath.Join(base, "ctr"), unix.MNT_DETACH)
	// Bidirectional is for privileged containers, and for shared mounts.
	lone := hostDir(t, "lone")
	if err := unix.Mount(lone, lone, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(lone, unix.MNT_DETACH)
	if err := unix.Mount("", lone, "", unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	c, err := p.tryCreate(callCtx(t), mount(&runtimeapi.Mount{ContainerPath: "/m", HostPath: lone, Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL}),
		security(func(s *secCtx) { s.Privileged = true }))
	if err == nil {
		err = c.tryStart(callCtx(t))
	}
	if err == nil {
		t.Error("bidirectional propagation of a private mount was accepted")
	}
}

func TestRecursiveReadOnly(t *testing.T) {
	base := hostDir(t, "base")
	sub := filepath.Join(base, "sub")
	if err := os.MkdirAll(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", sub, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(sub, unix.MNT_DETACH)
	p := runPod(t)
	plain := p.run(t, mount(&runtimeapi.Mount{ContainerPath: "/m", HostPath: base, Readonly: true}))
	plain.sh(t, "touch /m/sub/x") // as ever: only the top is read-only
	rro := p.run(t, mount(&runtimeapi.Mount{ContainerPath: "/m", HostPath: base, Readonly: true, RecursiveReadOnly: true, Propagation: runtimeapi.MountPropagation_PROPAGATION_PRIVATE}))
	contains(t, "write below", rro.shFails(t, "touch /m/sub/y"), "Read-only")
	if m := rro.status(t).Mounts; len(m) != 1 || !m[0].RecursiveReadOnly {
		t.Errorf("status mounts: %v, want recursive_read_only", m)
	}
	for name, m := range map[string]*runtimeapi.Mount{
		"without readonly":    {ContainerPath: "/m", HostPath: base, RecursiveReadOnly: true},
		"with propagation":    {ContainerPath: "/m", HostPath: base, Readonly: true, RecursiveReadOnly: true, Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
		"with bidirectional":  {ContainerPath: "/m", HostPath: base, Readonly: true, RecursiveReadOnly: true, Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL},
		"no container path":   {HostPath: base},
		"host path and image": {ContainerPath: "/m", HostPath: base, Image: &runtimeapi.ImageSpec{Image: pictures}, Readonly: true},
	} {
		if _, err := p.tryCreate(callCtx(t), mount(m)); err == nil {
			t.Errorf("mount %s: accepted", name)
		}
	}
}

func TestImageVolumes(t *testing.T) {
	p := runPod(t)
	vol := func(ref, sub string) *runtimeapi.Mount {
		return &runtimeapi.Mount{ContainerPath: "/pic", Readonly: true, Image: &runtimeapi.ImageSpec{Image: ref}, ImageSubPath: sub}
	}
	c := p.run(t, mount(vol(pictures, "")))
	equal(t, "content", c.sh(t, "cat /pic/art/monet"), "water")
	contains(t, "write", c.shFails(t, "touch /pic/x"), "Read-only")
	c.sh(t, "/pic/bin/true")
	var found bool
	for _, m := range c.status(t).Mounts {
		found = found || (m.ContainerPath == "/pic" && m.GetImage().GetImageRef() != "")
	}
	if !found {
		t.Errorf("status mounts %v, want the image's reference", c.status(t).Mounts)
	}
	equal(t, "sub path", p.run(t, mount(vol(pictures, "art"))).sh(t, "cat /pic/monet"), "water")
	for name, m := range map[string]*runtimeapi.Mount{
		"missing sub path":     vol(pictures, "no/such"),
		"leaving by ..":        vol(pictures, "../../../../../../../.."),
		"leaving by a link":    vol(pictures, "up"),
		"writable":             {ContainerPath: "/pic", Image: &runtimeapi.ImageSpec{Image: pictures}},
		"image that is absent": vol(hub.Addr+"/e2e/absent:1", ""),
	} {
		c, err := p.tryCreate(callCtx(t), mount(m))
		if err != nil {
			continue
		}
		if strings.HasPrefix(name, "leaving") {
			// The path may resolve inside the image, never outside.
			if err := c.tryStart(callCtx(t)); err == nil {
				equal(t, name, c.sh(t, "test -e /pic/unique -o -e /pic/art && test ! -e /pic/lib/systemd && echo inside"), "inside")
			}
			continue
		}
		t.Errorf("image volume, %s: accepted", name)
	}
	// The image is in use: its removal must not break the container.
	c.sh(t, "cat /pic/art/monet")
}

func TestImageDeclaredVolumes(t *testing.T) {
	p := runPod(t)
	c := p.run(t, image(volumes), func(c *runtimeapi.ContainerConfig) { c.Command = sleeper })
	c.sh(t, "touch /data/x")
	equal(t, "working directory", c.sh(t, "pwd"), "/work/here")
	other := p.run(t, image(volumes))
	equal(t, "another container's volume", other.sh(t, "ls /data"), "")
}

func TestEntrypoint(t *testing.T) {
	p := runPod(t)
	for _, c := range []struct {
		name          string
		command, args []string
		want          string
	}{
		{"of the image", nil, nil, "entry cmd"},
		{"args replace cmd", nil, []string{"mine"}, "entry mine"},
		{"command replaces both", []string{"/bin/echo", "only"}, nil, "only"},
		{"both", []string{"/bin/echo", "a"}, []string{"b"}, "a b"},
	} {
		ctr := p.run(t, image(volumes), func(cc *runtimeapi.ContainerConfig) { cc.Command, cc.Args = c.command, c.args })
		ctr.waitExit(t)
		equal(t, c.name, ctr.text(t), c.want)
	}
	c := p.run(t, func(c *runtimeapi.ContainerConfig) {
		c.Envs = []*runtimeapi.KeyValue{{Key: "MINE", Value: []byte("a=b c")}, {Key: "FROM_IMAGE", Value: []byte("no")}}
		c.WorkingDir = "/made/for/me"
	})
	equal(t, "environment", c.sh(t, `echo "$MINE|$FROM_IMAGE|$(pwd)"`), "a=b c|no|/made/for/me")
}

func TestDevices(t *testing.T) {
	p := runPod(t)
	dev := func(perm string) containerOption {
		return func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: "/dev/zero", ContainerPath: "/dev/mine", Permissions: perm}}
		}
	}
	c := p.run(t, dev("rwm"))
	equal(t, "device", c.sh(t, "head -c 4 /dev/mine | od -An -tx1 | tr -d ' '"), "00000000")
	c.sh(t, "ls -l /dev/mine | grep -q '1, *5'")
	for _, d := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		c.sh(t, "test -c /dev/"+d)
	}
	// A device that was not given cannot be opened, even when made by hand.
	contains(t, "device that was not given", c.shFails(t, "mknod /tmp/kmsg c 1 11 && head -c 1 /tmp/kmsg"), "not permitted")
	// A directory of devices.
	if _, err := os.Stat("/dev/pts"); err == nil {
		p.run(t, func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: "/dev/net", ContainerPath: "/dev/net", Permissions: "rw"}}
			if _, err := os.Stat("/dev/net"); err != nil {
				c.Devices = nil
			}
		})
	}
	if _, err := p.tryCreate(callCtx(t), func(c *runtimeapi.ContainerConfig) {
		c.Devices = []*runtimeapi.Device{{HostPath: "/dev/no-such-device", ContainerPath: "/dev/x", Permissions: "r"}}
	}); err == nil {
		t.Error("a missing device was accepted")
	}
}

func TestCDI(t *testing.T) {
	dir := filepath.Join(workDir, "cdi")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "acme.yaml"), `cdiVersion: "0.6.0"
kind: acme.example/toy
devices:
- name: one
  containerEdits:
    env: ["TOY=one"]
    deviceNodes:
    - path: /dev/toy
      hostPath: /dev/zero
`)
	p := runPod(t)
	cdi := func(name string) containerOption {
		return func(c *runtimeapi.ContainerConfig) { c.CDIDevices = []*runtimeapi.CDIDevice{{Name: name}} }
	}
	c := p.run(t, cdi("acme.example/toy=one"))
	equal(t, "environment and device", c.sh(t, "echo $TOY; head -c 2 /dev/toy | od -An -tx1 | tr -d ' '"), "one\n0000")
	if _, err := p.tryCreate(callCtx(t), cdi("acme.example/toy=two")); err == nil {
		t.Error("an unknown CDI device was accepted")
	}
}
