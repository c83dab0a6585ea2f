//go:build linux && cgo

package join

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The program is machine code without the rest of the one that carries it: it
// must not refer to anything there.
func TestProgramIsComplete(t *testing.T) {
	objdump, err := exec.LookPath("objdump")
	if err != nil {
		t.Skip("needs objdump")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	code, err := exec.Command(objdump, "-d", "--no-show-raw-insn", "-j", "joincode", self).Output()
	if err != nil {
		t.Fatal(err)
	}
	instruction := regexp.MustCompile(`(?m)^ *([0-9a-f]+):\t`)
	all := instruction.FindAllSubmatch(code, -1)
	if len(all) < 500 {
		t.Fatalf("%d instructions", len(all))
	}
	number := func(b []byte) uint64 {
		n, err := strconv.ParseUint(string(b), 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	first, last := number(all[0][1]), number(all[len(all)-1][1])
	// Targets of jumps and calls, and addresses relative to the code.
	target := regexp.MustCompile(`(?m)^.*[ \t](?:0x)?([0-9a-f]{4,}) <.*$`)
	found := target.FindAllSubmatch(code, -1)
	if len(found) < 100 {
		t.Fatalf("%d references", len(found))
	}
	for _, m := range found {
		if at := number(m[1]); at < first || at > last {
			t.Errorf("a reference out of the program: %s", m[0])
		}
	}
}

// A program started by somebody else, as a container can by /proc/PID/exe, only
// ends.
func TestProgramAlone(t *testing.T) {
	j, err := New()
	if err != nil {
		t.Fatal(err)
	}
	fi, err := j.program.Stat()
	if err != nil || fi.Size() > 4096 {
		t.Errorf("program of %d bytes, %v", fi.Size(), err)
	}
	t.Logf("program of %d bytes", fi.Size())
	if _, err := j.program.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("write to the sealed program: %v", err)
	}
	path := filepath.Join("/proc/self/fd", strconv.Itoa(int(j.program.Fd())))
	out, err := exec.Command(path).CombinedOutput()
	var x *exec.ExitError
	if !errors.As(err, &x) || x.ExitCode() != 255 || len(out) != 0 {
		t.Errorf("ended with %v, said %q", err, out)
	}
}

// What cannot be joined changes nothing and leaves nothing behind.
func TestNotJoined(t *testing.T) {
	j, err := New()
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	child := exec.Command("sleep", "1000")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(child.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	_ = child.Process.Kill()
	_ = child.Wait()
	dead := os.NewFile(uintptr(fd), "pidfd")
	defer dead.Close()
	p := &Process{Args: []string{"/bin/true"}, Stdio: [3]*os.File{null, null, null}}
	for name, c := range map[string]*Container{
		"no pidfd":        {Pidfd: null, Namespaces: unix.CLONE_NEWUTS},
		"dead container":  {Pidfd: dead, Namespaces: unix.CLONE_NEWUTS},
		"no tasks file":   {Pidfd: dead, Namespaces: unix.CLONE_NEWUTS, Tasks: []string{"/none/tasks"}},
		"no unified one":  {Pidfd: dead, Namespaces: unix.CLONE_NEWUTS, Unified: "/none"},
		"not a v2 group":  {Pidfd: dead, Namespaces: unix.CLONE_NEWUTS, Unified: "/proc"},
		"wrong oom score": {Pidfd: dead, Namespaces: unix.CLONE_NEWUTS, OOMScore: "many"},
	} {
		pid, err := j.Start(c, p)
		if !errors.Is(err, ErrNotJoined) || pid != 0 {
			t.Errorf("%s: %d, %v", name, pid, err)
		}
		t.Log(err)
	}
	if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != unix.ECHILD {
		t.Errorf("a child is left: %v", err)
	}
}

// Our own namespaces serve as a container's: the process sees what it was given
// and is our child.
func TestStart(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	j, err := New()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	self := os.NewFile(uintptr(fd), "pidfd")
	defer self.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p := &Process{
		Args: []string{"sh", "-c", "echo $A $PWD; exec cat /proc/self/limits"}, Env: []string{"PATH=/bin:/usr/bin", "A=b c"}, Cwd: "/usr",
		Rlimits: []Rlimit{{unix.RLIMIT_NOFILE, 66, 88}}, Stdio: [3]*os.File{w, w, w},
	}
	pid, err := j.Start(&Container{Pidfd: self, Namespaces: unix.CLONE_NEWUTS}, p)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	_, _ = out.ReadFrom(r)
	var st syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &st, 0, nil); err != nil || st.ExitStatus() != 0 {
		t.Errorf("end: %v, %v", st, err)
	}
	if ok, _ := regexp.Match(`^b c /usr\n(?s).*Max open files +66 +88 `, out.Bytes()); !ok {
		t.Errorf("said %s", out.Bytes())
	}
}

func TestEnvironment(t *testing.T) {
	for _, c := range []struct {
		in, out []string
		home    bool
		err     string
	}{
		{nil, nil, false, ""},
		{[]string{"A=1", "B=2", "A=3"}, []string{"B=2", "A=3"}, false, ""},
		{[]string{"HOME=", "A="}, []string{"A="}, false, ""},
		{[]string{"HOME=/h", "A=b=c"}, []string{"HOME=/h", "A=b=c"}, true, ""},
		{[]string{"A"}, nil, false, "invalid environment variable: missing '='"},
		{[]string{"=A"}, nil, false, "invalid environment variable: name cannot be empty"},
		{[]string{"A=\x00"}, nil, false, `invalid environment variable "A": contains nul byte (\x00)`},
	} {
		out, home, err := environment(c.in)
		if !slices.Equal(out, c.out) || home != c.home || (err == nil) != (c.err == "") || err != nil && err.Error() != c.err {
			t.Errorf("%q: %q, %v, %v", c.in, out, home, err)
		}
	}
}

func TestLookPath(t *testing.T) {
	for _, c := range []struct {
		name, path string
		out        []string
		search     bool
	}{
		{"/bin/x", "/bin", []string{"/bin/x"}, false},
		{"./x", "/bin", []string{"./x"}, false},
		{"x", "/a:/b/:", []string{"/a/x", "/b/x", "x"}, true},
		{"x", "", nil, true},
		{"..", "/a", nil, false},
	} {
		out, search, err := lookPath(c.name, []string{"A=1", "PATH=" + c.path})
		if !slices.Equal(out, c.out) || search != c.search || (err != nil) != (c.name == "..") {
			t.Errorf("%s in %s: %q, %v, %v", c.name, c.path, out, search, err)
		}
	}
}
