package criolog

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestAppendLines(t *testing.T) {
	const at = 1700000000_000000009
	for _, c := range []struct {
		name    string
		in      string
		final   bool
		stripCR bool
		want    string // "tag text|tag text"
		used    int
	}{
		{name: "nothing"},
		{name: "a line", in: "a\n", want: "F a", used: 2},
		{name: "empty lines", in: "\n\n", want: "F |F ", used: 2},
		{name: "no end yet", in: "a\nb", want: "F a", used: 2},
		{name: "no end ever", in: "a\nb", final: true, want: "F a|P b", used: 3},
		{name: "exactly the longest", in: "12345678\n", want: "F 12345678", used: 9},
		{name: "exactly the longest, no end yet", in: "12345678", used: 0},
		{name: "too long", in: "123456789\n", want: "P 12345678|F 9", used: 10},
		{name: "much too long", in: "12345678abcdefgh12345678\n", want: "P 12345678|P abcdefgh|F 12345678", used: 25},
		{name: "CR stays", in: "a\r\n", want: "F a\r", used: 3},
		{name: "CR of a terminal", in: "a\r\nb\rc\r\n\r\n", stripCR: true, want: "F a|F b\rc|F ", used: 10},
		{name: "any byte", in: "\x00\xff \x01\n", want: "F \x00\xff \x01", used: 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := batch{at: at, stream: Stderr, max: 8, stripCR: c.stripCR}
			out, used, _ := b.appendLines(nil, []byte(c.in), c.final, 0)
			if used != c.used {
				t.Errorf("used %d, want %d", used, c.used)
			}
			var want string
			for i, l := range strings.Split(c.want, "|") {
				if c.want != "" {
					want += fmt.Sprintf("2023-11-14T22:13:20.%09dZ stderr %s\n", 9+i, l)
				}
			}
			if string(out) != want {
				t.Errorf("out = %q, want %q", out, want)
			}
		})
	}
}

func TestStampCarries(t *testing.T) {
	s := stamp{ns: 1700000000_999999999}
	b := s.append(nil)
	s.ns++
	b = s.append(append(b, ' '))
	if string(b) != "2023-11-14T22:13:20.999999999Z 2023-11-14T22:13:21.000000000Z" {
		t.Errorf("stamps = %s", b)
	}
}

// What was written in pieces and replayed as a whole must be the same bytes.
func FuzzReplayIsExact(f *testing.F) {
	f.Add([]byte("a\nbb\n\ncccccccccccccccccccccc\nx"), 3, 7)
	f.Add([]byte("\r\n\r\n12345678\n123456789"), 1, 1)
	f.Fuzz(func(t *testing.T, src []byte, cut, limit int) {
		b := batch{at: 1, max: 8, stripCR: len(src)%2 == 0}
		out, used, _ := b.appendLines(nil, src[:min(len(src), max(cut, 0))], false, max(limit, 0))
		again, n, _ := b.appendLines(nil, src[:used], true, 0)
		if n != used || !bytes.Equal(out, again) {
			t.Errorf("%d bytes: %q, replayed %d bytes: %q", used, out, n, again)
		}
	})
}

func FuzzState(f *testing.F) {
	var b [recordSize]byte
	(&state{dev: 1, ino: 2, size: 3, expect: 4, at: 5, stream: Stderr, pos: [streams]position{{1, 2, 3}, {0, 5, 9}}}).encode(&b)
	f.Add(b[:])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, in []byte) {
		var s state
		if s.decode(in) != nil {
			return
		}
		var out [recordSize]byte
		s.encode(&out)
		if !bytes.Equal(in, out[:]) {
			t.Errorf("%x decodes and encodes to %x", in, out)
		}
	})
}

// world is a log whose writers die.
type world struct {
	t    *testing.T
	dir  string
	log  *Log
	pipe [streams][2]int
	// die is asked at each crash point.
	die func(step string) bool
}

type killed struct{}

func newWorld(t *testing.T) *world {
	w := &world{t: t, dir: t.TempDir(), die: func(string) bool { return false }}
	for s := range streams {
		if err := unix.Pipe2(w.pipe[s][:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(w.pipe[s][0]); unix.Close(w.pipe[s][1]) })
	}
	w.open()
	return w
}

