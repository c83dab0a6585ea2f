package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/e2e/node"
	"github.com/nodeagent/nodeagent/test/images"
)

// alive checks that the daemon still does its work: a pod from start to end.
func alive(t testing.TB, n *node.Node) {
	t.Helper()
	p := runPodOn(t, n, podConfig(t))
	c := p.run(t)
	equal(t, "exec afterwards", c.sh(t, "echo fine"), "fine")
	p.remove(t)
}

func TestManyLabels(t *testing.T) {
	labels := map[string]string{}
	for i := range 10000 {
		labels[fmt.Sprintf("label.example/number-%d", i)] = fmt.Sprintf("value %d", i)
	}
	p := runPod(t, func(c *runtimeapi.PodSandboxConfig) { c.Labels, c.Annotations = labels, labels })
	c := p.run(t, func(c *runtimeapi.ContainerConfig) { c.Labels, c.Annotations = labels, labels })
	equal(t, "labels in the pod's status", len(p.status(t).Labels), len(labels))
	equal(t, "labels in the container's status", len(c.status(t).Labels), len(labels))
	equal(t, "one of them", c.status(t).Labels["label.example/number-7777"], "value 7777")
	for _, l := range p.list(t) {
		equal(t, "annotations in the list", len(l.Annotations), len(labels))
	}
}

// TestNamesWithEveryByte uses names and labels of all bytes that protobuf
// strings may hold, path separators and shell characters among them.
func TestNamesWithEveryByte(t *testing.T) {
	var ascii strings.Builder
	for b := 1; b < 128; b++ {
		ascii.WriteByte(byte(b))
	}
	for i, name := range []string{ascii.String(), "../../../etc", "a/b/c", "über-日本-\u202e", strings.Repeat("n", 3000), " ", "-rf", "$(reboot)", "nul\x00byte", ".", ".."} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			cfg := podConfig(t, func(c *runtimeapi.PodSandboxConfig) {
				c.Metadata.Name, c.Metadata.Namespace, c.Metadata.Uid = name, name, name
				c.Labels, c.Annotations = map[string]string{name: name}, map[string]string{name: name}
			})
			r, err := shared.Runtime().RunPodSandbox(callCtx(t), &runtimeapi.RunPodSandboxRequest{Config: cfg})
			if err != nil {
				wantCode(t, "refusal", err, codes.InvalidArgument)
				return
			}
			p := &pod{node: shared, id: r.PodSandboxId, config: cfg}
			defer p.remove(t)
			s := p.status(t)
			equal(t, "name", s.Metadata.Name, name)
			equal(t, "label", s.Labels[name], name)
			c, err := p.tryCreate(callCtx(t), func(c *runtimeapi.ContainerConfig) {
				c.Metadata.Name, c.Labels = name, map[string]string{name: name}
				c.Envs = []*runtimeapi.KeyValue{{Key: "V", Value: []byte(strings.ReplaceAll(name, "\x00", ""))}}
			})
			if err != nil {
				wantCode(t, "refusal of the container", err, codes.InvalidArgument)
				return
			}
			c.start(t)
			if want := strings.TrimSpace(strings.ReplaceAll(name, "\x00", "")); len(want) < 200 {
				equal(t, "environment", c.sh(t, `printf %s "$V"`), want)
			}
		})
	}
	alive(t, shared)
}

// TestOutputWithoutReader lets containers print at full speed, with a log that
// nobody rotates, with none, and with an attached client that does not read.
func TestOutputWithoutReader(t *testing.T) {
	p := runPod(t)
	yes := script("exec yes 0123456789012345678901234567890123456789")
	// Bounded: the disk is the kubelet's to watch, by rotating.
	logged := p.run(t, script("yes 0123456789012345678901234567890123456789 | head -c 60000000; sleep 1000"))
	silent := p.run(t, yes, func(c *runtimeapi.ContainerConfig) { c.LogPath = "" })
	r, err := shared.Runtime().Attach(callCtx(t), &runtimeapi.AttachRequest{ContainerId: silent.id, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	conn := dialWS(t, r.Url, "v4.channel.k8s.io") // and never read
	defer conn.Close()
	time.Sleep(700 * time.Millisecond)
	start := time.Now()
	alive(t, shared)
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("a pod beside two loud containers took %v", d)
	}
	logged.stop(t, 0)
	silent.stop(t, 0)
	lines := logged.lines(t)
	if len(lines) < 1000 {
		t.Errorf("%d lines in the log", len(lines))
	}
	for i, l := range lines[:len(lines)-1] {
		if l.text != "0123456789012345678901234567890123456789" && !l.partial {
			t.Fatalf("line %d is torn: %q", i, l.text)
		}
	}
}

// TestDescriptorsExhausted runs a daemon that may open few files, and takes
// all of them with idle clients of the streaming server.
func TestDescriptorsExhausted(t *testing.T) {
	n := ownNode(t, func(c *node.Config) { c.Wrapper = []string{"prlimit", "--nofile=256:256", "--"} })
	if _, err := exec.LookPath("prlimit"); err != nil {
		t.Skip(err)
	}
	var conns []func()
	for range 300 {
		c, err := node.Dial(n.Socket)
		if err != nil {
			break
		}
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		_, err = runtimeapi.NewRuntimeServiceClient(c).Version(ctx, &runtimeapi.VersionRequest{})
		cancel()
		conns = append(conns, func() { c.Close() })
		if err != nil {
			break
		}
	}
	cfg := podConfig(t)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	r, err := n.Runtime().RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
	cancel()
	t.Logf("a pod without descriptors: %v", err)
	for _, c := range conns {
		c()
	}
	if n.Pid() == 0 {
		t.Fatal("the daemon ended")
	}
	if err == nil {
		(&pod{node: n, id: r.PodSandboxId, config: cfg}).remove(t)
	}
	eventually(t, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_, err := n.Runtime().Version(ctx, &runtimeapi.VersionRequest{})
		return err
	})
	alive(t, n)
}

