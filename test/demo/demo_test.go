package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nodeagent/nodeagent/config"
	"github.com/nodeagent/nodeagent/test/images"
	"golang.org/x/sys/unix"
)

// TestMain makes the test binary the demo itself where a test executes it.
func TestMain(m *testing.M) {
	if os.Getenv("NODEAGENT_DEMO") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// demoCommand is the demo on directories and a network of its own.
func demoCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	top, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	bin, tool := filepath.Join(top, "bin"), filepath.Join(top, "build/testtool")
	for _, need := range []string{filepath.Join(bin, "nodeagent"), tool, images.DefaultBusybox} {
		if _, err := os.Stat(need); err != nil {
			t.Skipf("%v (make build makes it)", err)
		}
	}
	dir, err := os.MkdirTemp("", "nademo") // a short path: sockets are below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	pid := os.Getpid() // several checkouts may be tested at the same time
	text := `apiVersion: nodeagent.dev/v1
kind: Config
root: ` + dir + `/root
state: ` + dir + `/state
network:
  name: ` + fmt.Sprintf("nd%d", pid%100000) + `
  cniConfDir: ` + dir + `/cni
  podCIDRs: [` + fmt.Sprintf("10.119.%d.0/24, \"fd6e:6f64:6561:%x::/64\"", pid%256, pid%65536) + `]
`
	path := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", append([]string{"--config", path, "--bin", bin, "--tool", tool, "--watch", "1s"}, args...)...)
	cmd.Env = append(os.Environ(), "NODEAGENT_DEMO=1")
	return cmd
}

// TestOnce runs the whole show.
func TestOnce(t *testing.T) {
	out, err := demoCommand(t, "--once").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"answers CRI v1", "every digest verified", "Hello from a pod", "counter │ 1: ", "exit code 0", "pod network", "nothing left behind"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the show does not have %q:\n%s", want, out)
		}
	}
}

// TestInterrupt: a signal at any time ends in the same clean state.
func TestInterrupt(t *testing.T) {
	for _, after := range []time.Duration{50 * time.Millisecond, 300 * time.Millisecond, 700 * time.Millisecond, 3 * time.Second} {
		t.Run(after.String(), func(t *testing.T) {
			cmd := demoCommand(t)
			var out strings.Builder
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(after)
			cmd.Process.Signal(unix.SIGINT)
			err := cmd.Wait()
			if killedBy(err) == unix.SIGINT && out.Len() == 0 {
				return // it had not begun: the signal came before anybody listened for it
			}
			if begun := strings.Contains(out.String(), "Taking it all away"); err != nil ||
				begun != strings.Contains(out.String(), "nothing left behind") {
				t.Errorf("%v\n%s", err, out.String())
			}
		})
	}
}

// killedBy is the signal that ended a process, 0 if it ended otherwise.
func killedBy(err error) syscall.Signal {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return 0
	}
	if ws := exit.Sys().(syscall.WaitStatus); ws.Signaled() {
		return ws.Signal()
	}
	return 0
}

// TestRefusesASecondDaemon: the demo leaves a daemon that it did not start.
func TestRefusesASecondDaemon(t *testing.T) {
	first := demoCommand(t)
	path := first.Args[2]
	c, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		first.Process.Signal(unix.SIGINT)
		if err := first.Wait(); err != nil {
			t.Error(err)
		}
	}()
	for deadline := time.Now().Add(30 * time.Second); !answersAt(t.Context(), c.CRI.Socket); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the first demo's daemon does not answer")
		}
	}
	second := demoCommand(t)
	second.Args[2] = path
	out, err := second.CombinedOutput()
	if err == nil || !strings.Contains(string(out), ") runs already on "+c.CRI.Socket) {
		t.Errorf("%v\n%s", err, out)
	}
}
