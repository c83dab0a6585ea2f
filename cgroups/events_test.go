package cgroups

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

var warmUp sync.Once

const wait = 10 * time.Second

func next(t *testing.T, ch <-chan Event) (Event, bool) {
	t.Helper()
	select {
	case e, ok := <-ch:
		return e, ok
	case <-time.After(wait):
		t.Fatal("no event")
		return Event{}, false
	}
}

// noLeaks checks that the watcher left no descriptor and no goroutine.
func noLeaks(t *testing.T) {
	t.Helper()
	// The runtime, os/exec and libcontainer's cgroups open things once.
	warmUp.Do(func() {
		if m := newManager(t); m != nil {
			t.Run("warm-up", func(t *testing.T) { container(t, m, "/", m.name, "cat") })
		}
	})
	fds, goroutines := openFDs(t), runtime.NumGoroutine()
	t.Cleanup(func() {
		for deadline := time.Now().Add(wait); ; time.Sleep(5 * time.Millisecond) {
			f, g := openFDs(t), runtime.NumGoroutine()
			if f <= fds && g <= goroutines {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("descriptors %d then %d, goroutines %d then %d", fds, f, goroutines, g)
				return
			}
		}
	})
}

func openFDs(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestWatchOOM(t *testing.T) {
	m := newManager(t)
	noLeaks(t)
	ctx := context.Background()
	parent, _ := m.PodParent("", "oom")
	if err := m.EnsurePod(ctx, parent, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(8 << 20))}}); err != nil {
		t.Fatal(err)
	}
	g, _ := m.Resolve(parent, "")
	ch, err := m.Watch(ctx, g)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Watch(ctx, g); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second watch: %v", err)
	}
	t.Run("kill", func(t *testing.T) {
		container(t, m, parent, "c1", "sh", "-c", "read x; while :; do x=$x$x$x$x; done")
		e, ok := next(t, ch)
		if !ok || e.Kind != OOM || e.Time.IsZero() {
			t.Fatalf("event %+v %v", e, ok)
		}
		c, _ := m.Resolve(parent, "c1")
		for deadline := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
			if n, err := c.OOMKills(); err != nil || n > 0 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("the kill was never counted")
			}
		}
		var s Stats
		if err := c.Stats(&s); err != nil || s.Memory.Usage > 8<<20 {
			t.Errorf("container after the kill: %+v, %v", s.Memory, err)
		}
	})
	if err := m.RemovePod(ctx, parent); err != nil {
		t.Fatal(err)
	}
	for { // closed when the group goes
		if _, ok := next(t, ch); !ok {
			break
		}
	}
	if _, err := m.Watch(ctx, g); !errdefs.IsNotFound(err) {
		t.Errorf("watch of a group that is gone: %v", err)
	}
}

