package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type logLine struct {
	time    time.Time
	stream  string
	partial bool
	text    string
}

// parseLog reads a log file of the CRI format strictly; a last line without a
// newline is an error, because a writer must append whole lines.
func parseLog(path string) ([]logLine, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if len(b) > 0 && b[len(b)-1] != '\n' {
		return nil, fmt.Errorf("%s ends inside a line: %q", path, b[max(0, len(b)-80):])
	}
	var out []logLine
	for i, line := range bytes.SplitAfter(b, []byte("\n")) {
		if len(line) == 0 {
			continue
		}
		f := strings.SplitN(strings.TrimSuffix(string(line), "\n"), " ", 4)
		if len(f) != 4 {
			return nil, fmt.Errorf("%s:%d: %q has %d fields, want time, stream, tag, text", path, i+1, line, len(f))
		}
		l := logLine{stream: f[1], text: f[3], partial: f[2] == "P"}
		if l.time, err = time.Parse(time.RFC3339Nano, f[0]); err != nil {
			return nil, fmt.Errorf("%s:%d: %w", path, i+1, err)
		}
		if f[1] != "stdout" && f[1] != "stderr" {
			return nil, fmt.Errorf("%s:%d: stream %q", path, i+1, f[1])
		}
		if f[2] != "F" && f[2] != "P" {
			return nil, fmt.Errorf("%s:%d: tag %q", path, i+1, f[2])
		}
		if n := len(out); n > 0 && l.stream == out[n-1].stream && l.time.Before(out[n-1].time) {
			return nil, fmt.Errorf("%s:%d: time goes back from %v to %v", path, i+1, out[n-1].time, l.time)
		}
		out = append(out, l)
	}
	return out, nil
}

func (c *container) lines(t testing.TB) []logLine {
	t.Helper()
	l, err := parseLog(c.logPath())
	if err != nil {
		t.Fatalf("read container log: %v", err)
	}
	return l
}

// joined glues partial lines of one stream together again.
func joined(lines []logLine, stream string) []string {
	var out []string
	var open strings.Builder
	for _, l := range lines {
		if l.stream != stream {
			continue
		}
		open.WriteString(l.text)
		if !l.partial {
			out = append(out, open.String())
			open.Reset()
		}
	}
	if open.Len() > 0 {
		out = append(out, open.String())
	}
	return out
}

// text is all of stdout as it was printed, but for a missing last newline.
func (c *container) text(t testing.TB) string {
	t.Helper()
	return strings.Join(joined(c.lines(t), "stdout"), "\n")
}

func TestLogFormat(t *testing.T) {
	p := runPod(t)
	c := p.run(t, script(`echo out; echo err >&2; echo; printf 'a b  c \n'; printf 'no newline'`))
	c.waitExit(t)
	lines := c.lines(t)
	equal(t, "stdout", fmt.Sprintf("%q", joined(lines, "stdout")), `["out" "" "a b  c " "no newline"]`)
	equal(t, "stderr", fmt.Sprintf("%q", joined(lines, "stderr")), `["err"]`)
	equal(t, "status log path", c.status(t).LogPath, c.logPath())
}

