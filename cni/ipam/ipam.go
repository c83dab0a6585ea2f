// Package ipam gives out pod addresses: one file per address in one directory.
//
// The directory is the truth, so a daemon and a CNI plugin binary can share it, and what a killed
// process held is found by listing it. A file appears complete or not at all (an unnamed
// temporary file is linked to its name; the link is what claims the address). Nothing is synced:
// after a power loss no pod is left, so a lost or torn record loses nothing.
//
// The next address is sought behind the last one given out (next fit). A released address rests
// for Config.Quarantine; when a range has no rested address left, the one released longest ago
// is taken, but none before Config.Floor.
//
// It must not touch links or routes. Called by cni/builtin. No goroutines; one mutex in Pool.
// Linux; the file system should have O_TMPFILE (ext4, xfs, btrfs, tmpfs), else named temporary files serve.
package ipam

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Config says where the records are.
type Config struct {
	Dir        string           // made if missing
	Quarantine time.Duration    // rest of a released address; 0: DefaultQuarantine
	Floor      time.Duration    // never reused sooner; 0: DefaultFloor
	Now        func() time.Time // nil: time.Now
}

// Rest of a released address, and the least of it under pressure.
const (
	DefaultQuarantine = 60 * time.Second
	DefaultFloor      = 2 * time.Second
)

const (
	freeSuffix   = ".free"   // a released address; its mtime is the time of release
	tempPrefix   = ".tmp-"   // only on file systems without O_TMPFILE
	cursorPrefix = "cursor-" // a hint: the last offset given out of a range
)

// probes is how many addresses are tried one by one before the directory is read instead.
const probes = 64

// Pool is the set of address files in one directory.
type Pool struct {
	cfg Config
	dir *os.File

	mu      sync.Mutex // guards cursors and noTmpfile, and makes an allocation of this process one step
	cursors map[netip.Prefix]*cursor
	noTmp   bool
}

type cursor struct {
	file *os.File
	last uint64
}

// Open opens the directory and makes it if it is missing.
func Open(cfg Config) (*Pool, error) {
	if cfg.Dir == "" {
		return nil, fmt.Errorf("open address records: no directory: %w", errdefs.ErrInvalidArgument)
	}
	if cfg.Quarantine == 0 {
		cfg.Quarantine = DefaultQuarantine
	}
	if cfg.Floor == 0 {
		cfg.Floor = min(DefaultFloor, cfg.Quarantine)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of address records: %w", err)
	}
	dir, err := os.Open(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("open directory of address records: %w", err)
	}
	return &Pool{cfg: cfg, dir: dir, cursors: map[netip.Prefix]*cursor{}}, nil
}

// Close drops the descriptors. Records stay.
func (p *Pool) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.cursors {
		if c.file != nil {
			c.file.Close()
		}
	}
	p.cursors = map[netip.Prefix]*cursor{}
	return p.dir.Close()
}

// Allocate holds one address of the first range that has one, for owner.
//
// Errors: ResourceExhausted if all ranges are full or their free addresses rest; the text says how many.
func (p *Pool) Allocate(owner Owner, ranges []Range) (netip.Addr, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var full []string
	for _, r := range ranges {
		addr, why, err := p.from(owner, r)
		if err != nil {
			return netip.Addr{}, err
		}
		if addr.IsValid() {
			return addr, nil
		}
		full = append(full, why)
	}
	if len(full) == 0 {
		full = []string{"no range is configured"}
	}
	return netip.Addr{}, fmt.Errorf("allocate an address for sandbox %s: %s: %w",
		owner.Sandbox, strings.Join(full, "; "), errdefs.ErrResourceExhausted)
}

// from tries one range. Without an address, why says what it is full of.
func (p *Pool) from(owner Owner, r Range) (addr netip.Addr, why string, err error) {
	c := p.cursor(r)
	off := c.last
	for range min(probes, r.Size()) {
		off = next(r, off)
		state, _, err := p.probe(r.at(off))
		if err != nil {
			return netip.Addr{}, "", err
		}
		if state != free {
			continue
		}
		ok, err := p.take(owner, r.at(off))
		if err != nil {
			return netip.Addr{}, "", err
		}
		if ok {
			p.move(c, off)
			return r.at(off), "", nil
		}
	}
	return p.search(owner, r, c)
}

