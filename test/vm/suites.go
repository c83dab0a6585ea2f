package main

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// step is one thing that a machine does: tests of a package, or a reboot.
type step struct {
	name    string
	seconds int // at most
	tests   *goTest
}

const (
	rebootStep  = "reboot"
	upgradeStep = "package and service" // upgrades the previous package
)

// goTest is a package's tests in the machine: its test binary, run in a folder
// with its testdata, as `go test` does it.
type goTest struct {
	pkg   string // folder in the tree
	run   string // pattern of tests
	env   string // "A=1 B=2", what env(1) takes
	flags string
	files []string // what the tests read in the package's folder, besides testdata; patterns
}

// command is run in the folder of the payload.
func (t goTest) command(seconds int) string {
	return strings.TrimSpace(fmt.Sprintf("cd %s && exec env %s ./%s -test.v -test.timeout %ds -test.run '%s' %s",
		t.dir(), t.env, t.binary(), seconds, t.run, t.flags))
}

func (t goTest) dir() string    { return path.Join("tests", t.pkg) }
func (t goTest) binary() string { return path.Base(t.pkg) + ".test" }

// testSuite is what can be asked for by name.
type testSuite struct {
	name     string
	machines int
	steps    []step
}

// hostTests are those of the end-to-end suite that depend on the host's cgroups,
// init or kernel: what the smaller suites run.
const hostTests = "^(TestVersionAndStatus|TestSandboxLifecycle|TestResources|TestPodResources|TestHugepages|TestOOMKilled|TestExitCodes|TestStop|TestKilledFromOutside|" +
	"TestContainerStats|TestMetrics|TestExecSync|TestNamespaceModes|TestUserNamespace|TestPrivileged|TestCapabilities|TestSeccomp|" +
	"TestDevices|TestSysctls|TestMounts|TestRecursiveReadOnly|TestImageVolumes|TestNetwork|TestPortMappings|TestSharedPIDReaps|TestEvents|TestPolicy)$"

func guest(name, run string, seconds int) step {
	return step{name, seconds, &goTest{pkg: "test/vm/guest", run: run, env: "NODEAGENT_GUEST=1"}}
}

func endToEnd(name, driver, run string, seconds int) step {
	return step{name, seconds, &goTest{
		pkg: "test/e2e", run: run, flags: "-test.short -test.skip '^TestPolicyFromAPIServer$'", // no control plane is brought along
		env: "NODEAGENT=/payload/bin/nodeagent NODEAGENT_TESTTOOL=/payload/testtool NODEAGENT_CGROUP_DRIVER=" + driver,
	}}
}

// suites, in the order in which they are run. A limit is several times what a
// quiet machine needs: it ends what hangs.
func suites() []testSuite {
	return []testSuite{
		{"smoke", 1, []step{guest("smoke", "^TestSmoke$", 600)}},
		{"service", 1, []step{guest(upgradeStep, "^TestService", 2400)}},
		{"v2", 1, []step{guest("cgroup v2 through the service", "^TestV2", 1200)}},
		{"packages", 1, []step{
			{"cgroups on this host", 600, &goTest{pkg: "cgroups", run: ".", flags: "-test.short"}},
			// A hard limit below those that the tests ask for: to be raised.
			{"shim on this host", 1200, &goTest{pkg: "shim", run: ".", flags: "-test.short", env: "NODEAGENT_SHIM=/payload/bin/nodeagent-shim prlimit --nofile=8192"}},
		}},
		{"reboot", 1, []step{
			guest("before the reboot", "^TestBeforeReboot$", 300),
			{name: rebootStep, seconds: 60},
			guest("after the reboot", "^TestAfterReboot$", 300),
		}},
		{"systemd", 1, []step{endToEnd("end to end, systemd driver", "systemd", hostTests, 2400)}},
		{"cgroupfs", 1, []step{endToEnd("end to end, cgroupfs driver", "cgroupfs", hostTests, 2400)}},
		{"all-systemd", 1, []step{endToEnd("all end to end, systemd driver", "systemd", ".", 5400)}},
		{"all-cgroupfs", 1, []step{endToEnd("all end to end, cgroupfs driver", "cgroupfs", ".", 5400)}},
		{"policy", 1, []step{
			{"policy programs on this kernel", 2400, &goTest{pkg: "ebpf/datapath", run: ".", flags: "-test.short", files: []string{"../lab/testdata"}}},
			{"policy between network namespaces", 1800, &goTest{pkg: "ebpf", run: ".", flags: "-test.short"}},
		}},
		{"purge", 1, []step{guest("removal and purge", "^TestPurge$", 600)}},
		{"nodes", 2, []step{guest("two hosts, network and policy", "^TestNodes$", 2400)}},
	}
}

func suiteNames() (names []string) {
	for _, s := range suites() {
		names = append(names, s.name)
	}
	return names
}

// stepsOf are the steps of the suites named, by the number of machines.
func stepsOf(names []string) (map[int][]step, error) {
	steps := map[int][]step{}
	for _, s := range suites() {
		if slices.Contains(names, s.name) {
			steps[s.machines] = append(steps[s.machines], s.steps...)
		}
	}
	for _, n := range names {
		if !slices.Contains(suiteNames(), n) {
			return nil, fmt.Errorf("suite %q: want some of %s", n, strings.Join(suiteNames(), ", "))
		}
	}
	return steps, nil
}
