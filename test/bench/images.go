package main

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	goruntime "runtime"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// images is a registry on a loopback port with what the measurements run.
type images struct {
	host  string
	srv   *http.Server
	logMB int
}

// Lines of the log image: 99 bytes and a newline.
const logLine = 100

func serveImages(o options) (*images, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	i := &images{host: ln.Addr().String(), logMB: o.logMB}
	i.srv = &http.Server{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)))}
	go i.srv.Serve(ln)
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return nil, fmt.Errorf("%w (install busybox-static)", err)
	}
	pause, err := pauseBinary()
	if err != nil {
		return nil, err
	}
	line := append(bytes.Repeat([]byte("x"), logLine-1), '\n')
	for ref, files := range map[string][]entry{
		"pause":   {{name: "pause", mode: 0o755, data: pause}},
		"busybox": {{name: "bin/busybox", mode: 0o755, data: busybox}, {name: "bin/sh", link: "busybox"}, {name: "bin/true", link: "busybox"}, {name: "bin/cat", link: "busybox"}},
		"log":     {{name: "bin/cat", mode: 0o755, data: busybox}, {name: "log", mode: 0o644, data: bytes.Repeat(line, o.logMB<<20/logLine)}},
	} {
		if err := i.push(ref, files); err != nil {
			return nil, err
		}
	}
	return i, nil
}

func (i *images) Close()           { i.srv.Close() }
func (i *images) pauseRef() string { return i.ref("pause") }
func (i *images) ref(name string) string {
	return i.host + "/bench/" + name + ":1"
}

type entry struct {
	name, link string
	mode       int64
	data       []byte
}

func layer(files []entry) (v1.Layer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.data)), Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)}
		if f.link != "" {
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	raw := b.Bytes()
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil },
		tarball.WithCompressedCaching)
}

func (i *images) push(ref string, layers ...[]entry) error {
	img := empty.Image
	for _, files := range layers {
		l, err := layer(files)
		if err != nil {
			return err
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			return err
		}
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", goruntime.GOARCH
	cf.Config = v1.Config{Env: []string{"PATH=/bin"}, Cmd: []string{"/pause"}}
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		return err
	}
	r, err := name.ParseReference(i.ref(ref), name.Insecure)
	if err != nil {
		return err
	}
	return remote.Write(r, img)
}

// pushBig makes an image of ten layers of 10 MB each, half of it
// incompressible, in files of 4 to 256 KB as programs and libraries have them.
// Another seed makes another image, so that no pull finds a layer already.
func (i *images) pushBig(_ context.Context, seed uint64) (string, error) {
	rnd := rand.New(rand.NewPCG(seed, 42))
	src := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	layers := make([][]entry, 10)
	for l := range layers {
		for left := 10 << 20; left > 0; {
			size := min(left, 4<<10+rnd.IntN(252<<10))
			data := make([]byte, size)
			src.Read(data[:size/2])
			layers[l] = append(layers[l], entry{name: fmt.Sprintf("l%d/f%d", l, len(layers[l])), mode: 0o644, data: data})
			left -= size
		}
	}
	name := fmt.Sprintf("big%d", seed)
	return i.ref(name), i.push(name, layers...)
}

// pauseBinary is a static executable that sleeps in pause(2) for ever: what a
// sandbox's pause container is, without needing a C compiler.
func pauseBinary() ([]byte, error) {
	var (
		code    []byte
		machine elf.Machine
	)
	switch goruntime.GOARCH {
	case "amd64":
		machine = elf.EM_X86_64
		code = []byte{0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7} // mov eax, SYS_pause; syscall; jmp -9
	case "arm64":
		machine = elf.EM_AARCH64
		for _, w := range []uint32{ // ppoll(NULL, 0, NULL, NULL), again
			0xd2800000, 0xd2800001, 0xd2800002, 0xd2800003, 0xd2800928, 0xd4000001, 0x17fffffa,
		} {
			code = binary.LittleEndian.AppendUint32(code, w)
		}
	default:
		return nil, fmt.Errorf("make a pause program: not for %s", goruntime.GOARCH)
	}
	const base, head = 0x400000, 64 + 56
	h := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: 1, Entry: base + head,
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1, Shentsize: 64,
	}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	size := uint64(head + len(code))
	p := elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Vaddr: base, Paddr: base, Filesz: size, Memsz: size, Align: 0x1000}
	var b bytes.Buffer
	binary.Write(&b, binary.LittleEndian, h)
	binary.Write(&b, binary.LittleEndian, p)
	b.Write(code)
	return b.Bytes(), nil
}

func shortRef(ref string) string { return ref[strings.LastIndex(ref, "/")+1:] }
