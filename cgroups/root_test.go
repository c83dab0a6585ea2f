package cgroups

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	ocicgroups "github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

// newManager returns a cgroupfs manager with a root group of this test's own,
// and checks at the end that nothing of it is left in any hierarchy.
func newManager(t testing.TB) *Manager {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	name := fmt.Sprintf("natest%d_%s", os.Getpid(), strings.Map(func(r rune) rune {
		if strings.ContainsRune("/-: ", r) {
			return '_'
		}
		return r
	}, t.Name()))
	m, err := New(Config{Driver: CgroupFS, Name: name})
	if errors.Is(err, errdefs.ErrNotFound) {
		t.Skip("no cgroups here")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, mount := range m.host.hierarchies() {
			dir := filepath.Join(mount, name)
			if _, err := os.Stat(dir); err == nil {
				t.Errorf("%s is left", dir)
				_ = filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
					if err == nil && d.IsDir() {
						defer os.Remove(p)
					}
					return nil
				})
				os.Remove(dir)
			}
		}
	})
	return m
}

func ptr[T any](v T) *T { return &v }

// container makes a container's group as the shim would, with one process in
// it, and removes both at the end.
func container(t testing.TB, m *Manager, parent, id string, cmd ...string) *exec.Cmd {
	t.Helper()
	rel, err := m.ContainerPath(parent, id)
	if err != nil {
		t.Fatal(err)
	}
	oci, err := m.oci(rel, mustResources(t, m, nil))
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(cmd[0], cmd[1:]...)
	stdin, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Kill()
		_ = c.Wait()
		if err := oci.Destroy(); err != nil {
			t.Error(err)
		}
	})
	if err := oci.Apply(c.Process.Pid); err != nil {
		t.Fatal(err)
	}
	// Commands wait for a line, so that what they use is charged to the group.
	if _, err := stdin.Write([]byte("go\n")); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestPodLifecycle(t *testing.T) {
	m := newManager(t)
	ctx := context.Background()
	parent, err := m.PodParent("", "abc")
	if err != nil {
		t.Fatal(err)
	}
	if want := "/" + m.name + "/podabc"; parent != want {
		t.Fatalf("parent %q, want %q", parent, want)
	}
	res := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20))},
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(50000)), Period: ptr(uint64(100000))},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(100))},
	}
	for range 2 { // the second finds it there
		if err := m.EnsurePod(ctx, parent, res); err != nil {
			t.Fatal(err)
		}
	}
	g, err := m.Resolve(parent, "")
	if err != nil {
		t.Fatal(err)
	}
	checkLimits(t, g, 64<<20, 50000, 100)

	res.Memory.Limit = ptr(int64(96 << 20))
	res.CPU.Quota = ptr(int64(70000))
	if err := m.UpdatePod(ctx, parent, res); err != nil {
		t.Fatal(err)
	}
	checkLimits(t, g, 96<<20, 70000, 100)

	if err := m.RemovePod(ctx, parent); err != nil {
		t.Fatal(err)
	}
	var s Stats
	if err := g.Stats(&s); err != nil {
		t.Errorf("a pod that a second one still uses was removed: %v", err)
	}
	for range 2 { // removing what is gone is no error
		if err := m.RemovePod(ctx, parent); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Stats(&s); !errdefs.IsNotFound(err) {
		t.Errorf("stats of a removed group: %v, want NotFound", err)
	}
	if err := m.UpdatePod(ctx, parent, res); !errdefs.IsNotFound(err) {
		t.Errorf("update of a removed group: %v, want NotFound", err)
	}
}

func checkLimits(t *testing.T, g Group, memory uint64, quota int64, pids uint64) {
	t.Helper()
	var s Stats
	if err := g.Stats(&s); err != nil {
		t.Fatal(err)
	}
	shares := s.CPU.Shares == 512 || g.v2 && s.CPU.Shares > 500 && s.CPU.Shares < 525 // see sharesOf
	if s.Memory.Limit != memory || s.CPU.Quota != quota || s.CPU.Period != 100000 || !shares || s.Pids.Limit != pids {
		t.Errorf("limits: memory %d cpu %d/%d shares %d pids %d", s.Memory.Limit, s.CPU.Quota, s.CPU.Period, s.CPU.Shares, s.Pids.Limit)
	}
}

