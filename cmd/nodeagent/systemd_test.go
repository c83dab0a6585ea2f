package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/cri"

	"github.com/nodeagent/nodeagent/cri/images"
)

func TestStatusText(t *testing.T) {
	at := time.Date(2026, 11, 30, 12, 1, 2, 0, time.UTC)
	for _, tt := range []struct{ got, want string }{
		{statusText(0, 1, nil, "", at), "0 pods, 1 container running"},
		{statusText(1, 2, []string{"cri.socket", "root"}, "", at), "1 pod, 2 containers running; a restart is needed for cri.socket, root"},
		{statusText(1, 0, nil, "cannot:\nx", at), "1 pod, 0 containers running; last error Nov 30 12:01:02: cannot:: x"},
	} {
		if tt.got != tt.want {
			t.Errorf("got %q, want %q", tt.got, tt.want)
		}
	}
	long := statusText(1, 0, nil, strings.Repeat("ä", 400), at)
	if len(long) > maxStatusError+100 || strings.ContainsRune(long, '\uFFFD') {
		t.Errorf("%d bytes: %q", len(long), long)
	}
}

// managerOf collects what a service manager is told.
type managerOf struct {
	mu   sync.Mutex
	said []string
}

func (m *managerOf) notify(state string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.said = append(m.said, state)
}

func (m *managerOf) has(state string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.ContainsFunc(m.said, func(s string) bool { return strings.HasPrefix(s, state) })
}

// TestServiceTellsSystemd: READY waits for the CRI, STOPPING comes at the end.
func TestServiceTellsSystemd(t *testing.T) {
	var m managerOf
	asked := make(chan struct{}, 1)
	up := make(chan struct{})
	s := &service{
		log: slog.New(slog.DiscardHandler), notify: m.notify, served: make(chan struct{}),
		status: func(context.Context) string { return "well" },
		answers: func(context.Context) error {
			select {
			case asked <- struct{}{}:
			default:
			}
			select {
			case <-up:
				return nil
			default:
				return errors.New("not yet")
			}
		},
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- s.run(ctx) }()
	close(s.served)
	<-asked
	if m.has("READY") {
		t.Error("ready before the CRI answers")
	}
	close(up)
	waitFor(t, "READY", func() bool { return m.has("READY=1\nSTATUS=well") })
	cancel()
	if err := <-ended; err != nil || !m.has("STOPPING=1") {
		t.Errorf("%v; said %q", err, m.said)
	}
}

// TestWatchdogNeedsEveryLoop: one loop that does not come round is enough.
func TestWatchdogNeedsEveryLoop(t *testing.T) {
	var log bytes.Buffer
	fine := func(context.Context) error { return nil }
	stuck := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	s := &service{log: slog.New(slog.NewTextHandler(&log, nil)), answers: fine, loops: map[string]func(context.Context) error{"exits": fine, "policy": fine}}
	if !s.progress(t.Context(), time.Minute) {
		t.Error("all loops are well, but no progress")
	}
	s.loops["policy"] = stuck
	if s.progress(t.Context(), time.Millisecond) || !strings.Contains(log.String(), "loop=policy") {
		t.Errorf("a loop hangs, but there is progress: %s", log.String())
	}
}

// reloaderOf is one whose parts note what they get.
func reloaderOf(t *testing.T, uplinks func(context.Context, []string) error) (r *reloader, write func(text string), got *images.Settings) {
	t.Helper()
	path, c := instance(t)
	got = &images.Settings{}
	r = &reloader{
		path: path, cfg: c, log: newLogging(&bytes.Buffer{}, c.Log, nil), notify: func(string) {}, uplinks: uplinks,
		images: func(s images.Settings) error { *got = s; return nil },
	}
	text := string(c.Document())
	return r, func(change string) {
		old, now, _ := strings.Cut(change, " -> ")
		if !strings.Contains(text, old) {
			t.Fatalf("no %q in\n%s", old, text)
		}
		text = strings.Replace(text, old, now, 1)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}, got
}

