//go:build linux

package shim_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/nodeagent/nodeagent/shim"
)

// pipe returns our end and the one to pass.
func pipe(t testing.TB, write bool) (ours, theirs *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if write {
		r, w = w, r
	}
	t.Cleanup(func() { r.Close() })
	return r, w
}

func TestExecSyncTimeoutKillsAll(t *testing.T) {
	n := newNode(t)
	st := n.start(n.spec("c", "sleep", "1000"))
	began := time.Now()
	// A child, a grandchild that outlives its parent and, where execs have a
	// group of their own (not on cgroup v2), a daemon in its own session.
	script := "echo begin; sleep 777 & (sleep 778 &) ; "
	if _, ok := st.CgroupPaths["freezer"]; ok {
		script += "setsid sh -c '(sleep 779 &)' ; "
	}
	r, err := n.client.ExecSync(n.ctx(), "c", shim.ExecOptions{
		Process: n.process("sh", "-c", script+"sleep 780"),
		Timeout: 300 * time.Millisecond,
	})
	if err != nil || !r.TimedOut || string(r.Stdout) != "begin\n" {
		t.Errorf("exec = %+v, %v", r, err)
	}
	if d := time.Since(began); d > 2*time.Second {
		t.Errorf("it took %v", d)
	}
	n.wantProcesses("c", 1)
	n.wantNoExecGroups("c")
}

func TestExecSyncCancelKillsAll(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("c", "sleep", "1000"))
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	_, err := n.client.ExecSync(ctx, "c", shim.ExecOptions{Process: n.process("sh", "-c", "sleep 777 & sleep 778")})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("err = %v", err)
	}
	n.wantProcesses("c", 1)

	// The daemon dies.
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = n.client.ExecSync(n.ctx(), "c", shim.ExecOptions{Process: n.process("sh", "-c", "sleep 777 & sleep 778")})
	}()
	n.wantProcesses("c", 3)
	n.stop()
	<-done
	n.connect()
	n.wantProcesses("c", 1)
	n.wantNoExecGroups("c")
}

// In a frozen container not even the timeout's victim can be killed; the answer
// comes all the same, and it dies with the thaw.
func TestExecSyncInFrozenContainer(t *testing.T) {
	n := newNode(t)
	st := n.start(n.spec("c", "sleep", "1000"))
	dir, ok := st.CgroupPaths["freezer"]
	if !ok {
		t.Skip("needs the freezer of cgroup v1")
	}
	freeze := func(state string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "freezer.state"), []byte(state), 0); err != nil {
			t.Fatal(err)
		}
	}
	freeze("FROZEN")
	began := time.Now()
	r, err := n.client.ExecSync(n.ctx(), "c", shim.ExecOptions{Process: n.process("true"), Timeout: 200 * time.Millisecond})
	if err != nil || !r.TimedOut {
		t.Errorf("exec = %+v, %v", r, err)
	}
	if d := time.Since(began); d > 3*time.Second {
		t.Errorf("it took %v", d)
	}
	freeze("THAWED")
	n.wantProcesses("c", 1)
	if r, err := n.client.ExecSync(n.ctx(), "c", shim.ExecOptions{Process: n.process("true")}); err != nil || r.Code != 0 {
		t.Errorf("exec after the thaw = %+v, %v", r, err)
	}
	n.wantNoExecGroups("c")
	freeze("FROZEN")
	if _, err := n.client.Delete(n.ctx(), "c"); err != nil {
		t.Errorf("delete: %v", err)
	}
}

func TestExecSyncOutput(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("c", "sleep", "1000"))
	exec := func(o shim.ExecOptions) shim.ExecResult {
		t.Helper()
		r, err := n.client.ExecSync(n.ctx(), "c", o)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	r := exec(shim.ExecOptions{Process: n.process("sh", "-c", "yes | head -c 100000; yes no | head -c 5000000 >&2"), MaxOutput: 1000})
	if len(r.Stdout) != 1000 || len(r.Stderr) != 1000 || r.Code != 0 {
		t.Errorf("%d and %d bytes, code %d", len(r.Stdout), len(r.Stderr), r.Code)
	}
	r = exec(shim.ExecOptions{Process: n.process("sh", "-c", "seq 1 900000")})
	if len(r.Stdout) != 6188895 || !strings.HasSuffix(string(r.Stdout), "\n900000\n") {
		t.Errorf("%d bytes", len(r.Stdout))
	}
	// Something left behind holds the output open.
	began := time.Now()
	if r = exec(shim.ExecOptions{Process: n.process("sh", "-c", "sleep 2 & echo done")}); string(r.Stdout) != "done\n" || r.TimedOut {
		t.Errorf("exec = %+v", r)
	}
	if d := time.Since(began); d > time.Second {
		t.Errorf("it took %v", d)
	}
	if r = exec(shim.ExecOptions{Process: n.process("sh", "-c", "kill -9 $$")}); r.Code != 137 {
		t.Errorf("code = %d", r.Code)
	}
}

