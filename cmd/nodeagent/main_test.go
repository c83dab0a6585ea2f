package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nodeagent/nodeagent/cmd/nodeagent/internal/probe"
	"github.com/nodeagent/nodeagent/config"
	"github.com/nodeagent/nodeagent/cri/images"
	"github.com/opencontainers/go-digest"
)

// TestMain makes the test binary answer as nodeagent where the code under
// test executes /proc/self/exe.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-") {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// execute runs the command line in this process.
func execute(t *testing.T, args ...string) (stdout string, err error) {
	t.Helper()
	var out bytes.Buffer
	cmd := newRootCommand()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	err = cmd.ExecuteContext(t.Context())
	return out.String(), err
}

// instance writes a configuration with directories of its own.
func instance(t *testing.T) (path string, c config.Config) {
	t.Helper()
	dir := t.TempDir()
	c = config.Default()
	c.Root, c.State = filepath.Join(dir, "root"), filepath.Join(dir, "state")
	c.CRI.Socket = filepath.Join(c.State, "nodeagent.sock")
	path = filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(path, c.Document(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path, c
}

func TestConfigDefaultValidates(t *testing.T) {
	text, err := execute(t, "config", "default")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := execute(t, "config", "validate", path); err != nil || !strings.Contains(out, "is valid") {
		t.Errorf("%q, %v", out, err)
	}
}

// TestErrorsSayWhatToDo: one line each, with the next step.
func TestErrorsSayWhatToDo(t *testing.T) {
	path, c := instance(t)
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"image", "ls", "--config", path}, `no daemon answers on ` + c.CRI.Socket + `: start it with "nodeagent run", or name its configuration with --config`},
		{[]string{"image", "pull", "x", "--config", path}, `no daemon answers on ` + c.AdminSocket() + `: start it with "nodeagent run", or name its configuration with --config`},
		{[]string{"image", "pull", "x", "--creds", "me", "--config", path}, `--creds is not user:password`},
		{[]string{"cert", "status", "--config", path}, `certificates are not kept here: set node.mode: certificates in the configuration and restart the daemon`},
		{[]string{"cert", "status", "-o", "xml", "--config", path}, `--output "xml" is not one of table, json`},
		{[]string{"version", "-o", "xml"}, `--output "xml" is not one of text, json`},
		{[]string{"version", "--ouput", "json"}, `unknown flag: --ouput; see "nodeagent version --help"`},
		{[]string{"config", "validate", "/absent"}, `read configuration: stat /absent: no such file or directory`},
	} {
		_, err := execute(t, tt.args...)
		if err == nil || err.Error() != tt.want {
			t.Errorf("%v:\ngot  %v\nwant %s", tt.args, err, tt.want)
		}
	}
}

func TestVersionJSON(t *testing.T) {
	out, err := execute(t, "version", "-o", "json")
	var v versionInfo
	if err != nil || json.Unmarshal([]byte(out), &v) != nil || !strings.HasPrefix(v.Go, "go1.") {
		t.Errorf("%q, %v", out, err)
	}
}

func TestManualAndCompletion(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "man8")
	if _, err := execute(t, "man", dir); err != nil {
		t.Fatal(err)
	}
	for _, page := range []string{"nodeagent.8", "nodeagent-run.8", "nodeagent-image-import.8"} {
		if _, err := os.Stat(filepath.Join(dir, page)); err != nil {
			t.Error(err)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if out, err := execute(t, "completion", shell); err != nil || len(out) < 500 {
			t.Errorf("completion %s: %d bytes, %v", shell, len(out), err)
		}
	}
}

func TestCheck(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	before := mounts(t)
	out, err := execute(t, "check", "--output", "json")
	var report struct {
		OK     bool
		Checks []probe.Result
	}
	if e := json.Unmarshal([]byte(out), &report); e != nil {
		t.Fatalf("%v in %s", e, out)
	}
	var exit exitError
	if report.OK != (err == nil) || err != nil && !errors.As(err, &exit) {
		t.Errorf("ok %v, but error %v", report.OK, err)
	}
	for _, r := range report.Checks {
		if r.Found != (r.Lost == "") || r.Detail == "" && r.Found {
			t.Errorf("%+v", r)
		}
	}
	if after := mounts(t); after != before {
		t.Errorf("mounts before\n%s\nafter\n%s", before, after)
	}
}

// mounts are those that a check could have made.
func mounts(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(regexp.MustCompile(`(?m)^.*\.nodeagent-check-.*$`).FindAllString(string(data), -1), "\n")
}

