// Command mkimages builds the standard test images and pushes them to a
// registry, or writes them as OCI layout or archive. It also makes an image of
// any root filesystem directory:
//
//	mkimages -push 127.0.0.1:5000/demo
//	mkimages -archive images.tar -only busybox:1,test:1
//	mkimages -dir rootfs -name app:1 -env A=b -user 1000 -cmd /app -push 127.0.0.1:5000
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/nodeagent/nodeagent/test/images"
)

// list is a flag that may be repeated or hold commas.
type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, strings.Split(s, ",")...); return nil }

// words is a flag of words separated by spaces.
type words []string

func (w *words) String() string     { return strings.Join(*w, " ") }
func (w *words) Set(s string) error { *w = strings.Fields(s); return nil }

type options struct {
	push, layout, archive string
	busybox, tool         string
	only                  list
	bench                 bool
	dir, name             string
	cfg                   images.Config
}

func main() {
	var o options
	flag.StringVar(&o.push, "push", "", "registry and prefix to push to, HOST:PORT[/PREFIX] (plain http)")
	flag.StringVar(&o.layout, "layout", "", "OCI layout directory to write")
	flag.StringVar(&o.archive, "archive", "", "OCI archive to write")
	flag.StringVar(&o.busybox, "busybox", images.DefaultBusybox, "static busybox")
	flag.StringVar(&o.tool, "tool", "", "static test tool (default: built from source)")
	flag.Var(&o.only, "only", "names of standard images to make (default: all)")
	flag.BoolVar(&o.bench, "bench", false, "add bench:gzip and bench:zstd, 100 MB in ten layers")
	flag.StringVar(&o.dir, "dir", "", "make one image of this root filesystem instead")
	flag.StringVar(&o.name, "name", "", "its name and tag")
	flag.Var((*list)(&o.cfg.Env), "env", "its environment, NAME=VALUE")
	flag.Var((*words)(&o.cfg.Cmd), "cmd", "its command")
	flag.Var((*words)(&o.cfg.Entrypoint), "entrypoint", "its entrypoint")
	flag.StringVar(&o.cfg.User, "user", "", "its user")
	flag.StringVar(&o.cfg.WorkingDir, "workdir", "", "its working directory")
	flag.StringVar(&o.cfg.StopSignal, "stop-signal", "", "its stop signal")
	flag.Var((*list)(&o.cfg.Volumes), "volume", "its volumes")
	flag.Var((*list)(&o.cfg.ExposedPorts), "port", "its ports, PORT/PROTOCOL")
	flag.Parse()
	if err := run(context.Background(), o); err != nil {
		fmt.Fprintln(os.Stderr, "mkimages:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	made, err := build(ctx, o)
	if err != nil {
		return err
	}
	if o.push != "" {
		for name, a := range made {
			ref := strings.TrimSuffix(o.push, "/") + "/" + name
			if err := images.Push(ctx, ref, a); err != nil {
				return err
			}
			fmt.Println(ref)
		}
	}
	if o.layout != "" {
		if err := images.WriteLayout(o.layout, made); err != nil {
			return err
		}
	}
	if o.archive != "" {
		f, err := os.Create(o.archive)
		if err != nil {
			return err
		}
		if err := images.WriteArchive(f, made); err != nil {
			f.Close()
			return err
		}
		return f.Close()
	}
	return nil
}

func build(ctx context.Context, o options) (map[string]images.Artifact, error) {
	if o.dir != "" {
		if o.name == "" {
			return nil, fmt.Errorf("-dir needs -name")
		}
		img, err := images.BuildDir(o.cfg, o.dir)
		return map[string]images.Artifact{o.name: img}, err
	}
	if o.tool == "" {
		dir, err := os.MkdirTemp("", "mkimages-")
		if err != nil {
			return nil, err
		}
		defer os.RemoveAll(dir)
		if o.tool, err = images.BuildTool(ctx, dir); err != nil {
			return nil, err
		}
	}
	made, err := images.Standard(ctx, o.busybox, o.tool)
	if err != nil {
		return nil, err
	}
	if o.bench {
		for name, c := range map[string]images.Compression{"bench:gzip": images.Gzip, "bench:zstd": images.Zstd} {
			if made[name], err = images.Bench(100<<20, 10, c, 1); err != nil {
				return nil, err
			}
		}
	}
	if len(o.only) > 0 {
		for name := range made {
			if !slices.Contains(o.only, name) {
				delete(made, name)
			}
		}
	}
	return made, nil
}
