//go:build linux && cgo && seccomp

package seccomp

// #cgo LDFLAGS: -Wl,--wrap=seccomp_init -Wl,--wrap=seccomp_release -Wl,--wrap=seccomp_reset
// #cgo LDFLAGS: -Wl,--wrap=seccomp_merge -Wl,--wrap=seccomp_arch_add -Wl,--wrap=seccomp_arch_remove
// #cgo LDFLAGS: -Wl,--wrap=seccomp_attr_set -Wl,--wrap=seccomp_syscall_priority
// #cgo LDFLAGS: -Wl,--wrap=seccomp_rule_add_array -Wl,--wrap=seccomp_rule_add_exact_array
// #cgo LDFLAGS: -Wl,--wrap=seccomp_export_bpf -Wl,--wrap=seccomp_export_pfc -Wl,--wrap=seccomp_load
// #include "wrap.h"
import "C"

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"time"

	"github.com/opencontainers/runc/libcontainer/configs"
	libcontainerseccomp "github.com/opencontainers/runc/libcontainer/seccomp"
	"golang.org/x/sys/unix"
)

// TableFD is the descriptor of the shim that init processes look at.
const TableFD = C.NA_SECCOMP_FD

// compileTimeout bounds a sacrificial process; 10 ms is usual.
const compileTimeout = 30 * time.Second

// Cache keeps compiled programs for the processes that this one starts.
type Cache struct {
	exe string
	log *slog.Logger

	mu       sync.Mutex
	last     *configs.Seccomp           // what Want saw last
	known    map[[sha256.Size]byte]bool // profiles asked for, compiled or not
	programs []program                  // oldest first
	queue    chan *configs.Seccomp
}

type program struct {
	profile [sha256.Size]byte
	entry   []byte // lengths, noted calls, program: as in the table
	flags   uint64 // of seccomp(2)
	final   []byte // what libcontainer makes of program, and loads
}

// NewCache returns an empty cache. exe is the program to start with Arg to
// compile a profile: this one. It takes TableFD for itself, so there can be
// one Cache in a process, and it must be made before many files are open.
func NewCache(exe string, log *slog.Logger) (*Cache, error) {
	c := &Cache{exe: exe, log: log, known: map[[sha256.Size]byte]bool{}, queue: make(chan *configs.Seccomp, maxPrograms)}
	if name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", int(TableFD))); err == nil {
		return nil, fmt.Errorf("descriptor %d, meant for seccomp programs, is taken by %q", int(TableFD), name)
	}
	return c, c.publish()
}

// Run compiles what is asked for until ctx ends.
func (c *Cache) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case p := <-c.queue:
			if err := c.add(ctx, p); err != nil {
				c.log.Warn("keep a compiled seccomp profile; its containers start slower", "err", err)
			}
		}
	}
}

// Want makes p known soon, so that later starts with the same profile are
// spared its compilation. It does not wait. p must not change any more.
func (c *Cache) Want(p *configs.Seccomp) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p == c.last {
		return // nearly always: one profile for all containers, and encoding takes longer than asking
	}
	key, _, err := encode(p)
	if err != nil {
		return
	}
	if c.known[key] {
		c.last = p
		return
	}
	select {
	case c.queue <- p:
		c.known[key], c.last = true, p
	default: // a later start asks again
	}
}

func encode(p *configs.Seccomp) ([sha256.Size]byte, []byte, error) {
	b, err := json.Marshal(p)
	return sha256.Sum256(b), b, err
}

func (c *Cache) add(ctx context.Context, profile *configs.Seccomp) error {
	key, text, err := encode(profile)
	if err != nil {
		return err
	}
	p, err := c.compile(ctx, text)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p.profile = key
	c.programs = append(c.programs, p)
	if len(c.programs) > maxPrograms {
		delete(c.known, c.programs[0].profile)
		c.last = nil
		c.programs = c.programs[1:]
	}
	return c.publish()
}

// Program returns the filter that libcontainer would load for p, as an array of
// struct sock_filter, and the flags of seccomp(2); not ok while it is not
// compiled, and for one with a listener. It is not to be changed.
func (c *Cache) Program(p *configs.Seccomp) (final []byte, flags uint64, ok bool) {
	key, _, err := encode(p)
	if err != nil {
		return nil, 0, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, have := range c.programs {
		if have.profile == key && have.flags&unix.SECCOMP_FILTER_FLAG_NEW_LISTENER == 0 {
			return have.final, have.flags, true
		}
	}
	return nil, 0, false
}

// compile runs the sacrificial process on a profile.
func (c *Cache) compile(ctx context.Context, profile []byte) (program, error) {
	ctx, cancel := context.WithTimeout(ctx, compileTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.exe, Arg)
	cmd.Stdin = bytes.NewReader(profile)
	cmd.Env = []string{"GOMAXPROCS=1"}
	var out, report bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &report
	if err := cmd.Run(); err != nil {
		return program{}, fmt.Errorf("compile seccomp profile: %w: %s", err, bytes.TrimSpace(report.Bytes()))
	}
	p, ok := parse(out.Bytes())
	if !ok {
		return program{}, fmt.Errorf("compile seccomp profile: %d bytes of garbage", out.Len())
	}
	return p, nil
}

// parse takes what the sacrificial process writes: an entry of the table, then
// the flags and the final program.
func parse(b []byte) (program, bool) {
	if len(b) < 8 {
		return program{}, false
	}
	entry := 8 + uint64(binary.NativeEndian.Uint32(b)) + uint64(binary.NativeEndian.Uint32(b[4:]))
	if uint64(len(b)) < entry+8 {
		return program{}, false
	}
	final := b[entry+8:]
	if len(final) == 0 || len(final)%8 != 0 {
		return program{}, false
	}
	return program{entry: b[:entry], flags: binary.NativeEndian.Uint64(b[entry:]), final: final}, true
}

// publish replaces the table by one of c.programs. c.mu is held (but in
// NewCache).
func (c *Cache) publish() error {
	var b bytes.Buffer
	magic := make([]byte, C.NA_SECCOMP_MAGIC_LEN)
	copy(magic, C.NA_SECCOMP_MAGIC)
	b.Write(magic)
	for _, p := range c.programs {
		b.Write(p.entry)
	}
	fd, err := unix.MemfdCreate("nodeagent-seccomp", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return fmt.Errorf("make a table of seccomp programs: %w", err)
	}
	f := os.NewFile(uintptr(fd), "nodeagent-seccomp")
	defer f.Close()
	if _, err := f.Write(b.Bytes()); err != nil {
		return fmt.Errorf("fill the table of seccomp programs: %w", err)
	}
	seals := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("seal the table of seccomp programs: %w", err)
	}
	if err := unix.Dup3(int(f.Fd()), TableFD, unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("put the table of seccomp programs at descriptor %d: %w", int(TableFD), err)
	}
	return nil
}

// Compile is the sacrificial process: it reads a profile from standard input,
// writes its table entry to standard output and ends the process.
func Compile() {
	var p configs.Seccomp
	err := json.NewDecoder(os.Stdin).Decode(&p)
	if err == nil {
		runtime.LockOSThread() // the one that is not to load the filter
		C.na_seccomp_capture(1)
		_, err = libcontainerseccomp.InitSeccomp(&p) // ends the process where it would load the filter
	}
	fmt.Fprintln(os.Stderr, "no program came of the seccomp profile:", err)
	os.Exit(1)
}
