//go:build linux

package server

import (
	"os"
	"os/exec"
	"testing"
)

func TestProcStatOfZombie(t *testing.T) {
	cmd := exec.Command("/bin/sh", "-c", "exit 37")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	x := childStatus(cmd.Process.Pid)
	if !x.Known || x.Code != 37 {
		t.Errorf("status = %+v", x)
	}
	st, err := procStat(cmd.Process.Pid)
	if err != nil || st.state != 'Z' || st.ppid != os.Getpid() || st.startTime == 0 {
		t.Errorf("stat = %+v, %v", st, err)
	}
	if x := waitStatus(st.exitCode); x.Code != 37 {
		t.Errorf("status = %+v", x)
	}
}

func FuzzParseStat(f *testing.F) {
	b, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("1 (a) b) S) Z 1"))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = parseStat(b) })
}