// A group that someone else made is used, not limited and not removed; what we
// make on the way to a parent goes with it.
func TestForeignParent(t *testing.T) {
	m := newManager(t)
	ctx := context.Background()
	foreign := "/" + m.name + "f"
	for _, mount := range m.host.hierarchies() {
		if err := os.Mkdir(mount+foreign, 0o755); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(mount + foreign)
	}
	res := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20))}}
	if err := m.EnsurePod(ctx, foreign, res); err != nil {
		t.Fatal(err)
	}
	g, _ := m.Resolve(foreign, "")
	var s Stats
	if err := g.Stats(&s); err != nil || s.Memory.Limit != sample.Unlimited {
		t.Errorf("limit of the kubelet's group: %d, %v", s.Memory.Limit, err)
	}
	below := foreign + "/besteffort/podx"
	if err := m.EnsurePod(ctx, below, res); err != nil {
		t.Fatal(err)
	}
	// A fresh process knows its own by the mark alone.
	m2, err := New(Config{Driver: CgroupFS, Name: m.name})
	if err != nil {
		t.Fatal(err)
	}
	if err := m2.RemovePod(ctx, below); err != nil {
		t.Fatal(err)
	}
	if err := m2.RemovePod(ctx, foreign); err != nil {
		t.Fatal(err)
	}
	for _, mount := range m.host.hierarchies() {
		if _, err := os.Stat(mount + foreign); err != nil {
			t.Errorf("the foreign group was removed: %v", err)
		}
		if _, err := os.Stat(mount + foreign + "/besteffort"); !os.IsNotExist(err) {
			t.Errorf("%s%s/besteffort is left: %v", mount, foreign, err)
		}
	}
}

func TestRemoveBusy(t *testing.T) {
	m := newManager(t)
	ctx := context.Background()
	parent, _ := m.PodParent("", "busy")
	if err := m.EnsurePod(ctx, parent, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // runs after the container is gone
		if err := m.RemovePod(ctx, parent); err != nil {
			t.Error(err)
		}
	})
	c := container(t, m, parent, "c1", "cat")
	if err := m.RemovePod(ctx, parent); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("remove with a process in it: %v, want FailedPrecondition", err)
	}
	g, _ := m.Resolve(parent, "c1")
	pids, err := g.Pids(nil)
	if err != nil || len(pids) != 1 || pids[0] != c.Process.Pid {
		t.Errorf("pids %v, %v; want %d", pids, err, c.Process.Pid)
	}
	pod, _ := m.Resolve(parent, "")
	if n, err := pod.Processes(); err != nil || n != 1 {
		t.Errorf("%d processes in the pod, %v", n, err)
	}
}

