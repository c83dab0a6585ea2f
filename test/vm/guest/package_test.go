package guest

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestServicePackage: what the package brings is there, as it was built, and in
// force.
func TestServicePackage(t *testing.T) {
	service(t)
	equal(t, "files that differ from the package", command(t, "dpkg", "--verify", "nodeagent"), "")
	for path, want := range map[string]string{
		"/usr/bin/nodeagent-cni":                           "\x7fELF",
		"/usr/bin/nodeagent-shim":                          "\x7fELF",
		"/usr/lib/systemd/system/nodeagent.service":        "ExecStart=/usr/bin/nodeagent run\n",
		"/usr/lib/modules-load.d/nodeagent.conf":           "overlay\n",
		"/usr/share/doc/nodeagent/copyright":               "Apache-2.0",
		"/usr/share/doc/nodeagent/changelog.gz":            "nodeagent (" + installed(t) + ")",
		"/usr/share/man/man8/nodeagent.8.gz":               ".TH",
		"/usr/share/man/man8/nodeagent-run.8.gz":           ".TH",
		"/usr/share/man/man8/nodeagent-policy-why.8.gz":    ".TH",
		"/usr/share/man/man8/nodeagent-shim.8.gz":          ".TH",
		"/usr/share/man/man8/nodeagent-cni.8.gz":           ".TH",
		"/usr/share/bash-completion/completions/nodeagent": "__start_nodeagent",
		configFile: "network:\n",
	} {
		read := []string{"cat", path}
		if strings.HasSuffix(path, ".gz") {
			read[0] = "zcat"
		}
		if out, err := exec.Command(read[0], read[1:]...).CombinedOutput(); err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: no %q, %v", path, want, err)
		}
	}
	if s := command(t, "dpkg-query", "-W", "-f", "${Conffiles}", "nodeagent"); !strings.HasPrefix(s, configFile+" ") {
		t.Errorf("conffiles: %q", s)
	}
	// Debian has 0, 128 and, by its memory, some thousands.
	for name, want := range map[string]string{
		"net/ipv4/ip_forward": "1", "fs/inotify/max_user_instances": "8192", "fs/inotify/max_user_watches": "524288",
	} {
		b, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err != nil {
			t.Fatal(err)
		}
		equal(t, name, strings.TrimSpace(string(b)), want)
	}
	for _, m := range strings.Fields(command(t, "grep", "-v", "^#", "/usr/lib/modules-load.d/nodeagent.conf")) {
		if _, err := os.Stat("/sys/module/" + m); err != nil {
			t.Errorf("module not loaded: %v", err)
		}
	}
	equal(t, "what bash completes", command(t, "bash", "-c", complete), "check completion config cert")
	if s := property(t, "Before"); !strings.Contains(s, "kubelet.service") {
		t.Errorf("the unit is before %q", s)
	}
	equal(t, "the unit as systemd sees it", command(t, "systemd-analyze", "--man=no", "verify", "nodeagent.service"), "")
}

// complete prints what bash makes of "nodeagent c<Tab>", in a fixed order.
const complete = `. /usr/share/bash-completion/bash_completion
_completion_loader nodeagent
COMP_WORDS=(nodeagent c) COMP_CWORD=1 COMP_LINE="nodeagent c" COMP_POINT=11 COMP_TYPE=9 COMP_KEY=9
__start_nodeagent 2>/dev/null
for w in check completion config cert; do
	printf '%s\n' "${COMPREPLY[@]}" | sed 's/ .*//' | grep -x "$w"
done | xargs echo`

// TestServiceCheck: a stock Debian with cgroup v2 has all that is essential; what
// it lacks is younger than its kernel.
func TestServiceCheck(t *testing.T) {
	service(t)
	t.Log("\n" + command(t, "nodeagent", "check"))
	var report struct {
		Checks []struct {
			Group, Name, Detail string
			Found, Essential    bool
		}
	}
	if err := json.Unmarshal([]byte(command(t, "nodeagent", "check", "-o", "json")), &report); err != nil {
		t.Fatal(err)
	}
	missing := map[string]bool{}
	for _, c := range report.Checks {
		if !c.Found {
			missing[c.Name] = true
		}
		if !c.Found && c.Essential {
			t.Errorf("missing: %s, %s: %s", c.Group, c.Name, c.Detail)
		}
	}
	for _, name := range []string{"systemd", "version 2", "cpuset, io, hugetlb", "pressure (PSI)", "overlayfs", "programs", "BTF", "seccomp", "AppArmor", "CAP_SYS_RESOURCE"} {
		if missing[name] {
			t.Errorf("%s is said to be missing", name)
		}
	}
	for _, name := range []string{"tcx", "pidfd exit info", "SELinux"} { // 6.6, 6.15
		if !missing[name] {
			t.Errorf("%s is said to be there", name)
		}
	}
}

// TestServiceDown: everything is stopped and cleaned on purpose, by the command
// and by nothing else.
func TestServiceDown(t *testing.T) {
	service(t)
	p := run(t, "down", "sleep 1000", nil, nil)
	run(t, "ended", "exit 3", nil, nil).waitExit(t)
	command(t, "systemctl", "stop", "nodeagent")
	if out, err := exec.Command("nodeagent", "down").CombinedOutput(); err == nil || !strings.Contains(string(out), "no daemon answers on "+socket) {
		t.Errorf("without a daemon: %v, %s", err, out)
	}
	if containerPID(t, p) == 0 {
		t.Error("the container has ended with the daemon")
	}
	command(t, "systemctl", "start", "nodeagent")
	waitActive(t)
	equal(t, "it says", command(t, "nodeagent", "down"), "removed 2 pods")
	statusHas(t, "0 pods, 0 containers running")
	equal(t, "it says then", command(t, "nodeagent", "down"), "removed 0 pods")
	command(t, "systemctl", "stop", "nodeagent")
	leaves(t)
	command(t, "systemctl", "start", "nodeagent")
	waitActive(t)
}

// leaves checks that nothing of pods and of our processes is left.
func leaves(t testing.TB) {
	t.Helper()
	for what, script := range map[string]string{
		"processes": "pgrep -af '[n]odeagent-shim|[s]leep 1000'",
		"mounts":    "grep -E ' /(run|var/lib)/nodeagent/(ns|sandboxes|containers)/' /proc/self/mountinfo",
		"links":     "ip -o link | grep ' na'",
		"tables":    "nft list tables | grep nodeagent",
		"groups":    "find /sys/fs/cgroup -depth -type d -path '*guest*' -name '*.scope'",
		"programs":  "ls /sys/fs/bpf | grep nodeagent",
	} {
		if out, _ := exec.Command("sh", "-c", script).Output(); len(out) > 0 {
			t.Errorf("%s left: %s", what, out)
		}
	}
}
