package guest

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const note = payload + "/rebooted.json"

// TestBeforeReboot leaves a running pod behind; the host restarts after it.
func TestBeforeReboot(t *testing.T) {
	service(t)
	p := run(t, "old", counting, nil, nil)
	p.countsOn(t)
	data, err := json.Marshal([]string{p.id, p.ctr})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(note, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestAfterReboot: the service came up by itself, the old pod is reported as
// ended, can be removed, and a new one of the same name runs.
func TestAfterReboot(t *testing.T) {
	machine(t)
	waitActive(t)
	data, err := os.ReadFile(note)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	if err := json.Unmarshal(data, &ids); err != nil || len(ids) != 2 {
		t.Fatal(err)
	}
	old := &pod{rt: runtime(t), id: ids[0], ctr: ids[1], log: logDir + "/old.log"}
	s := old.status(t)
	equal(t, "old container", s.State, runtimeapi.ContainerState_CONTAINER_EXITED)
	if s.ExitCode == 0 || s.FinishedAt < s.StartedAt {
		t.Errorf("exit code %d, started %v, finished %v", s.ExitCode, time.Unix(0, s.StartedAt), time.Unix(0, s.FinishedAt))
	}
	t.Logf("reported as: %s, %d, %q", s.Reason, s.ExitCode, s.Message)
	r, err := old.rt.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: old.id})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "old pod", r.Status.State, runtimeapi.PodSandboxState_SANDBOX_NOTREADY)
	old.remove(t)
	p := run(t, "old", counting, nil, nil)
	p.countsOn(t)
	p.remove(t)
	entries, _ := os.ReadDir("/var/lib/nodeagent/containers")
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			t.Errorf("left: %s", e.Name())
		}
	}
}

// TestPurge: removal ends the pods, of a daemon that was stopped as well, and
// keeps the data; purge takes that too.
func TestPurge(t *testing.T) {
	service(t)
	run(t, "last", "sleep 1000", nil, nil)
	t.Log(command(t, "dpkg", "-r", "nodeagent"))
	for _, f := range []string{"/usr/bin/nodeagent", "/usr/lib/systemd/system/nodeagent.service"} {
		if _, err := os.Stat(f); err == nil {
			t.Errorf("%s is left", f)
		}
	}
	for _, f := range []string{"/etc/nodeagent/config.yaml", "/var/lib/nodeagent/images"} {
		if _, err := os.Stat(f); err != nil {
			t.Errorf("removal without purge: %v", err)
		}
	}
	leaves(t)
	t.Log(command(t, "dpkg", "-i", payload+"/nodeagent.deb"))
	waitActive(t)
	p := run(t, "again", counting, nil, nil) // the image is still there
	p.countsOn(t)
	command(t, "systemctl", "stop", "nodeagent")
	p.countsOn(t)
	t.Log(command(t, "dpkg", "-r", "nodeagent"))
	leaves(t)
	t.Log(command(t, "dpkg", "-P", "nodeagent"))
	for _, f := range []string{"/etc/nodeagent", "/var/lib/nodeagent", "/run/nodeagent", "/etc/systemd/system/nodeagent.service"} {
		if _, err := os.Lstat(f); err == nil {
			t.Errorf("%s is left", f)
		}
	}
	if out := command(t, "sh", "-c", "find / -xdev -iname '*nodeagent*' -not -path '/payload/*' -not -path '/tmp/*' || true"); out != "" {
		t.Errorf("named after us and left: %s", out)
	}
}
