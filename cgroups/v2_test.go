package cgroups

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

// v2Files are those of a container with limits, as kernel 6.1 gives them.
var v2Files = map[string]string{
	"cpu.stat":       "usage_usec 2500000\nuser_usec 1500000\nsystem_usec 1000000\ncore_sched.force_idle_usec 0\nnr_periods 100\nnr_throttled 40\nthrottled_usec 3000000\nnr_bursts 0\nburst_usec 0\n",
	"cpu.max":        "50000 100000\n",
	"cpu.weight":     "100\n",
	"memory.current": "104857600\n",
	"memory.stat": `anon 41943040
file 52428800
kernel 4194304
kernel_stack 147456
pagetables 409600
sec_pagetables 0
percpu 4320
sock 8192
vmalloc 0
shmem 0
zswap 0
zswapped 0
file_mapped 10485760
file_dirty 0
file_writeback 0
swapcached 0
anon_thp 0
inactive_anon 41930752
active_anon 12288
inactive_file 31457280
active_file 20971520
unevictable 0
slab_reclaimable 1000
pgfault 5555
pgmajfault 12
workingset_refault_anon 0
`,
	"memory.max":          "134217728\n",
	"memory.low":          "67108864\n",
	"memory.peak":         "110000000\n",
	"memory.swap.current": "1048576\n",
	"memory.swap.max":     "max\n",
	"memory.events":       "low 0\nhigh 0\nmax 77\noom 3\noom_kill 2\noom_group_kill 0\n",
	"pids.current":        "9\n",
	"pids.max":            "max\n",
	"io.stat":             "8:16 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n8:0 rbytes=4096 wbytes=8192 rios=3 wios=4 dbytes=0 dios=0\n",
	"hugetlb.2MB.current": "4194304\n",
	"hugetlb.2MB.events":  "max 5\n",
	"cpu.pressure":        "some avg10=1.00 avg60=2.00 avg300=3.00 total=400\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=100\n",
	"memory.pressure":     "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
	"io.pressure":         "some avg10=0.00 avg60=0.00 avg300=0.00 total=2\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
	"cgroup.procs":        "101\n102\n",
}

// v2Host is a manager of a made-up v2 tree, with the files in group rel.
func v2Host(t *testing.T, rel string, files map[string]string) *Manager {
	t.Helper()
	root := t.TempDir()
	dir := filepath.Join(root, rel)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m, err := New(Config{Host: Host{Mode: V2, Mounts: map[string]string{Unified: root}}, Driver: CgroupFS})
	if err != nil {
		t.Fatal(err)
	}
	m.pages = []string{"2MB"}
	return m
}

