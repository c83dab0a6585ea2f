package namespaces

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func needRoot(tb testing.TB) {
	tb.Helper()
	if os.Getuid() != 0 {
		tb.Skip("needs root")
	}
}

// newPool returns a pool in a directory of its own that leaves nothing behind.
func newPool(tb testing.TB, c Config) *Pool {
	tb.Helper()
	needRoot(tb)
	if c.Dir == "" {
		c.Dir = filepath.Join(tb.TempDir(), "ns")
	}
	p, err := New(c)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := p.pins.Close(); err != nil {
			tb.Errorf("close: %v", err)
		}
		mounts, _ := os.ReadFile("/proc/self/mountinfo")
		if strings.Contains(string(mounts), c.Dir) {
			tb.Errorf("mounts left below %s", c.Dir)
		}
	})
	return p
}

func podWant() Want { return Want{Net: true, IPC: true, UTS: true, Hostname: "pod"} }

// inode identifies the namespace at path.
func inode(tb testing.TB, path string) uint64 {
	tb.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		tb.Fatalf("stat %s: %v", path, err)
	}
	return st.Ino
}

// in runs fn inside the set's namespaces.
func in(tb testing.TB, s Set, fn func() error) {
	tb.Helper()
	err := onThread(func() error {
		for path, flag := range map[string]int{s.Net: unix.CLONE_NEWNET, s.IPC: unix.CLONE_NEWIPC, s.UTS: unix.CLONE_NEWUTS} {
			if path == "" {
				continue
			}
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			err = unix.Setns(int(f.Fd()), flag)
			f.Close()
			if err != nil {
				return fmt.Errorf("setns %s: %w", path, err)
			}
		}
		return fn()
	})
	if err != nil {
		tb.Fatal(err)
	}
}

func hostname() string {
	var u unix.Utsname
	_ = unix.Uname(&u)
	return unix.ByteSliceToString(u.Nodename[:])
}

func eachMode(t *testing.T, fn func(t *testing.T, c Config)) {
	for _, visible := range []bool{false, true} {
		t.Run(fmt.Sprintf("visible=%v", visible), func(t *testing.T) { fn(t, Config{Visible: visible}) })
	}
}

func TestGetMakesConfiguredNamespaces(t *testing.T) {
	eachMode(t, func(t *testing.T, c Config) {
		p := newPool(t, c)
		w := podWant()
		w.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1"}
		s, err := p.Get(t.Context(), w)
		if err != nil {
			t.Fatal(err)
		}
		for k, path := range map[string]string{"net": s.Net, "ipc": s.IPC, "uts": s.UTS} {
			if inode(t, path) == inode(t, "/proc/self/ns/"+k) {
				t.Errorf("%s is the host's", path)
			}
		}
		if s.User != "" {
			t.Errorf("user namespace %q was not asked for", s.User)
		}
		host := hostname()
		in(t, s, func() error {
			if got := hostname(); got != "pod" {
				t.Errorf("hostname %q, want pod", got)
			}
			for name, want := range map[string]string{"net/ipv4/ip_unprivileged_port_start": "80", "kernel/shm_rmid_forced": "1"} {
				got, err := os.ReadFile("/proc/sys/" + name)
				if err != nil {
					return err
				}
				if strings.TrimSpace(string(got)) != want {
					t.Errorf("%s is %s, want %s", name, got, want)
				}
			}
			return nil
		})
		if hostname() != host {
			t.Errorf("the host's name became %q", hostname())
		}
		for range 2 {
			if err := p.Release(t.Context(), s); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.Lstat(s.Net); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("after Release: %v", err)
		}
	})
}