func TestCheckTable(t *testing.T) {
	var b bytes.Buffer
	err := reportCheck(&b, "table", []probe.Result{
		{Group: "kernel", Name: "version", Found: true, Essential: true, Detail: "6.1"},
		{Group: "kernel", Name: "systemd", Detail: "not booted with it", Lost: "its driver"},
		{Group: "files", Name: "overlayfs", Essential: true, Detail: "no such device", Lost: "images"},
	})
	want := `kernel
  found    version                        6.1
  missing  systemd                        not booted with it
                                           lost: its driver
files
  MISSING  overlayfs                      no such device
                                           essential, lost: images

2 of 3 missing, 1 of them essential: nodeagent will not work here.
`
	if b.String() != want || !errors.Is(err, exitError{1}) {
		t.Errorf("%v\n%s", err, b.String())
	}
}

func TestOneDaemonPerDirectory(t *testing.T) {
	_, c := instance(t)
	release, err := claim(c)
	if err != nil {
		t.Fatal(err)
	}
	_, err = claim(c)
	if err == nil || !strings.Contains(err.Error(), "another nodeagent (pid ") {
		t.Errorf("second claim: %v", err)
	}
	release()
	release, err = claim(c)
	if err != nil {
		t.Fatal(err)
	}
	release()
}

// TestClaimEndsWithItsProcess: a process that dies gives its claim back.
func TestClaimEndsWithItsProcess(t *testing.T) {
	_, c := instance(t)
	if err := os.MkdirAll(c.State, 0o700); err != nil {
		t.Fatal(err)
	}
	lock := filepath.Join(c.State, "daemon.lock")
	holder := exec.Command("flock", lock, "sleep", "60")
	holder.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := holder.Start(); err != nil {
		t.Skip(err)
	}
	waitFor(t, "the holder's lock", func() bool { r, err := claim(c); closeIf(r, err); return err != nil })
	syscall.Kill(-holder.Process.Pid, syscall.SIGKILL)
	holder.Wait()
	waitFor(t, "the lock to be free", func() bool { r, err := claim(c); closeIf(r, err); return err == nil })
}

func closeIf(release func(), err error) {
	if err == nil {
		release()
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// TestTrim: the program still works with its pages gone, and has fewer.
func TestTrim(t *testing.T) {
	before := filePages(t)
	if err := trim(); err != nil {
		t.Fatal(err)
	}
	if after := filePages(t); after > before*3/4 {
		t.Errorf("%d kB of the program are mapped after, %d before", after, before)
	}
}

// After a burst it is trimmed at the next rest, after single calls now and then.
func TestWorthTrimming(t *testing.T) {
	for _, c := range []struct {
		cpu, since time.Duration
		want       bool
	}{
		{0, time.Hour, false},
		{workCPU - 1, time.Hour, false},
		{workCPU, trimPause - 1, false},
		{workCPU, trimPause, true},
		{burstCPU, time.Second, true},
	} {
		if got := worthTrimming(c.cpu, c.since); got != c.want {
			t.Errorf("%v of CPU in %v: %v", c.cpu, c.since, got)
		}
	}
}

// filePages are the resident file mappings, in kB.
func filePages(t *testing.T) (kb int) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(regexp.MustCompile(`RssFile:\s*(\d+)`).FindStringSubmatch(string(data))[1], &kb); err != nil {
		t.Fatal(err)
	}
	return kb
}

// fakeStore answers as the image store does.
type fakeStore struct {
	pull func(context.Context, images.PullOptions) (images.Image, error)
}

func (f fakeStore) Pull(ctx context.Context, o images.PullOptions) (images.Image, error) {
	return f.pull(ctx, o)
}

func (f fakeStore) Import(_ context.Context, path string, o images.ImportOptions) ([]images.Image, error) {
	return []images.Image{{ID: "sha256:1", RepoTags: []string{path}}, {ID: "sha256:2", RepoTags: []string{o.Name}}}, nil
}

// serve runs an admin socket until the test ends.
func serve(t *testing.T, f fakeStore) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "admin.sock")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- serveAdmin(ctx, socket, f, func(*http.ServeMux) {}, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	waitFor(t, "the socket", func() bool { _, err := os.Stat(socket); return err == nil })
	return socket
}

func layer(n string, phase images.Phase, offset int64) images.Progress {
	return images.Progress{Ref: "r", Digest: digest.Digest("sha256:" + n), Kind: "layer", Phase: phase, Offset: offset, Total: 10}
}

func TestAdminPull(t *testing.T) {
	steps := []images.Progress{layer("a", images.Downloading, 5), layer("b", images.Downloaded, 10), layer("a", images.Unpacked, 10)}
	socket := serve(t, fakeStore{pull: func(_ context.Context, o images.PullOptions) (images.Image, error) {
		for _, s := range steps {
			o.Progress(s)
		}
		if o.Auth.Username != "me" {
			return images.Image{}, errors.New("no credentials arrived")
		}
		return images.Image{ID: "sha256:1", RepoTags: []string{o.Ref}, Size: 7}, nil
	}})
	var seen []images.Progress
	got, err := callAdmin(t.Context(), socket, adminPull, pullRequest{Ref: "r", Auth: images.Auth{Username: "me"}},
		func(p images.Progress) { seen = append(seen, p) })
	if err != nil {
		t.Fatal(err)
	}
	if want := []adminImage{{ID: "sha256:1", RepoTags: []string{"r"}, Size: 7}}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if !reflect.DeepEqual(seen, steps) {
		t.Errorf("progress %+v, want %+v", seen, steps)
	}
	if fi, err := os.Stat(socket); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", fi.Mode(), err)
	}
}

