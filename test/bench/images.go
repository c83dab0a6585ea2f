package main

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	goruntime "runtime"

	image "github.com/nodeagent/nodeagent/test/images"
	"github.com/nodeagent/nodeagent/test/registry"
)

// images is a registry on a loopback port with what the measurements run.
type images struct {
	server *registry.Server
}

// Lines of the log image: 99 bytes and a newline.
const logLine = 100

func serveImages(o options) (*images, error) {
	server, err := registry.Start(registry.Config{})
	if err != nil {
		return nil, err
	}
	i := &images{server: server}
	const busybox = "/bin/busybox"
	if !exists(busybox) {
		return nil, errors.New("find " + busybox + ": install busybox-static")
	}
	pause, err := pauseBinary()
	if err != nil {
		return nil, err
	}
	line := append(bytes.Repeat([]byte("x"), logLine-1), '\n')
	for ref, files := range map[string][]image.Entry{
		"pause": {{Name: "pause", Mode: 0o755, Data: pause}},
		"busybox": {image.Executable("bin/busybox", busybox), image.Symlink("bin/sh", "busybox"),
			image.Symlink("bin/true", "busybox")},
		"log": {image.Executable("bin/cat", busybox), {Name: "log", Data: bytes.Repeat(line, o.logMB<<20/logLine)}},
	} {
		if err := i.push(ref, files); err != nil {
			return nil, err
		}
	}
	return i, nil
}

func (i *images) Close()           { i.server.Close() }
func (i *images) pauseRef() string { return i.ref("pause") }
func (i *images) ref(name string) string {
	return i.server.Addr + "/bench/" + name + ":1"
}

func (i *images) push(name string, layers ...[]image.Entry) error {
	var packed []image.Layer
	for _, files := range layers {
		l, err := image.NewLayer(image.Gzip, files...)
		if err != nil {
			return err
		}
		packed = append(packed, l)
	}
	img, err := image.New(image.Config{Env: []string{"PATH=/bin"}, Cmd: []string{"/pause"}}, packed...)
	if err != nil {
		return err
	}
	return image.Push(context.Background(), i.ref(name), img)
}

// pushBig makes an image of ten layers of 10 MB each, half of it
// incompressible, in files of 4 to 256 KB as programs and libraries have them.
// Another seed makes another image, so that no pull finds a layer already.
func (i *images) pushBig(seed uint64) (string, error) {
	rnd := rand.New(rand.NewPCG(seed, 42))
	src := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	layers := make([][]image.Entry, 10)
	for l := range layers {
		for left := 10 << 20; left > 0; {
			size := min(left, 4<<10+rnd.IntN(252<<10))
			data := make([]byte, size)
			src.Read(data[:size/2])
			layers[l] = append(layers[l], image.Entry{Name: fmt.Sprintf("l%d/f%d", l, len(layers[l])), Data: data})
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