func TestUserNamespaceOwnsTheOthers(t *testing.T) {
	eachMode(t, func(t *testing.T, c Config) {
		p := newPool(t, c)
		w := podWant()
		w.User = true
		w.UIDMap = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
		w.GIDMap = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
		w.Sysctls = map[string]string{"kernel.shmmax": "65536", "fs.mqueue.msg_max": "7", "net.core.somaxconn": "99", "net.ipv4.ip_local_port_range": "2000 3000"}
		s, err := p.Get(t.Context(), w)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Release(t.Context(), s)
		user := inode(t, s.User)
		for _, path := range []string{s.Net, s.IPC, s.UTS} {
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			owner, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
			f.Close()
			if err != nil {
				t.Fatal(err)
			}
			var st unix.Stat_t
			err = unix.Fstat(owner, &st)
			unix.Close(owner)
			if err != nil || st.Ino != user {
				t.Errorf("%s belongs to another user namespace (%v)", path, err)
			}
		}
		in(t, s, func() error {
			if got := hostname(); got != "pod" {
				t.Errorf("hostname %q, want pod", got)
			}
			for key, want := range w.Sysctls {
				got, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(key, ".", "/"))
				if err != nil || strings.Join(strings.Fields(string(got)), " ") != want {
					t.Errorf("%s is %q (%v), want %q", key, got, err, want)
				}
			}
			return nil
		})
		if os.Geteuid() != 0 {
			t.Error("the test is no longer root")
		}
	})
}

func TestHostNamespacesAreNotMade(t *testing.T) {
	p := newPool(t, Config{})
	s, err := p.Get(t.Context(), Want{})
	if err != nil || s != (Set{}) {
		t.Fatalf("got %+v, %v; want nothing", s, err)
	}
	if err := p.Release(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	s, err = p.Get(t.Context(), Want{IPC: true})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Release(t.Context(), s)
	if s.Net != "" || s.UTS != "" || s.User != "" || s.IPC == "" {
		t.Errorf("got %+v, want an IPC namespace only", s)
	}
}

func TestGetRefuses(t *testing.T) {
	p := newPool(t, Config{})
	for name, w := range map[string]Want{
		"mapping without user": {Net: true, UIDMap: []specs.LinuxIDMapping{{Size: 1}}},
		"user without mapping": {User: true},
		"long hostname":        {UTS: true, Hostname: strings.Repeat("x", 65)},
		"unknown sysctl":       {Net: true, Sysctls: map[string]string{"net.no.such": "1"}},
		"bad sysctl value":     {Net: true, Sysctls: map[string]string{"net.ipv4.ip_forward": "many"}},
		"sysctl that escapes":  {Net: true, Sysctls: map[string]string{"//..etc.passwd": "1"}},
	} {
		t.Run(name, func(t *testing.T) {
			if s, err := p.Get(t.Context(), w); !errdefs.IsInvalidArgument(err) {
				t.Errorf("got %+v, %v; want InvalidArgument", s, err)
			}
		})
	}
	if ids, err := p.pins.List(); err != nil || len(ids) != 0 {
		t.Errorf("left behind: %v, %v", ids, err)
	}
}

func TestReconcileAfterRestart(t *testing.T) {
	eachMode(t, func(t *testing.T, c Config) {
		old := newPool(t, c)
		c.Dir = old.cfg.Dir
		keep, err := old.Get(t.Context(), podWant())
		if err != nil {
			t.Fatal(err)
		}
		drop, err := old.Get(t.Context(), podWant())
		if err != nil {
			t.Fatal(err)
		}
		before := map[string]uint64{"net": inode(t, keep.Net), "ipc": inode(t, keep.IPC), "uts": inode(t, keep.UTS)}
		// A crash in the middle of a pin, of a link, of a mkdir.
		half := map[kind]*os.File{kindUTS: mustOpen(t, "/proc/self/ns/uts")}
		if err := old.pins.Pin("00000000000000aa", half); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(c.Dir, "00000000000000bb"), 0o711); err != nil {
			t.Fatal(err)
		}
		// kill -9: every descriptor is closed, nothing else happens.
		for _, h := range old.sets {
			closeFiles(h.files)
		}
		closeFiles(half)

		var unwired []string
		var mu sync.Mutex
		c.Unwire = func(_ context.Context, netns string) error {
			mu.Lock()
			defer mu.Unlock()
			unwired = append(unwired, netns)
			return nil
		}
		p, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		err = p.Reconcile(t.Context(), []string{keep.ID, "00000000000000cc", ""})
		if !errdefs.IsNotFound(err) {
			t.Fatalf("got %v, want NotFound for the set that never was", err)
		}
		after := map[string]uint64{"net": inode(t, keep.Net), "ipc": inode(t, keep.IPC), "uts": inode(t, keep.UTS)}
		if fmt.Sprint(before) != fmt.Sprint(after) {
			t.Errorf("namespaces changed: %v, %v", before, after)
		}
		ids, err := p.pins.List()
		if err != nil || len(ids) != 1 || ids[0] != keep.ID {
			t.Errorf("left %v, %v; want only %s", ids, err, keep.ID)
		}
		if !strings.Contains(fmt.Sprint(unwired), drop.Net) {
			t.Errorf("unwired %v, want %s among them", unwired, drop.Net)
		}
		if err := p.Release(t.Context(), keep); err != nil {
			t.Fatal(err)
		}
		if ids, _ := p.pins.List(); len(ids) != 0 {
			t.Errorf("left %v", ids)
		}
		if h, ok := p.pins.(*hiddenPins); ok {
			h.mnt.Close()
		}
	})
}