func TestAdminErrors(t *testing.T) {
	socket := serve(t, fakeStore{pull: func(context.Context, images.PullOptions) (images.Image, error) {
		return images.Image{}, errors.New(`pull "r": no such image`)
	}})
	for _, tt := range []struct {
		path string
		req  any
		want string
	}{
		{adminPull, pullRequest{Ref: "r"}, `pull "r": no such image`},
		{adminPull, map[string]int{"reff": 1}, `the daemon refuses: decode request: json: unknown field "reff"`},
		{adminImport, importRequest{Path: "x.tar"}, `import "x.tar": not an absolute path`},
		{"/v2/other", struct{}{}, `the daemon refuses: 404 page not found`},
	} {
		_, err := callAdmin(t.Context(), socket, tt.path, tt.req, func(images.Progress) {})
		if err == nil || err.Error() != tt.want {
			t.Errorf("%s %v: got %v, want %s", tt.path, tt.req, err, tt.want)
		}
	}
}

func TestAdminClientGoneCancelsPull(t *testing.T) {
	started, ended := make(chan struct{}), make(chan error, 1)
	socket := serve(t, fakeStore{pull: func(ctx context.Context, o images.PullOptions) (images.Image, error) {
		close(started)
		<-ctx.Done()
		ended <- ctx.Err()
		return images.Image{}, ctx.Err()
	}})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-started; cancel() }()
	if _, err := callAdmin(ctx, socket, adminPull, pullRequest{}, func(images.Progress) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("client: %v", err)
	}
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("the pull goes on though nobody waits for it")
	}
}

// TestFeedKeepsTheLatest: a slow client sees each phase, with its last figure.
func TestFeedKeepsTheLatest(t *testing.T) {
	f := newFeed()
	for i := range int64(1000) {
		f.put(layer("a", images.Downloading, i))
	}
	f.put(layer("a", images.Unpacked, 10))
	f.close()
	var got []images.Progress
	for b := range f.batches() {
		got = append(got, b...)
	}
	want := []images.Progress{layer("a", images.Downloading, 999), layer("a", images.Unpacked, 10)}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestProgressWithoutTerminal(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b)
	for _, s := range []images.Progress{
		layer("aaaaaaaaaaaaaaaa", images.Downloading, 1), layer("aaaaaaaaaaaaaaaa", images.Downloading, 9),
		layer("aaaaaaaaaaaaaaaa", images.Unpacked, 10),
	} {
		p.update(s)
	}
	p.finish()
	want := "layer aaaaaaaaaaaa  downloading  10 B\nlayer aaaaaaaaaaaa  unpacked     10 B\n"
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}

func TestProgressOnTerminal(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b)
	p.width, p.rows = 60, 24
	p.update(layer("a", images.Downloading, 5))
	p.update(layer("b", images.Downloaded, 10))
	b.Reset()
	p.update(layer("a", images.Unpacked, 10))
	for _, line := range strings.Split(strings.TrimRight(b.String(), "\n"), "\n") {
		if n := len([]rune(regexp.MustCompile("\x1b\\[[0-9]*[A-Z]|\r").ReplaceAllString(line, ""))); n >= p.width {
			t.Errorf("%q is %d columns wide, the terminal %d", line, n, p.width)
		}
	}
	if !strings.HasPrefix(b.String(), "\x1b[2A") {
		t.Errorf("%q does not go back over the two lines drawn before", b.String())
	}
}

// TestProgressOnSmallTerminal: more layers than rows are not a scrolling mess.
func TestProgressOnSmallTerminal(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b)
	p.width, p.rows = 60, 10
	for i := range 40 {
		p.update(layer(fmt.Sprint(i), images.Downloading, 5))
		if i%3 == 0 {
			p.update(layer(fmt.Sprint(i), images.Unpacked, 10))
		}
	}
	for i := range 40 {
		before := p.drawn
		p.update(layer(fmt.Sprint(i), images.Unpacked, 10))
		if p.drawn < before || p.drawn >= p.rows {
			t.Fatalf("%d lines drawn over %d on %d rows", p.drawn, before, p.rows)
		}
	}
	for _, up := range regexp.MustCompile("\x1b\\[(\\d+)A").FindAllStringSubmatch(b.String(), -1) {
		if len(up[1]) > 1 {
			t.Errorf("goes up %s lines on %d rows", up[1], p.rows)
		}
	}
}
