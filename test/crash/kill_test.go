package crash

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// TestRandomKills kills the daemon, the shim, or either, at random moments
// while clients make and remove pods and repeat what fails.
func TestRandomKills(t *testing.T) {
	daemon := func(t *testing.T, r *rig) {
		must(t, "kill the daemon", r.Kill())
		r.restart(t)
	}
	shim := func(t *testing.T, r *rig) {
		if pid := serving(r); pid != 0 {
			kill(t, pid)
		}
	}
	t.Run("daemon", func(t *testing.T) { randomKills(t, 12*time.Second, daemon) })
	t.Run("shim", func(t *testing.T) { randomKills(t, 8*time.Second, shim) })
	t.Run("both", func(t *testing.T) {
		randomKills(t, 8*time.Second, func(t *testing.T, r *rig) {
			if rand.IntN(2) == 0 {
				shim(t, r)
			}
			if rand.IntN(2) == 0 {
				time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
				daemon(t, r)
			}
		})
	})
}

func randomKills(t *testing.T, d time.Duration, kill func(*testing.T, *rig)) {
	r := start(t, nil)
	witness := r.newPod(counter(100, 42)...)
	must(t, "start the witness", witness.up())
	base := r.Settled()
	if *soak > 0 {
		d = *soak
	}
	end := time.Now().Add(d)
	ctx, cancel := context.WithDeadline(context.Background(), end)
	defer cancel()
	var (
		wg   sync.WaitGroup
		made atomic.Int64
	)
	for w := range 4 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 1))
			for ctx.Err() == nil {
				p := r.newPod()
				code := int32(rnd.IntN(100))
				p.ctr.Command = []string{"/bin/sh", "-c", fmt.Sprintf("sleep 0.0%d; exit %d", rnd.IntN(10), code)}
				if err := p.life(code); err != nil {
					t.Errorf("pod %s: %v", p.config.Metadata.Name, err)
					return
				}
				made.Add(1)
			}
		})
	}
	kills := 0
	for ctx.Err() == nil {
		time.Sleep(time.Duration(50+rand.IntN(700)) * time.Millisecond)
		kill(t, r)
		kills++
	}
	wg.Wait()
	t.Logf("%d pods lived through %d kills", made.Load(), kills)
	if made.Load() == 0 {
		t.Error("no pod was made")
	}
	witness.goesOn(t)
	if l := r.WaitNoLeaks(base); l != "" {
		t.Errorf("left behind:\n%s", l)
	}
	a, err := call(r.Runtime().ListPodSandbox, &runtimeapi.ListPodSandboxRequest{})
	must(t, "list", err)
	if len(a.Items) != 1 {
		t.Errorf("%d sandboxes listed, want the witness: %v", len(a.Items), a.Items)
	}
	witness.endsWith(t, 42)
	must(t, "removal", witness.down())
}

