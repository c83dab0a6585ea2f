// Package node runs one nodeagent daemon of its own for a test or a bench:
// with its own root, state, socket, network name and pod ranges, so that
// several run side by side and beside a real one.
//
// It starts the built binary, waits until the CRI answers, and ends it by
// process id, politely or with SIGKILL. Destroy takes everything away again,
// the shim that outlives the daemon included. Leaks compares what the kernel
// holds before and after.
//
// Callers: test/e2e, test/crash, test/bench. It must not be linked into the
// product. A Node is used by one goroutine at a time; the clients it hands out
// are safe for many. One goroutine per running daemon waits for its end.
package node

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Config says where a Node lives and how its daemon is set up. The zero value
// of every field but Dir and Binary is useful.
type Config struct {
	Dir    string // everything of this node is below it; made by Start
	Binary string // the nodeagent binary, see Binary()

	Name         string   // network name, at most 9 bytes; default derived from the process id
	PodCIDRs     []string // default 10.<x>.0.0/20 and fd00:6e61:<x>::/64, x from Name
	RegistryDirs []string // directories with hosts.toml
	CNIConfDir   string   // default an empty directory: the built-in network
	LogLevel     string   // default info
	Seccomp      string   // unsetSeccompProfile
	Extra        string   // YAML appended at top level
	CRIExtra     string   // YAML lines put under cri:, indented by two
	Warm         int      // warm namespaces; default 2, -1 none
	MTU          int

	Env     []string // added to the daemon's environment
	Wrapper []string // command put before the binary: unshare -m ..., prlimit ...

	// OnLog is called with each line the daemon logs, from one goroutine per
	// daemon. The line reaches the log file after it returns.
	OnLog func(line string)

	// Cgroup paths whose cgroup.procs the daemon joins before it executes.
	Cgroups []string
}

// Binary is the daemon under test: $NODEAGENT, or bin/nodeagent of the
// repository the test was started in.
func Binary() (string, error) {
	if p := os.Getenv("NODEAGENT"); p != "" {
		return p, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		p := filepath.Join(dir, "bin", "nodeagent")
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", errors.New("find bin/nodeagent above the working directory: not there (run `make build`, or set NODEAGENT)")
}

// Node is one daemon and what belongs to it.
type Node struct {
	Root, State, Socket string
	Config              Config

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{} // closed when cmd has been waited for
	conn *grpc.ClientConn
	log  *os.File
}

// Start writes the configuration ($NODEAGENT_CGROUP_DRIVER in it), starts the daemon and waits until its CRI
// socket answers Version.
func Start(ctx context.Context, c Config) (*Node, error) {
	n, err := New(c)
	if err != nil {
		return nil, err
	}
	if err := n.Up(ctx); err != nil {
		return nil, errors.Join(err, n.Destroy(context.WithoutCancel(ctx)))
	}
	return n, nil
}

// New makes the directories and the configuration file and starts nothing.
func New(c Config) (*Node, error) {
	if c.Name == "" {
		c.Name = "t" + strconv.Itoa(os.Getpid()%1000000)
	}
	if len(c.PodCIDRs) == 0 {
		c.PodCIDRs = podRanges(c.Name)
	}
	if c.LogLevel == "" {
		c.LogLevel = "info"
	}
	if c.Warm == 0 {
		c.Warm = 2
	}
	n := &Node{Config: c, Root: filepath.Join(c.Dir, "root"), State: filepath.Join(c.Dir, "state")}
	n.Socket = filepath.Join(n.State, "nodeagent.sock")
	if len(n.Socket) > 107 {
		return nil, fmt.Errorf("use socket path %q: %d bytes, a unix socket has at most 107", n.Socket, len(n.Socket))
	}
	for _, d := range []string{n.Root, n.State, filepath.Join(c.Dir, "cni")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(n.ConfigPath(), []byte(n.yaml()), 0o600); err != nil {
		return nil, err
	}
	return n, nil
}

// podRanges picks a range of each family by name, that no interface has
// addresses of.
func podRanges(name string) []string {
	var used []netip.Prefix
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			used = append(used, p)
		}
	}
	h := fnv.New32a()
	for {
		h.Write([]byte(name))
		n := h.Sum32()
		v4 := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(128 + n%100), byte(n >> 8 & 0xf0), 0}), 20)
		v6 := fmt.Sprintf("fd00:6e61:%x::/64", n&0xffff)
		if !slices.ContainsFunc(used, v4.Overlaps) && !slices.ContainsFunc(used, netip.MustParsePrefix(v6).Overlaps) {
			return []string{v4.String(), v6}
		}
	}
}

// ConfigPath is the daemon's configuration file.
func (n *Node) ConfigPath() string { return filepath.Join(n.Config.Dir, "config.yaml") }

// LogPath is where the daemon's standard error goes, appended over restarts.
func (n *Node) LogPath() string { return filepath.Join(n.Config.Dir, "daemon.log") }

