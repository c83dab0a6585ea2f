package guest

import (
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestSmoke is the shortest walk through it all: package, readiness, a pod with
// limits, restart, reload, removal.
func TestSmoke(t *testing.T) {
	service(t)
	equal(t, "driver", property(t, "ActiveState"), "active")
	p := run(t, "smoke", counting, &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20}, nil)
	pid := containerPID(t, p)
	equal(t, "memory.max", p.groupFile(t, "memory.max"), "67108864")
	equal(t, "exec", p.sh(t, "echo works"), "works")
	command(t, "systemctl", "restart", "nodeagent")
	waitActive(t)
	equal(t, "process after a restart", containerPID(t, p), pid)
	p.countsOn(t)
	command(t, "systemctl", "reload", "nodeagent")
	statusHas(t, "1 pod, 1 container running")
	short := run(t, "short", "exit 42", nil, nil)
	equal(t, "exit code", short.waitExit(t).ExitCode, 42)
	short.remove(t)
	p.remove(t)
	t.Log(command(t, "dpkg", "-P", "nodeagent"))
}