// life is a pod from start to end, with each call repeated until it succeeds.
func (p *pod) life(code int32) error {
	exit := func() error {
		s, err := p.waitExit(20 * time.Second)
		if err == nil && s.ExitCode != code {
			return fatal{fmt.Errorf("exit code %d (%s %s), want %d", s.ExitCode, s.Reason, s.Message, code)}
		}
		return err
	}
	for _, s := range []struct {
		name string
		f    func() error
	}{{"RunPodSandbox", p.sandbox}, {"CreateContainer", p.create}, {"StartContainer", p.start}, {"exit", exit},
		{"StopPodSandbox", p.stopSandbox}, {"RemovePodSandbox", p.removeSandbox}} {
		var err error
		for range 100 {
			if err = s.f(); err == nil {
				break
			}
			if _, ok := err.(fatal); ok {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	os.RemoveAll(p.config.LogDirectory)
	return nil
}

type fatal struct{ error }

// crowd starts n counting containers whose exit codes are their numbers.
func crowd(t *testing.T, r *rig, n int) []*pod {
	t.Helper()
	pods := make([]*pod, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	limit := make(chan struct{}, 4)
	for i := range pods {
		pods[i] = r.newPod(counter(10, i)...)
		wg.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			errs[i] = pods[i].up()
		})
	}
	wg.Wait()
	for _, err := range errs {
		must(t, "start a counter", err)
	}
	return pods
}

// check wants all pods counting on without a fault, then their exact ends.
func check(t *testing.T, pods []*pod) {
	t.Helper()
	for _, p := range pods {
		must(t, "state", p.hasState(runtimeapi.ContainerState_CONTAINER_RUNNING))
		p.goesOn(t)
	}
	pods[0].execWorks(t)
	var wg sync.WaitGroup
	limit := make(chan struct{}, 8)
	for i, p := range pods {
		wg.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			p.endsWith(t, int32(i))
			if err := p.down(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// serving is the shim's serving process (its parent, the reaper, is another);
// 0 if there is none just now.
func serving(r *rig) int {
	for _, pid := range r.Shims() {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if strings.Contains(string(b), "\x00serve\x00") {
			return pid
		}
	}
	return 0
}

func kill(t *testing.T, pid int) {
	t.Helper()
	if pid == 0 {
		t.Fatal("there is no shim to kill")
	}
	must(t, "kill", syscall.Kill(pid, syscall.SIGKILL))
}

const crowdSize = 50

func TestShimKilled(t *testing.T) {
	r := start(t, nil)
	base := r.Settled()
	pods := crowd(t, r, crowdSize)
	old := serving(r)
	kill(t, old)
	deadline := time.Now().Add(10 * time.Second)
	for {
		if now := serving(r); now != 0 && now != old {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no new shim")
		}
		time.Sleep(10 * time.Millisecond)
	}
	check(t, pods)
	inHostNamespaces(t, serving(r))
	if l := r.WaitNoLeaks(base); l != "" {
		t.Errorf("left behind:\n%s", l)
	}
}

// inHostNamespaces wants no thread of the shim inside a container: it would
// keep the container's mounts alive.
func inHostNamespaces(t *testing.T, pid int) {
	t.Helper()
	for _, ns := range []string{"mnt", "net", "pid", "ipc", "uts", "user"} {
		host, err := os.Readlink("/proc/self/ns/" + ns)
		must(t, ns, err)
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/ns/%s", pid, ns))
		must(t, ns, err)
		for _, task := range tasks {
			if got, err := os.Readlink(task); err == nil && got != host {
				t.Errorf("%s is %s, the host's is %s", task, got, host)
			}
		}
	}
}

// TestShimKilledOften kills it again and again while it works.
func TestShimKilledOften(t *testing.T) {
	r := start(t, nil)
	base := r.Settled()
	pods := crowd(t, r, 10)
	for range 5 {
		kill(t, serving(r))
		time.Sleep(500 * time.Millisecond)
		p := r.newPod("/bin/sh", "-c", "exit 9")
		if err := p.life(9); err != nil {
			t.Error(err)
		}
	}
	check(t, pods)
	if l := r.WaitNoLeaks(base); l != "" {
		t.Errorf("left behind:\n%s", l)
	}
}

func TestDaemonAndShimKilled(t *testing.T) {
	r := start(t, nil)
	base := r.Settled()
	pods := crowd(t, r, crowdSize)
	shim := serving(r)
	must(t, "kill the daemon", r.Kill())
	kill(t, shim)
	time.Sleep(300 * time.Millisecond)
	r.restart(t)
	check(t, pods)
	if l := r.WaitNoLeaks(base); l != "" {
		t.Errorf("left behind:\n%s", l)
	}
}

// TestAllOursKilled kills daemon, shim and reaper at once: containers run on
// and are adopted. Their later exit codes are exact or said to be unknown.
func TestAllOursKilled(t *testing.T) {
	r := start(t, nil)
	base := r.Settled()
	pods := crowd(t, r, 10)
	shims := r.Shims()
	must(t, "kill the daemon", r.Kill())
	for _, pid := range shims {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	time.Sleep(300 * time.Millisecond)
	r.restart(t)
	for i, p := range pods {
		must(t, "state", p.hasState(runtimeapi.ContainerState_CONTAINER_RUNNING))
		p.execWorks(t)
		must(t, "stop", p.stop())
		s, err := p.waitExit(5 * time.Second)
		must(t, "exit", err)
		if s.ExitCode != int32(i) && s.Reason != "Unknown" {
			t.Errorf("exit code %d (%s), want %d or reason Unknown", s.ExitCode, s.Reason, i)
		}
		must(t, "removal", p.down())
	}
	if l := r.WaitNoLeaks(base); l != "" {
		t.Errorf("left behind:\n%s", l)
	}
}

// TestReboot ends everything as a power cut would: processes, mounts,
// namespaces, links and State are gone, Root stays, the boot id is new.
func TestReboot(t *testing.T) {
	dir := t.TempDir()
	bootID := filepath.Join(dir, "boot_id")
	must(t, "boot id", os.WriteFile(bootID, []byte("11111111-2222-3333-4444-555555555555\n"), 0o644))
	// The daemon sees another boot id from the second life on; its mounts stay
	// in a namespace of its own, so leaks are looked for from inside.
	r := start(t, nil)
	empty := diskOnly(r.Settled())
	running, exited := r.newPod(), r.newPod("/bin/sh", "-c", "exit 5")
	must(t, "start", running.up())
	must(t, "start", exited.up())
	_, err := exited.waitExit(5 * time.Second)
	must(t, "exit", err)
	created := r.newPod()
	must(t, "sandbox", created.sandbox())
	must(t, "create", created.create())

	must(t, "kill", r.Kill())
	must(t, "kill the rest", r.KillShim(context.Background()))
	must(t, "unmount", node.UnmountBelow(r.Config.Dir))
	node.RemoveCgroups(cgroupTop())
	r.ForgetNetwork()
	entries, err := os.ReadDir(r.State)
	must(t, "empty State", err)
	for _, e := range entries {
		must(t, "empty State", os.RemoveAll(filepath.Join(r.State, e.Name())))
	}
	r.Config.Wrapper = []string{"unshare", "-m", "--propagation", "private", "/bin/sh", "-c",
		"mount --bind " + bootID + ` /proc/sys/kernel/random/boot_id && exec "$@"`, "sh"}
	r.restart(t)

	for _, c := range []struct {
		p    *pod
		name string
	}{{running, "running"}, {exited, "exited"}, {created, "created"}} {
		a, err := call(r.Runtime().PodSandboxStatus, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: c.p.id})
		must(t, c.name, err)
		if a.Status.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("%s: the sandbox is %v after the reboot", c.name, a.Status.State)
		}
		s, err := c.p.status()
		must(t, c.name, err)
		switch c.name {
		case "running":
			if s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode == 0 {
				t.Errorf("running: now %v, exit code %d", s.State, s.ExitCode)
			}
		case "exited":
			if s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode != 5 {
				t.Errorf("exited: now %v, exit code %d, want 5", s.State, s.ExitCode)
			}
		case "created":
			if s.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
				t.Errorf("created: now %v", s.State)
			}
		}
	}
	fresh := r.newPod()
	fresh.config.Metadata.Name, fresh.config.Metadata.Uid = running.config.Metadata.Name, running.config.Metadata.Uid
	fresh.config.Metadata.Attempt = 1
	must(t, "a pod after the reboot", fresh.up())
	fresh.execWorks(t)
	for _, p := range []*pod{running, exited, created, fresh} {
		must(t, "removal", p.down())
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		l := diskOnly(r.Snapshot()).Since(empty)
		if l == "" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("left behind:\n%s", l)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if c := r.Containers(); len(c) > 0 {
		t.Errorf("processes %v are left", c)
	}
}

// diskOnly leaves out what cannot be seen from outside the daemon's mount
// namespace, and the warm namespaces.
func diskOnly(l node.Leaks) node.Leaks {
	return node.Leaks{"dir": slices.DeleteFunc(slices.Clone(l["dir"]), func(s string) bool { return strings.Contains(s, "/state/ns/") }),
		"cgroup": l["cgroup"]}
}
