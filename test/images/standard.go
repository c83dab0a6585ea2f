package images

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"runtime"
	"strings"
)

// DefaultBusybox is where Debian's package busybox-static puts the binary.
const DefaultBusybox = "/bin/busybox"

// Busybox lists a small root filesystem: the static busybox of the host with a
// link for each of its applets, users, and the usual directories. It refuses a
// dynamically linked busybox.
func Busybox(ctx context.Context, binary string) ([]Entry, error) {
	list, err := exec.CommandContext(ctx, binary, "--list-full").Output()
	if err != nil {
		return nil, fmt.Errorf("list applets of %q (Debian package busybox-static): %w", binary, err)
	}
	if raw, err := os.ReadFile(binary); err != nil || bytes.Contains(raw, []byte("/ld-linux")) || bytes.Contains(raw, []byte("/ld-musl")) {
		return nil, fmt.Errorf("%q is not static, install the Debian package busybox-static (%v)", binary, err)
	}
	entries := append(skeleton(), Executable("bin/busybox", binary))
	for name := range strings.FieldsSeq(string(list)) {
		if name != "bin/busybox" {
			entries = append(entries, Symlink(name, "/bin/busybox"))
		}
	}
	return entries, nil
}

// skeleton is what any Linux root filesystem has.
func skeleton() []Entry {
	var out []Entry
	for _, dir := range []string{"bin", "sbin", "usr", "usr/bin", "usr/sbin", "etc", "dev", "proc", "sys", "home", "var", "var/log", "var/run", "lib"} {
		out = append(out, Dir(dir))
	}
	return append(out,
		Entry{Name: "tmp", Typeflag: tar.TypeDir, Mode: 0o1777},
		Entry{Name: "root", Typeflag: tar.TypeDir, Mode: 0o700},
		Entry{Name: "home/user", Typeflag: tar.TypeDir, Mode: 0o755, UID: 1000, GID: 1000},
		File("etc/passwd", "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/:/bin/false\nuser:x:1000:1000:user:/home/user:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
		File("etc/group", "root:x:0:\ndaemon:x:1:\nuser:x:1000:\nextra:x:2000:user\nmore:x:2001:user\nnogroup:x:65534:\n"),
		File("etc/nsswitch.conf", "hosts: files dns\n"),
	)
}

// BuildTool compiles the test tool as a static program into dir, and returns
// its path. It needs the Go toolchain and this repository's sources.
func BuildTool(ctx context.Context, dir string) (string, error) {
	out := path.Join(dir, "testtool")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "github.com/nodeagent/nodeagent/test/images/testtool")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build test tool: %w: %s", err, text)
	}
	return out, nil
}

// ToolPath is where the standard images have the test tool.
const ToolPath = "/bin/testtool"

// Standard builds the images that end-to-end tests and the demo use, by name
// and tag:
//
//	busybox:1     busybox alone, Cmd sh
//	test:1        busybox and the test tool, Cmd "testtool sleep"
//	test:zstd     the same, layers compressed with zstd
//	multi:1       index: this platform has test:1, another one something else
//	user:1        test:1 with User 1000:2000; user:named with User "user"
//	config:1      test:1 with Env, Entrypoint, WorkingDir, Volumes, StopSignal, ExposedPorts
//	whiteout:1    three layers with whiteouts and an opaque directory (see Whiteouts)
//	data:1        files only, for image volumes: /data/file, /data/sub/file, /link -> /data
func Standard(ctx context.Context, busybox, tool string) (map[string]Artifact, error) {
	base, err := Busybox(ctx, busybox)
	if err != nil {
		return nil, err
	}
	b := builder{}
	baseLayer := b.layer(Gzip, base...)
	toolLayer := b.layer(Gzip, Executable(strings.TrimPrefix(ToolPath, "/"), tool))
	run := Config{Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, Cmd: []string{ToolPath, "sleep"}}
	with := func(change func(*Config)) Config { c := run; change(&c); return c }
	test := b.image(run, baseLayer, toolLayer)
	foreign := b.image(Config{Architecture: map[bool]string{true: "arm64", false: "amd64"}[runtime.GOARCH == "amd64"]},
		b.layer(Gzip, File("foreign", "this is not your platform")))
	out := map[string]Artifact{
		"busybox:1":  b.image(with(func(c *Config) { c.Cmd = []string{"sh"} }), baseLayer),
		"test:1":     test,
		"test:zstd":  b.image(run, b.layer(Zstd, base...), b.layer(Zstd, Executable(strings.TrimPrefix(ToolPath, "/"), tool))),
		"multi:1":    b.index(foreign, test),
		"user:1":     b.image(with(func(c *Config) { c.User = "1000:2000" }), baseLayer, toolLayer),
		"user:named": b.image(with(func(c *Config) { c.User = "user" }), baseLayer, toolLayer),
		"config:1": b.image(with(func(c *Config) {
			c.Env = append(c.Env, "FROM_IMAGE=yes", "OVERRIDDEN=image")
			c.Entrypoint, c.Cmd = []string{ToolPath}, []string{"info"}
			c.WorkingDir, c.StopSignal = "/work/dir", "SIGUSR1"
			c.Volumes, c.ExposedPorts = []string{"/volume"}, []string{"80/tcp", "53/udp"}
		}), baseLayer, toolLayer),
		"whiteout:1": b.image(run, append([]Layer{baseLayer, toolLayer}, b.whiteouts()...)...),
		"data:1": b.image(Config{}, b.layer(Gzip, Dir("data"), File("data/file", "data\n"), Dir("data/sub"), File("data/sub/file", "sub\n"),
			Symlink("link", "/data"), Symlink("escape", "../../../../../../etc"))),
	}
	return out, b.err
}