func mustOpen(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := openNS(path)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestReconcileAfterReboot(t *testing.T) {
	eachMode(t, func(t *testing.T, c Config) {
		old := newPool(t, c)
		c.Dir = old.cfg.Dir
		s, err := old.Get(t.Context(), podWant())
		if err != nil {
			t.Fatal(err)
		}
		// The mounts are gone, the files in a persistent /run are not.
		for _, k := range kinds() {
			_ = unmountAll(pinPath(c.Dir, s.ID, k))
		}
		_ = unmountAll(filepath.Join(c.Dir, ".mnt"))
		_ = unmountAll(c.Dir)
		for _, h := range old.sets {
			closeFiles(h.files)
		}
		p, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Reconcile(t.Context(), []string{s.ID}); !errdefs.IsNotFound(err) {
			t.Fatalf("got %v, want NotFound", err)
		}
		if ids, err := p.pins.List(); err != nil || len(ids) != 0 {
			t.Errorf("left %v, %v", ids, err)
		}
		if h, ok := p.pins.(*hiddenPins); ok {
			h.mnt.Close()
		}
	})
}

func TestWarmSets(t *testing.T) {
	var mu sync.Mutex
	wired := map[string]bool{}
	c := Config{Warm: 2, RefillDelay: time.Millisecond,
		Prewire: func(_ context.Context, netns string) error {
			mu.Lock()
			defer mu.Unlock()
			wired[netns] = true
			return nil
		},
		Unwire: func(_ context.Context, netns string) error {
			mu.Lock()
			defer mu.Unlock()
			delete(wired, netns)
			return nil
		}}
	p := newPool(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	waitWarm(t, p, 2)
	first := p.warm[0].set
	s, err := p.Get(ctx, podWant())
	if err != nil {
		t.Fatal(err)
	}
	if s != first {
		t.Errorf("got %+v, want the oldest warm set %+v", s, first)
	}
	mu.Lock()
	if !wired[s.Net] {
		t.Error("the warm set was not wired")
	}
	mu.Unlock()
	waitWarm(t, p, 2)
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if len(wired) != 1 || !wired[s.Net] {
		t.Errorf("still wired %v, want only the one in use", wired)
	}
	if ids, _ := p.pins.List(); len(ids) != 1 || ids[0] != s.ID {
		t.Errorf("left %v, want the one in use", ids)
	}
	if err := p.Release(t.Context(), s); err != nil {
		t.Fatal(err)
	}
}

func waitWarm(tb testing.TB, p *Pool, n int) {
	tb.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		p.mu.Lock()
		have := len(p.warm)
		p.mu.Unlock()
		if have >= n {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("%d warm sets, want %d", have, n)
		}
	}
}

// TestNoLeaks makes and releases many sets at once, and looks at descriptors,
// threads, goroutines and mounts, and at the main thread's namespaces.
func TestNoLeaks(t *testing.T) {
	eachMode(t, func(t *testing.T, c Config) {
		p := newPool(t, c)
		warmUp, err := p.Get(t.Context(), podWant())
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Release(t.Context(), warmUp); err != nil {
			t.Fatal(err)
		}
		main := inode(t, fmt.Sprintf("/proc/%d/ns/net", os.Getpid()))
		fds, goroutines := count(t, "/proc/self/fd"), runtime.NumGoroutine()
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 5 {
					s, err := p.Get(t.Context(), podWant())
					if err != nil {
						t.Error(err)
						return
					}
					if err := p.Release(t.Context(), s); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if got := count(t, "/proc/self/fd"); got != fds {
			t.Errorf("descriptors: %d, before %d", got, fds)
		}
		// A goroutine on a thread that ends needs a moment more.
		for deadline := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > goroutines; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Errorf("goroutines: %d, before %d", runtime.NumGoroutine(), goroutines)
				break
			}
		}
		if got := inode(t, fmt.Sprintf("/proc/%d/ns/net", os.Getpid())); got != main {
			t.Errorf("the main thread moved to another network namespace")
		}
		if ids, err := p.pins.List(); err != nil || len(ids) != 0 {
			t.Errorf("left %v, %v", ids, err)
		}
	})
}

