package certs

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/util/certificate"
)

func testPair(t testing.TB, ca *authority) *Pair {
	now := time.Now()
	return ca.pair(t, clientKind, nodeIdentity(testNode), now.Add(-time.Minute), now.Add(time.Hour))
}

// TestKubeletReadsOurFiles and the other way round, with kubelet's own store.
func TestKubeletReadsOurFiles(t *testing.T) {
	ca, dir := newAuthority(t, "ca"), t.TempDir()
	ours := store{dir, clientKind.prefix}
	mine := testPair(t, ca)
	if err := ours.save(mine); err != nil {
		t.Fatal(err)
	}
	kubelets, err := certificate.NewFileStore(clientKind.prefix, dir, dir, "", "")
	if err != nil {
		t.Fatal(err)
	}
	got, err := kubelets.Current()
	if err != nil || !got.Leaf.Equal(mine.Leaf()) {
		t.Fatalf("kubelet reads %v, %v", got, err)
	}
	theirs := testPair(t, ca)
	if _, err := kubelets.Update(theirs.certPEM, theirs.keyPEM); err != nil {
		t.Fatal(err)
	}
	if p, err := ours.load(); err != nil || !p.same(theirs) {
		t.Errorf("we read %v, %v", p, err)
	}
	if link, err := os.Readlink(ours.current()); err != nil || link == "" {
		t.Errorf("no link: %v", err)
	}
}

// TestPairIsAlwaysWhole reads while pairs are replaced: never none, never half.
func TestPairIsAlwaysWhole(t *testing.T) {
	ca := newAuthority(t, "ca")
	s := store{t.TempDir(), clientKind.prefix}
	if err := s.save(testPair(t, ca)); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := loadPair(s.current(), s.current()); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 100 {
		if err := s.save(testPair(t, ca)); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	wg.Wait()
	if files, _ := filepath.Glob(s.path("-2*.pem")); len(files) > keptPairs {
		t.Errorf("%d files of old pairs are left", len(files))
	}
}

func TestFilesArePrivate(t *testing.T) {
	s := store{t.TempDir(), clientKind.prefix}
	p := testPair(t, newAuthority(t, "ca"))
	if err := errors.Join(s.save(p), s.savePendingKey(p.keyPEM)); err != nil {
		t.Fatal(err)
	}
	all, _ := filepath.Glob(filepath.Join(s.dir, "*"))
	if len(all) != 3 {
		t.Errorf("files: %q", all)
	}
	for _, f := range all {
		if st, err := os.Stat(f); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", f, st.Mode(), err)
		}
	}
}

// TestUnusableFiles: an error that names the file, and a way back by saving.
func TestUnusableFiles(t *testing.T) {
	ca := newAuthority(t, "ca")
	for name, break_ := range map[string]func(t *testing.T, s store){
		"cut short":   func(t *testing.T, s store) { cut(t, s) },
		"garbage":     func(t *testing.T, s store) { mustWrite(t, s.current(), []byte("garbage")) },
		"empty":       func(t *testing.T, s store) { mustWrite(t, s.current(), nil) },
		"a loose end": func(t *testing.T, s store) { os.Remove(target(t, s)) },
		"another's key": func(t *testing.T, s store) {
			mustWrite(t, s.current(), append(testPair(t, ca).certPEM, testPair(t, ca).keyPEM...))
		},
		"a file in the link's place": func(t *testing.T, s store) {
			os.Remove(s.current())
			mustWrite(t, s.current(), []byte("garbage"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := store{t.TempDir(), clientKind.prefix}
			if err := s.save(testPair(t, ca)); err != nil {
				t.Fatal(err)
			}
			break_(t, s)
			if p, err := s.load(); err == nil || errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), s.current()) {
				t.Errorf("load: %v, %v", p, err)
			}
			next := testPair(t, ca)
			if err := s.save(next); err != nil {
				t.Fatal(err)
			}
			if p, err := s.load(); err != nil || !p.same(next) {
				t.Errorf("after saving: %v, %v", p, err)
			}
		})
	}
}

func target(t *testing.T, s store) string {
	t.Helper()
	path, err := os.Readlink(s.current())
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func cut(t *testing.T, s store) {
	t.Helper()
	data, err := os.ReadFile(s.current())
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, s.current(), data[:len(data)/2])
}

// TestInterruptedKubelet: kubelet removes the link before it renames the next.
func TestInterruptedKubelet(t *testing.T) {
	s := store{t.TempDir(), clientKind.prefix}
	p := testPair(t, newAuthority(t, "ca"))
	if err := s.save(p); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(s.current(), s.path("-updated.pem")); err != nil {
		t.Fatal(err)
	}
	if got, err := s.load(); err != nil || !got.same(p) {
		t.Errorf("%v, %v", got, err)
	}
}

// TestNothingSecretIsPrinted whatever is printed with whatever verb.
func TestNothingSecretIsPrinted(t *testing.T) {
	p := testPair(t, newAuthority(t, "ca"))
	var b strings.Builder
	log := slog.New(slog.NewJSONHandler(&b, nil))
	log.Info("x", "pair", p, "list", []*Pair{p})
	fmt.Fprintf(&b, "%v %+v %#v %s %q %x %d", p, p, p, p, p, p, []*Pair{p})
	for _, secret := range []string{"PRIVATE", string(p.keyPEM[40:80])} {
		if strings.Contains(b.String(), secret) {
			t.Errorf("%q in %s", secret, b.String())
		}
	}
}