func TestReconcile(t *testing.T) {
	m := newManager(t)
	ctx := context.Background()
	var parents []string
	for _, p := range []string{"", "", "/" + m.name + "x/burstable/pod1"} {
		parent, err := m.PodParent(p, "p"+strconv.Itoa(len(parents)))
		if err != nil {
			t.Fatal(err)
		}
		if err := m.EnsurePod(ctx, parent, nil); err != nil {
			t.Fatal(err)
		}
		parents = append(parents, parent)
	}
	// What a dead container left must not keep the pod's group.
	for _, mount := range m.host.hierarchies() {
		if err := os.Mkdir(mount+parents[1]+"/dead", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	fresh, err := New(Config{Driver: CgroupFS, Name: m.name})
	if err != nil {
		t.Fatal(err)
	}
	if err := fresh.Reconcile(ctx, parents[:1]); err != nil {
		t.Fatal(err)
	}
	for i, p := range parents {
		ok, err := fresh.exists(p)
		if err != nil || ok != (i == 0) {
			t.Errorf("%s exists: %v, %v", p, ok, err)
		}
	}
	if ok, _ := fresh.exists("/" + m.name + "x"); ok {
		t.Errorf("the ancestors of %s are left", parents[2])
	}
	if err := fresh.Reconcile(ctx, nil); err != nil {
		t.Fatal(err)
	}
}

// The figures must be those of the kernel: compare with the files read anew.
func TestStatsLive(t *testing.T) {
	m := newManager(t)
	ctx := context.Background()
	parent, _ := m.PodParent("", "stats")
	if err := m.EnsurePod(ctx, parent, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.RemovePod(ctx, parent) })
	container(t, m, parent, "c1", "sh", "-c", "read x; i=0; while [ $i -lt 14 ]; do x=$x$x; i=$((i+1)); done; while :; do i=$((i+1)); done")
	g, _ := m.Resolve(parent, "c1")
	var a, b Stats
	if err := g.Stats(&a); err != nil {
		t.Fatal(err)
	}
	for b.CPU.Usage < a.CPU.Usage+20e6 {
		if err := g.Stats(&b); err != nil {
			t.Fatal(err)
		}
	}
	if rate := float64(b.CPU.Usage-a.CPU.Usage) / float64(b.Time.Sub(a.Time)); rate > 1.1 {
		t.Errorf("one busy loop uses %.2f cores", rate)
	}
	if b.Memory.Usage == 0 || b.Memory.WorkingSet == 0 || b.Memory.WorkingSet > b.Memory.Usage {
		t.Errorf("memory %+v", b.Memory)
	}
	if b.Pids.Current != 1 || b.Pids.Limit != sample.Unlimited || b.Memory.Limit != sample.Unlimited || b.CPU.Quota != -1 {
		t.Errorf("pids %+v limit %d quota %d", b.Pids, b.Memory.Limit, b.CPU.Quota)
	}
	if m.host.Mode != V1 && b.Have&sample.PSI == 0 {
		if _, err := os.Stat("/proc/pressure/cpu"); err == nil {
			t.Error("no pressure information")
		}
	}
	if b.CPU.Shares != 1024 || b.CPU.Period != 100000 {
		t.Errorf("cpu %+v", b.CPU)
	}
}

func TestStatsNoAllocs(t *testing.T) {
	if raceDetector {
		t.Skip("allocations are not those of production")
	}
	m := newManager(t)
	ctx := context.Background()
	parent, _ := m.PodParent("", "allocs")
	if err := m.EnsurePod(ctx, parent, nil); err != nil {
		t.Fatal(err)
	}
	defer m.RemovePod(ctx, parent)
	g, _ := m.Resolve(parent, "")
	var s Stats
	if n := testing.AllocsPerRun(100, func() {
		if err := g.Read(&s, sample.Basic); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations a reading of the basic parts", n)
	}
	if n := testing.AllocsPerRun(100, func() {
		if err := g.Stats(&s); err != nil {
			t.Fatal(err)
		}
	}); n > 10 { // huge page file names, errors of what the host lacks
		t.Errorf("%v allocations a full reading", n)
	}
}

func BenchmarkStats(b *testing.B) {
	m := newManager(b)
	ctx := context.Background()
	var groups []Group
	for i := range 50 {
		parent, _ := m.PodParent("", strconv.Itoa(i))
		if err := m.EnsurePod(ctx, parent, nil); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { m.RemovePod(ctx, parent) })
		container(b, m, parent, "c", "cat")
		g, _ := m.Resolve(parent, "c")
		groups = append(groups, g)
	}
	stats := make([]Stats, len(groups))
	for _, bm := range []struct {
		name string
		set  sample.Set
	}{{"basic", sample.Basic}, {"full", sample.Full}, {"cpu", sample.CPU}, {"memory", sample.Memory}, {"psi", sample.PSI}} {
		b.Run(bm.name+"-50-groups", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				for i, g := range groups {
					if err := g.Read(&stats[i], bm.set); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

func BenchmarkPodGroup(b *testing.B) {
	m := newManager(b)
	ctx := context.Background()
	for b.Loop() {
		parent, _ := m.PodParent("", "bench")
		if err := m.EnsurePod(ctx, parent, nil); err != nil {
			b.Fatal(err)
		}
		if err := m.RemovePod(ctx, parent); err != nil {
			b.Fatal(err)
		}
	}
}

func mustResources(t testing.TB, m *Manager, r *specs.LinuxResources) *ocicgroups.Resources {
	t.Helper()
	res, err := m.resources(r)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// A limit that the kernel refuses leaves nothing behind.
func TestEnsureFails(t *testing.T) {
	m := newManager(t)
	ctx := context.Background()
	for _, parent := range []string{"/" + m.name + "/podbad", "/" + m.name + "/a/b/podbad"} {
		err := m.EnsurePod(ctx, parent, &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "9999"}})
		if err == nil {
			t.Fatal("a CPU that does not exist was accepted")
		}
		if ok, _ := m.exists("/" + m.name); ok {
			t.Errorf("%s: the group is left after %v", parent, err)
		}
	}
	if len(m.users) != 0 {
		t.Errorf("users %v", m.users)
	}
	err := m.EnsurePod(ctx, "/"+m.name+"/pod", &specs.LinuxResources{Unified: map[string]string{"memory.high": "1"}})
	switch {
	case m.host.Mode != V2 && !errdefs.IsInvalidArgument(err):
		t.Errorf("unified limits on v1: %v", err)
	case m.host.Mode == V2 && err != nil:
		t.Error(err)
	case m.host.Mode == V2:
		if err := m.RemovePod(ctx, "/"+m.name+"/pod"); err != nil {
			t.Error(err)
		}
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if err := m.EnsurePod(cancelled, "/"+m.name+"/pod", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// Pods come and go at once while their common root does too.
func TestConcurrentPods(t *testing.T) {
	m := newManager(t)
	ctx := context.Background()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			parent, _ := m.PodParent("", strconv.Itoa(i))
			for range 20 {
				if err := m.EnsurePod(ctx, parent, nil); err != nil {
					t.Error(err)
				}
				g, _ := m.Resolve(parent, "")
				if err := g.Read(new(Stats), sample.Memory); err != nil {
					t.Error(err)
				}
				if err := m.RemovePod(ctx, parent); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// A pod's group that the kubelet made in the controllers that it knows, and
// not in the others, keeps the kubelet's limits.
func TestHalfForeign(t *testing.T) {
	m := newManager(t)
	if m.host.Mode == V2 {
		t.Skip("v2 has one hierarchy")
	}
	rel := "/" + m.name + "/kubelets"
	dir := m.host.Mounts["memory"] + rel
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(m.host.Mounts["memory"] + "/" + m.name)
	defer os.Remove(dir)
	m.name += "other" // so that nothing is ours by its name
	defer func() { m.name = strings.TrimSuffix(m.name, "other") }()
	if err := m.EnsurePod(context.Background(), rel, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20))}}); err != nil {
		t.Fatal(err)
	}
	g, _ := m.Resolve(rel, "")
	var s Stats
	if err := g.Read(&s, sample.Memory|sample.Pids); err != nil || s.Memory.Limit != sample.Unlimited || s.Have&sample.Pids == 0 {
		t.Errorf("limit %d have %b %v", s.Memory.Limit, s.Have, err)
	}
	if err := m.RemovePod(context.Background(), rel); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("the kubelet's group was removed: %v", err)
	}
	if _, err := os.Stat(m.host.Mounts["pids"] + rel); !os.IsNotExist(err) {
		t.Errorf("ours is left: %v", err)
	}
}

func FuzzPaths(f *testing.F) {
	for _, s := range []string{"", "/", "../..", "/kubepods/pod1", "a.slice", "/a.slice/a-b.slice", "-.slice", "/x\x00y"} {
		f.Add(s, "id1")
	}
	host := Host{Mode: V2, Mounts: map[string]string{Unified: "/sys/fs/cgroup"}, SystemdRunning: true}
	f.Fuzz(func(t *testing.T, parent, id string) {
		for _, d := range []Driver{CgroupFS, Systemd} {
			m, err := New(Config{Host: host, Driver: d})
			if err != nil {
				t.Fatal(err)
			}
			pod, err := m.PodParent(parent, id)
			if err != nil {
				continue
			}
			if !filepath.IsAbs(pod) || filepath.Clean(pod) != pod || strings.ContainsRune(pod, 0) {
				t.Errorf("%s: parent %q, id %q give %q", d, parent, id, pod)
			}
			if again, err := m.PodParent(pod, id); err != nil || again != pod {
				t.Errorf("%s: %q becomes %q, %v", d, pod, again, err)
			}
			g, err := m.Resolve(pod, id)
			if err == nil && id != "" && !strings.HasPrefix(g.Path(), "/sys/fs/cgroup/") {
				t.Errorf("%s: group at %q", d, g.Path())
			}
		}
	})
}
