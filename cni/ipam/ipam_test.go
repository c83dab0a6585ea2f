package ipam

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

type clock struct{ now time.Time }

func (c *clock) Now() time.Time { return c.now }

func open(t testing.TB, dir string, c *clock) *Pool {
	t.Helper()
	cfg := Config{Dir: dir, Quarantine: time.Minute, Floor: 2 * time.Second}
	if c != nil {
		cfg.Now = c.Now
	}
	p, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func ranges(t testing.TB, s ...string) []Range {
	t.Helper()
	var ps []netip.Prefix
	for _, p := range s {
		ps = append(ps, netip.MustParsePrefix(p))
	}
	rs, err := NewRanges(ps)
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

func owner(s string) Owner {
	return Owner{Network: "net", Sandbox: s, IfName: "eth0", Netns: "/run/ns/" + s}
}

func TestNextFitAndQuarantine(t *testing.T) {
	c := &clock{time.Unix(1e9, 0)}
	dir := t.TempDir()
	p := open(t, dir, c)
	r := ranges(t, "10.0.0.0/29") // 10.0.0.2 to 10.0.0.6
	get := func(want string) netip.Addr {
		t.Helper()
		a, err := p.Allocate(owner("s"), r)
		if want == "" {
			if !errors.Is(err, errdefs.ErrResourceExhausted) {
				t.Fatalf("%s, %v, want exhaustion", a, err)
			}
			return a
		}
		if err != nil || a.String() != want {
			t.Fatalf("%s, %v, want %s", a, err, want)
		}
		return a
	}
	free := func(a string) {
		t.Helper()
		if err := p.Release("net", "s", netip.MustParseAddr(a)); err != nil {
			t.Fatal(err)
		}
	}
	get("10.0.0.2")
	get("10.0.0.3")
	free("10.0.0.2")
	get("10.0.0.4") // behind the last one, not the one released
	get("10.0.0.5")
	get("10.0.0.6")
	get("") // 10.0.0.2 was released just now
	c.now = c.now.Add(time.Second)
	free("10.0.0.4")
	c.now = c.now.Add(1500 * time.Millisecond)
	get("10.0.0.2") // the only one beyond the floor
	get("")
	c.now = c.now.Add(time.Second)
	get("10.0.0.4")
	free("10.0.0.3")
	c.now = c.now.Add(2 * time.Minute)
	free("10.0.0.5")
	get("10.0.0.3") // rested
	// Another process goes on where this one stopped.
	q := open(t, dir, c)
	free("10.0.0.3")
	c.now = c.now.Add(-time.Hour) // the clock was set back: nothing is kept for ever
	if a, err := q.Allocate(owner("s"), r); err != nil || a.String() != "10.0.0.5" {
		t.Errorf("%s, %v", a, err)
	}
}

func TestReleaseChecksOwner(t *testing.T) {
	p := open(t, t.TempDir(), nil)
	a, err := p.Allocate(owner("a"), ranges(t, "fd00::/64"))
	if err != nil {
		t.Fatal(err)
	}
	for _, who := range [][2]string{{"net", "b"}, {"other", "a"}} {
		if err := p.Release(who[0], who[1], a); err != nil {
			t.Error(err)
		}
	}
	if rec, err := p.Get(a); err != nil || rec.Owner != owner("a") || rec.Addr != a {
		t.Errorf("%+v, %v", rec, err)
	}
	if err := p.Claim(owner("a"), a); err != nil {
		t.Errorf("claim of one's own: %v", err)
	}
	if err := p.Claim(owner("b"), a); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("claim of another's: %v", err)
	}
	for range 2 {
		if err := p.Release("net", "a", a); err != nil {
			t.Error(err)
		}
	}
	if _, err := p.Get(a); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("after release: %v", err)
	}
	if err := p.Claim(owner("b"), a); err != nil {
		t.Errorf("claim of a resting one: %v", err)
	}
}

