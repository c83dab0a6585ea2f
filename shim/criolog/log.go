// Package criolog writes the output of one container as a Kubernetes CRI log,
// exactly: a process that is killed with SIGKILL at any instruction and started
// again neither loses, repeats, tears nor reorders a byte.
//
// How: bytes go from the container's fifo into a spool file with splice(2), one
// system call that takes them out of the pipe and puts them into the file, so
// the size of the spool is the kernel's own record of what was taken. Lines are
// formatted from the spool; before they are written to the log, a record of the
// write (log size before, bytes to add, time stamp, range of the spool) goes to
// log.state. Whoever opens the log next compares the log's size with the record
// and writes the bytes that are missing: the same bytes, as formatting is a
// function of the record and the spool. Nothing is synced to disk: the promise
// is against the death of processes, not of the machine.
//
// A Log holds at most a spool of about spoolLimit bytes for each stream. When
// the log cannot be written (disk full) nothing more is taken from the fifos,
// so the container blocks instead of losing output.
//
// The package must not know of containers, processes or ttrpc. Its caller is
// shim/server, with one goroutine for each stream; mu makes their writes take
// turns, and Reopen gets in between. It starts no goroutine. Linux 4.5 or newer (splice from a fifo).
package criolog

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// DefaultMaxLine is the longest line in bytes when Config says 0; it is
	// what containerd and CRI-O cut at.
	DefaultMaxLine = 16 << 10

	maxMaxLine = 512 << 10
	spoolLimit = 1 << 20   // a spool larger than this is rotated
	idleLimit  = 64 << 10  // a spool that is done and larger than this is emptied
	chunk      = 128 << 10 // read from the spool at a time
	outLimit   = 256 << 10 // written to the log at a time, about
	spliceMax  = 1 << 20
)

// Config says where the files of one log are.
type Config struct {
	Dir     string // for spools and log.state; on a file system that outlives the process
	Path    string // of the log; "" writes none and only feeds Tap
	MaxLine int    // bytes, 0: DefaultMaxLine
	StripCR bool   // for terminals: drop the CR of a CR LF
	Log     *slog.Logger
	Now     func() time.Time
	// Tap gets every new piece of output before it is written, in order for
	// each stream; it may block to slow the container down, and must not keep p.
	Tap func(s Stream, p []byte)
	// Tapped says whether Tap wants anything now.
	Tapped func() bool
}

// Log is the log of one container. Its methods may be called from any
// goroutine, but Take and Finish of one stream only from one at a time.
type Log struct {
	cfg Config

	// step is called with the name of each crash point; tests only.
	step func(string)

	// turn is held by the stream that writes, also while it waits for Tap or
	// for space; mu, always taken after turn, is given up in these waits.
	turn sync.Mutex

	mu       sync.Mutex
	cond     *sync.Cond // with mu: something changed for a writer that waits
	st       state
	file     *os.File // the log; nil when cfg.Path is ""
	record   *os.File
	spool    [streams][2]*os.File
	size     [streams]int64 // of the active spool
	last     int64          // no line has a later time, ns
	pending  bool           // st describes a write that is not done
	closed   bool
	complain bool // the log could not be written and that was said
}