// search reads the directory once and takes the next free address behind the cursor, or else the
// one that has rested longest.
func (p *Pool) search(owner Owner, r Range, c *cursor) (addr netip.Addr, why string, err error) {
	names, err := p.names()
	if err != nil {
		return netip.Addr{}, "", err
	}
	held, resting := map[netip.Addr]bool{}, map[netip.Addr]time.Time{}
	for _, name := range names {
		base, isFree := strings.CutSuffix(name, freeSuffix)
		a, err := netip.ParseAddr(base)
		if err != nil || !r.Gives(a) {
			continue
		}
		if !isFree {
			held[a] = true
		} else if st, err := p.stat(name); err == nil && p.rests(st, p.cfg.Quarantine) {
			resting[a] = st
		}
	}
	// At most every record of the range is in the way.
	off := c.last
	for range min(uint64(len(held)+len(resting))+1, r.Size()) {
		off = next(r, off)
		a := r.at(off)
		if _, rests := resting[a]; held[a] || rests {
			continue
		}
		if ok, err := p.take(owner, a); err != nil {
			return netip.Addr{}, "", err
		} else if ok {
			p.move(c, off)
			return a, "", nil
		}
	}
	for len(resting) > 0 {
		var oldest netip.Addr
		for a, at := range resting {
			if held[a] {
				delete(resting, a)
			} else if !oldest.IsValid() || at.Before(resting[oldest]) {
				oldest = a
			}
		}
		if !oldest.IsValid() || p.rests(resting[oldest], p.cfg.Floor) {
			break
		}
		if ok, err := p.take(owner, oldest); err != nil {
			return netip.Addr{}, "", err
		} else if ok {
			return oldest, "", nil
		}
		delete(resting, oldest)
	}
	return netip.Addr{}, fmt.Sprintf("range %s: %d of %d held, %d released less than %s ago",
		r.prefix, len(held), r.Size(), len(resting), p.cfg.Floor), nil
}

func next(r Range, off uint64) uint64 {
	if off < r.first || off >= r.last {
		return r.first
	}
	return off + 1
}

type state int

const (
	taken state = iota
	rests
	free
)

// probe looks at the files of one address.
func (p *Pool) probe(a netip.Addr) (state, time.Time, error) {
	name := a.String()
	if _, err := p.stat(name); err == nil {
		return taken, time.Time{}, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return taken, time.Time{}, fmt.Errorf("look up address record %s: %w", name, err)
	}
	at, err := p.stat(name + freeSuffix)
	if errors.Is(err, fs.ErrNotExist) {
		return free, time.Time{}, nil
	}
	if err != nil {
		return taken, time.Time{}, fmt.Errorf("look up address record %s: %w", name, err)
	}
	if p.rests(at, p.cfg.Quarantine) {
		return rests, at, nil
	}
	return free, at, nil
}

// rests says whether an address released at that time is still to be left alone. A time in the
// future (the clock was set back) counts as long ago.
func (p *Pool) rests(at time.Time, least time.Duration) bool {
	age := p.cfg.Now().Sub(at)
	return age >= 0 && age < least
}

// stat is the mtime of a file in the directory.
func (p *Pool) stat(name string) (time.Time, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(int(p.dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return time.Time{}, err
	}
	return time.Unix(st.Mtim.Unix()), nil
}

// take claims a for owner; false if somebody else did. The rest of an earlier release ends with it.
func (p *Pool) take(owner Owner, a netip.Addr) (bool, error) {
	rec, err := Record{Version: recordVersion, Addr: a, Owner: owner}.Encode()
	if err != nil {
		return false, fmt.Errorf("encode address record %s: %w", a, err)
	}
	err = p.create(a.String(), rec)
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("write address record %s: %w", a, err)
	}
	// A crash in between leaves both: the held one counts.
	_ = unix.Unlinkat(int(p.dir.Fd()), a.String()+freeSuffix, 0)
	return true, nil
}

