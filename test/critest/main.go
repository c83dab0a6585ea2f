// Command critest runs the public CRI validation suite against a daemon of its
// own, with images made here and served from a registry on loopback. The suite
// itself, the program critest of cri-tools, is the caller's to bring:
//
//	critest -critest FILE                        run all of it
//	critest -critest FILE -- -ginkgo.focus=Exec  arguments for the suite
//
// It needs root, bin/nodeagent and Debian's busybox-static. The exit code is
// the suite's. It must not be linked into the product.
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
	suite   string // the program critest
	build   string // directory for what is compiled
	busybox string // for the images
	args    []string
}

func main() {
	var o options
	flag.StringVar(&o.suite, "critest", "critest", "the suite's `program`")
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
	suite, err := exec.LookPath(o.suite)
	if err != nil {
		return fmt.Errorf("find the suite (-critest, or make critest CRITEST=file): %w", err)
	}
	if suite, err = filepath.Abs(suite); err != nil {
		return err
	}
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
	cmd := exec.CommandContext(ctx, suite, append([]string{"-runtime-endpoint", endpoint, "-image-endpoint", endpoint}, o.args...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = work, os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("the suite: %w; the daemon's log ends:\n%s", err, n.LogTail(20))
	}
	return nil
}
