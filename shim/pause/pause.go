//go:build linux && cgo

// Package pause makes the program /pause: the first process of a pod's PID
// namespace, which reaps orphans and ends on SIGTERM and SIGINT, and does
// nothing else.
//
// The program is under 300 bytes and needs no library: its machine code is
// compiled into the program that imports this package, in a section of its own
// (pause.c), and written out behind an ELF header. So there is nothing to
// install, to find or to commit, and a pause process has two pages of its own.
//
// cmd/nodeagent-shim calls it at its start. No goroutine, no lock; x86-64 and
// arm64.
package pause

/*
const void *nodeagent_pause_code(void);
unsigned long nodeagent_pause_size(void);
unsigned long nodeagent_pause_entry(void);
*/
import "C"

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"unsafe"
)

// loadAt is where the program is in its memory.
const loadAt = 0x400000

// Program returns the program as an ELF file.
func Program() ([]byte, error) {
	machine, ok := map[string]uint16{"amd64": 62, "arm64": 183}[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("make pause program: no code for %s", runtime.GOARCH)
	}
	code := unsafe.Slice((*byte)(C.nodeagent_pause_code()), int(C.nodeagent_pause_size()))
	const headers = 64 + 2*56
	size := uint64(headers + len(code))
	le := binary.LittleEndian
	// ELF64 header: 64-bit, little endian, version 1, ET_EXEC.
	b := []byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	b = le.AppendUint16(b, 2)
	b = le.AppendUint16(b, machine)
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, loadAt+headers+uint64(C.nodeagent_pause_entry()))
	b = le.AppendUint64(b, 64) // program headers
	b = le.AppendUint64(b, 0)  // section headers: none
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{64, 56, 2, 0, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	// PT_LOAD, readable and executable: the whole file.
	b = le.AppendUint32(b, 1)
	b = le.AppendUint32(b, 5)
	for _, v := range []uint64{0, loadAt, loadAt, size, size, 4096} {
		b = le.AppendUint64(b, v)
	}
	// PT_GNU_STACK, not executable.
	b = le.AppendUint32(b, 0x6474e551)
	b = le.AppendUint32(b, 6)
	for _, v := range []uint64{0, 0, 0, 0, 0, 16} {
		b = le.AppendUint64(b, v)
	}
	return append(b, code...), nil
}

// WriteRoot makes a root filesystem at dir with /pause and the directories that
// are mounted on. It may be there already, and in use.
func WriteRoot(dir string) error {
	for _, d := range []string{"", "proc", "dev", "sys", "etc"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	program, err := Program()
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "pause")
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, program) {
		return nil
	}
	// By rename: the old file may be running.
	if err := os.WriteFile(path+".tmp", program, 0o755); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}