func (n *node) processes(id string) []string {
	var all []string
	b, _ := os.ReadFile("/sys/fs/cgroup/pids" + n.parent + "/" + id + "/cgroup.procs")
	if b == nil {
		b, _ = os.ReadFile("/sys/fs/cgroup" + n.parent + "/" + id + "/cgroup.procs")
	}
	for _, p := range strings.Fields(string(b)) {
		text, _ := os.ReadFile("/proc/" + p + "/cmdline")
		if len(text) > 0 { // not a zombie
			all = append(all, strings.ReplaceAll(string(text), "\x00", " "))
		}
	}
	return all
}

func (n *node) wantProcesses(id string, want int) {
	n.t.Helper()
	eventually(n.t, 3*time.Second, func() string {
		if p := n.processes(id); len(p) != want {
			return fmt.Sprintf("processes %q, want %d", p, want)
		}
		return ""
	})
}

func (n *node) wantNoExecGroups(id string) {
	n.t.Helper()
	eventually(n.t, 3*time.Second, func() string {
		g, _ := filepath.Glob("/sys/fs/cgroup/*" + n.parent + "/" + id + "/exec-*")
		return strings.Join(g, " ")
	})
}

func TestExecStream(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("c", "sleep", "1000"))
	in, inT := pipe(t, true)
	out, outT := pipe(t, false)
	errs, errT := pipe(t, false)
	s, err := n.client.Exec(n.ctx(), "c", shim.StreamOptions{
		Process: n.process("sh", "-c", "cat; echo bye >&2; exit 4"), Stdin: inT, Stdout: outT, Stderr: errT,
	})
	if err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat("0123456789abcdef", 100000)
	go func() {
		_, _ = io.WriteString(in, big)
		in.Close()
	}()
	b, err := io.ReadAll(out)
	if err != nil || string(b) != big {
		t.Errorf("stdout: %d bytes, %v", len(b), err)
	}
	if b, _ = io.ReadAll(errs); string(b) != "bye\n" {
		t.Errorf("stderr = %q", b)
	}
	if code, err := s.Wait(n.ctx()); code != 4 || err != nil {
		t.Errorf("wait = %d, %v", code, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestExecStreamCloseKills(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("c", "sleep", "1000"))
	_, outT := pipe(t, false)
	s, err := n.client.Exec(n.ctx(), "c", shim.StreamOptions{Process: n.process("sh", "-c", "setsid sleep 777 & sleep 778"), Stdout: outT})
	if err != nil {
		t.Fatal(err)
	}
	n.wantProcesses("c", 3)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	n.wantProcesses("c", 1)
	if err := s.Resize(1, 1); err == nil {
		t.Error("resize after close works")
	}
}

func TestExecTerminal(t *testing.T) {
	n := newNode(t)
	n.start(n.spec("c", "sleep", "1000"))
	in, inT := pipe(t, true)
	out, outT := pipe(t, false)
	p := n.process("sh", "-c", "stty -echo; while read l; do [ $l = size ] && stty size; [ $l = quit ] && exit 6; done")
	p.Terminal = true
	s, err := n.client.Exec(n.ctx(), "c", shim.StreamOptions{Process: p, Stdin: inT, Stdout: outT, Terminal: true, Width: 91, Height: 33})
	if err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out)
	ask := func(want string) {
		t.Helper()
		for {
			fmt.Fprintln(in, "size")
			line, err := r.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			if strings.TrimSpace(line) == want {
				return
			}
			if line != "size\r\n" { // echoed before stty
				t.Fatalf("size = %q, want %q", line, want)
			}
		}
	}
	ask("33 91")
	if err := s.Resize(120, 40); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(in, "size")
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if line == "40 120\r\n" {
			break
		}
	}
	fmt.Fprintln(in, "quit")
	if code, err := s.Wait(n.ctx()); code != 6 || err != nil {
		t.Errorf("wait = %d, %v", code, err)
	}
	if _, err := io.ReadAll(r); err != nil {
		t.Error(err)
	}
}