func TestReload(t *testing.T) {
	var nics []string
	r, write, got := reloaderOf(t, func(_ context.Context, p []string) error { nics = p; return nil })
	var m managerOf
	r.notify = m.notify
	write("level: info -> level: debug")
	write("uplinks: [] -> uplinks: [\"eth*\"]")
	write("registryConfigDirs: [ -> registryConfigDirs: [/srv/certs.d, ")
	write("warmNamespaces: 4 -> warmNamespaces: 5")
	out, err := r.reload(t.Context())
	want := reloaded{Applied: []string{"log.level", "images.registryConfigDirs", "policy.uplinks"}, Waiting: []string{"network.warmNamespaces"}}
	if err != nil || !reflect.DeepEqual(out, want) {
		t.Fatalf("%+v, %v", out, err)
	}
	if !r.log.Enabled(t.Context(), slog.LevelDebug) || !slices.Equal(nics, []string{"eth*"}) || got.RegistryConfigDirs[0] != "/srv/certs.d" {
		t.Errorf("uplinks %q, images %+v", nics, got)
	}
	if len(m.said) != 2 || !strings.HasPrefix(m.said[0], "RELOADING=1\nMONOTONIC_USEC=") || m.said[1] != "READY=1" {
		t.Errorf("systemd was told %q", m.said)
	}
	if b, err := json.Marshal(r); err != nil || !strings.Contains(string(b), `"level":"debug"`) || !strings.Contains(string(b), `"warmNamespaces":4`) {
		t.Errorf("in force: %s %v", b, err)
	}
	// What waits goes on waiting, and is told each time.
	out, err = r.reload(t.Context())
	if want := (reloaded{Waiting: []string{"network.warmNamespaces"}}); err != nil || !reflect.DeepEqual(out, want) || !slices.Equal(r.waiting(), want.Waiting) {
		t.Errorf("%+v, %v", out, err)
	}
	write("warmNamespaces: 5 -> warmNamespaces: 4")
	if out, err = r.reload(t.Context()); err != nil || out.String() != "nothing to apply" || len(r.waiting()) != 0 {
		t.Errorf("%v, %v", out, err)
	}
}

// TestReloadRefuses: a bad file, and one that cannot be applied, change nothing.
func TestReloadRefuses(t *testing.T) {
	fail := false
	r, write, got := reloaderOf(t, func(context.Context, []string) error {
		if fail {
			return errors.New("policy engine has ended")
		}
		return nil
	})
	before := r.cfg
	check := func(want string) {
		t.Helper()
		_, err := r.reload(t.Context())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
		if !reflect.DeepEqual(r.cfg, before) || r.log.Enabled(t.Context(), slog.LevelDebug) {
			t.Error("something changed")
		}
	}
	write("level: info -> level: debug")
	write("maxParallelDownloads: 4 -> maxParallelDownloads: 5")
	write("warmNamespaces: 4 -> warmNamespaces: -1")
	check("network.warmNamespaces")
	if text, _ := r.log.last.get(); !strings.Contains(text, "former one stays in force") {
		t.Errorf("the status line would say %q", text)
	}
	write("warmNamespaces: -1 -> warmNamespaces: 4")
	fail = true
	check("policy engine has ended")
	if got.MaxParallelDownloads != 4 {
		t.Errorf("images have %+v", got)
	}
}