func count(t *testing.T, dir string) int {
	t.Helper()
	e, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(e)
}

func TestReleaseRefusesForeignIDs(t *testing.T) {
	p := newPool(t, Config{})
	for _, id := range []string{"..", "../../etc", "0123", strings.Repeat("0", 18)} {
		if err := p.Release(t.Context(), Set{ID: id}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %v, want InvalidArgument", id, err)
		}
	}
}

func BenchmarkGetRelease(b *testing.B) {
	for _, visible := range []bool{false, true} {
		b.Run(fmt.Sprintf("cold/visible=%v", visible), func(b *testing.B) {
			p := newPool(b, Config{Visible: visible})
			var release time.Duration
			for b.Loop() {
				s, err := p.Get(b.Context(), podWant())
				if err != nil {
					b.Fatal(err)
				}
				start := time.Now()
				if err := p.Release(b.Context(), s); err != nil {
					b.Fatal(err)
				}
				release += time.Since(start)
			}
			b.ReportMetric(float64(release.Microseconds())/float64(b.N), "release-us/op")
		})
	}
	b.Run("user", func(b *testing.B) {
		p := newPool(b, Config{})
		w := podWant()
		w.User = true
		w.UIDMap = []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
		w.GIDMap = w.UIDMap
		for b.Loop() {
			s, err := p.Get(b.Context(), w)
			if err != nil {
				b.Fatal(err)
			}
			if err := p.Release(b.Context(), s); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkGetWarm(b *testing.B) {
	p := newPool(b, Config{Warm: 1})
	w := podWant()
	var got time.Duration
	for b.Loop() {
		h, err := func() (*held, error) { _ = p.open(); return p.create(w) }()
		if err != nil {
			b.Fatal(err)
		}
		p.warm = append(p.warm, h)
		start := time.Now()
		s, err := p.Get(b.Context(), w)
		got += time.Since(start)
		if err != nil || s != h.set {
			b.Fatal(s, err)
		}
		if err := p.Release(b.Context(), s); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(got.Microseconds())/float64(b.N), "get-us/op")
}

func TestClosedPool(t *testing.T) {
	p := newPool(t, Config{})
	s, err := p.Get(t.Context(), podWant())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	// With a set in use the pool stays open for whoever has it.
	if err := p.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if err := p.Release(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if err := p.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Get(t.Context(), podWant()); !errdefs.IsUnavailable(err) {
		t.Errorf("got %v, want Unavailable", err)
	}
	if err := p.Release(t.Context(), s); err != nil {
		t.Error(err)
	}
}

// BenchmarkContainerStart is what a container's start pays for the pins of
// other pods: a copy of the mount table that is torn down again. Compare with
// and without sets, hidden and visible.
func BenchmarkContainerStart(b *testing.B) {
	for _, visible := range []bool{false, true} {
		for _, pods := range []int{0, 50, 200} {
			b.Run(fmt.Sprintf("visible=%v/pods=%d", visible, pods), func(b *testing.B) {
				p := newPool(b, Config{Visible: visible})
				for range pods {
					s, err := p.Get(b.Context(), podWant())
					if err != nil {
						b.Fatal(err)
					}
					defer p.Release(context.Background(), s)
				}
				for b.Loop() {
					err := onThread(func() error {
						if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
							return err
						}
						return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, "")
					})
					if err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