// Open opens the log, finishing what a killed process began.
//
// Errors: those of the file system; a log.state of another version is refused
// and kept.
func Open(cfg Config) (*Log, error) {
	if cfg.MaxLine <= 0 {
		cfg.MaxLine = DefaultMaxLine
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.MaxLine = min(cfg.MaxLine, maxMaxLine)
	l := &Log{cfg: cfg, step: func(string) {}}
	l.cond = sync.NewCond(&l.mu)
	if cfg.Path == "" {
		return l, nil
	}
	if err := l.open(); err != nil {
		l.closeFiles()
		return nil, fmt.Errorf("open container log %s: %w", cfg.Path, err)
	}
	return l, nil
}

// open opens the log and what a process before this one has left. State and
// spools are made with the first output: many containers never have any.
func (l *Log) open() error {
	var err error
	if l.file, err = openLog(l.cfg.Path); err != nil {
		return err
	}
	l.record, err = openFile(l.recordPath(), unix.O_RDWR)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	b := make([]byte, recordSize+1)
	n, err := l.record.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return err
	}
	if n > 0 {
		if err := l.st.decode(b[:n]); err != nil {
			return err
		}
	}
	for s := range streams {
		if err := l.openSpool(s, l.st.pos[s].active); err != nil {
			return err
		}
		fi, err := l.spool[s][l.st.pos[s].active].Stat()
		if err != nil {
			return err
		}
		l.size[s] = fi.Size()
	}
	return l.recover()
}

func (l *Log) recordPath() string { return filepath.Join(l.cfg.Dir, "log.state") }

// openFile opens a plain file without asking the netpoller to wait for it, which
// os.OpenFile tries with five system calls.
func openFile(path string, flags int) (*os.File, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o640)
		if err == nil {
			return os.NewFile(uintptr(fd), path), nil
		}
		if err != unix.EINTR {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

func openLog(path string) (*os.File, error) {
	return openFile(path, unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND)
}

func (l *Log) openSpool(s Stream, which uint8) error {
	if l.spool[s][which] != nil {
		return nil
	}
	name := filepath.Join(l.cfg.Dir, s.String()+".spool"+string('0'+rune(which)))
	f, err := openFile(name, unix.O_RDWR|unix.O_CREAT)
	if err != nil {
		return err
	}
	l.spool[s][which] = f
	return nil
}

// openState opens what open did not find.
func (l *Log) openState(s Stream) error {
	if l.record == nil {
		f, err := openFile(l.recordPath(), unix.O_RDWR|unix.O_CREAT)
		if err != nil {
			return err
		}
		l.record = f
		if err := l.writeState(); err != nil {
			return err
		}
	}
	return l.openSpool(s, l.st.pos[s].active)
}

// recover finishes the write that st describes.
func (l *Log) recover() error {
	p := &l.st.pos[l.st.stream]
	if l.st.expect == 0 || p.to == p.from {
		return l.settle()
	}
	file, err := l.find()
	if err != nil {
		return err
	}
	if file == nil {
		// The file that the write went to is gone. What of it was seen by
		// whom cannot be known; writing it again loses nothing.
		l.cfg.Log.Warn("log file of an unfinished write is gone; its lines are written to the new file", "path", l.cfg.Path)
		p.to = p.from
		return l.settle()
	}
	defer file.Close()
	fi, err := file.Stat()
	if err != nil {
		return err
	}
	done := fi.Size() - l.st.size
	if done >= l.st.expect {
		return l.settle()
	}
	out, err := l.replay(p)
	if err != nil {
		return err
	}
	if done < 0 || int64(len(out)) != l.st.expect {
		// Not what this program would write: the log was cut by somebody, or
		// the record is of a build that formats differently.
		if done > 0 {
			if err := unix.Ftruncate(int(file.Fd()), l.st.size); err != nil {
				return os.NewSyscallError("ftruncate", err)
			}
		}
		done = 0
	}
	if _, err := file.Write(out[done:]); err != nil {
		if !full(err) {
			return err
		}
		// No space: as if the write had not begun.
		if err := unix.Ftruncate(int(file.Fd()), l.st.size); err != nil {
			return os.NewSyscallError("ftruncate", err)
		}
		p.to = p.from
	}
	return l.settle()
}

// replay formats the range of the unfinished write again.
func (l *Log) replay(p *position) ([]byte, error) {
	src := make([]byte, p.to-p.from)
	if _, err := l.spool[l.st.stream][p.active].ReadAt(src, p.from); err != nil {
		return nil, fmt.Errorf("read spool: %w", err)
	}
	out, _, _ := l.batch(l.st.stream, l.st.at).appendLines(nil, src, true, 0)
	return out, nil
}

// find opens the file that the unfinished write went to: the log, or the name
// that it was rotated to since. It returns nil when there is none.
func (l *Log) find() (*os.File, error) {
	same := func(path string) bool {
		var st unix.Stat_t
		return unix.Lstat(path, &st) == nil && st.Dev == l.st.dev && st.Ino == l.st.ino
	}
	if same(l.cfg.Path) {
		return openLog(l.cfg.Path)
	}
	dir := filepath.Dir(l.cfg.Path)
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range names {
		if path := filepath.Join(dir, e.Name()); same(path) {
			return openLog(path)
		}
	}
	return nil, nil
}

// settle makes the end of the last write the begin of the next and records
// that no write is under way.
func (l *Log) settle() error {
	for s := range streams {
		l.st.pos[s].from = l.st.pos[s].to
	}
	l.st.expect = 0
	return l.writeState()
}

func (l *Log) writeState() error {
	if l.record == nil {
		return nil // nothing was written yet
	}
	var b [recordSize]byte
	l.st.encode(&b)
	_, err := l.record.WriteAt(b[:], 0)
	return err
}

func (l *Log) batch(s Stream, at int64) batch {
	return batch{at: at, stream: s, max: l.cfg.MaxLine, stripCR: l.cfg.StripCR}
}

// Take moves what the pipe fd (not blocking) has into the log. It returns the
// number of bytes, 0 at the end of the stream, and EAGAIN when the pipe is
// empty. It does not return while the log cannot be written, unless the Log is
// closed: then os.ErrClosed. What is not a complete line yet stays in the spool.
func (l *Log) Take(s Stream, fd int) (int, error) {
	if l.cfg.Path == "" {
		return l.discard(s, fd)
	}
	l.turn.Lock()
	defer l.turn.Unlock()
	n, err := l.fetch(s, fd)
	if err != nil || n == 0 {
		return n, err
	}
	l.tap(s, int64(n))
	l.mu.Lock()
	defer l.mu.Unlock()
	return n, l.write(s, false)
}

// fetch moves what the pipe has into the spool.
func (l *Log) fetch(s Stream, fd int) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return 0, os.ErrClosed
	}
	if l.record == nil {
		if more, err := waiting(fd); !more {
			return 0, err // no reason to make files yet
		}
	}
	if err := l.openState(s); err != nil {
		return 0, err
	}
	if err := l.makeRoom(s); err != nil {
		return 0, err
	}
	n, err := l.splice(s, fd)
	if err == nil && n > 0 {
		l.size[s] += int64(n)
		l.step("spliced")
	}
	return n, err
}

