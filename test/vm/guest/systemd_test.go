package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

const configFile = "/etc/nodeagent/config.yaml"

// edit replaces texts in the configuration, "old -> new", until the test ends.
func edit(t *testing.T, changes ...string) {
	t.Helper()
	before, err := os.ReadFile(configFile)
	if err != nil {
		t.Fatal(err)
	}
	text := string(before)
	for _, c := range changes {
		old, now, _ := strings.Cut(c, " -> ")
		if !strings.Contains(text, old) {
			t.Fatalf("%s has no %q", configFile, old)
		}
		text = strings.Replace(text, old, now, 1)
	}
	if err := os.WriteFile(configFile, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.WriteFile(configFile, before, 0o644) })
}

// journal is what the service has written that has the fields.
func journal(t testing.TB, fields ...string) (entries []map[string]any) {
	t.Helper()
	out := command(t, "journalctl", append([]string{"-u", "nodeagent", "-o", "json", "--no-pager"}, fields...)...)
	for line := range strings.Lines(out) {
		var e map[string]any
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		entries = append(entries, e)
	}
	return entries
}

func statusHas(t testing.TB, want string) {
	t.Helper()
	eventually(t, "the status line has "+want, func() error {
		if s := property(t, "StatusText"); !strings.Contains(s, want) {
			return fmt.Errorf("it is %q", s)
		}
		return nil
	})
}

// TestServiceReload: what can change live does, what cannot is told, a bad file
// is refused; the daemon and its pods go on.
func TestServiceReload(t *testing.T) {
	service(t)
	p := run(t, "reload", counting, nil, nil)
	defer p.remove(t)
	pid := mainPID(t)
	t.Run("applied", func(t *testing.T) {
		edit(t, "level: info -> level: debug", "warmNamespaces: 4 -> warmNamespaces: 5")
		command(t, "systemctl", "reload", "nodeagent")
		statusHas(t, "a restart is needed for network.warmNamespaces")
		p.sh(t, "true")
		eventually(t, "debug lines are in the journal", func() error {
			if len(journal(t, "PRIORITY=7")) == 0 {
				return errors.New("none")
			}
			return nil
		})
		e := journal(t, "NODEAGENT_PATH="+configFile, "PRIORITY=6")
		if len(e) == 0 {
			t.Fatal("the journal does not say what was applied")
		}
		last := e[len(e)-1]
		if !strings.Contains(fmt.Sprint(last["MESSAGE"]), "configuration reloaded") || last["NODEAGENT_APPLIED"] != "[log.level]" || last["SYSLOG_IDENTIFIER"] != "nodeagent" {
			t.Errorf("the journal has %v", last)
		}
		if e := journal(t, "NODEAGENT_FIELDS=[network.warmNamespaces]", "PRIORITY=4"); len(e) == 0 {
			t.Error("the journal does not say what needs a restart")
		}
	})
	t.Run("bad file", func(t *testing.T) {
		edit(t, "warmNamespaces: 4 -> warmNamespaces: many")
		if out, err := exec.Command("systemctl", "reload", "nodeagent").CombinedOutput(); err == nil {
			t.Errorf("systemctl reload takes a bad file: %s", out)
		}
		statusHas(t, "last error")
		statusHas(t, "network.warmNamespaces")
		e := journal(t, "NODEAGENT_PATH="+configFile, "PRIORITY=3")
		if len(e) == 0 || !strings.Contains(fmt.Sprint(e[0]["NODEAGENT_ERR"]), "network.warmNamespaces") {
			t.Errorf("the journal has %v", e)
		}
		equal(t, "state", property(t, "ActiveState"), "active")
	})
	t.Run("signal", func(t *testing.T) {
		// The file is the former one again.
		n := len(journal(t, "NODEAGENT_APPLIED=[log.level]"))
		command(t, "systemctl", "kill", "--kill-who=main", "--signal=HUP", "nodeagent")
		eventually(t, "the level changes", func() error {
			if len(journal(t, "NODEAGENT_APPLIED=[log.level]")) != n+1 {
				return errors.New("nothing in the journal")
			}
			return nil
		})
	})
	command(t, "systemctl", "reload", "nodeagent")
	statusHas(t, "1 pod, 1 container running")
	equal(t, "the daemon", mainPID(t), pid)
	p.countsOn(t)
}

