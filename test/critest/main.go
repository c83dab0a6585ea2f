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
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/nodeagent/nodeagent/test/e2e/node"
	"github.com/nodeagent/nodeagent/test/images"
	"golang.org/x/sys/unix"
)

type options struct {
	suite   string // the program critest
	build   string // directory for what is compiled
	busybox string // for the images
	shell   string // likewise; "": from Debian's package
	args    []string
}

func main() {
	var o options
	flag.StringVar(&o.suite, "critest", "critest", "the suite's `program`")
	flag.StringVar(&o.build, "build", "build/critest", "`directory` for what is compiled")
	flag.StringVar(&o.busybox, "busybox", images.DefaultBusybox, "static `busybox` for the images")
	flag.StringVar(&o.shell, "shell", "", "a busybox whose `shell` heeds masked files, default Debian's dynamic one from its package")
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
	if o.shell == "" {
		if o.shell, err = dynamicBusybox(ctx, build); err != nil {
			return err
		}
	}
	all, err := suiteImages(ctx, o.busybox, o.shell, applets)
	if err != nil {
		return err
	}
	server, err := serve(ctx, all, filepath.Join(work, "hosts"))
	if err != nil {
		return err
	}
	defer server.Close()
	if suite, err = withDigest(suite, work, all[byDigest].Manifest.Desc.Digest.String()); err != nil {
		return err
	}
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

// withDigest copies the suite's program into dir with the digest of our image in
// the place of the one original that it pulls by digest, which cannot be made
// here. A program that names no such image is copied as it is.
func withDigest(suite, dir, digest string) (string, error) {
	program, err := os.ReadFile(suite)
	if err != nil {
		return "", fmt.Errorf("read the suite: %w", err)
	}
	original := regexp.MustCompile(regexp.QuoteMeta(path.Base(strings.TrimSuffix(byDigest, ":latest"))) + "@sha256:[0-9a-f]{64}")
	program = original.ReplaceAllFunc(program, func(ref []byte) []byte {
		fmt.Printf("%s is pulled as %s\n", ref, digest)
		return append(bytes.Clone(ref[:bytes.IndexByte(ref, '@')+1]), digest...)
	})
	out := filepath.Join(dir, "critest")
	return out, os.WriteFile(out, program, 0o755)
}