// waiting says whether the pipe has something; if not, the error is EAGAIN, or
// nil at the end of the stream.
func waiting(fd int) (bool, error) {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(p, 0)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return false, os.NewSyscallError("poll", err)
		case p[0].Revents&unix.POLLIN != 0:
			return true, nil
		case p[0].Revents&unix.POLLHUP != 0:
			return false, nil
		}
		return false, unix.EAGAIN
	}
}

// splice moves up to spliceMax bytes from fd to the end of the active spool,
// waiting for space on a full disk.
func (l *Log) splice(s Stream, fd int) (int, error) {
	for delay := 10 * time.Millisecond; ; delay = min(2*delay, time.Second) {
		off := l.size[s]
		f := l.spool[s][l.st.pos[s].active]
		n, err := unix.Splice(fd, nil, int(f.Fd()), &off, spliceMax, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		switch {
		case err == unix.EINTR:
			delay = 5 * time.Millisecond
			continue
		case err == nil || err == unix.EAGAIN:
			return int(n), err
		case !full(err):
			return 0, os.NewSyscallError("splice to spool", err)
		}
		if err := l.pause(err, delay); err != nil {
			return 0, err
		}
	}
}

// discard empties the pipe when there is no log.
func (l *Log) discard(s Stream, fd int) (int, error) {
	p := buffers.get()
	defer buffers.put(p)
	for {
		n, err := unix.Read(fd, p.in[:chunk])
		if err == unix.EINTR {
			continue
		}
		if n > 0 && l.cfg.Tap != nil && l.cfg.Tapped() {
			l.cfg.Tap(s, p.in[:n])
		}
		return max(n, 0), err
	}
}

// tap hands the last n bytes of the spool to Tap. The caller holds turn.
func (l *Log) tap(s Stream, n int64) {
	if l.cfg.Tap == nil || !l.cfg.Tapped() {
		return
	}
	p := buffers.get()
	defer buffers.put(p)
	f := l.spool[s][l.st.pos[s].active]
	for off := l.size[s] - n; off < l.size[s]; {
		m, err := f.ReadAt(p.in[:min(chunk, l.size[s]-off)], off)
		if m == 0 || err != nil && err != io.EOF {
			return
		}
		l.cfg.Tap(s, p.in[:m])
		off += int64(m)
	}
}

// write brings the complete lines of the spool into the log; with final the
// rest too.
func (l *Log) write(s Stream, final bool) error {
	p := buffers.get()
	defer buffers.put(p)
	if len(p.in) <= l.cfg.MaxLine {
		p.in = make([]byte, l.cfg.MaxLine+1)
	}
	limit := outLimit
	for l.st.pos[s].to < l.size[s] {
		src := p.in[:min(int64(len(p.in)), l.size[s]-l.st.pos[s].to)]
		f := l.spool[s][l.st.pos[s].active]
		if _, err := f.ReadAt(src, l.st.pos[s].to); err != nil {
			return fmt.Errorf("read spool: %w", err)
		}
		last := l.st.pos[s].to+int64(len(src)) == l.size[s]
		at := max(l.cfg.Now().UnixNano(), l.last+1)
		out, used, lines := l.batch(s, at).appendLines(p.out[:0], src, final && last, limit)
		p.out = out
		if used == 0 {
			return nil
		}
		l.last = at + int64(lines)
		switch err := l.commit(s, at, int64(used), out, lines == 1); err {
		case nil:
		case errSmaller:
			limit = max(len(out)/4, 1)
		default:
			return err
		}
	}
	return nil
}

// errSmaller says that a write had to wait for space: try with less.
var errSmaller = errors.New("write less")

// commit writes out, made of the next used bytes of s, to the log. When it
// cannot be written it waits; a single line is tried until it can, of more
// nothing is written then and the error is errSmaller. It is os.ErrClosed when
// the Log is closed meanwhile; the write is then still to be done.
func (l *Log) commit(s Stream, at, used int64, out []byte, single bool) error {
	l.st.stream, l.st.at, l.st.expect = s, at, int64(len(out))
	l.st.pos[s].from, l.st.pos[s].to = l.st.pos[s].to, l.st.pos[s].to+used
	l.st.pos[1-s].from = l.st.pos[1-s].to
	l.pending = true
	for delay := 10 * time.Millisecond; ; delay = min(2*delay, time.Second) {
		err := l.begin()
		if err == nil {
			err = l.append(out)
		}
		if err == nil {
			l.written()
			return nil
		}
		if err := l.pause(err, delay); err != nil {
			return err
		}
		if !single {
			l.pending = false
			l.st.expect = 0
			l.st.pos[s].to = l.st.pos[s].from
			return errSmaller
		}
	}
}

func (l *Log) written() {
	l.pending = false
	if l.complain {
		l.complain = false
		l.cfg.Log.Info("container log can be written again", "path", l.cfg.Path)
	}
}

// begin records the write that st describes, against the log as it is.
func (l *Log) begin() error {
	var st unix.Stat_t
	if err := unix.Fstat(int(l.file.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	l.st.dev, l.st.ino, l.st.size = st.Dev, st.Ino, st.Size
	if err := l.writeState(); err != nil {
		return err
	}
	l.step("recorded")
	return nil
}

// append writes out to the log whole or, after an error, not at all.
func (l *Log) append(out []byte) error {
	_, err := l.file.Write(out)
	if err == nil {
		l.step("written")
		return nil
	}
	if terr := unix.Ftruncate(int(l.file.Fd()), l.st.size); terr != nil {
		err = errors.Join(err, os.NewSyscallError("ftruncate", terr))
	}
	return err
}

// pause waits between two attempts, with mu given up. It says once what is
// wrong.
func (l *Log) pause(err error, delay time.Duration) error {
	if !l.complain {
		l.complain = true
		l.cfg.Log.Error("write container log; the container waits until it can be written", "path", l.cfg.Path, "err", err)
	}
	t := time.AfterFunc(delay, l.cond.Broadcast)
	defer t.Stop()
	l.cond.Wait()
	if l.closed {
		return os.ErrClosed
	}
	return nil
}

// makeRoom keeps the spool small: what is not written yet (less than a line)
// moves to the stream's other spool file. The record is the moment of change:
// killed before it the old file counts, after it the new one, which has the same
// rest.
func (l *Log) makeRoom(s Stream) error {
	p := &l.st.pos[s]
	rest := l.size[s] - p.to
	if l.size[s] < idleLimit || rest > 0 && l.size[s] < spoolLimit {
		return nil
	}
	old, next := p.active, 1-p.active
	if err := l.openSpool(s, next); err != nil {
		return err
	}
	if err := l.spool[s][next].Truncate(0); err != nil {
		return err
	}
	if rest > 0 {
		b := make([]byte, rest)
		if _, err := l.spool[s][old].ReadAt(b, p.to); err != nil {
			return fmt.Errorf("read spool: %w", err)
		}
		if _, err := l.spool[s][next].WriteAt(b, 0); err != nil {
			return nil // full disk: go on with the large spool
		}
	}
	l.step("copied")
	prev := l.st
	*p = position{active: next}
	l.st.expect = 0
	if err := l.writeState(); err != nil {
		l.st = prev
		return nil
	}
	l.step("switched")
	l.size[s] = rest
	return l.spool[s][old].Truncate(0)
}

// Finish ends the stream: what has no newline yet is written as a partial line.
func (l *Log) Finish(s Stream) error {
	l.turn.Lock()
	defer l.turn.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return os.ErrClosed
	}
	if l.file == nil {
		return nil
	}
	return l.write(s, true)
}

// Reopen opens the log by its path again, after somebody has renamed it. A
// write that waits for space goes to the new file, whole.
func (l *Log) Reopen() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return fmt.Errorf("reopen container log %s: %w", l.cfg.Path, os.ErrClosed)
	}
	if l.file == nil {
		return nil
	}
	f, err := openLog(l.cfg.Path)
	if err != nil {
		return fmt.Errorf("reopen container log %s: %w", l.cfg.Path, err)
	}
	if !l.pending {
		// The last write is done: nobody need look for the old file.
		if err := l.settle(); err != nil {
			f.Close()
			return fmt.Errorf("reopen container log %s: %w", l.cfg.Path, err)
		}
	}
	l.file.Close()
	l.file = f
	l.cond.Broadcast()
	return nil
}

// Close gives up the files; the next Open goes on where this Log ends.
// It waits for a Take that is in Tap.
func (l *Log) Close() error {
	l.mu.Lock()
	l.closed = true
	l.cond.Broadcast()
	l.mu.Unlock()
	l.turn.Lock()
	defer l.turn.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closeFiles()
	return nil
}

func (l *Log) closeFiles() {
	all := []*os.File{l.file, l.record}
	for s := range streams {
		all = append(all, l.spool[s][:]...)
	}
	for _, f := range all {
		if f != nil {
			f.Close()
		}
	}
}

func full(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EIO) || errors.Is(err, unix.EFBIG)
}
