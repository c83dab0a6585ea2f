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

const (
	// trimPeriod is how often the daemon looks whether it is at rest.
	trimPeriod = time.Second
	// restCPU is what it uses in a period at most when it is.
	restCPU = 5 * time.Millisecond
	// workCPU is what it must have used since the last time to do it again, and
	// trimPause the time that must have passed unless it was burstCPU: to trim
	// costs some 10 ms.
	workCPU   = 10 * time.Millisecond
	burstCPU  = 100 * time.Millisecond
	trimPause = 15 * time.Second
)

// trimAtRest trims whenever the daemon comes to rest after work, the start
// included, until ctx ends.
func (d *node) trimAtRest(ctx context.Context) error {
	tick := time.NewTicker(trimPeriod)
	defer tick.Stop()
	var trimmed, last time.Duration // CPU used until the last trim, the last tick
	var when time.Time              // of the last trim
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := usedCPU()
		resting := now-last < restCPU
		last = now
		if !resting || !worthTrimming(now-trimmed, time.Since(when)) {
			continue
		}
		if err := trim(); err != nil {
			d.log.Warn("memory cannot be given back", "err", err)
			return nil
		}
		last = usedCPU()
		trimmed, when = last, time.Now()
	}
}

// worthTrimming says whether to trim after using cpu in the time since the last.
func worthTrimming(cpu, since time.Duration) bool {
	return cpu >= burstCPU || cpu >= workCPU && since >= trimPause
}

// usedCPU is that of this process, in user and kernel mode.
func usedCPU() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// trim gives back memory that work has left: the heap's free spans, and the
// mapped pages of the program file. Most of these are initialisation, and
// neighbours of what was used, since a fault maps 16 pages; what is needed again
// comes back from the page cache.
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
