package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/nodeagent/nodeagent/test/images"
	"github.com/nodeagent/nodeagent/test/registry"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const page = "<h1>Hello from a pod</h1>\n"

// imageServer is a registry on loopback with the demo's image.
type imageServer struct {
	server *registry.Server
	ref    string
}

// pull makes the image, serves it and lets the daemon fetch it.
func (d *demo) pull(ctx context.Context) error {
	s := d.screen
	s.step("The image", "busybox and our test tool, from a registry on loopback")
	img, err := buildImage(ctx, d.tool)
	if err != nil {
		return err
	}
	if d.registry, err = serveImage(ctx, img); err != nil {
		return err
	}
	if s.terminal {
		// Loopback is too fast to see anything: as from a distant registry.
		d.registry.server.Inject(registry.Fault{Path: regexp.MustCompile("/blobs/"), Rate: 2 << 20})
	}
	pull := exec.CommandContext(ctx, filepath.Join(d.binaries, "nodeagent"), "image", "pull", "--config", d.config, d.registry.ref)
	pull.Stderr = s.out // the progress
	var said strings.Builder
	pull.Stdout = &said
	if err := pull.Run(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("pull %s: %w", d.registry.ref, err)
	}
	got, err := d.daemon.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: d.registry.ref}})
	if err != nil {
		return err
	}
	if got.Image == nil {
		return fmt.Errorf("%s was pulled, but the daemon does not know it", d.registry.ref)
	}
	s.done("%s, %s in %d layers, every digest verified", d.registry.ref, size(got.Image.Size), len(img.Layers))
	return nil
}

// buildImage makes an image of three layers: busybox, the test tool, a page.
func buildImage(ctx context.Context, tool string) (images.Image, error) {
	base, err := images.Busybox(ctx, images.DefaultBusybox)
	if err != nil {
		return images.Image{}, err
	}
	var layers []images.Layer
	for _, entries := range [][]images.Entry{
		base,
		{images.Executable("bin/testtool", tool)},
		{images.Dir("www"), images.File("www/index.html", page)},
	} {
		l, err := images.NewLayer(images.Gzip, entries...)
		if err != nil {
			return images.Image{}, fmt.Errorf("build image: %w", err)
		}
		layers = append(layers, l)
	}
	return images.New(images.Config{Env: []string{"PATH=/bin:/sbin:/usr/bin:/usr/sbin"}, Cmd: []string{"sh"}}, layers...)
}

func serveImage(ctx context.Context, img images.Image) (*imageServer, error) {
	server, err := registry.Start(registry.Config{})
	if err != nil {
		return nil, err
	}
	i := &imageServer{server: server, ref: server.Addr + "/demo/hello:1"}
	if err := images.Push(ctx, i.ref, img); err != nil {
		server.Close()
		return nil, err
	}
	return i, nil
}