// create makes the file name with content data, complete or not at all; EEXIST if it is there.
func (p *Pool) create(name string, data []byte) error {
	dir := int(p.dir.Fd())
	if !p.noTmp {
		fd, err := unix.Openat(dir, ".", unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
		switch {
		case err == nil:
			defer unix.Close(fd)
			if err := writeAll(fd, data); err != nil {
				return err
			}
			return unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(fd), dir, name, unix.AT_SYMLINK_FOLLOW)
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EISDIR), errors.Is(err, unix.ENOENT):
			p.noTmp = true // a file system, or a kernel, without O_TMPFILE
		default:
			return err
		}
	}
	tmp := tempPrefix + strconv.Itoa(os.Getpid()) + "-" + name
	fd, err := unix.Openat(dir, tmp, unix.O_CREAT|unix.O_TRUNC|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer unix.Unlinkat(dir, tmp, 0)
	defer unix.Close(fd)
	if err := writeAll(fd, data); err != nil {
		return err
	}
	return unix.Linkat(dir, tmp, dir, name, 0)
}

func writeAll(fd int, p []byte) error {
	for len(p) > 0 {
		n, err := unix.Write(fd, p)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrShortWrite
		}
		p = p[n:]
	}
	return nil
}

// Claim holds a given address for owner. It is success if owner holds it already. A broken record is replaced.
//
// Errors: AlreadyExists if another holds it.
func (p *Pool) Claim(owner Owner, a netip.Addr) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	ok, err := p.take(owner, a)
	if err != nil || ok {
		return err
	}
	rec, err := p.Get(a)
	if errors.Is(err, errdefs.ErrDataLoss) {
		// The caller knows better than a broken record.
		if err := unix.Unlinkat(int(p.dir.Fd()), a.String(), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("replace broken address record %s: %w", a, err)
		}
		if ok, err := p.take(owner, a); err != nil || ok {
			return err
		}
		rec, err = p.Get(a)
	}
	if err != nil {
		return err
	}
	if rec.Network == owner.Network && rec.Sandbox == owner.Sandbox && rec.IfName == owner.IfName {
		return nil
	}
	return fmt.Errorf("claim address %s for sandbox %s: held by sandbox %s: %w", a, owner.Sandbox, rec.Sandbox, errdefs.ErrAlreadyExists)
}

// Get reads the record of one address.
//
// Errors: NotFound if nobody holds it, and those of Decode.
func (p *Pool) Get(a netip.Addr) (Record, error) {
	data, err := p.read(a.String())
	if errors.Is(err, fs.ErrNotExist) {
		return Record{}, fmt.Errorf("address %s is not held: %w", a, errdefs.ErrNotFound)
	}
	if err != nil {
		return Record{}, fmt.Errorf("read address record %s: %w", a, err)
	}
	return Decode(a.String(), data)
}

func (p *Pool) read(name string) ([]byte, error) {
	fd, err := unix.Openat(int(p.dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxRecord))
}

// Release lets a rest if sandbox of network holds it. It is success if nobody or another holds it.
func (p *Pool) Release(network, sandbox string, a netip.Addr) error {
	rec, err := p.Get(a)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if rec.Network != network || rec.Sandbox != sandbox {
		return nil
	}
	return p.free(a.String())
}

// Free lets a rest, which the caller has just allocated and nobody else knows of. It needs no descriptor, so it works
// when there are none left.
func (p *Pool) Free(a netip.Addr) error { return p.free(a.String()) }

// free turns a held address into a resting one.
func (p *Pool) free(name string) error {
	dir := int(p.dir.Fd())
	now := unix.NsecToTimespec(p.cfg.Now().UnixNano())
	if err := unix.UtimesNanoAt(dir, name, []unix.Timespec{now, now}, unix.AT_SYMLINK_NOFOLLOW); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("release address %s: %w", name, err)
	}
	if err := unix.Renameat(dir, name, dir, name+freeSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("release address %s: %w", name, err)
	}
	return nil
}