func TestStatsV2(t *testing.T) {
	m := v2Host(t, "/nodeagent/podx/c1", v2Files)
	g, err := m.Resolve("/nodeagent/podx", "c1")
	if err != nil {
		t.Fatal(err)
	}
	var s Stats
	if err := g.Stats(&s); err != nil {
		t.Fatal(err)
	}
	if s.Have != sample.Full || s.Path != "/nodeagent/podx/c1" {
		t.Errorf("have %b path %q", s.Have, s.Path)
	}
	wantCPU := sample.CPUStats{Usage: 2500e6, User: 1500e6, System: 1000e6, Periods: 100, ThrottledPeriods: 40, ThrottledTime: 3000e6, Quota: 50000, Period: 100000, Shares: 1024}
	if s.CPU != wantCPU {
		t.Errorf("cpu %+v, want %+v", s.CPU, wantCPU)
	}
	wantMem := sample.MemoryStats{Usage: 100 << 20, MaxUsage: 110000000, WorkingSet: 70 << 20, RSS: 40 << 20, Cache: 50 << 20,
		MappedFile: 10 << 20, Kernel: 4 << 20, ActiveFile: 20 << 20, InactiveFile: 30 << 20, Swap: 1 << 20,
		Limit: 128 << 20, Reservation: 64 << 20, SwapLimit: sample.Unlimited, FailCount: 77, OOMKills: 2,
		PageFaults: 5555, MajorPageFaults: 12, LocalPageFaults: 5555, LocalMajorPageFaults: 12}
	if s.Memory != wantMem {
		t.Errorf("memory %+v, want %+v", s.Memory, wantMem)
	}
	if s.Pids != (sample.PidsStats{Current: 9, Limit: sample.Unlimited}) {
		t.Errorf("pids %+v", s.Pids)
	}
	if len(s.IO) != 2 || s.IO[0].Minor != 0 || s.IO[0].WriteBytes != 8192 || s.IO[1].Writes != 2 {
		t.Errorf("io %+v", s.IO)
	}
	if len(s.Hugetlb) != 1 || s.Hugetlb[0] != (sample.HugePages{Size: "2MB", Usage: 4 << 20, FailCount: 5}) {
		t.Errorf("hugetlb %+v", s.Hugetlb)
	}
	if s.PSI.CPU.Full.Total != 100 || s.PSI.CPU.Some.Avg60 != 2 || s.PSI.IO.Some.Total != 2 {
		t.Errorf("psi %+v", s.PSI)
	}
	if n, err := g.OOMKills(); n != 2 || err != nil {
		t.Errorf("OOM kills %d, %v", n, err)
	}
	if pids, err := g.Pids(nil); err != nil || len(pids) != 2 || pids[1] != 102 {
		t.Errorf("pids %v, %v", pids, err)
	}
}

// Where a controller is not enabled or the kernel is older, the rest is read.
func TestStatsV2Partial(t *testing.T) {
	for _, c := range []struct {
		name    string
		without []string
		lacks   sample.Set
	}{
		{"no memory controller", []string{"memory.current", "memory.events"}, sample.Memory | sample.MemoryDetail},
		{"no cpu controller", []string{"cpu.max", "cpu.weight"}, sample.CPUDetail},
		{"no swap accounting", []string{"memory.swap.current", "memory.swap.max"}, 0},
		{"before 5.19", []string{"memory.peak"}, 0},
		{"PSI off", []string{"cpu.pressure", "memory.pressure", "io.pressure"}, sample.PSI},
		{"no hugetlb", []string{"hugetlb.2MB.current"}, sample.Hugetlb},
		{"no io", []string{"io.stat"}, sample.IO},
	} {
		files := map[string]string{}
		for k, v := range v2Files {
			files[k] = v
		}
		for _, name := range c.without {
			delete(files, name)
		}
		m := v2Host(t, "/p/c", files)
		g, _ := m.Resolve("/p", "c")
		var s Stats
		if err := g.Stats(&s); err != nil || s.Have != sample.Full&^c.lacks {
			t.Errorf("%s: have %b, want %b: %v", c.name, s.Have, sample.Full&^c.lacks, err)
		}
	}
	m := v2Host(t, "/p/c", map[string]string{"memory.current": "x\n", "cpu.stat": "usage_usec 1\n"})
	g, _ := m.Resolve("/p", "c")
	if err := g.Stats(new(Stats)); err == nil {
		t.Error("garbage in a file: no error")
	}
}

