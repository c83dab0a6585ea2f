package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// trimDelay after the start of serving, the first calls have been answered.
const trimDelay = time.Second

// trimLater trims once, unless ctx ends before.
func (d *node) trimLater(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(trimDelay):
	}
	if err := trim(); err != nil {
		d.log.Warn("memory of the start is kept", "err", err)
	}
	return nil
}

// trim gives back the memory that only the start of the process needed: the
// heap's free spans, and the pages of the program file that are mapped. Half
// of the program is initialisation and dependencies' code that never runs
// again; what is still needed comes back from the page cache at its next use,
// 16 pages a fault.
func trim() error {
	debug.FreeOSMemory()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("trim memory: %w", err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return fmt.Errorf("trim memory: %w", err)
	}
	for s := bufio.NewScanner(bytes.NewReader(maps)); s.Scan(); {
		f := strings.Fields(s.Text())
		// Read-only mappings of the file only: writable ones are private copies,
		// whose content would be lost.
		if len(f) < 6 || f[5] != exe || strings.Contains(f[1], "w") {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		begin, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err1 != nil || err2 != nil {
			return fmt.Errorf("trim memory: mapping %q", s.Text())
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(begin), uintptr(end-begin), unix.MADV_DONTNEED); errno != 0 {
			return fmt.Errorf("trim memory: madvise: %w", errno)
		}
	}
	return nil
}
