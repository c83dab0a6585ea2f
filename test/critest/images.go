package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/nodeagent/nodeagent/test/images"
	"github.com/nodeagent/nodeagent/test/registry"
)

const (
	e2e     = "e2e-test-images/"
	staging = "k8s-staging-cri-tools/"

	byDigest = staging + "test-image-digest:latest" // the suite pulls it by digest
)

// mirrored are the registries whose images are served here instead.
func mirrored() []string { return []string{"registry.k8s.io", "gcr.io", "k8s.gcr.io"} }

// suiteImages are those the suite pulls, by repository and tag: the same names
// and behaviour as the originals, made of busybox and the applets.
func suiteImages(ctx context.Context, busybox, sh, applets string) (map[string]images.Image, error) {
	base, err := images.Busybox(ctx, busybox)
	if err != nil {
		return nil, err
	}
	b := &builder{images: map[string]images.Image{}}
	base, err = shell(ctx, hardlinked(base), sh)
	if err != nil {
		return nil, err
	}
	root := b.layer(append(base,
		users(""),
		images.Executable("bin/pgrep", applets), images.Executable("bin/ipcs", applets))...)
	cfg := images.Config{Cmd: []string{"sh"}}
	b.add(e2e+"busybox:1.29-2", cfg, root)

	web := b.layer(images.Executable("bin/nginx", applets))
	serving := func(port string) images.Config {
		return images.Config{Cmd: []string{"nginx", port}, StopSignal: "SIGTERM", ExposedPorts: []string{"80/tcp"}}
	}
	b.add(e2e+"nginx:1.14-2", serving("80"), root, web)
	b.add(e2e+"httpd:2.4.39-4", serving("80"), root, web)
	b.add(staging+"hostnet-nginx-"+runtime.GOARCH+":latest", serving("12003"), root, web)

	nnp := images.Executable("nnp", applets)
	nnp.Mode = 0o4755
	b.add(e2e+"nonewprivs:1.3", images.Config{Entrypoint: []string{"/nnp"}}, root, b.layer(nnp))
	for name, user := range map[string]string{
		"uid": "1002", "username": "www-data", "uid-group": "1003:1004", "username-group": "www-data:1004",
	} {
		b.add(staging+"test-image-user-"+name+":latest", images.Config{Cmd: []string{"sh"}, User: user}, root)
	}
	b.add(staging+"test-image-predefined-group:latest", images.Config{Cmd: []string{"sh"}, User: "1000"}, root, b.layer(
		users("default-user:x:1000:1000:Linux User,,,:/home/default-user:/bin/sh\n"),
		images.File("etc/group", "root:x:0:\nwww-data:x:33:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")))
	for _, tag := range []string{"1:latest", "2:latest", "3:latest", "latest:latest", "tag:test", "tag:all"} {
		b.add(staging+"test-image-"+tag, cfg, root, b.layer(images.File("name", tag)))
	}
	b.add(byDigest, cfg, root, b.layer(images.File("name", "digest")))
	same := b.layer(images.File("name", "tags"))
	for _, tag := range []string{"1", "2", "3"} {
		b.add(staging+"test-image-tags:"+tag, cfg, root, same)
	}
	b.add("pause:3.9", images.Config{Entrypoint: []string{"sleep", "1000000"}}, root)
	return b.images, b.err
}

// hardlinked makes each applet of busybox a file of its own name, since the
// suite masks single ones.
func hardlinked(entries []images.Entry) []images.Entry {
	for i, e := range entries {
		if e.Link == "/bin/busybox" {
			entries[i] = images.Hardlink(e.Name, "bin/busybox")
			entries[i].Mode = 0o755 // a link's header has the file's mode
		}
	}
	return entries
}

// shell puts the program at path, with the libraries it needs, in the place of
// bin/sh. Debian's static busybox runs ls though /bin/ls is masked; the shell of
// its dynamic one looks for the file.
func shell(ctx context.Context, entries []images.Entry, path string) ([]images.Entry, error) {
	out, err := exec.CommandContext(ctx, "ldd", path).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("find the libraries of %s: ldd: %w: %s", path, err, out)
	}
	entries = slices.DeleteFunc(entries, func(e images.Entry) bool { return e.Name == "bin/sh" })
	entries = append(entries, images.Executable("bin/sh", path))
	for f := range strings.FieldsSeq(string(out)) {
		if filepath.IsAbs(f) {
			entries = append(entries, images.Executable(f[1:], f))
		}
	}
	return entries, nil
}

// dynamicBusybox is Debian's busybox that is not static, from its package, which
// cannot be installed beside the static one.
func dynamicBusybox(ctx context.Context, dir string) (string, error) {
	dir = filepath.Join(dir, "busybox")
	out := filepath.Join(dir, "bin/busybox")
	if _, err := os.Stat(out); err == nil {
		return out, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	for _, line := range []string{"apt-get download -q busybox", "dpkg-deb --extract busybox_*.deb ."} {
		cmd := exec.CommandContext(ctx, "sh", "-c", line)
		cmd.Dir = dir
		if text, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("get Debian's busybox for the images' shell: %s: %w: %s", line, err, text)
		}
	}
	return out, nil
}

// users is the passwd file that the suite's user tests go by.
func users(more string) images.Entry {
	return images.File("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n"+more)
}

// builder keeps the first error, so that a list of images reads as a list.
type builder struct {
	images map[string]images.Image
	err    error
}

func (b *builder) layer(entries ...images.Entry) images.Layer {
	l, err := images.NewLayer(images.Gzip, entries...)
	b.keep(err)
	return l
}

func (b *builder) add(name string, cfg images.Config, layers ...images.Layer) {
	cfg.Env = append(cfg.Env, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	img, err := images.New(cfg, layers...)
	b.keep(err)
	b.images[name] = img
}

func (b *builder) keep(err error) {
	if b.err == nil {
		b.err = err
	}
}

// serve pushes the images into a registry of its own and writes hosts.toml
// files into dir that send pulls there.
func serve(ctx context.Context, all map[string]images.Image, dir string) (*registry.Server, error) {
	server, err := registry.Start(registry.Config{})
	if err != nil {
		return nil, err
	}
	for name, img := range all {
		if err := images.Push(ctx, server.Addr+"/"+name, img); err != nil {
			server.Close()
			return nil, err
		}
	}
	for _, host := range mirrored() {
		url := "http://" + server.Addr
		text := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", url, url)
		path := filepath.Join(dir, host, "hosts.toml")
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	return server, nil
}
