//go:build linux && cgo

package pause

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestProgramEndsOnSIGTERM(t *testing.T) {
	dir := t.TempDir()
	if err := WriteRoot(dir); err != nil {
		t.Fatal(err)
	}
	if err := WriteRoot(dir); err != nil {
		t.Fatalf("again: %v", err)
	}
	fi, err := os.Stat(filepath.Join(dir, "pause"))
	if err != nil || fi.Size() > 600 {
		t.Fatalf("size %d, %v", fi.Size(), err)
	}
	t.Logf("program of %d bytes", fi.Size())
	cmd := exec.Command(filepath.Join(dir, "pause"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitReady(t, cmd.Process.Pid)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("end: %v", err)
	}
}

func TestProgramReaps(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := os.Stat("/bin/busybox"); err != nil {
		t.Skip("needs busybox-static")
	}
	dir := t.TempDir()
	if err := WriteRoot(dir); err != nil {
		t.Fatal(err)
	}
	// The shell's children become orphans, then the shell becomes pause.
	cmd := exec.Command("/bin/busybox", "sh", "-c",
		"for i in 1 2 3 4 5 6 7 8; do (busybox sleep 0.05 & busybox sleep 0.01) & done; exec "+filepath.Join(dir, "pause"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitReady(t, cmd.Process.Pid)
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		b, _ := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/task/" + strconv.Itoa(cmd.Process.Pid) + "/children")
		if len(strings.Fields(string(b))) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("not reaped: %s", b)
		}
	}
	// From outside of its namespace too.
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("end: %v", err)
	}
}

// waitReady waits until the program waits for its signals.
func waitReady(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
		if strings.Contains(string(b), "State:\tS") && strings.HasPrefix(string(b), "Name:\tpause") {
			return
		}
	}
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	t.Fatalf("pause does not start: %s", b)
}