// Held lists what network holds. Records that cannot be read are in broken, by file name;
// those of a version this program does not know are in neither.
func (p *Pool) Held(network string) (held []Record, broken []string, err error) {
	names, err := p.names()
	if err != nil {
		return nil, nil, err
	}
	for _, name := range names {
		if a, err := netip.ParseAddr(name); err != nil || a.String() != name {
			continue
		}
		data, err := p.read(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("read address record %s: %w", name, err)
		}
		rec, err := Decode(name, data)
		switch {
		case errors.Is(err, errdefs.ErrDataLoss):
			broken = append(broken, name)
		case err == nil && rec.Network == network:
			held = append(held, rec)
		}
	}
	return held, broken, nil
}

// ReleaseSandbox lets all addresses rest that sandbox of network holds on ifName ("": on any),
// and returns them. It reads the directory: Release with known addresses is cheaper.
func (p *Pool) ReleaseSandbox(network, sandbox, ifName string) ([]netip.Addr, error) {
	held, _, err := p.Held(network)
	if err != nil {
		return nil, err
	}
	var freed []netip.Addr
	var errs []error
	for _, rec := range held {
		if rec.Sandbox != sandbox || ifName != "" && rec.IfName != ifName {
			continue
		}
		if err := p.free(rec.Addr.String()); err != nil {
			errs = append(errs, err)
			continue
		}
		freed = append(freed, rec.Addr)
	}
	return freed, errors.Join(errs...)
}

// Keep releases every address of network for whose record live is false, and every broken record
// whose address keepBroken does not name. It returns what it released.
func (p *Pool) Keep(network string, live func(Record) bool, keepBroken func(netip.Addr) bool) ([]netip.Addr, error) {
	held, broken, err := p.Held(network)
	if err != nil {
		return nil, err
	}
	var freed []netip.Addr
	var errs []error
	drop := func(a netip.Addr) {
		if err := p.free(a.String()); err != nil {
			errs = append(errs, err)
			return
		}
		freed = append(freed, a)
	}
	for _, rec := range held {
		if !live(rec) {
			drop(rec.Addr)
		}
	}
	for _, name := range broken {
		if a, err := netip.ParseAddr(name); err == nil && !keepBroken(a) {
			drop(a)
		}
	}
	return freed, errors.Join(errs...)
}

// Sweep removes what no longer matters: rested addresses and temporary files older than a minute.
func (p *Pool) Sweep() error {
	names, err := p.names()
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		least := p.cfg.Quarantine
		switch {
		case strings.HasSuffix(name, freeSuffix):
		case strings.HasPrefix(name, tempPrefix):
			least = time.Minute
		default:
			continue
		}
		at, err := p.stat(name)
		if err != nil || p.rests(at, least) {
			continue
		}
		if err := unix.Unlinkat(int(p.dir.Fd()), name, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// names lists the directory through a descriptor of its own, so that callers do not share an offset.
func (p *Pool) names() ([]string, error) {
	dir, err := os.Open(p.cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("list address records: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list address records: %w", err)
	}
	return names, nil
}

// cursor loads the hint where to go on in r. Without one it starts at the beginning.
func (p *Pool) cursor(r Range) *cursor {
	if c := p.cursors[r.prefix]; c != nil {
		return c
	}
	c := &cursor{}
	name := cursorPrefix + strings.ReplaceAll(r.prefix.String(), "/", "_")
	if f, err := os.OpenFile(filepath.Join(p.cfg.Dir, name), os.O_RDWR|os.O_CREATE, 0o600); err == nil {
		c.file = f
		buf := make([]byte, 20)
		if n, _ := f.ReadAt(buf, 0); n == len(buf) {
			if v, err := strconv.ParseUint(string(buf), 10, 64); err == nil {
				c.last = v
			}
		}
	}
	p.cursors[r.prefix] = c
	return c
}

// move records the last offset given out; losing it costs nothing but the order.
func (p *Pool) move(c *cursor, off uint64) {
	c.last = off
	if c.file != nil {
		_, _ = c.file.WriteAt(fmt.Appendf(nil, "%020d", off), 0)
	}
}