// TestForkFails lets a pod use up its own process limit; the daemon says why
// an exec fails and goes on.
func TestForkFails(t *testing.T) {
	p := runPod(t)
	c := p.run(t, resources(&runtimeapi.LinuxContainerResources{Unified: map[string]string{}}), script("exec /bin/testtool fork 1 1000s"))
	root := ""
	for _, r := range node.CgroupRoots() {
		found, _ := filepath.Glob(filepath.Join(r, podCgroup(p.config.Metadata.Name), "*"+c.id+"*", "pids.max"))
		if len(found) > 0 {
			root = found[0]
		}
	}
	if root == "" {
		t.Skip("the container has no pids cgroup")
	}
	writeFile(t, root, "1")
	r, err := shared.Runtime().ExecSync(callCtx(t), &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"/bin/sh", "-c", "true | true; true & wait"}, Timeout: 5})
	if err == nil && r.ExitCode == 0 {
		t.Error("an exec forked beyond the process limit")
	}
	alive(t, shared)
}

// smallDisk is an ext4 file system of some megabytes in a file.
func smallDisk(t testing.TB, megabytes int) string {
	t.Helper()
	for _, tool := range []string{"mkfs.ext4", "mount"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(err)
		}
	}
	dir := filepath.Join(workDir, "disk"+fmt.Sprint(serial.Add(1)))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := dir + ".img"
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(int64(megabytes) << 20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-m0", file).CombinedOutput(); err != nil {
		t.Fatalf("mkfs: %v: %s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop", file, dir).CombinedOutput(); err != nil {
		t.Skipf("mount a file system in a file: %v: %s", err, out)
	}
	t.Cleanup(func() {
		unix.Unmount(dir, unix.MNT_DETACH)
		os.Remove(file)
	})
	return dir
}

// fill takes all space of the file system but keep bytes, and returns what
// gives it back.
func fill(t testing.TB, dir string, keep int64) func() {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := int64(st.Bavail)*st.Bsize - keep
	for size > 0 {
		if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err == nil {
			break
		}
		size -= 64 << 10
	}
	return func() { os.Remove(f.Name()) }
}

