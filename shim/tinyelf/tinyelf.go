// Package tinyelf puts an ELF header before machine code that is complete in
// itself: no library, no data, no reference out of it (shim/pause, shim/join).
// Such a program needs no file of its own beside the one that carries it, and
// starts with a handful of page faults.
//
// Pure; x86-64 and arm64.
package tinyelf

import (
	"encoding/binary"
	"fmt"
	"runtime"
)

// loadAt is where the program is in its memory.
const loadAt = 0x400000

// Program returns the program as an ELF file. It begins at code[entry], and may
// use its stack but no other memory.
func Program(code []byte, entry int) ([]byte, error) {
	machine, ok := map[string]uint16{"amd64": 62, "arm64": 183}[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("make program: no code for %s", runtime.GOARCH)
	}
	const headers = 64 + 2*56
	size := uint64(headers + len(code))
	le := binary.LittleEndian
	// ELF64 header: 64-bit, little endian, version 1, ET_EXEC.
	b := []byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	b = le.AppendUint16(b, 2)
	b = le.AppendUint16(b, machine)
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, loadAt+headers+uint64(entry))
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
