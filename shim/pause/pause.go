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
	"os"
	"path/filepath"
	"unsafe"

	"github.com/nodeagent/nodeagent/shim/tinyelf"
)

// Program returns the program as an ELF file.
func Program() ([]byte, error) {
	code := unsafe.Slice((*byte)(C.nodeagent_pause_code()), int(C.nodeagent_pause_size()))
	return tinyelf.Program(code, int(C.nodeagent_pause_entry()))
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