// TestDiskFull runs a daemon whose Root and State are on a small disk, and
// fills it at different times: clear errors, nothing half-kept, and work goes
// on when there is space again.
func TestDiskFull(t *testing.T) {
	disk := smallDisk(t, 96)
	n := ownNode(t, func(c *node.Config) { c.Dir = filepath.Join(disk, "n") })
	c := runPodOn(t, n, podConfig(t)).run(t)
	empty := n.Settled()

	free := fill(t, disk, 0)
	big := newImage(t, images.Gzip, images.File("big", randomText(2<<20)))
	ref := hub.Addr + "/full/big:1"
	push(t, ref, big)
	_, err := pull(context.Background(), n, ref)
	if err == nil {
		t.Error("a pull on a full disk succeeded")
	} else {
		t.Logf("pull: %v", err)
	}
	for range 3 {
		cfg := podConfig(t)
		r, err := n.Runtime().RunPodSandbox(callCtx(t), &runtimeapi.RunPodSandboxRequest{Config: cfg})
		if err == nil {
			p := &pod{node: n, id: r.PodSandboxId, config: cfg}
			_, err = p.tryCreate(callCtx(t))
			p.remove(t)
		}
		if err != nil {
			if c := status.Code(err); c == codes.Unknown || len(status.Convert(err).Message()) < 10 {
				t.Errorf("on a full disk: code %v: %v", c, err)
			}
		}
	}
	equal(t, "exec on a full disk", c.sh(t, "echo here"), "here")
	if n.Pid() == 0 {
		t.Fatal("the daemon ended on a full disk")
	}
	// It also has to start on one.
	if err := n.Kill(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := n.Up(ctx); err != nil {
		t.Errorf("start on a full disk: %v", err)
		free()
		if err := n.Up(ctx); err != nil {
			t.Fatal(err)
		}
	}
	free()
	equal(t, "container after the restart", c.sh(t, "echo here"), "here")
	if _, err := pull(context.Background(), n, ref); err != nil {
		t.Errorf("pull with space again: %v", err)
	}
	alive(t, n)
	if l := n.WaitNoLeaks(empty); l != "" {
		t.Errorf("left behind:\n%s", l)
	}
}

// randomText does not compress.
func randomText(n int) string {
	b := make([]byte, n)
	f, err := os.Open("/dev/urandom")
	if err != nil {
		panic(err)
	}
	defer f.Close()
	f.Read(b)
	return string(b)
}

// TestContainerLogDiskFull: a log on a full disk costs log lines, not the
// container, and the log is right again when there is space.
func TestContainerLogDiskFull(t *testing.T) {
	disk := smallDisk(t, 16)
	p := runPod(t, func(c *runtimeapi.PodSandboxConfig) { c.LogDirectory = filepath.Join(disk, "logs") })
	c := p.run(t, script(`trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); echo $i; usleep 5000; done`))
	waitLog(t, c, "stdout F 5\n")
	free := fill(t, disk, 0)
	time.Sleep(500 * time.Millisecond)
	equal(t, "state", c.status(t).State, runtimeapi.ContainerState_CONTAINER_RUNNING)
	equal(t, "exec", c.sh(t, "echo here"), "here")
	free()
	time.Sleep(500 * time.Millisecond)
	c.stop(t, 2)
	if _, err := parseLog(c.logPath()); err != nil {
		t.Error(err)
	}
}

// TestIPAMChurn makes and removes pods by the hundred with kills in between:
// no address may stay in use.
func TestIPAMChurn(t *testing.T) {
	total, limit := 1000, 90*time.Second
	if testing.Short() {
		total, limit = 100, 20*time.Second
	}
	n := ownNode(t, nil)
	before := n.Settled()
	keep := runPodOn(t, n, podConfig(t))
	deadline := time.Now().Add(limit)
	var (
		wg   sync.WaitGroup
		made atomic.Int64
	)
	for range 6 {
		wg.Go(func() {
			for made.Add(1) <= int64(total) && time.Now().Before(deadline) {
				cfg := podConfig(t)
				var id string
				retry := func(f func(context.Context) error) bool {
					for range 200 {
						ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
						err := f(ctx)
						cancel()
						if err == nil {
							return true
						}
						if status.Code(err) == codes.InvalidArgument {
							t.Errorf("pod: %v", err)
							return false
						}
						time.Sleep(20 * time.Millisecond)
					}
					return false
				}
				ok := retry(func(ctx context.Context) error {
					r, err := n.Runtime().RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
					id = r.GetPodSandboxId()
					return err
				}) && retry(func(ctx context.Context) error {
					_, err := n.Runtime().StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
					return err
				}) && retry(func(ctx context.Context) error {
					_, err := n.Runtime().RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id})
					return err
				})
				os.RemoveAll(cfg.LogDirectory)
				if !ok {
					t.Errorf("pod %s did not come to its end", cfg.Metadata.Name)
					return
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	kills := 0
	for running := true; running; {
		select {
		case <-done:
			running = false
		case <-time.After(2 * time.Second):
			if err := n.Kill(); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			if err := n.Up(ctx); err != nil {
				t.Fatal(err)
			}
			cancel()
			kills++
		}
	}
	t.Logf("%d pods, %d kills", min(made.Load(), int64(total)), kills)
	v4, v6 := keep.ips(t)
	leases := leasesOf(t, n)
	for _, l := range leases {
		if l != v4.String() && l != v6.String() {
			t.Errorf("address %s is in use by nobody", l)
		}
	}
	keep.remove(t)
	if l := n.WaitNoLeaks(before); l != "" {
		t.Errorf("left behind:\n%s", l)
	}
}

var addressLike = regexp.MustCompile(`^(\d+\.\d+\.\d+\.\d+|[0-9a-f:]+:[0-9a-f:]*)$`)

// leasesOf asks the daemon's own bookkeeping which addresses are in use: by
// the routes to pods in the host's namespace, one per address.
func leasesOf(t testing.TB, n *node.Node) []string {
	t.Helper()
	var out []string
	for _, family := range []string{"-4", "-6"} {
		b, err := exec.Command("ip", family, "-o", "route", "show", "table", "all").Output()
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) > 2 && addressLike.MatchString(f[0]) && n.OwnsAddress(f[0]) && strings.Contains(line, " dev na") {
				out = append(out, f[0])
			}
		}
	}
	return out
}

// TestNoDescriptorLeak: many pods later the daemon has as many files open.
func TestNoDescriptorLeak(t *testing.T) {
	cycle := func() {
		p := runPod(t)
		c := p.run(t)
		c.sh(t, "true")
		p.remove(t)
	}
	for range 3 {
		cycle()
	}
	shims := func() int {
		n := 0
		for _, pid := range shared.Shims() {
			n += node.CountFDs(pid)
		}
		return n
	}
	shared.Settled()
	daemon, shim := shared.FDs(), shims()
	for range 15 {
		cycle()
	}
	eventually(t, func() error {
		if d, s := shared.FDs(), shims(); d > daemon+3 || s > shim+3 {
			return fmt.Errorf("descriptors: daemon %d, was %d; shim %d, was %d", d, daemon, s, shim)
		}
		return nil
	})
}