// builder keeps the first error, so that a list of images reads as a list.
type builder struct{ err error }

func (b *builder) layer(c Compression, entries ...Entry) Layer {
	l, err := NewLayer(c, entries...)
	b.keep(err)
	return l
}

func (b *builder) image(cfg Config, layers ...Layer) Image {
	img, err := New(cfg, layers...)
	b.keep(err)
	return img
}

func (b *builder) index(children ...Artifact) Index {
	x, err := NewIndex(children...)
	b.keep(err)
	return x
}

func (b *builder) keep(err error) {
	if b.err == nil {
		b.err = err
	}
}

// Whiteouts is what the directory /w of whiteout:1 must look like: names and
// the contents of files ("" for directories).
func Whiteouts() map[string]string {
	return map[string]string{"keep": "1", "part": "", "part/stays": "1", "opaque": "", "opaque/new": "2", "file": "2", "dir": "", "dir/x": "3"}
}

func (b *builder) whiteouts() []Layer {
	return []Layer{
		b.layer(Gzip, Dir("w"), File("w/keep", "1"), File("w/gone", "1"), Dir("w/gonedir"), File("w/gonedir/x", "1"),
			Dir("w/part"), File("w/part/stays", "1"), File("w/part/goes", "1"), Dir("w/opaque"), File("w/opaque/old", "1"),
			Dir("w/file"), File("w/file/x", "1"), File("w/dir", "1")),
		b.layer(Zstd, Whiteout("w/gone"), Whiteout("w/gonedir"), Whiteout("w/part/goes"), Opaque("w/opaque"), File("w/opaque/new", "2"), File("w/file", "2")),
		b.layer(None, Dir("w/dir"), File("w/dir/x", "3")),
	}
}

// Bench builds an image of layers with about total bytes of files (before
// compression) between them: a third of the bytes does not compress, the rest
// compresses like text, in files of 1 KiB to 1 MiB in some hundred
// directories. Equal seeds give equal images.
func Bench(total, layers int, c Compression, seed uint64) (Image, error) {
	b := builder{}
	var built []Layer
	for i := range layers {
		built = append(built, b.layer(c, benchEntries(total/layers, i, seed)...))
	}
	img := b.image(Config{Cmd: []string{"/none"}}, built...)
	return img, b.err
}

func benchEntries(size, layer int, seed uint64) []Entry {
	r := rand.New(rand.NewPCG(seed, uint64(layer)))
	words := make([][]byte, 4000)
	for i := range words {
		words[i] = make([]byte, 3+r.IntN(9))
		for j := range words[i] {
			words[i][j] = byte('a' + r.IntN(26))
		}
	}
	out := []Entry{Dir(fmt.Sprintf("l%d", layer))}
	for n := 0; size > 0; n++ {
		dir := fmt.Sprintf("l%d/d%d", layer, n/20)
		if n%20 == 0 {
			out = append(out, Dir(dir))
		}
		length := min(1<<(10+r.IntN(11)), size)
		size -= length
		out = append(out, Entry{Name: fmt.Sprintf("%s/f%d", dir, n), Data: benchData(r, words, length)})
	}
	return out
}

func benchData(r *rand.Rand, words [][]byte, length int) []byte {
	var b bytes.Buffer
	for b.Len() < length {
		if r.IntN(3) == 0 {
			for range 64 {
				v := r.Uint64()
				for range 8 {
					b.WriteByte(byte(v))
					v >>= 8
				}
			}
		}
		for range 60 {
			b.Write(words[min(r.IntN(len(words)), r.IntN(len(words)))])
			b.WriteByte(' ')
		}
	}
	return b.Bytes()[:length]
}