func (n *Node) yaml() string {
	c := n.Config
	var b strings.Builder
	p := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	p("apiVersion: nodeagent.dev/v1\nkind: Config")
	p("root: %q\nstate: %q", n.Root, n.State)
	p("log:\n  level: %s\n  format: text", c.LogLevel)
	if driver := os.Getenv("NODEAGENT_CGROUP_DRIVER"); c.Seccomp != "" || c.CRIExtra != "" || driver != "" {
		p("cri:")
		if driver != "" {
			p("  cgroupDriver: %s", driver)
		}
		if c.Seccomp != "" {
			p("  unsetSeccompProfile: %s", c.Seccomp)
		}
		if c.CRIExtra != "" {
			p("%s", c.CRIExtra)
		}
	}
	if len(c.RegistryDirs) > 0 {
		p("images:\n  registryConfigDirs: [%s]", quoted(c.RegistryDirs))
	}
	cni := c.CNIConfDir
	if cni == "" {
		cni = filepath.Join(c.Dir, "cni")
	}
	p("network:\n  name: %s\n  cniConfDir: %q\n  podCIDRs: [%s]\n  warmNamespaces: %d", c.Name, cni, quoted(c.PodCIDRs), max(c.Warm, 0))
	if c.MTU != 0 {
		p("  mtu: %d", c.MTU)
	}
	if c.Extra != "" {
		p("%s", c.Extra)
	}
	if !strings.Contains(c.Extra, "policy:") { // many daemons live here at a time; tests of policy have BPF filesystems of their own
		p("policy: {mode: \"off\"}")
	}
	return b.String()
}

func quoted(s []string) string {
	q := make([]string, len(s))
	for i, v := range s {
		q[i] = strconv.Quote(v)
	}
	return strings.Join(q, ", ")
}

// Up starts the daemon (again) and waits until the CRI answers.
func (n *Node) Up(ctx context.Context) error {
	if err := n.Launch(); err != nil {
		return err
	}
	return n.WaitReady(ctx)
}

// Launch starts the daemon and does not wait for it to answer.
func (n *Node) Launch() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd != nil && !n.endedLocked() {
		return errors.New("start daemon: it runs already")
	}
	var err error
	if n.log, err = os.OpenFile(n.LogPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644); err != nil {
		return err
	}
	args := append(append([]string{}, n.Config.Wrapper...), n.Config.Binary, "run", "--config", n.ConfigPath())
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = n.log, n.log
	var lines, write *os.File
	if n.Config.OnLog != nil {
		if lines, write, err = os.Pipe(); err != nil {
			return err
		}
		cmd.Stdout, cmd.Stderr = write, write
	}
	cmd.Env = append(os.Environ(), append([]string{"GOTRACEBACK=all"}, n.Config.Env...)...)
	// Its own session: a Ctrl-C at the test must not reach it, and it must not
	// share the test's terminal.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = n.startIn(cmd)
	if write != nil {
		write.Close()
	}
	if err != nil {
		n.log.Close()
		return fmt.Errorf("start daemon %s: %w", n.Config.Binary, err)
	}
	done := make(chan struct{})
	n.cmd, n.done = cmd, done
	log := n.log
	read := make(chan struct{})
	go func() {
		defer close(read)
		if lines != nil {
			n.follow(lines, log)
		}
	}()
	if lines == nil {
		log.Close() // the daemon has its own
	}
	go func() {
		cmd.Wait()
		// A shim may have inherited the pipe: its end does not wait for it.
		select {
		case <-read:
		case <-time.After(100 * time.Millisecond):
		}
		close(done)
	}()
	return nil
}

// follow passes the daemon's lines on until no process writes any more.
func (n *Node) follow(lines, log *os.File) {
	defer lines.Close()
	defer log.Close()
	r := bufio.NewReader(lines)
	for {
		line, err := r.ReadString('\n')
		if line != "" {
			n.Config.OnLog(line)
			log.WriteString(line)
		}
		if err != nil {
			return
		}
	}
}

// startIn starts cmd inside the configured cgroups, from the first
// instruction: this thread joins them, forks, and goes back.
func (n *Node) startIn(cmd *exec.Cmd) error {
	if len(n.Config.Cgroups) == 0 {
		return cmd.Start()
	}
	// A shell that joins and then executes keeps the pid.
	var script strings.Builder
	for _, g := range n.Config.Cgroups {
		fmt.Fprintf(&script, "echo $$ > %s/cgroup.procs && ", g)
	}
	script.WriteString(`exec "$@"`)
	sh := []string{"/bin/sh", "-c", script.String(), "sh"}
	cmd.Path, cmd.Args = "/bin/sh", append(sh, cmd.Args...)
	return cmd.Start()
}

func (n *Node) endedLocked() bool {
	select {
	case <-n.done:
		return true
	default:
		return false
	}
}

// Pid of the daemon (of its wrapper, if there is one), 0 when it does not run.
func (n *Node) Pid() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil || n.endedLocked() {
		return 0
	}
	return n.cmd.Process.Pid
}

