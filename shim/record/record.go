// Package record holds what the shim writes down about containers: the facts
// of a start (for the next shim), exits (for the daemon), and the lines of the
// reaper. It reads and writes files and knows no process. shim/server calls it.
// No goroutine, no lock.
package record

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Version is that of Facts and Exit. A file of another version is refused and
// stays where it is.
const Version = 1

// ErrVersion is in the error of a file of another version.
var ErrVersion = errors.New("record of a version that this program does not know")

// Facts is the second line of a container's journal: a container that was
// started. It is written, not synced, before the container's program runs; it
// dies with the boot, as the container does.
type Facts struct {
	Version     int               `json:"version"`
	ID          string            `json:"id"`
	SandboxID   string            `json:"sandbox"`
	Pid         int               `json:"pid"`
	StartTime   uint64            `json:"startTime"` // clock ticks since boot
	CreatedAt   time.Time         `json:"createdAt"`
	StartedAt   time.Time         `json:"startedAt"`
	LogPath     string            `json:"logPath,omitempty"`
	MaxLogLine  int               `json:"maxLogLine,omitempty"`
	Terminal    bool              `json:"terminal,omitempty"`
	Stdin       bool              `json:"stdin,omitempty"`
	StdinOnce   bool              `json:"stdinOnce,omitempty"`
	StdinClosed bool              `json:"stdinClosed,omitempty"`
	Pause       bool              `json:"pause,omitempty"`
	PrivatePID  bool              `json:"privatePid,omitempty"`
	CgroupPaths map[string]string `json:"cgroupPaths,omitempty"`
}

// Exit is ExitDir/<id>.json: how the container's first process ended. It is
// synced before anybody is told.
type Exit struct {
	Version   int       `json:"version"`
	ID        string    `json:"id"`
	SandboxID string    `json:"sandbox,omitempty"`
	Pid       int       `json:"pid"`
	StartTime uint64    `json:"startTime,omitempty"`
	Code      int       `json:"code"`
	Signal    int       `json:"signal,omitempty"`
	Known     bool      `json:"known"`
	OOMKilled bool      `json:"oomKilled,omitempty"`
	CreatedAt time.Time `json:"createdAt"`
	StartedAt time.Time `json:"startedAt"`
	At        time.Time `json:"at"`
}

// DecodeFacts reads and checks facts.
func DecodeFacts(b []byte) (Facts, error) {
	var f Facts
	if err := decode(b, &f, &f.Version); err != nil {
		return Facts{}, err
	}
	if !ValidID(f.ID) || f.Pid <= 0 {
		return Facts{}, fmt.Errorf("facts of container %q, pid %d: not valid", f.ID, f.Pid)
	}
	return f, nil
}

// DecodeExit reads and checks an exit.
func DecodeExit(b []byte) (Exit, error) {
	var e Exit
	if err := decode(b, &e, &e.Version); err != nil {
		return Exit{}, err
	}
	if !ValidID(e.ID) {
		return Exit{}, fmt.Errorf("exit of container %q: not a valid id", e.ID)
	}
	return e, nil
}

func decode(b []byte, into any, version *int) error {
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("decode record: %w", err)
	}
	if *version != Version {
		return fmt.Errorf("%w: %d, want %d", ErrVersion, *version, Version)
	}
	return nil
}

// ValidID says whether id may name a container: what libcontainer accepts, and
// no more than a file name holds.
func ValidID(id string) bool {
	if id == "" || len(id) > 200 || id == "." || id == ".." {
		return false
	}
	for _, c := range []byte(id) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '+', c == '-', c == '.':
		default:
			return false
		}
	}
	return true
}

// WriteFile replaces the file at path by one with v as JSON, atomically. With
// sync, file and directory are on disk when it returns.
func WriteFile(path string, v any, sync bool) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	tmp := path + ".tmp"
	if err := writeTemp(tmp, b, sync); err != nil {
		os.Remove(tmp)
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		os.Remove(tmp)
		return err
	}
	if sync {
		return SyncDir(filepath.Dir(path))
	}
	return nil
}

func writeTemp(path string, b []byte, sync bool) error {
	f, err := create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil && sync {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// create opens a new plain file without asking the netpoller to wait for it,
// which os.OpenFile tries with five system calls.
func create(path string) (*os.File, error) {
	for {
		fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC, 0o600)
		if err == nil {
			return os.NewFile(uintptr(fd), path), nil
		}
		if err != unix.EINTR {
			return nil, &os.PathError{Op: "create", Path: path, Err: err}
		}
	}
}

// Journal is a file of records, one a line, that a process adds to and a later
// one reads.
type Journal struct{ f *os.File }

// NewJournal makes the file at path, empty.
func NewJournal(path string) (Journal, error) {
	f, err := create(path)
	return Journal{f}, err
}

// Append adds v as JSON, with one system call that a kill cannot divide. It is
// not synced.
func (j Journal) Append(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode record of %s: %w", j.f.Name(), err)
	}
	_, err = j.f.Write(append(b, '\n'))
	return err
}

// Close closes the file.
func (j Journal) Close() error { return j.f.Close() }

// ReadJournal returns the complete lines of a journal; none when there is no
// file.
func ReadJournal(path string) ([][]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	lines := bytes.Split(b, []byte{'\n'})
	return lines[:len(lines)-1], nil // what is after the last newline is not complete
}

// SyncDir makes the names in dir durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Orphan is how a process ended that the reaper reaped.
type Orphan struct {
	Pid       int
	StartTime uint64 // clock ticks since boot
	Code      int    // si_code: 1 exited, 2 killed, 3 dumped
	Status    int    // exit code or signal
	At        time.Time
}

// ParseOrphan reads a line of the reaper.
func ParseOrphan(line string) (Orphan, error) {
	f := strings.Fields(line)
	if len(f) != 5 {
		return Orphan{}, fmt.Errorf("orphan line %q: %d fields, want 5", line, len(f))
	}
	var (
		o    Orphan
		errs [5]error
		ns   int64
	)
	o.Pid, errs[0] = strconv.Atoi(f[0])
	o.StartTime, errs[1] = strconv.ParseUint(f[1], 10, 64)
	o.Code, errs[2] = strconv.Atoi(f[2])
	o.Status, errs[3] = strconv.Atoi(f[3])
	ns, errs[4] = strconv.ParseInt(f[4], 10, 64)
	if err := errors.Join(errs[:]...); err != nil {
		return Orphan{}, fmt.Errorf("orphan line %q: %w", line, err)
	}
	if o.Pid <= 0 || o.Code < 1 || o.Code > 3 {
		return Orphan{}, fmt.Errorf("orphan line %q: pid or code is not valid", line)
	}
	o.At = time.Unix(0, ns)
	return o, nil
}

// FindOrphan looks for the process in the file of the reaper. No file is no
// orphan. Lines that cannot be read are passed over.
func FindOrphan(path string, pid int, startTime uint64) (Orphan, bool, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Orphan{}, false, nil
	}
	if err != nil {
		return Orphan{}, false, err
	}
	for line := range strings.Lines(string(b)) {
		if !strings.HasSuffix(line, "\n") {
			break
		}
		if o, err := ParseOrphan(line); err == nil && o.Pid == pid && o.StartTime == startTime {
			return o, true, nil
		}
	}
	return Orphan{}, false, nil
}
