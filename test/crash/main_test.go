// Package crash kills the daemon and its shim with SIGKILL, at each named
// phase of each call, at random moments under load, one, the other and both,
// and simulates a reboot. After each death a new daemon has to converge:
// containers run on, every number they print is in their logs exactly once,
// exit codes are exact, what was half made is gone, a repeated call succeeds,
// and nothing leaks.
//
// The phases are debug lines of the daemon (phase=Call/point). They are killed
// from outside when the line appears, so death comes shortly after the point;
// the random kills hit what lies between.
//
// The tests need root and bin/nodeagent. Without -soak they are bounded to a
// few minutes; `make soak` runs the random ones for longer.
package crash

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nodeagent/nodeagent/test/e2e/node"
	"github.com/nodeagent/nodeagent/test/images"
	"github.com/nodeagent/nodeagent/test/registry"
)

var soak = flag.Duration("soak", 0, "how long the random kills go on; 0: a short while")

var (
	binary  string
	workDir string
	image   string // busybox and the test tool
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	var err error
	if os.Getuid() != 0 {
		fmt.Println("crash: skipped: not root")
		return 0
	}
	if binary, err = node.Binary(); err != nil {
		fmt.Println("crash: skipped:", err)
		return 0
	}
	if err := setUp(); err != nil {
		fmt.Fprintln(os.Stderr, "crash:", err)
		return 1
	}
	defer os.RemoveAll(workDir)
	code := m.Run()
	node.RemoveCgroups(cgroupTop())
	return code
}

func setUp() (err error) {
	if workDir, err = os.MkdirTemp("", "nacrash"); err != nil {
		return err
	}
	tool := filepath.Join(workDir, "testtool")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", tool, "github.com/nodeagent/nodeagent/test/images/testtool")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the test tool: %w: %s", err, out)
	}
	entries := []images.Entry{images.Executable("bin/busybox", "/bin/busybox"), images.Executable("bin/testtool", tool)}
	for _, d := range []string{"etc", "proc", "sys", "dev", "tmp"} {
		entries = append(entries, images.Dir(d))
	}
	for _, a := range strings.Fields("sh sleep cat echo true kill seq usleep") {
		entries = append(entries, images.Symlink("bin/"+a, "busybox"))
	}
	img, err := images.Build(images.Config{Env: []string{"PATH=/bin"}, Cmd: []string{"/bin/sh"}}, entries...)
	if err != nil {
		return fmt.Errorf("%w (install busybox-static)", err)
	}
	// The registry lives as long as the process.
	r, err := registry.Start(registry.Config{})
	if err != nil {
		return err
	}
	image = r.Addr + "/crash/busybox:1"
	return images.Push(context.Background(), image, img)
}

func cgroupTop() string { return fmt.Sprintf("/nacrash-%d", os.Getpid()) }

// start runs a daemon for one test.
func start(t *testing.T, change func(*node.Config)) *rig {
	t.Helper()
	r := &rig{}
	name := fmt.Sprintf("c%c%d", 'a'+rigs.Add(1), os.Getpid()%100000)
	c := node.Config{Dir: filepath.Join(os.TempDir(), name), Binary: binary, Name: name, LogLevel: "debug", OnLog: r.onLog}
	if change != nil {
		change(&c)
	}
	r.Node = node.StartTest(t, c)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.pull(ctx); err != nil {
		t.Fatal(err)
	}
	return r
}