func TestKeep(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir, nil)
	r := ranges(t, "10.0.0.0/24")
	addr := map[string]netip.Addr{}
	for _, s := range []string{"live", "dead"} {
		a, err := p.Allocate(owner(s), r)
		if err != nil {
			t.Fatal(err)
		}
		addr[s] = a
	}
	foreign := owner("x")
	foreign.Network = "other"
	addr["foreign"], _ = p.Allocate(foreign, r)
	for name, content := range map[string]string{
		"10.0.0.100": "", "10.0.0.101": `{"version":1,"addr":"10.0.0.7","network":"net","sandbox":"s"}`,
		"10.0.0.102": `{"version":99}`, "10.0.0.103": "torn {", "README": "not a record", "10.0.0.007": "not an address",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	freed, err := p.Keep("net", func(r Record) bool { return r.Sandbox == "live" }, func(a netip.Addr) bool { return a.String() == "10.0.0.103" })
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(freed, netip.Addr.Compare)
	if want := []netip.Addr{addr["dead"], netip.MustParseAddr("10.0.0.100"), netip.MustParseAddr("10.0.0.101")}; !slices.Equal(freed, want) {
		t.Errorf("freed %v, want %v", freed, want)
	}
	if err := p.Claim(owner("live"), netip.MustParseAddr("10.0.0.103")); err != nil {
		t.Errorf("claim of a broken record's address: %v", err)
	}
	if err := p.Claim(owner("live"), netip.MustParseAddr("10.0.0.102")); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("claim of an unknown record's address: %v", err)
	}
	// A record of an unknown version is kept, and its address is never given out.
	full := map[string]bool{}
	for {
		a, err := p.Allocate(owner("many"), r)
		if errors.Is(err, errdefs.ErrResourceExhausted) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		full[a.String()] = true
	}
	for _, a := range []string{"10.0.0.0", "10.0.0.1", "10.0.0.255", "10.0.0.102", "10.0.0.103", addr["live"].String(), addr["foreign"].String()} {
		if full[a] {
			t.Errorf("%s was given out", a)
		}
	}
	if freed, err := p.ReleaseSandbox("net", "many", ""); err != nil || len(freed) != len(full) {
		t.Errorf("released %d of %d, %v", len(freed), len(full), err)
	}
}

func TestSweep(t *testing.T) {
	c := &clock{time.Now().Add(time.Second)}
	dir := t.TempDir()
	p := open(t, dir, c)
	r := ranges(t, "10.0.0.0/24")
	for range 3 {
		if _, err := p.Allocate(owner("s"), r); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, tempPrefix+"1-x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := p.ReleaseSandbox("net", "s", "eth0"); err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{4, 0} {
		if err := p.Sweep(); err != nil {
			t.Fatal(err)
		}
		n := 0
		names, _ := p.names()
		for _, name := range names {
			if !strings.HasPrefix(name, cursorPrefix) {
				n++
			}
		}
		if n != want {
			t.Errorf("%d files, want %d: %v", n, want, names)
		}
		c.now = c.now.Add(3 * time.Minute)
	}
}

func TestNamedTemporaryFiles(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir, nil)
	p.noTmp = true
	seen := map[netip.Addr]bool{}
	for range 20 {
		a, err := p.Allocate(owner("s"), ranges(t, "10.0.0.0/24"))
		if err != nil || seen[a] {
			t.Fatal(a, err)
		}
		seen[a] = true
	}
	if left, _ := filepath.Glob(filepath.Join(dir, tempPrefix+"*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestRanges(t *testing.T) {
	for s, want := range map[string]string{
		"10.0.0.0/24": "10.0.0.2 10.0.0.254 253", "10.0.0.0/30": "10.0.0.2 10.0.0.2 1", "10.0.0.0/8": "10.0.0.2 10.255.255.254 16777213",
		"fd00::/64": "fd00::2 fd00::3fff:ffff:ffff:ffff 4611686018427387902", "fd00::/126": "fd00::2 fd00::3 2", "fd00::/48": "fd00::2 fd00::3fff:ffff:ffff:ffff 4611686018427387902",
	} {
		r, err := NewRange(netip.MustParsePrefix(s))
		if err != nil {
			t.Errorf("%s: %v", s, err)
			continue
		}
		if got := fmt.Sprint(r.at(r.first), r.at(r.last), r.Size()); got != strings.ReplaceAll(want, "  ", " ") {
			t.Errorf("%s: %s, want %s", s, got, want)
		}
		if !r.Gives(r.at(r.first)) || !r.Gives(r.at(r.last)) || r.Gives(r.Host()) || r.Gives(r.at(r.last+1)) {
			t.Errorf("%s: limits", s)
		}
	}
	for _, s := range []string{"10.0.0.0/31", "10.0.0.0/32", "10.0.0.1/24", "0.0.0.0/0", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/8", "fd00::/127", "ff00::/8", "fe80::/64", "::ffff:10.0.0.0/104"} {
		if _, err := NewRange(netip.MustParsePrefix(s)); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: error %v", s, err)
		}
	}
	if _, err := NewRange(netip.Prefix{}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("zero: error %v", err)
	}
}