func (w *world) path() string { return filepath.Join(w.dir, "log") }

func (w *world) open() {
	w.t.Helper()
	l, err := Open(Config{Dir: w.dir, Path: w.path(), MaxLine: 100})
	if err != nil {
		w.t.Fatal(err)
	}
	l.step = func(name string) {
		if w.die(name) {
			panic(killed{})
		}
	}
	w.log = l
	w.t.Cleanup(l.closeFiles)
}

// do runs f, which may die, and starts again after its death until it lives.
func (w *world) do(f func() error) error {
	w.t.Helper()
	for {
		err, died := w.once(f)
		if !died {
			return err
		}
		w.open()
	}
}

func (w *world) once(f func() error) (err error, died bool) {
	defer func() {
		if p := recover(); p != nil {
			if _, ok := p.(killed); !ok {
				panic(p)
			}
			died = true
		}
	}()
	return f(), false
}

// put lets the container write p and the log take it.
func (w *world) put(s Stream, p []byte) {
	w.t.Helper()
	for len(p) > 0 {
		n, err := unix.Write(w.pipe[s][1], p)
		if err != nil && err != unix.EAGAIN {
			w.t.Fatal(err)
		}
		p = p[max(n, 0):]
		err = w.do(func() error {
			for {
				if _, err := w.log.Take(s, w.pipe[s][0]); err != nil {
					return err
				}
			}
		})
		if err != unix.EAGAIN {
			w.t.Fatal(err)
		}
	}
}

func (w *world) finish() {
	w.t.Helper()
	for s := range streams {
		if err := w.do(func() error { return w.log.Finish(s) }); err != nil {
			w.t.Fatal(err)
		}
	}
}

// text is what the log has of each stream, put together again.
func (w *world) text(paths ...string) [streams]string {
	w.t.Helper()
	var b [streams]strings.Builder
	var last string
	for _, p := range paths {
		all, err := os.ReadFile(p)
		if err != nil {
			w.t.Fatal(err)
		}
		for line := range strings.Lines(string(all)) {
			f := strings.SplitN(line, " ", 4)
			if len(f) != 4 || !strings.HasSuffix(line, "\n") {
				w.t.Fatalf("torn line %q", line)
			}
			if f[0] <= last {
				w.t.Fatalf("time goes back: %q after %q", line, last)
			}
			last = f[0]
			s := map[string]Stream{"stdout": Stdout, "stderr": Stderr}[f[1]]
			switch f[2] {
			case "F":
				b[s].WriteString(f[3])
			case "P":
				b[s].WriteString(strings.TrimSuffix(f[3], "\n"))
			default:
				w.t.Fatalf("line %q", line)
			}
		}
	}
	return [streams]string{b[0].String(), b[1].String()}
}

// feed makes the output of a container: lines of all lengths, cut anywhere.
func (w *world) feed(rng *rand.Rand, bytes int) [streams]string {
	var want [streams]strings.Builder
	for bytes > 0 {
		s := Stream(rng.IntN(2))
		var p []byte
		for range 1 + rng.IntN(30) {
			p = fmt.Appendf(p, "%d-%s\n", bytes, strings.Repeat("x", rng.IntN(250)))
		}
		if rng.IntN(2) == 0 {
			p = p[:len(p)-1-rng.IntN(min(20, len(p)-1))]
		}
		want[s].Write(p)
		w.put(s, p)
		bytes -= len(p)
	}
	return [streams]string{want[0].String(), want[1].String()}
}

func TestExactWithoutDeath(t *testing.T) {
	w := newWorld(t)
	rng := rand.New(rand.NewPCG(1, 2))
	want := w.feed(rng, 4<<20)
	w.finish()
	if got := w.text(w.path()); got != want {
		t.Errorf("log differs")
	}
	for s := range streams {
		for _, f := range w.log.spool[s] {
			if f == nil {
				t.Errorf("%v: the spool was never rotated", s)
				continue
			}
			if fi, err := f.Stat(); err != nil || fi.Size() > spoolLimit+1<<20 {
				t.Errorf("spool of %d bytes, %v", fi.Size(), err)
			}
		}
	}
}