// TestReloadCommand: through the socket, with the daemon's words.
func TestReloadCommand(t *testing.T) {
	r, write, _ := reloaderOf(t, nil)
	if err := os.MkdirAll(r.cfg.State, 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		done <- serveAdmin(ctx, r.cfg.AdminSocket(), fakeStore{}, func(mux *http.ServeMux) { mux.Handle("POST "+adminReload, r) }, slog.New(slog.DiscardHandler))
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	waitFor(t, "the socket", func() bool { _, err := os.Stat(r.cfg.AdminSocket()); return err == nil })
	write("level: info -> level: warn")
	write("masquerade: true -> masquerade: false")
	out, err := execute(t, "reload", "--config", r.path)
	if want := "applied: log.level; a restart is needed for: network.masquerade\n"; err != nil || out != want {
		t.Errorf("%q, %v", out, err)
	}
	write("masquerade: false -> masquerade: maybe")
	if _, err := execute(t, "reload", "--config", r.path); err == nil || !strings.Contains(err.Error(), "network.masquerade") {
		t.Errorf("a bad file: %v", err)
	}
	if _, err := callReload(t.Context(), r.cfg.AdminSocket()); err == nil || !strings.Contains(err.Error(), "the former configuration stays in force") {
		t.Errorf("a bad file, asked of the daemon: %v", err)
	}
}

// TestReloadOnHangup: SIGHUP does the same.
func TestReloadOnHangup(t *testing.T) {
	r, write, _ := reloaderOf(t, nil)
	hup := make(chan os.Signal, 1)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- r.onSignal(ctx, hup) }()
	write("level: info -> level: debug")
	hup <- unix.SIGHUP
	waitFor(t, "the new level", func() bool { return r.log.Enabled(ctx, slog.LevelDebug) })
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// storeOf is a service manager that holds descriptors.
type storeOf struct{ held map[string]*os.File }

func (s *storeOf) notify(state string, keep ...*os.File) error {
	verb, name, _ := strings.Cut(state, "\nFDNAME=")
	switch verb {
	case "FDSTORE=1":
		fd, err := unix.Dup(int(keep[0].Fd()))
		s.held[name] = os.NewFile(uintptr(fd), name)
		return err
	case "FDSTOREREMOVE=1":
		s.held[name].Close()
		delete(s.held, name)
		return nil
	}
	return errors.New("unexpected " + state)
}

// next is what the following process gets.
func (s *storeOf) next(t *testing.T) *keptSocket {
	t.Helper()
	k := &keptSocket{log: slog.New(slog.DiscardHandler), notify: s.notify}
	for name, f := range s.held {
		fd, err := unix.Dup(int(f.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		k.held = append(k.held, os.NewFile(uintptr(fd), name))
	}
	return k
}

// TestKeptSocket: a caller that comes between two daemons is served by the
// second; a socket whose file was replaced is let go.
func TestKeptSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cri.sock")
	s := &storeOf{held: map[string]*os.File{}}
	first, err := s.next(t).listen(path)
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	caller, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("between two daemons: %v", err)
	}
	defer caller.Close()
	second, err := s.next(t).listen(path)
	if err != nil {
		t.Fatal(err)
	}
	served, err := second.Accept()
	if err != nil {
		t.Fatal(err)
	}
	served.Close()
	second.Close()
	if len(s.held) != 1 {
		t.Errorf("held: %v", s.held)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	third, err := s.next(t).listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer third.Close()
	if _, err := net.Dial("unix", path); err != nil {
		t.Errorf("the socket was not made anew: %v", err)
	}
	if len(s.held) != 1 {
		t.Errorf("held: %v", s.held)
	}
}

// TestNotify: state and descriptors arrive at the manager's socket.
func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	ln, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := sdNotify("FDSTORE=1", f); err != nil {
		t.Fatal(err)
	}
	buf, oob := make([]byte, 100), make([]byte, 100)
	n, m, _, _, err := ln.ReadMsgUnix(buf, oob)
	if err != nil || string(buf[:n]) != "FDSTORE=1" {
		t.Fatalf("%q %v", buf[:n], err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:m])
	if err != nil || len(msgs) != 1 {
		t.Fatalf("%v %v", msgs, err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		t.Fatalf("%v %v", fds, err)
	}
	unix.Close(fds[0])
	testStillCloses(t)
	t.Setenv("NOTIFY_SOCKET", "")
	if err := sdNotify("READY=1"); err != nil {
		t.Errorf("without a manager: %v", err)
	}
}

// testStillCloses: a listener that the manager keeps ends its Accept when it is
// closed.
func testStillCloses(t *testing.T) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kept")
	ln, err := cri.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	k := &keptSocket{notify: sdNotify}
	if err := k.keep(ln.(*net.UnixListener), path); err != nil {
		t.Fatal(err)
	}
	raw, err := ln.(*net.UnixListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var flags int
	if err := raw.Control(func(fd uintptr) { flags, err = unix.FcntlInt(fd, unix.F_GETFL, 0) }); err != nil {
		t.Fatal(err)
	}
	if err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Fatalf("the kept listener blocks: flags %#x, %v", flags, err)
	}
	done := make(chan error, 1)
	go func() { _, err := ln.Accept(); done <- err }()
	ln.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept on a closed listener: %v", err)
	}
}