func TestAttach(t *testing.T) {
	n := newNode(t)
	spec := n.spec("c", "sh", "-c", "while read l; do echo got $l; echo err $l >&2; done; echo end; exit 8")
	spec.Stdin, spec.StdinOnce = true, true
	n.start(spec)
	out2, out2T := pipe(t, false)
	watch, err := n.client.Attach(n.ctx(), "c", shim.StreamOptions{Stdout: out2T})
	if err != nil {
		t.Fatal(err)
	}
	in, inT := pipe(t, true)
	out, outT := pipe(t, false)
	errs, errT := pipe(t, false)
	s, err := n.client.Attach(n.ctx(), "c", shim.StreamOptions{Stdin: inT, Stdout: outT, Stderr: errT})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(in, "a\nb\n")
	in.Close()
	for what, f := range map[string]*os.File{"client": out, "second client": out2} {
		if b, err := io.ReadAll(f); string(b) != "got a\ngot b\nend\n" || err != nil {
			t.Errorf("%s: stdout = %q, %v", what, b, err)
		}
	}
	if b, _ := io.ReadAll(errs); string(b) != "err a\nerr b\n" {
		t.Errorf("stderr = %q", b)
	}
	for _, s := range []shim.Session{s, watch} {
		if _, err := s.Wait(n.ctx()); err != nil {
			t.Error(err)
		}
	}
	if x := n.wait("c"); x.Code != 8 {
		t.Errorf("exit = %+v", x)
	}
	if got := strings.Join(n.lines("c", "stdout"), "|"); got != "got a|got b|end" {
		t.Errorf("log = %q", got)
	}
	_, o := pipe(t, false)
	if _, err := n.client.Attach(n.ctx(), "c", shim.StreamOptions{Stdout: o}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("attach after exit: %v", err)
	}
}

