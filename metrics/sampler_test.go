package metrics

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

// fakeGroup counts how often it is read.
type fakeGroup struct {
	reads atomic.Int64
	gone  atomic.Bool
	usage atomic.Uint64
	delay time.Duration
}

func (g *fakeGroup) Read(s *sample.Cgroup, want sample.Set) error {
	g.reads.Add(1)
	time.Sleep(g.delay)
	if g.gone.Load() {
		return errdefs.ErrNotFound
	}
	*s = sample.Cgroup{Time: time.Now(), Have: want}
	s.CPU.Usage = g.usage.Load()
	return nil
}
func (g *fakeGroup) Pids(pids []int) ([]int, error) { return pids, nil }
func (g *fakeGroup) Processes() (uint64, error)     { return 3, nil }

func newSampler(t *testing.T, cfg Config, g Group) *Sampler {
	t.Helper()
	cfg.Group = func(parent, id string) (Group, error) { return g, nil }
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func targets(started time.Time) []sample.PodTarget {
	return []sample.PodTarget{{ID: "p", CgroupParent: "/p", CreatedAt: started, Containers: []sample.ContainerTarget{{ID: "c", StartedAt: started}}}}
}

func TestSampleAge(t *testing.T) {
	g := &fakeGroup{}
	s := newSampler(t, Config{MaxAge: time.Hour}, g)
	ctx := context.Background()
	for range 3 {
		if _, err := s.Sample(ctx, targets(time.Now()), sample.Containers); err != nil {
			t.Fatal(err)
		}
	}
	if n := g.reads.Load(); n != 1 {
		t.Errorf("%d readings for three samples within the age", n)
	}
	// A deeper sample needs more than the young one has; then it serves both.
	for _, d := range []sample.Depth{sample.Everything, sample.Containers, sample.Everything} {
		if _, err := s.Sample(ctx, targets(time.Now()), d); err != nil {
			t.Fatal(err)
		}
	}
	if n := g.reads.Load(); n != 3 { // container and pod once each
		t.Errorf("%d readings after a deep sample", n)
	}
	s2 := newSampler(t, Config{MaxAge: time.Nanosecond}, g)
	before := g.reads.Load()
	for range 3 {
		time.Sleep(time.Microsecond)
		s2.Sample(ctx, targets(time.Now()), sample.Containers)
	}
	if n := g.reads.Load() - before; n != 3 {
		t.Errorf("%d readings for three samples beyond the age", n)
	}
}

func TestSampleSingleFlight(t *testing.T) {
	g := &fakeGroup{delay: 20 * time.Millisecond}
	s := newSampler(t, Config{MaxAge: time.Second}, g)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, err := s.Sample(context.Background(), targets(time.Now()), sample.Pods); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := g.reads.Load(); n != 2 { // one container, one pod
		t.Errorf("%d readings for 20 callers at once", n)
	}
}

func TestSampleGone(t *testing.T) {
	g := &fakeGroup{}
	g.usage.Store(5e9)
	s := newSampler(t, Config{MaxAge: time.Nanosecond}, g)
	ctx := context.Background()
	started := time.Now().Add(-10 * time.Second)
	pods, err := s.Sample(ctx, targets(started), sample.Pods)
	if err != nil {
		t.Fatal(err)
	}
	if r := pods[0].Containers[0].Rate; !r.Valid || r.NanoCores < 4e8 || r.NanoCores > 6e8 {
		t.Errorf("rate %+v, want half a core", r)
	}
	if pods[0].Processes != 3 || pods[0].Cgroup.Have == 0 {
		t.Errorf("pod %+v", pods[0])
	}
	g.gone.Store(true)
	pods, err = s.Sample(ctx, targets(started), sample.Pods)
	if err != nil {
		t.Fatal(err)
	}
	if c := pods[0].Containers[0]; c.Cgroup.Have != 0 || c.Rate.Valid || c.Target.ID != "c" {
		t.Errorf("a container that is gone: %+v", c)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := s.Sample(cancelled, targets(started), sample.Pods); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := New(Config{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("New without Group: %v", err)
	}
}

func TestWritableLayers(t *testing.T) {
	var calls atomic.Int64
	block := make(chan struct{})
	dir := t.TempDir()
	s := newSampler(t, Config{WritableDir: dir, WritableMaxAge: time.Hour, Writable: func(ctx context.Context, id string) (uint64, uint64, error) {
		calls.Add(1)
		switch id {
		case "slow":
			select {
			case <-block:
			case <-ctx.Done():
				return 0, 0, ctx.Err()
			}
			return 11, 12, nil
		case "bad":
			return 0, 0, errors.New("gone")
		}
		return 1, 2, nil
	}}, &fakeGroup{})
	ctx := context.Background()
	target := func(id string) []sample.PodTarget {
		return []sample.PodTarget{{ID: "p", Containers: []sample.ContainerTarget{{ID: id}}}}
	}
	layer := func(id string) *sample.Filesystem {
		pods, err := s.Sample(ctx, target(id), sample.Containers)
		if err != nil {
			t.Fatal(err)
		}
		return pods[0].Containers[0].Writable
	}
	for range 3 {
		fs := layer("quick")
		if fs == nil || fs.UsedBytes != 1 || fs.UsedInodes != 2 || fs.Mountpoint != dir || fs.LimitBytes == 0 || fs.Time.IsZero() {
			t.Fatalf("quick: %+v", fs)
		}
	}
	if n := calls.Load(); n != 1 {
		t.Errorf("measured %d times within the age", n)
	}
	if fs := layer("bad"); fs != nil {
		t.Errorf("bad: %+v", fs)
	}
	begin := time.Now()
	if fs := layer("slow"); fs != nil {
		t.Errorf("slow: %+v", fs)
	}
	if d := time.Since(begin); d > time.Second {
		t.Errorf("a slow layer held the sample up for %v", d)
	}
	close(block)
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if fs := layer("slow"); fs != nil && fs.UsedBytes == 11 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the slow layer's figure never came")
		}
	}
}

// Close ends a measurement that hangs.
func TestCloseWhileMeasuring(t *testing.T) {
	s := newSampler(t, Config{WritableDir: t.TempDir(), Writable: func(ctx context.Context, id string) (uint64, uint64, error) {
		<-ctx.Done()
		return 0, 0, ctx.Err()
	}}, &fakeGroup{})
	if _, err := s.Sample(context.Background(), targets(time.Now()), sample.Containers); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := s.Sample(context.Background(), targets(time.Now()), sample.Containers); err != nil {
		t.Errorf("after Close: %v", err)
	}
}

func TestPrune(t *testing.T) {
	s := newSampler(t, Config{WritableDir: t.TempDir(), Writable: func(context.Context, string) (uint64, uint64, error) { return 0, 0, nil }}, &fakeGroup{})
	if _, err := s.Sample(context.Background(), targets(time.Now()), sample.Pods); err != nil {
		t.Fatal(err)
	}
	s.writables.work.Wait()
	s.prune(time.Now().Add(2 * keepFor))
	if len(s.groups)+len(s.nets)+len(s.writables.layers) != 0 {
		t.Errorf("left: %d groups, %d networks, %d layers", len(s.groups), len(s.nets), len(s.writables.layers))
	}
}
