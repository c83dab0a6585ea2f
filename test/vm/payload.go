package main

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/nodeagent/nodeagent/test/images"
)

//go:embed run.sh
var runScript string

// writePayload makes the tar archive that a machine gets as its second disk.
func writePayload(ctx context.Context, out string, o options, previous string, steps []step) error {
	dir := strings.TrimSuffix(out, ".tar")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "bin"), 0o755); err != nil {
		return err
	}
	var lines strings.Builder
	for _, s := range steps {
		command := s.name
		if s.tests != nil {
			command = s.tests.command(s.seconds)
		}
		// The test binary's own limit comes first: it says where it hangs.
		fmt.Fprintf(&lines, "%s|%d|%s\n", s.name, s.seconds+30, command)
	}
	for name, text := range map[string]string{"steps": lines.String(), "run.sh": runScript} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	files := map[string]string{"nodeagent.deb": o.pkg, "previous.deb": previous}
	for _, b := range []string{"nodeagent", "nodeagent-shim", "nodeagent-cni"} {
		files["bin/"+b] = filepath.Join(o.bins, b)
	}
	for name, from := range files {
		if from == "" {
			continue
		}
		if err := command(ctx, "cp", from, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := goBuild(ctx, filepath.Join(dir, "testtool"), "test/images/testtool"); err != nil {
		return err
	}
	for _, s := range steps {
		if s.tests == nil {
			continue
		}
		if err := addTests(ctx, dir, *s.tests); err != nil {
			return fmt.Errorf("tests of %s: %w", s.tests.pkg, err)
		}
	}
	if err := writeImage(ctx, dir); err != nil {
		return fmt.Errorf("make the test image: %w", err)
	}
	if err := command(ctx, "tar", "-C", dir, "-cf", out, "."); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// addTests puts a package's test binary and what its tests read below dir,
// unless another step has done so.
func addTests(ctx context.Context, dir string, t goTest) error {
	to := filepath.Join(dir, t.dir())
	binary := filepath.Join(to, t.binary())
	if _, err := os.Stat(binary); err == nil {
		return nil
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	if err := goBuild(ctx, binary, t.pkg, "-c"); err != nil {
		return err
	}
	for _, pattern := range append([]string{"testdata"}, t.files...) {
		found, err := filepath.Glob(filepath.Join(t.pkg, pattern))
		if err != nil {
			return err
		}
		for _, f := range found {
			rel, err := filepath.Rel(t.pkg, f)
			if err != nil {
				return err
			}
			dir := filepath.Dir(filepath.Join(to, rel)) // "../lab" is beside the package there too
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			if err := command(ctx, "cp", "-r", f, dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// goBuild builds a static program of pkg, with "-c" its tests.
func goBuild(ctx context.Context, out, pkg string, flags ...string) error {
	verb := "build"
	if len(flags) > 0 {
		verb = "test"
	}
	args := append([]string{"CGO_ENABLED=0", "go", verb, "-trimpath", "-ldflags=-s -w", "-o", out}, flags...)
	return command(ctx, "env", append(args, "./"+pkg)...)
}

// writeImage makes image.tar in dir, of the host's busybox and the test tool.
func writeImage(ctx context.Context, dir string) error {
	entries, err := images.Busybox(ctx, images.DefaultBusybox)
	if err != nil {
		return err
	}
	entries = append(entries, images.Executable("bin/testtool", filepath.Join(dir, "testtool")))
	layer, err := images.NewLayer(images.None, entries...)
	if err != nil {
		return err
	}
	img, err := images.New(images.Config{Env: []string{"PATH=/bin:/sbin:/usr/bin:/usr/sbin"}, Cmd: []string{"sh"}}, layer)
	if err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(dir, "image.tar"))
	if err != nil {
		return err
	}
	defer f.Close()
	return images.WriteArchive(f, map[string]images.Artifact{"example.test/busybox:1": img})
}