// TestServiceSocket: who calls while the daemon restarts waits and is served.
func TestServiceSocket(t *testing.T) {
	service(t)
	equal(t, "descriptors that systemd holds", property(t, "NFileDescriptorStore"), "1")
	stop, ended := make(chan struct{}), make(chan error)
	calls := 0
	go func() {
		for {
			select {
			case <-stop:
				ended <- nil
				return
			case <-time.After(5 * time.Millisecond):
			}
			c, err := net.Dial("unix", socket)
			if err != nil {
				ended <- err
				return
			}
			c.Close()
			calls++
		}
	}()
	command(t, "systemctl", "restart", "nodeagent")
	waitActive(t)
	before := mainPID(t)
	syscall.Kill(before, syscall.SIGKILL)
	eventually(t, "another daemon", func() error {
		if now := mainPID(t); now == before || now == 0 {
			return fmt.Errorf("main process %d", now)
		}
		return nil
	})
	waitActive(t)
	close(stop)
	if err := <-ended; err != nil {
		t.Errorf("after %d calls: %v", calls, err)
	}
	t.Logf("%d calls through a restart and a crash", calls)
	equal(t, "descriptors that systemd holds", property(t, "NFileDescriptorStore"), "1")
}

// TestServiceHardening: the unit protects the daemon and takes nothing from
// the containers, which inherit from it.
func TestServiceHardening(t *testing.T) {
	service(t)
	for name, want := range map[string]string{
		"Type": "notify", "NotifyAccess": "main", "Restart": "always", "KillMode": "process", "Delegate": "yes", "OOMPolicy": "continue",
		"OOMScoreAdjust": "-999", "ManagedOOMPreference": "avoid", "WatchdogUSec": "3min", "TimeoutStopFailureMode": "abort", "FileDescriptorStoreMax": "16", "TasksMax": "infinity", "UMask": "0022",
	} {
		equal(t, name, property(t, name), want)
	}
	for path, want := range map[string]os.FileMode{
		"/run/nodeagent": 0o711, "/var/lib/nodeagent": 0o711, "/run/nodeagent/admin.sock": 0o600, socket: 0o660,
		"/var/lib/nodeagent/state.db": 0o600, "/var/lib/nodeagent/images": 0o700, configFile: 0o644,
	} {
		fi, err := os.Stat(path)
		if err != nil {
			t.Error(err)
			continue
		}
		equal(t, "mode of "+path, fi.Mode().Perm(), want)
		equal(t, "owner of "+path, fi.Sys().(*syscall.Stat_t).Uid, 0)
	}
	equal(t, "mounts reach the host", command(t, "readlink", fmt.Sprintf("/proc/%d/ns/mnt", mainPID(t))), command(t, "readlink", "/proc/1/ns/mnt"))
	p := run(t, "plain", "sleep 1000", nil, nil)
	defer p.remove(t)
	for _, line := range []string{"NoNewPrivs:\t0", "Seccomp:\t0"} {
		if s := p.sh(t, "cat /proc/1/status"); !strings.Contains(s, line) {
			t.Errorf("a container inherits a restriction: no %q in\n%s", line, s)
		}
	}
}

// TestServiceStatus: what systemctl status shows.
func TestServiceStatus(t *testing.T) {
	service(t)
	statusHas(t, "0 pods, 0 containers running")
	p, q := run(t, "one", "sleep 1000", nil, nil), run(t, "two", "exit 3", nil, nil)
	q.waitExit(t)
	statusHas(t, "2 pods, 1 container running")
	t.Log("\n" + command(t, "systemctl", "status", "--no-pager", "-n", "5", "nodeagent"))
	p.remove(t)
	q.remove(t)
}