func TestWatchPressure(t *testing.T) {
	m := newManager(t)
	if m.host.Mode == V1 {
		t.Skip("needs a v2 hierarchy")
	}
	noLeaks(t)
	parent, _ := m.PodParent("", "psi")
	if err := m.EnsurePod(context.Background(), parent, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.RemovePod(context.Background(), parent) })
	g, _ := m.Resolve(parent, "")
	ctx, cancel := context.WithCancel(context.Background())
	trigger := Trigger{Resource: CPUPressure, Stall: 20 * time.Millisecond, Window: 500 * time.Millisecond}
	ch, err := m.Watch(ctx, g, trigger)
	if err != nil {
		t.Fatal(err)
	}
	// Two busy loops on one CPU: one of them waits.
	busy := "read x; taskset -p -c 0 $$ >/dev/null; while :; do :; done"
	container(t, m, parent, "c1", "sh", "-c", busy)
	container(t, m, parent, "c2", "sh", "-c", busy)
	if e, ok := next(t, ch); !ok || e.Kind != Pressure || e.Trigger != trigger {
		t.Errorf("event %+v %v", e, ok)
	}
	cancel()
	for {
		if _, ok := next(t, ch); !ok {
			break
		}
	}
	for _, bad := range []Trigger{
		{Resource: "disk", Stall: time.Millisecond, Window: time.Second},
		{Resource: CPUPressure, Stall: 2 * time.Second, Window: time.Second},
	} {
		if _, err := m.Watch(context.Background(), g, bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// v1 without PSI has memory.pressure_level.
func TestWatchPressureLevel(t *testing.T) {
	m := newManager(t)
	if m.host.Mode == V2 {
		t.Skip("needs a v1 memory controller")
	}
	noLeaks(t)
	parent, _ := m.PodParent("", "level")
	if err := m.EnsurePod(context.Background(), parent, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(16 << 20))}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.RemovePod(context.Background(), parent) })
	g, _ := m.Resolve(parent, "")
	g.unified = ""
	trigger := Trigger{Resource: MemoryPressure, Stall: time.Millisecond, Window: time.Second}
	ch, err := m.Watch(context.Background(), g, trigger)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Watch(context.Background(), Group{memory: g.memory + "/", pids: g.pids}, Trigger{Resource: IOPressure}); !errdefs.IsNotImplemented(err) {
		t.Errorf("I/O pressure on v1: %v", err)
	}
	// Page cache beyond the limit has to be reclaimed, anonymous memory fills
	// the rest: the kernel reports pressure before it kills.
	container(t, m, parent, "c1", "sh", "-c", "read x; while :; do x=$x$x; done")
	for {
		e, ok := next(t, ch)
		if !ok {
			t.Fatal("closed")
		}
		if e.Kind == Pressure {
			break
		}
	}
	m.Close()
	for {
		if _, ok := next(t, ch); !ok {
			break
		}
	}
}

// The files of v2, in a made-up tree: inotify works there as well.
func TestWatchV2(t *testing.T) {
	noLeaks(t)
	files := map[string]string{"memory.events": "oom 0\noom_kill 0\n", "cgroup.events": "populated 1\n"}
	m := v2Host(t, "/p/c", files)
	g, _ := m.Resolve("/p", "c")
	ch, err := m.Watch(context.Background(), g)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, s string) {
		if err := os.WriteFile(filepath.Join(g.memory, name), []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("memory.events", "oom 1\noom_kill 2\n")
	if e, ok := next(t, ch); !ok || e.Kills != 2 || e.Kind != OOM {
		t.Errorf("event %+v %v", e, ok)
	}
	// A change that is no OOM kill is no event; the end of the group is its end.
	write("memory.events", "oom 5\noom_kill 2\n")
	if err := os.Remove(filepath.Join(g.memory, "memory.events")); err != nil {
		t.Fatal(err)
	}
	write("cgroup.events", "populated 0\n")
	if e, ok := next(t, ch); ok {
		t.Errorf("event %+v after the end", e)
	}
	// Nobody reads: nothing blocks, and the last count is what counts.
	m = v2Host(t, "/p/c", files)
	g, _ = m.Resolve("/p", "c")
	ctx, cancel := context.WithCancel(context.Background())
	if ch, err = m.Watch(ctx, g); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		write("memory.events", "oom 1\noom_kill "+strings.Repeat("1", i%15+1)+"\n")
	}
	cancel()
	for range ch {
	}
	cancelled, stop := context.WithCancel(context.Background())
	stop()
	if _, err := m.Watch(cancelled, g); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestWatchMany(t *testing.T) {
	m := newManager(t)
	noLeaks(t)
	for round := range 3 {
		ctx, cancel := context.WithCancel(context.Background())
		var all []<-chan Event
		for i := range 20 {
			parent, _ := m.PodParent("", "many"+string(rune('a'+i)))
			if err := m.EnsurePod(ctx, parent, nil); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { m.RemovePod(context.Background(), parent) })
			g, _ := m.Resolve(parent, "")
			ch, err := m.Watch(ctx, g)
			if err != nil {
				t.Fatal(round, err)
			}
			all = append(all, ch)
		}
		cancel()
		for _, ch := range all {
			for range ch {
			}
		}
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
}

func FuzzInotify(f *testing.F) {
	f.Add([]byte{})
	f.Add(binary.NativeEndian.AppendUint32(make([]byte, 12), 4))
	f.Fuzz(func(t *testing.T, b []byte) {
		inotifyEvents(b, func(int32, uint32) {})
	})
}
