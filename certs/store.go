package certs

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// keptPairs is how many dated files of each kind stay, the current one too.
const keptPairs = 3

// store holds one kind of pair in kubelet's layout:
//
//	<prefix>-current.pem              a link to
//	<prefix>-2006-01-02-15-04-05.pem  chain and key, 0600
//	<prefix>-updated.pem              the next link of a kubelet, for a moment
//	<prefix>.crt, <prefix>.key        read when there is no link
//	<prefix>.key.tmp                  the key of the request under way
//
// A reader of the link sees a whole pair, the old or the new one, always: the
// file is complete and synced before the link is renamed over the old one.
type store struct{ dir, prefix string }

func (s store) path(tail string) string { return filepath.Join(s.dir, s.prefix+tail) }

func (s store) current() string { return s.path("-current.pem") }

// load reads the pair.
//
// Errors: fs.ErrNotExist if there is none, else what is wrong with the file.
func (s store) load() (*Pair, error) {
	if err := s.heal(); err != nil {
		return nil, err
	}
	p, err := loadPair(s.current(), s.current())
	if !errors.Is(err, fs.ErrNotExist) {
		return p, err
	}
	if target, linkErr := os.Readlink(s.current()); linkErr == nil {
		return nil, fmt.Errorf("read pair: %s points to %s, which is not there", s.current(), target)
	}
	return loadPair(s.path(".crt"), s.path(".key"))
}

func loadPair(cert, key string) (*Pair, error) {
	certPEM, at, err := readFile(cert)
	if err != nil {
		return nil, fmt.Errorf("read pair: %w", err)
	}
	keyPEM := certPEM
	if key != cert {
		if keyPEM, _, err = readFile(key); err != nil {
			return nil, fmt.Errorf("read pair: %w", err)
		}
	}
	p, err := newPair(certPEM, onlyKey(keyPEM), at)
	if err != nil {
		return nil, fmt.Errorf("read pair %s: %w", cert, err)
	}
	return p, nil
}

// maxPair bounds a file of certificates, in bytes.
const maxPair = 1 << 20

func readFile(path string) ([]byte, time.Time, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, time.Time{}, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, time.Time{}, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxPair {
		return nil, time.Time{}, fmt.Errorf("%s is no file of certificates", path)
	}
	data, err := os.ReadFile(path)
	return data, st.ModTime(), err
}

// onlyKey is the private key's block of a file with both.
func onlyKey(data []byte) []byte {
	for rest := data; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			return nil
		}
		if b.Type != "CERTIFICATE" {
			return pem.EncodeToMemory(b)
		}
	}
}

// heal ends what a kubelet that died between removing the link and renaming
// the new one has left.
func (s store) heal() error {
	if _, err := os.Lstat(s.current()); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if st, err := os.Lstat(s.path("-updated.pem")); err != nil || st.Mode()&fs.ModeSymlink == 0 {
		return nil
	}
	if err := os.Rename(s.path("-updated.pem"), s.current()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("finish an interrupted rotation: %w", err)
	}
	return nil
}

// stamp changes when another pair may be in place; it costs a stat or two.
func (s store) stamp() string {
	out := ""
	for _, path := range []string{s.current(), s.path(".crt"), s.path(".key")} {
		var st unix.Stat_t
		err := unix.Stat(path, &st)
		out += fmt.Sprintf("%v %d %d %d %v;", err, st.Ino, st.Size, st.Mode, st.Mtim)
	}
	return out
}

// save makes p the current pair. A failure leaves the old one in place.
func (s store) save(p *Pair) error {
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return fmt.Errorf("make directory for certificates: %w", err)
	}
	dated := s.path(p.received.UTC().Format("-2006-01-02-15-04-05") + ".pem")
	if _, err := os.Lstat(dated); err == nil {
		dated = s.path(p.received.UTC().Format("-2006-01-02-15-04-05.000000000") + ".pem")
	}
	if err := writeFile(dated, slices.Concat(p.certPEM, p.keyPEM)); err != nil {
		return err
	}
	if err := s.link(dated); err != nil {
		os.Remove(dated)
		return err
	}
	s.prune()
	return nil
}

// link renames a new link over the old one. Where backup tools have put a file
// in the link's place it is kept beside.
func (s store) link(target string) error {
	target, err := filepath.Abs(target)
	if err != nil {
		return fmt.Errorf("link pair: %w", err)
	}
	if st, err := os.Lstat(s.current()); err == nil && st.Mode().IsRegular() {
		if err := os.Rename(s.current(), s.current()+".replaced"); err != nil {
			return fmt.Errorf("move aside what is in the link's place: %w", err)
		}
	}
	next := s.path("-current.tmp") // not kubelet's name: it may be at work as well
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("link pair: %w", err)
	}
	if err := os.Symlink(target, next); err != nil {
		return fmt.Errorf("link pair: %w", err)
	}
	if err := os.Rename(next, s.current()); err != nil {
		return fmt.Errorf("link pair: %w", err)
	}
	return syncDir(s.dir)
}

var datedFile = regexp.MustCompile(`-\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d(\.\d+)?\.pem$`)

// prune removes dated files beyond the newest few. What it cannot remove stays.
func (s store) prune() {
	all, _ := filepath.Glob(s.path("-*.pem"))
	all = slices.DeleteFunc(all, func(p string) bool { return !datedFile.MatchString(p) })
	slices.Sort(all) // by date
	now, _ := os.Readlink(s.current())
	for _, old := range all[:max(0, len(all)-keptPairs)] {
		if old != now {
			os.Remove(old)
		}
	}
}

// pendingKey is the key of a request under way, nil if there is none that can
// be used.
func (s store) pendingKey() []byte {
	data, _, err := readFile(s.path(".key.tmp"))
	if err != nil {
		return nil
	}
	return bytes.TrimSpace(data)
}

func (s store) savePendingKey(keyPEM []byte) error {
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return fmt.Errorf("make directory for certificates: %w", err)
	}
	return writeFile(s.path(".key.tmp"), keyPEM)
}

func (s store) dropPendingKey() { os.Remove(s.path(".key.tmp")) }

// writeFile puts data at path with mode 0600, whole or not at all, also when
// the host dies.
func writeFile(path string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*") // 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}