// Death at every crash point, each many times, and at all of them at random.
func TestExactWithDeath(t *testing.T) {
	for _, at := range []string{"spliced", "recorded", "written", "copied", "switched", ""} {
		t.Run("at "+at, func(t *testing.T) {
			w := newWorld(t)
			rng := rand.New(rand.NewPCG(3, uint64(len(at))))
			dice := rand.New(rand.NewPCG(5, uint64(len(at))))
			deaths := 0
			w.die = func(step string) bool {
				if at != "" && step != at || dice.IntN(3) > 0 {
					return false
				}
				deaths++
				if step == "written" && dice.IntN(2) == 0 {
					w.tear(dice)
				}
				return true
			}
			want := w.feed(rng, 3<<20)
			w.finish()
			if got := w.text(w.path()); got != want {
				t.Errorf("log differs after %d deaths", deaths)
			}
			if deaths < 1 {
				t.Errorf("%d deaths", deaths)
			}
			t.Logf("%d deaths", deaths)
		})
	}
}

// tear takes away a part of the last write: as if death had come within it.
func (w *world) tear(rng *rand.Rand) {
	fi, err := os.Stat(w.path())
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.Truncate(w.path(), fi.Size()-rng.Int64N(w.log.st.expect+1)); err != nil {
		w.t.Fatal(err)
	}
}

// The log is renamed, and the writer dies before, between and after.
func TestExactWithRotation(t *testing.T) {
	w := newWorld(t)
	rng := rand.New(rand.NewPCG(7, 7))
	dice := rand.New(rand.NewPCG(8, 8))
	w.die = func(step string) bool {
		if dice.IntN(4) > 0 {
			return false
		}
		if step == "written" {
			w.tear(dice)
		}
		return true
	}
	var want [streams]string
	var paths []string
	for i := range 20 {
		died := false
		got := w.feed(rng, 50<<10)
		for s := range want {
			want[s] += got[s]
		}
		if dice.IntN(2) == 0 {
			// Killed within a write, and renamed before the next writer comes.
			s := Stream(dice.IntN(2))
			more := fmt.Appendf(nil, "rotation %d\n", i)
			want[s] += string(more)
			if _, err := unix.Write(w.pipe[s][1], more); err != nil {
				t.Fatal(err)
			}
			_, died = w.once(func() error { _, err := w.log.Take(s, w.pipe[s][0]); return err })
		}
		old := fmt.Sprintf("%s.%d", w.path(), i)
		if err := os.Rename(w.path(), old); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, old)
		if died || dice.IntN(2) == 0 {
			w.open()
		}
		if err := w.log.Reopen(); err != nil {
			t.Fatal(err)
		}
	}
	w.put(Stdout, []byte("end\n"))
	want[Stdout] += "end\n"
	w.finish()
	if got := w.text(append(paths, w.path())...); got != want {
		t.Error("logs differ")
	}
}