func TestPaths(t *testing.T) {
	host := Host{Mode: V2, Mounts: map[string]string{Unified: "/sys/fs/cgroup"}, SystemdRunning: true}
	if d := host.PreferredDriver(); d != Systemd {
		t.Errorf("preferred driver %q", d)
	}
	fs, err := New(Config{Host: host, Driver: CgroupFS})
	if err != nil {
		t.Fatal(err)
	}
	sd, err := New(Config{Host: host})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		m                       *Manager
		parent, pod, oci, group string // pod "": refused
	}{
		{fs, "", "/nodeagent/pods1", "/nodeagent/pods1/c1", "/nodeagent/pods1/c1"},
		{fs, "/kubepods/besteffort/pod7", "/kubepods/besteffort/pod7", "/kubepods/besteffort/pod7/c1", "/kubepods/besteffort/pod7/c1"},
		{fs, "rel/x", "/rel/x", "/rel/x/c1", "/rel/x/c1"},
		{fs, "/a..b/.c", "/a..b/.c", "/a..b/.c/c1", "/a..b/.c/c1"},
		{fs, "/", "/", "/c1", "/c1"},
		{fs, "/a\x00b", "", "", ""},
		{fs, "/a\nb", "", "", ""},
		{fs, "../../x", "", "", ""},
		{fs, "/..", "", "", ""},
		{fs, "/a/../b", "", "", ""},
		{fs, "/a/./b", "", "", ""},
		{fs, "/a//b", "", "", ""},
		{fs, "//a", "", "", ""},
		{fs, "/a/", "", "", ""},
		{fs, "/" + strings.Repeat("x", 256), "", "", ""},
		{sd, "", "/nodeagent.slice/nodeagent-pods1.slice", "nodeagent-pods1.slice:nodeagent:c1", "/nodeagent.slice/nodeagent-pods1.slice/nodeagent-c1.scope"},
		{sd, "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podX.slice", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podX.slice",
			"kubepods-besteffort-podX.slice:nodeagent:c1", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podX.slice/nodeagent-c1.scope"},
		{sd, "kubepods-burstable.slice", "/kubepods.slice/kubepods-burstable.slice", "kubepods-burstable.slice:nodeagent:c1", "/kubepods.slice/kubepods-burstable.slice/nodeagent-c1.scope"},
		{sd, "/kubepods/besteffort", "", "", ""},
		{sd, "/", "/", "-.slice:nodeagent:c1", "/nodeagent-c1.scope"},
		{sd, "/bad--name.slice", "", "", ""},
		{sd, "-bad.slice", "", "", ""},
		{sd, "bad-.slice", "", "", ""},
		{sd, ".slice", "", "", ""},
		{sd, "b d.slice", "", "", ""},
		{sd, "b%d.slice", "", "", ""},
		{sd, "a.scope", "", "", ""},
		{sd, "a.service/a.slice", "", "", ""},
		{sd, "/other.slice/kubepods-pod1.slice", "", "", ""},
		{sd, "../kubepods.slice", "", "", ""},
		{sd, "/kubepods.slice/../x.slice", "", "", ""},
		{sd, "/kubepods.slice//kubepods-pod1.slice", "", "", ""},
		{sd, "/kubepods.slice/", "", "", ""},
	} {
		pod, err := c.m.PodParent(c.parent, "s1")
		if c.pod == "" {
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), strconv.Quote(c.parent)) {
				t.Errorf("%s %q: accepted as %q, or not with the right error: %v", c.m.driver, c.parent, pod, err)
			}
			continue
		}
		if err != nil || pod != c.pod {
			t.Errorf("%s PodParent(%q) = %q, %v", c.m.driver, c.parent, pod, err)
		}
		if oci, err := c.m.ContainerPath(pod, "c1"); err != nil || oci != c.oci {
			t.Errorf("%s ContainerPath(%q) = %q, %v; want %q", c.m.driver, pod, oci, err, c.oci)
		}
		if g, err := c.m.Resolve(pod, "c1"); err != nil || g.Path() != "/sys/fs/cgroup"+c.group {
			t.Errorf("%s Resolve(%q) = %q, %v", c.m.driver, pod, g.Path(), err)
		}
		// What PodParent gives is stable: it is stored and given back.
		if again, err := c.m.PodParent(pod, "s1"); err != nil || again != pod {
			t.Errorf("%s PodParent(%q) = %q, %v", c.m.driver, pod, again, err)
		}
	}
	for _, id := range []string{"", "..", "a/b", "a:b"} {
		if _, err := fs.ContainerPath("/p", id); err == nil {
			t.Errorf("container %q accepted", id)
		}
	}
	for _, cfg := range []Config{{Host: host, Driver: "x"}, {Host: host, Name: "a/b"}, {Host: Host{Mode: V1}, Driver: Systemd}} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%+v accepted", cfg)
		}
	}
}
