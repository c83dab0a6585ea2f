//go:build linux

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	ciliumebpf "github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/ebpf/policy"
)

// Config says where pins are and how large the tables get. Zero fields take
// the defaults.
type Config struct {
	// Dir is a folder on a BPF filesystem (see Mount), for pins. Empty: nothing
	// is pinned and enforcement ends with the process, as tests want it.
	Dir string
	// Mark is the bit of the packet mark that this package may use. 1<<20.
	Mark uint32
	// Conntrack is the number of flows kept, for each family. 32768, 7 MB in all.
	Conntrack uint32
	// Peers is the number of addresses of pods, for each family. 131072.
	Peers uint32
	// RowBlocks is the size of the row table in blocks of 128 bytes. 32768, 4 MB: 110
	// pods with 8192 classes of peers, or fewer with more; the most
	// that can be addressed is 1<<20.
	RowBlocks uint32
	// Strict lets TCP answers pass only with a conntrack entry.
	Strict bool
	// KeepEstablished lets flows go on that policy no longer allows.
	KeepEstablished bool
	// Events is how many events a second each CPU tells for each reason. 100;
	// negative: none.
	Events int
	// XDP says where NICs drop early: "off" nowhere; "auto" with the driver's help
	// where it has it, else generic, and never on a veth (native XDP there costs
	// three quarters of TCP's throughput); "native" or "generic": so on each.
	XDP string
	Log *slog.Logger
}

