package main

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/nodeagent/nodeagent/test/images"
)

//go:embed run.sh
var runScript string

// step is one thing that the machine does: a command, or a reboot.
type step struct {
	name, command string
	seconds       int // at most
}

const reboot = "reboot"

// hostTests are those of the end-to-end suite that depend on the host's cgroups,
// init or kernel: what the smaller suites run.
const hostTests = "^(TestVersionAndStatus|TestSandboxLifecycle|TestResources|TestOOMKilled|TestExitCodes|TestStop|TestKilledFromOutside|" +
	"TestContainerStats|TestMetrics|TestExecSync|TestNamespaceModes|TestUserNamespace|TestPrivileged|TestCapabilities|TestSeccomp|" +
	"TestDevices|TestSysctls|TestMounts|TestRecursiveReadOnly|TestImageVolumes|TestNetwork|TestPortMappings|TestSharedPIDReaps|TestEvents)$"

func guest(run string) string {
	return "NODEAGENT_GUEST=1 ./guest.test -test.v -test.run '" + run + "'"
}

func endToEnd(driver, run string) string {
	return "NODEAGENT_SLOW=5 NODEAGENT=/payload/bin/nodeagent NODEAGENT_TESTTOOL=/payload/testtool NODEAGENT_CGROUP_DRIVER=" + driver +
		" ./e2e.test -test.v -test.short -test.timeout 20m -test.run '" + run + "'"
}

// suites are what can be asked for, in the order in which it is run.
var suites = []struct {
	name  string
	steps []step
}{
	{"service", []step{{"package and service", guest("^TestService"), 600}}},
	{"v2", []step{{"cgroup v2 through the service", guest("^TestV2"), 600}}},
	{"reboot", []step{
		{"before the reboot", guest("^TestBeforeReboot$"), 120},
		{reboot, reboot, 60},
		{"after the reboot", guest("^TestAfterReboot$"), 120},
	}},
	{"systemd", []step{{"end to end, systemd driver", endToEnd("systemd", hostTests), 900}}},
	{"cgroupfs", []step{{"end to end, cgroupfs driver", endToEnd("cgroupfs", hostTests), 900}}},
	{"all-systemd", []step{{"all end to end, systemd driver", endToEnd("systemd", "."), 1500}}},
	{"all-cgroupfs", []step{{"all end to end, cgroupfs driver", endToEnd("cgroupfs", "."), 1500}}},
	{"purge", []step{{"removal and purge", guest("^TestPurge$"), 180}}},
}

func suiteNames() (names []string) {
	for _, s := range suites {
		names = append(names, s.name)
	}
	return names
}

func stepsOf(names []string) (steps []step, err error) {
	for _, s := range suites {
		if slices.Contains(names, s.name) {
			steps = append(steps, s.steps...)
		}
	}
	for _, n := range names {
		if !slices.Contains(suiteNames(), n) {
			err = fmt.Errorf("suite %q: want some of %s", n, strings.Join(suiteNames(), ", "))
		}
	}
	return steps, err
}

// writePayload makes the tar archive that the machine gets as its second disk.
func writePayload(ctx context.Context, out string, o options, steps []step) error {
	dir := out + ".d"
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "bin"), 0o755); err != nil {
		return err
	}
	var lines strings.Builder
	for _, s := range steps {
		fmt.Fprintf(&lines, "%s|%d|%s\n", s.name, s.seconds, s.command)
	}
	for name, text := range map[string]string{"steps": lines.String(), "run.sh": runScript} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	for _, b := range []string{"nodeagent", "nodeagent-shim", "nodeagent-cni"} {
		if err := command(ctx, "cp", filepath.Join(o.bins, b), filepath.Join(dir, "bin", b)); err != nil {
			return err
		}
	}
	if o.pkg != "" {
		if err := command(ctx, "cp", o.pkg, filepath.Join(dir, "nodeagent.deb")); err != nil {
			return err
		}
		if prev := previous(o); prev != "" {
			if err := command(ctx, "cp", prev, filepath.Join(dir, "previous.deb")); err != nil {
				return err
			}
		}
	}
	for _, b := range []struct{ out, how, pkg string }{
		{"e2e.test", "test", "./test/e2e"}, {"guest.test", "test", "./test/vm/guest"}, {"testtool", "build", "./test/images/testtool"},
	} {
		args := []string{"CGO_ENABLED=0", "go", b.how, "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, b.out)}
		if b.how == "test" {
			args = append(args, "-c")
		}
		if err := command(ctx, "env", append(args, b.pkg)...); err != nil {
			return err
		}
	}
	if err := writeImage(ctx, dir); err != nil {
		return fmt.Errorf("make the test image: %w", err)
	}
	if err := command(ctx, "tar", "-C", dir, "-cf", out, "."); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// writeImage makes image.tar in dir, of the host's busybox and the test tool.
func writeImage(ctx context.Context, dir string) error {
	entries, err := images.Busybox(ctx, images.DefaultBusybox)
	if err != nil {
		return err
	}
	entries = append(entries, images.Executable("bin/testtool", filepath.Join(dir, "testtool")))
	layer, err := images.NewLayer(images.None, entries...)
	if err != nil {
		return err
	}
	img, err := images.New(images.Config{Env: []string{"PATH=/bin:/sbin:/usr/bin:/usr/sbin"}, Cmd: []string{"sh"}}, layer)
	if err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(dir, "image.tar"))
	if err != nil {
		return err
	}
	defer f.Close()
	return images.WriteArchive(f, map[string]images.Artifact{"example.test/busybox:1": img})
}

const previousName = "previous.deb"

// previous is the package of the last build that passed here, if there is one.
func previous(o options) string {
	p := filepath.Join(o.cache, previousName)
	if _, err := os.Stat(p); err != nil {
		return ""
	}
	return p
}