func TestLogOldAppended(t *testing.T) {
	p := runPod(t)
	c := p.create(t, script("echo new"))
	if err := os.WriteFile(c.logPath(), []byte("2020-01-01T00:00:00.000000000Z stdout F old\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	c.start(t)
	c.waitExit(t)
	equal(t, "log", c.text(t), "old\nnew")
}

func TestLogPartialLines(t *testing.T) {
	p := runPod(t)
	// 100,000 bytes in one line: tagged P until the last piece.
	c := p.run(t, script(`head -c 100000 /dev/zero | tr '\0' x; echo; echo short`))
	c.waitExit(t)
	lines := c.lines(t)
	got := joined(lines, "stdout")
	if len(got) != 2 || got[0] != strings.Repeat("x", 100000) || got[1] != "short" {
		t.Fatalf("got %d lines of %d pieces, first %d bytes", len(got), len(lines), len(got[0]))
	}
	for _, l := range lines {
		if len(l.text) > 16<<10 {
			t.Errorf("a piece has %d bytes, the limit is 16384", len(l.text))
		}
	}
}

func TestLogTTY(t *testing.T) {
	p := runPod(t)
	c := p.run(t, script(`echo one; echo two >&2; tty`), func(c *runtimeapi.ContainerConfig) { c.Tty = true })
	c.waitExit(t)
	for _, l := range c.lines(t) {
		equal(t, "stream of a tty", l.stream, "stdout")
	}
	text := strings.ReplaceAll(c.text(t), "\r", "")
	equal(t, "text", text, "one\ntwo\n/dev/pts/0")
}

func TestLogNone(t *testing.T) {
	p := runPod(t)
	c := p.run(t, script(`i=0; while [ $i -lt 2000 ]; do echo 0123456789012345678901234567890123456789012345678901234567890123456789; i=$((i+1)); done`),
		func(c *runtimeapi.ContainerConfig) { c.LogPath = "" })
	equal(t, "exit code of a container without log", c.waitExit(t).ExitCode, 0)
}

// TestLogNothingLost has a container print numbers as fast as it can, through
// reopens, and wants each number once and in order.
func TestLogNothingLost(t *testing.T) {
	const numbers = 300000
	p := runPod(t)
	c := p.run(t, script(fmt.Sprintf("seq 1 %d", numbers)))
	files := 1
	for ; files < 6; files++ {
		time.Sleep(15 * time.Millisecond)
		if err := os.Rename(c.logPath(), fmt.Sprintf("%s.%d", c.logPath(), files)); err != nil {
			if errors.Is(err, os.ErrNotExist) {
				break
			}
			t.Fatal(err)
		}
		_, err := p.node.Runtime().ReopenContainerLog(callCtx(t), &runtimeapi.ReopenContainerLogRequest{ContainerId: c.id})
		if err != nil {
			if c.status(t).State == runtimeapi.ContainerState_CONTAINER_EXITED {
				break // it was faster
			}
			t.Fatalf("ReopenContainerLog: %v", err)
		}
	}
	c.waitExit(t)
	var all []logLine
	for i := 1; i <= files; i++ {
		l, err := parseLog(fmt.Sprintf("%s.%d", c.logPath(), i))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		all = append(all, l...)
	}
	if l, err := parseLog(c.logPath()); err == nil {
		all = append(all, l...)
	} else if !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	checkCounter(t, joined(all, "stdout"), 1, numbers)
}

// checkCounter wants the lines to be the numbers first to last, each once and
// in order.
func checkCounter(t testing.TB, lines []string, first, last int) {
	t.Helper()
	for i, l := range lines {
		if want := fmt.Sprint(first + i); l != want {
			t.Fatalf("line %d is %q, want %q (lost, torn, doubled or out of order)", i+1, l, want)
		}
	}
	if want := last - first + 1; len(lines) != want {
		t.Fatalf("%d lines, want %d", len(lines), want)
	}
}

func TestLogReopen(t *testing.T) {
	p := runPod(t)
	c := p.run(t, script(`trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done`))
	eventually(t, func() error {
		if f, err := os.Stat(c.logPath()); err != nil || f.Size() == 0 {
			return fmt.Errorf("no log yet: %v", err)
		}
		return nil
	})
	rotated := c.logPath() + ".1"
	if err := os.Rename(c.logPath(), rotated); err != nil {
		t.Fatal(err)
	}
	if _, err := p.node.Runtime().ReopenContainerLog(callCtx(t), &runtimeapi.ReopenContainerLogRequest{ContainerId: c.id}); err != nil {
		t.Fatalf("ReopenContainerLog: %v", err)
	}
	time.Sleep(200 * time.Millisecond)
	c.stop(t, 5)
	old, err := parseLog(rotated)
	if err != nil {
		t.Fatal(err)
	}
	all := append(old, c.lines(t)...)
	checkCounter(t, joined(all, "stdout"), 1, len(all))
	if len(c.lines(t)) == 0 {
		t.Error("nothing was written to the new file")
	}
	if err := os.Remove(c.logPath()); err != nil {
		t.Fatal(err)
	}
	_, err = p.node.Runtime().ReopenContainerLog(callCtx(t), &runtimeapi.ReopenContainerLogRequest{ContainerId: c.id})
	wantCode(t, "reopening the log of an exited container", err, codes.FailedPrecondition)
	if _, err := os.Stat(c.logPath()); err == nil {
		t.Error("a refused ReopenContainerLog made the file")
	}
}

// TestLogStreamsKeepOrder prints to both streams; each must keep its order.
func TestLogStreamsKeepOrder(t *testing.T) {
	const n = 3000
	p := runPod(t)
	c := p.run(t, script(fmt.Sprintf(`i=0; while [ $i -lt %d ]; do i=$((i+1)); echo $i; echo $i >&2; done`, n)))
	c.waitExit(t)
	lines := c.lines(t)
	checkCounter(t, joined(lines, "stdout"), 1, n)
	checkCounter(t, joined(lines, "stderr"), 1, n)
}

// TestLogBinary prints every byte value; the log must carry all of them.
func TestLogBinary(t *testing.T) {
	p := runPod(t)
	var script strings.Builder
	var want bytes.Buffer
	for b := 1; b < 256; b++ {
		fmt.Fprintf(&script, `\%03o`, b)
		want.WriteByte(byte(b))
	}
	c := p.run(t, command("/bin/printf", script.String()+`\n`))
	c.waitExit(t)
	got := strings.Join(joined(c.lines(t), "stdout"), "\n")
	s := bufio.NewScanner(&want)
	var lines []string
	for s.Scan() {
		lines = append(lines, s.Text())
	}
	// Scan strips \r before \n, and there is none here.
	equal(t, "bytes", fmt.Sprintf("%q", got), fmt.Sprintf("%q", strings.Join(lines, "\n")))
}