// Stdin stays open over the death of the shim, and over attaches when it is
// not to be used once.
func TestStdinSurvives(t *testing.T) {
	n := newNode(t)
	spec := n.spec("c", "sh", "-c", "while read l; do echo got $l; [ $l = end ] && exit 3; done; exit 1")
	spec.Stdin = true
	n.start(spec)
	send := func(text string) {
		t.Helper()
		in, inT := pipe(t, true)
		s, err := n.client.Attach(n.ctx(), "c", shim.StreamOptions{Stdin: inT})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(in, text)
		in.Close()
		eventually(t, 3*time.Second, func() string {
			if l := n.lines("c", "stdout"); len(l) == 0 || l[len(l)-1] != "got "+text {
				return strings.Join(l, "|")
			}
			return ""
		})
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	send("one")
	n.killShim()
	eventually(t, 5*time.Second, func() string { _, err := n.client.State(n.ctx(), "c"); return fmt.Sprint(errOrEmpty(err)) })
	send("two")
	send("end")
	if x := n.wait("c"); x.Code != 3 {
		t.Errorf("exit = %+v", x)
	}
}

func errOrEmpty(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// A terminal container goes on when its shim dies, and its log has all of it.
func TestTerminalSurvivesShim(t *testing.T) {
	n := newNode(t)
	spec := n.spec("c", "sh", "-c", "stty size; i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done; read l; stty size; echo $l; exit 4")
	spec.Terminal, spec.Stdin = true, true
	spec.OCI.Process.Terminal = true
	spec.OCI.Process.ConsoleSize = &specs.Box{Width: 80, Height: 25}
	n.start(spec)
	for range 4 {
		time.Sleep(20 * time.Millisecond)
		n.killShim()
	}
	eventually(t, 20*time.Second, func() string {
		l := n.lines("c", "stdout")
		return map[bool]string{false: fmt.Sprintf("%d lines", len(l))}[len(l) == 20001]
	})
	in, inT := pipe(t, true)
	out, outT := pipe(t, false)
	s, err := n.client.Attach(n.ctx(), "c", shim.StreamOptions{Stdin: inT, Stdout: outT, Terminal: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Resize(100, 50); err != nil {
		t.Error(err)
	}
	fmt.Fprintln(in, "bye")
	b, err := io.ReadAll(out)
	if err != nil || string(b) != "bye\r\n50 100\r\nbye\r\n" {
		t.Errorf("terminal says %q, %v", b, err)
	}
	if x := n.wait("c"); !x.Known || x.Code != 4 {
		t.Errorf("exit = %+v", x)
	}
	lines := n.lines("c", "stdout")
	if lines[0] != "25 80" {
		t.Errorf("first line = %q", lines[0])
	}
	wantCount(t, "terminal", lines[1:20001], 20000)
	if got := strings.Join(lines[20001:], "|"); got != "bye|50 100|bye" {
		t.Errorf("last lines = %q", got)
	}
}

// A client that takes nothing is cut off, and the container goes on.
func TestAttachSlowClient(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 10 s")
	}
	n := newNode(t)
	n.start(n.spec("c", "sh", "-c", "usleep 200000; seq 1 200000; exit 2"))
	_, outT := pipe(t, false)
	s, err := n.client.Attach(n.ctx(), "c", shim.StreamOptions{Stdout: outT})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Wait(n.ctx()); err != nil {
		t.Error(err)
	}
	if x := n.wait("c"); x.Code != 2 {
		t.Errorf("exit = %+v", x)
	}
	if l := n.lines("c", "stdout"); len(l) != 200000 || l[199999] != "200000" {
		t.Errorf("%d lines", len(l))
	}
}

func TestPause(t *testing.T) {
	n := newNode(t)
	oci := n.oci("pause", "/pause")
	oci.Root = &specs.Root{Path: n.client.PauseBinary(), Readonly: true}
	st := n.start(shim.Spec{ID: "pause", OCI: oci, Pause: true})
	// A second container in its PID namespace whose orphans pause reaps.
	spec := n.spec("c", "sh", "-c", "for i in 1 2 3 4 5; do (sleep 0.02 &) ; done; echo $$; exit 3")
	for i := range spec.OCI.Linux.Namespaces {
		if ns := &spec.OCI.Linux.Namespaces[i]; ns.Type == specs.PIDNamespace {
			ns.Path = "/proc/" + strconv.Itoa(st.Pid) + "/ns/pid"
		}
	}
	n.start(spec)
	if x := n.wait("c"); x.Code != 3 {
		t.Errorf("exit = %+v", x)
	}
	if l := n.lines("c", "stdout"); len(l) != 1 || l[0] == "1" {
		t.Errorf("pid in the namespace = %q", l)
	}
	eventually(t, 3*time.Second, func() string {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", st.Pid, st.Pid))
		return strings.TrimSpace(string(b))
	})
	if err := n.client.Signal(n.ctx(), "pause", syscall.SIGTERM, false); err != nil {
		t.Fatal(err)
	}
	if x := n.wait("pause"); x.Code != 0 || !x.Known {
		t.Errorf("pause: exit = %+v", x)
	}
}

// In a shared PID namespace the end of the first process does not end the
// others; its exit is told at once and Delete ends them.
func TestSharedPIDNamespace(t *testing.T) {
	n := newNode(t)
	oci := n.oci("pause", "/pause")
	oci.Root = &specs.Root{Path: n.client.PauseBinary(), Readonly: true}
	st := n.start(shim.Spec{ID: "pause", OCI: oci, Pause: true})
	spec := n.spec("c", "sh", "-c", "sh -c 'while :; do echo more; usleep 1000; done' & echo last; printf tail; exit 3")
	for i := range spec.OCI.Linux.Namespaces {
		if ns := &spec.OCI.Linux.Namespaces[i]; ns.Type == specs.PIDNamespace {
			ns.Path = "/proc/" + strconv.Itoa(st.Pid) + "/ns/pid"
		}
	}
	began := time.Now()
	n.start(spec)
	if x := n.wait("c"); x.Code != 3 {
		t.Errorf("exit = %+v", x)
	}
	if d := time.Since(began); d > 4*time.Second { // 5 s: it waits for the other's output
		t.Errorf("exit after %v", d)
	}
	if l := strings.Join(n.lines("c", "stdout"), "|"); !strings.Contains(l, "last") || !strings.Contains(l, "tail") {
		t.Errorf("log at exit = %q", l)
	}
	n.wantProcesses("c", 1)
	if _, err := n.client.Delete(n.ctx(), "c"); err != nil {
		t.Fatal(err)
	}
	n.wantNothing("c")
}