// TestRandomAgainstModel compares random work with a map.
func TestRandomAgainstModel(t *testing.T) {
	dir := t.TempDir()
	r := ranges(t, "10.0.0.0/27", "10.0.1.0/28")
	model := map[netip.Addr]string{}
	p := open(t, dir, nil)
	p.cfg.Quarantine, p.cfg.Floor = 1, 1
	for i := range 3000 {
		if rand.IntN(100) == 0 {
			p = open(t, dir, nil)
			p.cfg.Quarantine, p.cfg.Floor = 1, 1
		}
		sandbox := fmt.Sprint("s", i)
		if rand.IntN(2) == 0 {
			a, err := p.Allocate(owner(sandbox), r)
			switch {
			case err == nil && model[a] != "":
				t.Fatalf("%s was given to %s, %s has it", a, sandbox, model[a])
			case err == nil:
				model[a] = sandbox
			case !errors.Is(err, errdefs.ErrResourceExhausted):
				t.Fatal(err)
			case len(model) < 42-1: // 29 and 13 fit; one may have been released this very nanosecond
				t.Fatalf("exhausted with %d", len(model))
			}
			continue
		}
		for a, s := range model {
			if err := p.Release("net", s, a); err != nil {
				t.Fatal(err)
			}
			delete(model, a)
			break
		}
	}
	held, broken, err := p.Held("net")
	if err != nil || len(broken) > 0 || len(held) != len(model) {
		t.Fatalf("%d held, model has %d, broken %v, %v", len(held), len(model), broken, err)
	}
	for _, h := range held {
		if model[h.Addr] != h.Sandbox {
			t.Errorf("%s: %s, model %s", h.Addr, h.Sandbox, model[h.Addr])
		}
	}
}

const raceDir = "NODEAGENT_IPAM_RACE_DIR"

// TestProcessesShare has several processes allocate from one small range at once: no address twice.
func TestProcessesShare(t *testing.T) {
	if dir := os.Getenv(raceDir); dir != "" {
		p := open(t, dir, nil)
		var wg sync.WaitGroup
		for g := range 2 {
			wg.Go(func() {
				for i := range 50 {
					if a, err := p.Allocate(owner(fmt.Sprint(os.Getpid(), "-", g, "-", i)), ranges(t, "10.0.0.0/22")); err != nil {
						t.Error(err)
					} else {
						fmt.Println("got", a)
					}
				}
			})
		}
		wg.Wait()
		return
	}
	dir := t.TempDir()
	outs := make([][]byte, 4)
	var wg sync.WaitGroup
	for i := range outs {
		wg.Go(func() {
			cmd := exec.Command(os.Args[0], "-test.run=^TestProcessesShare$")
			cmd.Env = append(os.Environ(), raceDir+"="+dir)
			outs[i], _ = cmd.Output()
		})
	}
	wg.Wait()
	seen := map[string]bool{}
	for _, out := range outs {
		for _, line := range strings.Split(string(out), "\n") {
			if a, ok := strings.CutPrefix(line, "got "); ok {
				if seen[a] {
					t.Errorf("%s twice", a)
				}
				seen[a] = true
			}
		}
	}
	if len(seen) != 400 {
		t.Errorf("%d addresses, want 400: %s", len(seen), outs)
	}
}

func FuzzDecode(f *testing.F) {
	good, _ := Record{Version: 1, Addr: netip.MustParseAddr("10.0.0.5"), Owner: owner("s")}.Encode()
	for _, seed := range []string{string(good), "", "{}", `{"version":2}`, `{"version":1,"addr":"fe80::1%eth0"}`, `{"version":-1}`, `{"version":1e99}`, `[[[[`} {
		f.Add("10.0.0.5", []byte(seed))
	}
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		r, err := Decode(name, data)
		if err != nil {
			if !errors.Is(err, errdefs.ErrDataLoss) && !errors.Is(err, errdefs.ErrFailedPrecondition) {
				t.Errorf("class of %v", err)
			}
			return
		}
		if r.Addr.String() != name || r.Sandbox == "" || r.Network == "" {
			t.Errorf("accepted %+v", r)
		}
		again, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if r2, err := Decode(name, again); err != nil || r2 != r {
			t.Errorf("%+v became %+v, %v", r, r2, err)
		}
	})
}

func BenchmarkAllocateRelease(b *testing.B) {
	p := open(b, b.TempDir(), nil)
	r := ranges(b, "10.0.0.0/16")
	for b.Loop() {
		a, err := p.Allocate(owner("s"), r)
		if err != nil {
			b.Fatal(err)
		}
		if err := p.Release("net", "s", a); err != nil {
			b.Fatal(err)
		}
	}
}
