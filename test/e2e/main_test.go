// Package e2e drives the built daemon over its CRI socket, as a kubelet would,
// and checks what the kernel and the disk then hold. It covers the ground of
// the CRI validation suite without needing it, and what that suite does not
// ask: concurrency, cancellation, limits, faults.
//
// The tests share one daemon (see TestMain) with pods of their own; a test that
// needs other settings, or breaks things on purpose, starts its own daemon.
// They need root, bin/nodeagent and Debian's busybox-static, and skip without.
// At the end the shared daemon must hold what it held at the start.
package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// The daemon, its registry and its cgroup parent that all tests share.
var (
	shared  *node.Node
	hub     *testRegistry
	workDir string

	systemdDriver bool // the shared daemon has systemd make cgroups
)

const cgroupTop = "nae2e"

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	if os.Getuid() != 0 {
		fmt.Println("e2e: skipped: not root")
		return 0
	}
	binary, err := node.Binary()
	if err != nil {
		fmt.Println("e2e: skipped:", err)
		return 0
	}
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	if workDir, err = os.MkdirTemp("", "nae2e"); err != nil {
		return fail(err)
	}
	defer os.RemoveAll(workDir)
	// Root of a user namespace has to get through, as it may on a real node.
	if err := os.Chmod(workDir, 0o755); err != nil {
		return fail(err)
	}
	if hub, err = startRegistry(); err != nil {
		return fail(err)
	}
	defer hub.Close()
	ctx := context.Background()
	shared, err = node.Start(ctx, node.Config{
		Dir: filepath.Join(workDir, "d"), Binary: binary, Name: nodeName("s"),
		RegistryDirs: []string{hub.hostsDir()},
		Seccomp:      "RuntimeDefault",
		LogLevel:     "debug",
		CRIExtra:     fmt.Sprintf("  cdiSpecDirs: [%q]", filepath.Join(workDir, "cdi")),
	})
	if err != nil {
		return fail(err)
	}
	defer func() {
		if err := shared.Destroy(ctx); err != nil {
			code = fail(err)
		}
		node.RemoveCgroups(podCgroup(""))
	}()
	conf, err := shared.Runtime().RuntimeConfig(ctx, &runtimeapi.RuntimeConfigRequest{})
	if err != nil {
		return fail(err)
	}
	systemdDriver = conf.GetLinux().GetCgroupDriver() == runtimeapi.CgroupDriver_SYSTEMD
	if err := pullAll(ctx, shared); err != nil {
		return fail(err)
	}
	before := shared.Settled()
	code = m.Run()
	if code != 0 {
		fmt.Printf("--- the shared daemon's log ends:\n%s\n", shared.LogTail(60))
	}
	if err := shared.RemoveAllPods(ctx); err != nil {
		fail(fmt.Errorf("remove what tests left: %w", err))
		code = 1
	}
	if leaks := shared.WaitNoLeaks(before); leaks != "" {
		fail(fmt.Errorf("the tests are over and the shared daemon holds more than at the start:\n%s", leaks))
		code = 1
	}
	return code
}

// nodeName makes a network name that no other process uses.
func nodeName(prefix string) string {
	return fmt.Sprintf("e%s%d", prefix, os.Getpid()%100000)
}

// podCgroup is the cgroup parent of the pod called name, as a kubelet with the
// daemon's cgroup driver would give it; "" names the parent of them all.
func podCgroup(name string) string {
	if !systemdDriver {
		return fmt.Sprintf("/%s-%d/%s", cgroupTop, os.Getpid(), name)
	}
	top := fmt.Sprintf("%s%d", cgroupTop, os.Getpid())
	if name == "" {
		return "/" + top + ".slice"
	}
	return fmt.Sprintf("/%s.slice/%s-%s.slice", top, top, strings.ReplaceAll(name, "-", "_"))
}