// Done is closed when the running daemon has ended.
func (n *Node) Done() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.done
}

// ExitState of the last daemon; nil while it runs.
func (n *Node) ExitState() *os.ProcessState {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil || !n.endedLocked() {
		return nil
	}
	return n.cmd.ProcessState
}

// WaitReady waits until Version is answered or the daemon has ended.
func (n *Node) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	for {
		c, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := n.Runtime().Version(c, &runtimeapi.VersionRequest{})
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-n.Done():
			return fmt.Errorf("daemon ended before it answered: %v; its log ends:\n%s", n.ExitState(), n.LogTail(30))
		case <-ctx.Done():
			return fmt.Errorf("wait for the CRI on %s: %w; the daemon's log ends:\n%s", n.Socket, err, n.LogTail(30))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// LogTail is the last lines of the daemon's log.
func (n *Node) LogTail(lines int) string {
	b, err := os.ReadFile(n.LogPath())
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimRight(b, "\n"), []byte("\n"))
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return string(bytes.Join(all, []byte("\n")))
}

// Conn is a connection to the CRI socket that survives daemon restarts.
func (n *Node) Conn() *grpc.ClientConn {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.conn == nil {
		conn, err := Dial(n.Socket)
		if err != nil {
			panic(err) // only a malformed target, and ours is a plain path
		}
		n.conn = conn
	}
	return n.conn
}

// Dial connects lazily to a CRI socket, with the limits a kubelet uses.
func Dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: fastBackoff, MinConnectTimeout: time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
}

// Runtime is the daemon's RuntimeService.
func (n *Node) Runtime() runtimeapi.RuntimeServiceClient {
	return runtimeapi.NewRuntimeServiceClient(n.Conn())
}

// Images is the daemon's ImageService.
func (n *Node) Images() runtimeapi.ImageServiceClient {
	return runtimeapi.NewImageServiceClient(n.Conn())
}

// Kill ends the daemon with SIGKILL and waits for it.
func (n *Node) Kill() error { return n.signal(syscall.SIGKILL, 10*time.Second) }

// Stop ends the daemon with SIGTERM; containers stay.
func (n *Node) Stop() error {
	err := n.signal(syscall.SIGTERM, 20*time.Second)
	if err != nil {
		// Have it say where it hangs.
		n.signal(syscall.SIGQUIT, time.Second)
		err = fmt.Errorf("%w; its log ends:\n%s", err, n.LogTail(300))
		return errors.Join(err, n.Kill())
	}
	return nil
}

func (n *Node) signal(sig syscall.Signal, wait time.Duration) error {
	pid := n.Pid()
	if pid == 0 {
		return nil
	}
	if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("signal daemon %d: %w", pid, err)
	}
	select {
	case <-n.Done():
		return nil
	case <-time.After(wait):
		return fmt.Errorf("daemon %d still runs %v after %v", pid, wait, sig)
	}
}

// RemoveAllPods stops and removes every sandbox of the daemon.
func (n *Node) RemoveAllPods(ctx context.Context) error {
	l, err := n.Runtime().ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	errs := make([]error, len(l.Items))
	limit := make(chan struct{}, 8)
	for i, s := range l.Items {
		wg.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			if _, err := n.Runtime().StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: s.Id}); err != nil {
				errs[i] = fmt.Errorf("stop sandbox %s: %w", s.Id, err)
				return
			}
			if _, err := n.Runtime().RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: s.Id}); err != nil {
				errs[i] = fmt.Errorf("remove sandbox %s: %w", s.Id, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// faults finds what a daemon must never log: panics, that gRPC may have caught,
// and, of a binary built with -race, data races.
func (n *Node) faults() error {
	b, err := os.ReadFile(n.LogPath())
	if err != nil {
		return nil // never started
	}
	for _, sign := range []string{"WARNING: DATA RACE", "panic: ", "fatal error: "} {
		if i := bytes.Index(b, []byte(sign)); i >= 0 {
			return fmt.Errorf("the daemon logged:\n%s", b[i:min(len(b), i+4000)])
		}
	}
	return nil
}

// Destroy ends everything of the node: the daemon, its shim, whatever runs
// below its directory, its mounts, and the directory itself. What had to be
// taken away by force is not an error here; Leaks is for that.
func (n *Node) Destroy(ctx context.Context) error {
	if n.Pid() != 0 {
		c, cancel := context.WithTimeout(ctx, 30*time.Second)
		n.RemoveAllPods(c)
		cancel()
	}
	err := n.Stop()
	n.mu.Lock()
	if n.conn != nil {
		n.conn.Close()
		n.conn = nil
	}
	n.mu.Unlock()
	err = errors.Join(err, n.faults(), n.KillShim(ctx))
	err = errors.Join(err, UnmountBelow(n.Config.Dir))
	n.ForgetNetwork()
	if e := os.RemoveAll(n.Config.Dir); e != nil {
		err = errors.Join(err, e)
	}
	return err
}
