// Command critest runs the public CRI validation suite against a daemon of its
// own, with images made here and served from a registry on loopback; nothing
// of it is kept in this repository:
//
//	critest                        fetch and build the suite, run all of it
//	critest -- -ginkgo.focus=Exec  arguments for the suite
//
// It needs root, bin/nodeagent, Debian's busybox-static, and once the Go module
// proxy for the suite's source. The exit code is the suite's. It must not be
// linked into the product.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"

	"github.com/nodeagent/nodeagent/test/e2e/node"
	"github.com/nodeagent/nodeagent/test/images"
	"golang.org/x/sys/unix"
)

type options struct {
	version string // of cri-tools
	suite   string // a critest that is there already
	build   string // directory for what is compiled
	busybox string // for the images
	args    []string
}

func main() {
	var o options
	flag.StringVar(&o.version, "version", "v1.36.0", "`version` of "+module)
	flag.StringVar(&o.suite, "critest", "", "a `binary` of the suite, instead of building it")
	flag.StringVar(&o.build, "build", "build/critest", "`directory` for what is compiled")
	flag.StringVar(&o.busybox, "busybox", images.DefaultBusybox, "static `busybox` for the images; with Debian's, the spec that masks /bin/ls is left out")
	flag.Parse()
	o.args = flag.Args()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "critest:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	build, err := filepath.Abs(o.build)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(build, 0o755); err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "nacri") // a short path: sockets are below it
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := os.Chmod(work, 0o711); err != nil { // the root of a user namespace goes through it
		return err
	}
	applets, err := buildApplets(ctx, build)
	if err != nil {
		return err
	}
	if shellSkipsFiles(ctx, o.busybox) {
		fmt.Println("the shell of", o.busybox, "runs ls without its file: leaving out the spec MaskedPaths (test/e2e TestMaskedAndReadonlyPaths has it)")
		o.args = append([]string{"-ginkgo.skip=runtime should support MaskedPaths|benchmark"}, o.args...)
	}
	all, err := suiteImages(ctx, o.busybox, applets)
	if err != nil {
		return err
	}
	if o.suite == "" {
		digest := all[staging+"test-image-digest:latest"].Manifest.Desc.Digest.String()
		if o.suite, err = buildSuite(ctx, build, o.version, digest); err != nil {
			return fmt.Errorf("build the suite: %w", err)
		}
	}
	server, err := serve(ctx, all, filepath.Join(work, "hosts"))
	if err != nil {
		return err
	}
	defer server.Close()
	binary, err := node.Binary()
	if err != nil {
		return err
	}
	n, err := node.Start(ctx, node.Config{
		Dir: filepath.Join(work, "d"), Binary: binary, Name: fmt.Sprintf("ct%d", os.Getpid()%100000),
		RegistryDirs: []string{filepath.Join(work, "hosts")},
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Destroy(context.WithoutCancel(ctx))) }()

	endpoint := "unix://" + n.Socket
	suite := exec.CommandContext(ctx, o.suite, append([]string{"-runtime-endpoint", endpoint, "-image-endpoint", endpoint}, o.args...)...)
	suite.Dir, suite.Stdout, suite.Stderr = work, os.Stdout, os.Stderr
	if err := suite.Run(); err != nil {
		return fmt.Errorf("the suite: %w; the daemon's log ends:\n%s", err, n.LogTail(20))
	}
	return nil
}