// A log that is complete and was taken away is not written again.
func TestReopenForgetsOldFile(t *testing.T) {
	w := newWorld(t)
	w.put(Stdout, []byte("one\n"))
	if err := os.Rename(w.path(), w.path()+".1"); err != nil {
		t.Fatal(err)
	}
	if err := w.log.Reopen(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(w.path() + ".1"); err != nil {
		t.Fatal(err)
	}
	w.open()
	w.put(Stdout, []byte("two\n"))
	if got := w.text(w.path()); got[Stdout] != "two\n" {
		t.Errorf("log = %q", got[Stdout])
	}
}

// When the disk is full the pipe stays full, and nothing is lost.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("mount tmpfs:", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	spool := t.TempDir()
	l, err := Open(Config{Dir: spool, Path: filepath.Join(dir, "log")})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		for {
			n, err := l.Take(Stdout, p[0])
			if err == unix.EAGAIN {
				time.Sleep(time.Millisecond)
				continue
			}
			if err != nil || n == 0 {
				done <- err
				return
			}
		}
	}()
	// rotate makes room as a kubelet does, and keeps what was written.
	rotations := 0
	rotate := func() {
		t.Helper()
		gone := filepath.Join(dir, "gone")
		if err := os.Rename(filepath.Join(dir, "log"), gone); err != nil {
			t.Fatal(err)
		}
		if err := l.Reopen(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(gone)
		if err == nil {
			err = os.WriteFile(filepath.Join(spool, fmt.Sprintf("old.%06d", rotations)), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		os.Remove(gone)
		rotations++
	}
	var want strings.Builder
	for i := range 3000 {
		line := fmt.Appendf(nil, "%06d %s\n", i, strings.Repeat("y", 50))
		want.Write(line)
		for {
			_, err := unix.Write(p[1], line)
			if err == nil {
				break
			}
			if err != unix.EAGAIN {
				t.Fatal(err)
			}
			time.Sleep(5 * time.Millisecond)
			rotate()
		}
	}
	unix.Close(p[1])
	for running := true; running; {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		case <-time.After(20 * time.Millisecond):
			rotate()
		}
	}
	w := &world{t: t}
	olds, _ := filepath.Glob(spool + "/old.*")
	got := w.text(append(olds, filepath.Join(dir, "log"))...)
	if got[Stdout] != want.String() {
		t.Errorf("log has %d bytes, want %d", len(got[Stdout]), want.Len())
	}
	if len(olds) == 0 {
		t.Error("the disk was never full")
	}
}

func TestTap(t *testing.T) {
	for _, path := range []string{"", "log"} {
		dir := t.TempDir()
		if path != "" {
			path = filepath.Join(dir, path)
		}
		var got bytes.Buffer
		on := true
		l, err := Open(Config{Dir: dir, Path: path, Tap: func(s Stream, p []byte) { got.Write(p) }, Tapped: func() bool { return on }})
		if err != nil {
			t.Fatal(err)
		}
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(w, "no newline yet")
		if _, err := l.Take(Stdout, int(r.Fd())); err != nil {
			t.Fatal(err)
		}
		on = false
		fmt.Fprint(w, "unseen")
		if _, err := l.Take(Stdout, int(r.Fd())); err != nil {
			t.Fatal(err)
		}
		w.Close()
		if n, err := l.Take(Stdout, int(r.Fd())); n != 0 || err != nil {
			t.Errorf("at the end: %d, %v", n, err)
		}
		if got.String() != "no newline yet" {
			t.Errorf("tap = %q", got.String())
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Take(Stdout, int(r.Fd())); path != "" && !errors.Is(err, os.ErrClosed) {
			t.Errorf("after close: %v", err)
		}
	}
}

func TestOtherVersionIsRefusedAndKept(t *testing.T) {
	dir := t.TempDir()
	var b [recordSize]byte
	(&state{}).encode(&b)
	b[4] = 9
	if err := os.WriteFile(filepath.Join(dir, "log.state"), b[:], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{Dir: dir, Path: filepath.Join(dir, "log")}); err == nil {
		t.Error("opened")
	}
	if now, err := os.ReadFile(filepath.Join(dir, "log.state")); err != nil || !bytes.Equal(now, b[:]) {
		t.Errorf("record changed: %v", err)
	}
}

// BenchmarkTake is the cost of bringing 100-byte lines into the log.
func BenchmarkTake(b *testing.B) {
	dir := b.TempDir()
	l, err := Open(Config{Dir: dir, Path: filepath.Join(dir, "log")})
	if err != nil {
		b.Fatal(err)
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		b.Fatal(err)
	}
	block := bytes.Repeat([]byte(strings.Repeat("x", 99)+"\n"), 640)
	b.SetBytes(int64(len(block)))
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		if _, err := unix.Write(p[1], block); err != nil {
			b.Fatal(err)
		}
		if _, err := l.Take(Stdout, p[0]); err != nil {
			b.Fatal(err)
		}
		if n++; n%1000 == 0 {
			_ = syscall.Truncate(filepath.Join(dir, "log"), 0)
		}
	}
}