func (c *Config) defaults() {
	c.Mark = cmp.Or(c.Mark, 1<<20)
	c.Conntrack = cmp.Or(c.Conntrack, 32768)
	c.Peers = cmp.Or(c.Peers, 131072)
	c.RowBlocks = cmp.Or(c.RowBlocks, 32768)
	c.Events = cmp.Or(c.Events, 100)
	c.XDP = cmp.Or(c.XDP, "off")
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// Sizes that bpf/policy.bpf.c fixes.
const (
	MaxEndpoints = 4096
	maxProfiles  = 4096
	portBlocks   = 3072
	near         = 65536 // interfaces with lower numbers are found in an array
	blockSize    = 128
	rowCells     = 64
	endpointSize = 64
	layout       = "v3" // of the conntrack maps
)

// Datapath is one loaded set of programs and tables.
type Datapath struct {
	cfg   Config
	objs  naObjects
	noTCX bool
	hz    uint32 // jiffies a second

	walk4, walk6 collector
	collected    uint64
	inherited    bool // the flows of an earlier layout

	endpoints, near, rows, ports, profiles, state, peers4, peers6, generation []byte // mapped

	peers peers

	eps   map[uint32]*endpoint
	slab  slab
	shift uint // log2 of the blocks of each row
	bank  uint32
	flip  time.Time // when the bank was changed
	old   []chunk   // to be freed after a grace period

	lost map[netip.Prefix]policy.Prefix // no room
}

type endpoint struct {
	ifindex  int
	ips      []netip.Addr
	row      chunk
	word     uint64 // without rows and size
	degraded error  // why; nil: it is not
}

// Open loads the programs and makes empty tables.
func Open(cfg Config) (*Datapath, error) {
	cfg.defaults()
	if !slices.Contains([]string{"off", "auto", "native", "generic"}, cfg.XDP) {
		return nil, fmt.Errorf("XDP %q: want off, auto, native or generic", cfg.XDP)
	}
	d := &Datapath{
		cfg: cfg, eps: map[uint32]*endpoint{}, slab: slab{[]gap{{0, cfg.RowBlocks}}},
		peers: newPeers(cfg.Peers), lost: map[netip.Prefix]policy.Prefix{},
	}
	spec, err := loadNa()
	if err != nil {
		return nil, fmt.Errorf("read eBPF objects: %w", err)
	}
	if err := d.size(spec); err != nil {
		return nil, err
	}
	replace, err := d.pinnedConntrack(spec)
	if err != nil {
		return nil, err
	}
	defer func() {
		for _, m := range replace {
			m.Close()
		}
	}()
	err = spec.LoadAndAssign(&d.objs, &ciliumebpf.CollectionOptions{MapReplacements: replace})
	if err != nil {
		return nil, fmt.Errorf("load eBPF programs: %w", err)
	}
	if err := d.prepare(); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Datapath) size(spec *ciliumebpf.CollectionSpec) error {
	c := d.cfg
	if c.RowBlocks > 1<<20 {
		return fmt.Errorf("row table of %d blocks: at most %d can be addressed", c.RowBlocks, 1<<20)
	}
	for name, n := range map[string]uint32{
		"ct4": c.Conntrack, "ct6": c.Conntrack, "peers4": buckets(c.Peers), "peers6": buckets(c.Peers), "cidr4": c.Peers, "cidr6": c.Peers, "rows": c.RowBlocks,
	} {
		spec.Maps[name].MaxEntries = n
	}
	for program, name := range map[string]string{ // as `bpftool prog` shows them, at most 15 letters
		"na_from_pod": "na_from_", "na_to_pod": "na_to_", "na_uplink_in": "na_in_", "na_uplink_out": "na_out_", "na_xdp": "na_xdp_",
	} {
		spec.Programs[program].Name = fmt.Sprintf("%s%04x", name, instance(c.Dir))
	}
	hz, err := jiffiesPerSecond(spec)
	if err != nil {
		return err
	}
	d.hz = hz
	if err := spec.Variables["cfg_seed"].Set(d.peers.seed); err != nil {
		return fmt.Errorf("set cfg_seed: %w", err)
	}
	for name, v := range map[string]uint32{
		"cfg_peers": d.peers.shift, "cfg_hz": hz, "cfg_mark": c.Mark, "cfg_strict": flag(c.Strict), "cfg_keep": flag(c.KeepEstablished), "cfg_events": uint32(max(0, c.Events)),
	} {
		if err := spec.Variables[name].Set(v); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

func flag(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

// jiffiesPerSecond asks the kernel's clock twice; CONFIG_HZ is not to be read
// everywhere.
func jiffiesPerSecond(spec *ciliumebpf.CollectionSpec) (uint32, error) {
	p, err := ciliumebpf.NewProgram(spec.Programs["na_clock"].Copy())
	if err != nil {
		return 0, fmt.Errorf("load clock program: %w", err)
	}
	defer p.Close()
	read := func() (uint32, time.Time, error) {
		n, err := p.Run(&ciliumebpf.RunOptions{Data: make([]byte, 14)})
		return n, time.Now(), err
	}
	a, t, err := read()
	if err != nil {
		return 0, fmt.Errorf("read the kernel's clock: %w", err)
	}
	time.Sleep(40 * time.Millisecond)
	b, u, err := read()
	if err != nil {
		return 0, fmt.Errorf("read the kernel's clock: %w", err)
	}
	got := float64(b-a) / u.Sub(t).Seconds()
	best := uint32(100)
	for _, hz := range []uint32{100, 250, 300, 1000} {
		if diff(got, hz) < diff(got, best) {
			best = hz
		}
	}
	return best, nil
}

func diff(got float64, hz uint32) float64 {
	return max(got, float64(hz)) / max(1, min(got, float64(hz)))
}

// pinnedConntrack opens the flows that an earlier process knew, if their size is
// still ours; else they are put aside, to be copied.
func (d *Datapath) pinnedConntrack(spec *ciliumebpf.CollectionSpec) (map[string]*ciliumebpf.Map, error) {
	out := map[string]*ciliumebpf.Map{}
	if d.cfg.Dir == "" {
		return out, nil
	}
	for _, name := range []string{"ct4", "ct6", "generation"} {
		path := d.pin("ct", name)
		m, err := ciliumebpf.LoadPinnedMap(path, nil)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = spec.Maps[name].Compatible(m)
			if err == nil {
				out[name] = m
				continue
			}
			m.Close()
		}
		d.cfg.Log.Info("conntrack of an earlier process is copied", "path", path, "why", err)
		aside := filepath.Join(d.cfg.Dir, layout+"-before", "ct") // as if of another layout
		if err := os.MkdirAll(aside, 0o700); err != nil {
			return out, fmt.Errorf("make folder for pins: %w", err)
		}
		_ = os.Remove(filepath.Join(aside, name)) // bpffs does not rename over a file
		if err := os.Rename(path, filepath.Join(aside, name)); err != nil {
			return out, fmt.Errorf("put old conntrack aside: %w", err)
		}
	}
	return out, nil
}

func (d *Datapath) pin(parts ...string) string {
	return filepath.Join(append([]string{d.cfg.Dir, layout}, parts...)...)
}

func (d *Datapath) prepare() error {
	for _, m := range []struct {
		to   *[]byte
		from *ciliumebpf.Map
	}{
		{&d.endpoints, d.objs.Endpoints}, {&d.near, d.objs.EpNear}, {&d.rows, d.objs.Rows}, {&d.ports, d.objs.Ports}, {&d.profiles, d.objs.Profiles}, {&d.state, d.objs.State},
		{&d.peers4, d.objs.Peers4}, {&d.peers6, d.objs.Peers6}, {&d.generation, d.objs.Generation},
	} {
		size := int(m.from.MaxEntries() * max(8, m.from.ValueSize()))
		size = (size + os.Getpagesize() - 1) &^ (os.Getpagesize() - 1)
		mem, err := unix.Mmap(m.from.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return fmt.Errorf("map %s: %w", m.from, err)
		}
		*m.to = mem
	}
	d.changed()
	if d.cfg.Dir == "" {
		return nil
	}
	for _, dir := range []string{"ct", "links"} {
		if err := os.MkdirAll(d.pin(dir), 0o700); err != nil {
			return fmt.Errorf("make folder for pins: %w", err)
		}
	}
	for name, m := range map[string]*ciliumebpf.Map{"ct4": d.objs.Ct4, "ct6": d.objs.Ct6, "generation": d.objs.Generation} {
		path := d.pin("ct", name)
		if _, err := os.Stat(path); err == nil {
			continue
		}
		if err := m.Pin(path); err != nil {
			return fmt.Errorf("pin conntrack: %w", err)
		}
	}
	return nil
}

// Close lets go of the tables. What is attached and pinned goes on by itself.
func (d *Datapath) Close() error {
	for _, mem := range [][]byte{d.endpoints, d.near, d.rows, d.ports, d.profiles, d.state, d.peers4, d.peers6, d.generation} {
		if mem != nil {
			_ = unix.Munmap(mem)
		}
	}
	d.endpoints, d.near, d.rows, d.ports, d.profiles, d.state, d.peers4, d.peers6, d.generation = nil, nil, nil, nil, nil, nil, nil, nil, nil
	return d.objs.Close()
}

// Mount makes dir a BPF filesystem unless it is one.
func Mount(dir string) error {
	var fs unix.Statfs_t
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make mount point of the BPF filesystem: %w", err)
	}
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	if fs.Type == unix.BPF_FS_MAGIC {
		return nil
	}
	if err := unix.Mount("bpffs", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount BPF filesystem on %s: %w", dir, err)
	}
	return nil
}

// Grace waits until no program run that began before is still under way.
func Grace() {
	const global = 1 // MEMBARRIER_CMD_GLOBAL waits for an RCU grace period
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0); errno != 0 {
		time.Sleep(100 * time.Millisecond) // kernels with nohz_full refuse it
	}
}
