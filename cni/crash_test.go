package cni

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nodeagent/nodeagent/cni/lab"
)

// The crash test runs this test binary again as a daemon that sets pods up and tears them down on a test
// node, kills it at random instants, reconciles as a fresh daemon would, and compares what is there
// with what the daemon had recorded.

const crashDir = "NODEAGENT_CNI_CRASH_DIR"

// event is a line of the daemon's record: appended before a teardown begins and after a setup or teardown ended.
type event struct {
	What string // "up", "going", "gone"
	Slot int    // which of the namespaces
	Req  Request
	Res  Result
}

const (
	crashSlots   = 24
	crashWorkers = 4
)

func crashManager(dir string) (*Manager, error) {
	return New(Config{
		Name: "crash", HostNetns: filepath.Join(dir, "node"), ConfDir: filepath.Join(dir, "net.d"), BinDirs: []string{"/usr/lib/cni"}, Masquerade: true, Quarantine: 50 * time.Millisecond,
		StateDir: filepath.Join(dir, "state"), RootDir: filepath.Join(dir, "root"),
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24"), netip.MustParsePrefix("fd77::/64")},
		Log:      slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
}

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		if err := crashDaemon(dir); err != nil {
			fmt.Fprintln(os.Stderr, "daemon:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// crashDaemon churns until it is killed.
func crashDaemon(dir string) error {
	m, err := crashManager(dir)
	if err != nil {
		return err
	}
	ctx := context.Background()
	go func() { _ = m.Run(ctx) }()
	live, count, err := readEvents(dir)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	record, err := os.OpenFile(filepath.Join(dir, "events"), os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	note := func(e event) {
		p, _ := json.Marshal(e)
		mu.Lock()
		defer mu.Unlock()
		_, _ = record.Write(append(p, '\n'))
	}
	errs := make(chan error)
	for w := range crashWorkers {
		mine := map[int]event{}
		for slot, e := range live {
			if slot%crashWorkers == w {
				mine[slot] = e
			}
		}
		go func() { errs <- churn(ctx, m, dir, w, count, mine, note) }()
	}
	return <-errs
}

func churn(ctx context.Context, m *Manager, dir string, worker, count int, mine map[int]event, note func(event)) error {
	for n := 0; ; n++ {
		slot := rand.IntN(crashSlots/crashWorkers)*crashWorkers + worker
		if e, ok := mine[slot]; ok {
			e.What = "going"
			note(e)
			if err := m.Teardown(ctx, e.Req, e.Res); err != nil {
				return err
			}
			e.What = "gone"
			note(e)
			delete(mine, slot)
			continue
		}
		req := Request{SandboxID: fmt.Sprintf("s%d-%d-%d", worker, count, n), PodName: "p", Netns: filepath.Join(dir, fmt.Sprint("pod", slot))}
		if rand.IntN(2) == 0 {
			req.PortMappings = []PortMapping{{Protocol: "tcp", HostPort: uint16(10000 + slot), ContainerPort: 80}, {Protocol: "udp", HostPort: uint16(10000 + slot), ContainerPort: 53}}
		}
		if rand.IntN(2) == 0 {
			if err := m.Prewire(ctx, req.Netns); err != nil {
				return err
			}
		}
		sctx, cancel := ctx, context.CancelFunc(func() {})
		if rand.IntN(4) == 0 {
			limit := 2 * time.Millisecond
			if name, _ := m.Network(); name != Builtin {
				limit = 200 * time.Millisecond
			}
			sctx, cancel = context.WithTimeout(ctx, rand.N(limit))
		}
		res, err := m.Setup(sctx, req)
		cancel()
		switch {
		case err == nil:
			mine[slot] = event{What: "up", Slot: slot, Req: req, Res: res}
			note(mine[slot])
		case errors.Is(err, context.DeadlineExceeded):
		default:
			return err
		}
	}
}

// readEvents returns what is live by slot, and how many setups there were.
func readEvents(dir string) (live map[int]event, count int, err error) {
	f, err := os.Open(filepath.Join(dir, "events"))
	if os.IsNotExist(err) {
		return map[int]event{}, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	live = map[int]event{}
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		var e event
		if json.Unmarshal(s.Bytes(), &e) != nil {
			continue // cut off by the kill
		}
		delete(live, e.Slot)
		if e.What == "up" {
			live[e.Slot] = e
			count++
		}
	}
	return live, count, s.Err()
}

func TestCrashes(t *testing.T) {
	l := lab.New(t)
	want := 1000
	if testing.Short() {
		want = 100
	}
	crashAndVerify(t, l, want, verifyCrash)
	m, err := crashManager(l.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := errors.Join(m.Reconcile(context.Background(), nil, nil), m.Remove(context.Background())); err != nil {
		t.Error(err)
	}
	(&fixture{Lab: l, t: t}).empty()
}

// TestCrashesForeign is the same on a network of other plugins, whose processes may outlive the daemon's kill.
func TestCrashesForeign(t *testing.T) {
	debianPlugins(t, "bridge", "host-local")
	l := lab.New(t)
	want := 40
	if testing.Short() {
		want = 5
	}
	store := filepath.Join(l.Dir, "hostlocal")
	if err := os.Mkdir(filepath.Join(l.Dir, "net.d"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(l.Dir, "net.d", "10.conflist"), fmt.Appendf(nil, bridgeConf, "1.0.0", "bridged", store), 0o600); err != nil {
		t.Fatal(err)
	}
	crashAndVerify(t, l, want, func(t *testing.T, l *lab.Lab, live map[int]event) { verifyForeign(t, l, store, live) })
	verifyForeign(t, l, store, nil)
}

func verifyForeign(t *testing.T, l *lab.Lab, store string, live map[int]event) {
	t.Helper()
	m, err := crashManager(l.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var reqs []Request
	results := map[string]Result{}
	for _, e := range live {
		reqs, results[e.Req.SandboxID] = append(reqs, e.Req), e.Res
	}
	if err := m.Reconcile(context.Background(), reqs, results); err != nil {
		t.Error(err)
	}
	for _, e := range live {
		if err := m.Check(context.Background(), e.Req, e.Res); err != nil {
			t.Error(err)
		}
	}
	for what, c := range map[string]struct {
		pattern string
		want    int
	}{
		"IPv4 addresses": {filepath.Join(store, "bridged", "10.*"), len(live)}, "IPv6 addresses": {filepath.Join(store, "bridged", "fd*"), len(live)},
		"attachments": {filepath.Join(l.Dir, "root/cni/attachments/*"), len(live)}, "results": {filepath.Join(l.Dir, "root/cni/results/*"), len(live)},
	} {
		if got, _ := filepath.Glob(c.pattern); len(got) != c.want {
			t.Errorf("%s: %v, want %d", what, got, c.want)
		}
	}
	if got := l.Links("veth"); len(got) != len(live) {
		t.Errorf("links %v, want %d", got, len(live))
	}
}

// crashAndVerify kills the daemon until it has set up want pods, and verifies after each kill.
func crashAndVerify(t *testing.T, l *lab.Lab, want int, verify func(*testing.T, *lab.Lab, map[int]event)) {
	t.Helper()
	for i := range crashSlots {
		l.Netns(fmt.Sprint("pod", i))
	}
	kills, deadline := 0, time.Now().Add(4*time.Minute)
	for {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), crashDir+"="+l.Dir)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case err := <-done:
			t.Fatalf("daemon ended by itself: %v: %s", err, stderr.String())
		case <-time.After(time.Duration(50+rand.IntN(400)) * time.Millisecond):
		}
		_ = cmd.Process.Kill()
		<-done
		if s := stderr.String(); s != "" {
			t.Logf("daemon: %s", s)
		}
		kills++
		live, count, err := readEvents(l.Dir)
		if err != nil {
			t.Fatal(err)
		}
		verify(t, l, live)
		if t.Failed() {
			t.FailNow()
		}
		if count >= want || time.Now().After(deadline) {
			t.Logf("%d pods, %d kills, %d live at the end", count, kills, len(live))
			if count < want {
				t.Errorf("only %d pods", count)
			}
			break
		}
	}
}

// verifyCrash reconciles as a fresh daemon does, and compares.
func verifyCrash(t *testing.T, l *lab.Lab, live map[int]event) {
	t.Helper()
	ctx := context.Background()
	m, err := crashManager(l.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var reqs []Request
	results := map[string]Result{}
	for _, e := range live {
		reqs = append(reqs, e.Req)
		results[e.Req.SandboxID] = e.Res
	}
	if err := m.Reconcile(ctx, reqs, results); err != nil {
		t.Error(err)
	}
	addrs, links, ports := 0, 0, 0
	for _, e := range live {
		if err := m.Check(ctx, e.Req, e.Res); err != nil {
			t.Error(err)
		}
		addrs += len(e.Res.IPs)
		links++
		ports += len(e.Req.PortMappings) * len(e.Res.IPs)
	}
	files, err := os.ReadDir(filepath.Join(l.Dir, "root", "ipam"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if _, err := netip.ParseAddr(f.Name()); err == nil {
			addrs--
		} else if strings.HasPrefix(f.Name(), ".tmp") {
			t.Errorf("left: %s", f.Name())
		}
	}
	if addrs != 0 {
		t.Errorf("%d addresses fewer held than live pods have", addrs)
	}
	if got := len(l.Links("na")); got != links {
		t.Errorf("%d links, %d live pods", got, links)
	}
	l.In(l.Node, func() error {
		out, err := exec.Command("nft", "list", "table", "inet", "crash").CombinedOutput()
		if len(live) > 0 || err == nil {
			if got := strings.Count(string(out), " tcp . ") + strings.Count(string(out), " udp . ") + strings.Count(string(out), "\ttcp . ") + strings.Count(string(out), "\tudp . "); got != ports {
				t.Errorf("%d host ports, want %d:\n%s", got, ports, out)
			}
		}
		for _, family := range []string{"-4", "-6"} {
			out, err := exec.Command("ip", family, "route", "show", "proto", "110", "type", "unicast").CombinedOutput()
			if err != nil {
				return err
			}
			if got := strings.Count(string(out), "dev na"); got != links {
				t.Errorf("%d routes %s, want %d:\n%s", got, family, links, out)
			}
		}
		return nil
	})
}
