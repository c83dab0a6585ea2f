package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// runtime is one CRI implementation under measurement.
type runtime struct {
	name    string
	handler string // RunPodSandbox runtime_handler
	conn    *grpc.ClientConn
	rs      runtimeapi.RuntimeServiceClient
	is      runtimeapi.ImageServiceClient
	pid     func() int // of the daemon
	mark    string     // string in the command line of helpers that left the daemon's process tree
	cgroup  string     // group that holds the daemon and the pods, relative to each hierarchy; "" if not ours
	seq     int
	failed  atomic.Int64 // pod starts
	figures figures
}

// podsCgroup is the cgroup parent the runtime's pods are given.
func (r *runtime) podsCgroup() string {
	if r.cgroup == "" {
		return ""
	}
	return "/" + r.cgroup + "/pods"
}

const (
	ours      = "nodeagent"
	reference = "containerd-runc"
	crun      = "containerd-crun"
)

// startRuntimes starts what is to be compared and returns a function that
// takes all of it away again, also after an error.
func startRuntimes(ctx context.Context, o options, imgs *images) ([]*runtime, func(), error) {
	var (
		rts  []*runtime
		undo []func()
	)
	stop := func() {
		for i := len(undo) - 1; i >= 0; i-- {
			undo[i]()
		}
	}
	if len(o.runtimes) > 0 {
		for _, s := range o.runtimes {
			name, socket, _ := strings.Cut(s, "=")
			r := &runtime{name: name}
			if err := r.dial(socket); err != nil {
				return nil, stop, err
			}
			pid, err := peerPid(socket)
			if err != nil {
				return nil, stop, err
			}
			r.pid = func() int { return pid }
			rts = append(rts, r)
		}
		return rts, stop, nil
	}
	type starter func(context.Context, options, *images, string) (*runtime, func(), error)
	for _, s := range []struct {
		name  string
		start starter
	}{{ours, startNodeagent}, {reference, startContainerd("runc")}, {crun, startContainerd("crun")}} {
		if o.only != "" && !strings.Contains(","+o.only+",", ","+s.name+",") {
			continue
		}
		cg := fmt.Sprintf("nabench-%d-%s", os.Getpid(), s.name)
		if err := makeCgroup(cg + "/runtime"); err != nil {
			return nil, stop, err
		}
		undo = append(undo, func() { node.RemoveCgroups(cg) })
		r, down, err := s.start(ctx, o, imgs, cg)
		if down != nil {
			undo = append(undo, down)
		}
		if err != nil {
			return nil, stop, fmt.Errorf("start %s: %w", s.name, err)
		}
		r.name, r.cgroup = s.name, cg
		rts = append(rts, r)
	}
	return rts, stop, nil
}

func (r *runtime) dial(socket string) (err error) {
	if r.conn, err = node.Dial(socket); err != nil {
		return err
	}
	r.rs, r.is = runtimeapi.NewRuntimeServiceClient(r.conn), runtimeapi.NewImageServiceClient(r.conn)
	return nil
}

func startNodeagent(ctx context.Context, o options, images *images, cg string) (*runtime, func(), error) {
	binary := o.daemon
	if binary == "" {
		var err error
		if binary, err = node.Binary(); err != nil {
			return nil, nil, err
		}
	}
	n, err := node.Start(ctx, node.Config{
		Dir: filepath.Join(o.dir, "na"), Binary: binary, Name: fmt.Sprintf("nb%d", os.Getpid()%1000000),
		PodCIDRs: []string{"10.203.0.0/20", "fd00:6e61:203::/64"},
		Warm:     4,
		Cgroups:  cgroupDirs(cg + "/runtime"),
	})
	if err != nil {
		return nil, nil, err
	}
	down := func() {
		if err := n.Destroy(context.WithoutCancel(ctx)); err != nil {
			fmt.Fprintln(os.Stderr, "bench: take nodeagent away:", err)
		}
	}
	r := &runtime{pid: n.Pid, mark: n.Config.Dir}
	return r, down, r.dial(n.Socket)
}

// peerPid asks the kernel who listens on a unix socket.
func peerPid(socket string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
		return 0, fmt.Errorf("connect %s: %w", socket, err)
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}

// cgroupDirs are the directories of the group in each hierarchy that exists.
func cgroupDirs(rel string) []string {
	var out []string
	for _, root := range node.CgroupRoots() {
		if d := filepath.Join(root, rel); exists(d) {
			out = append(out, d)
		}
	}
	return out
}

// makeCgroup makes the group in the hierarchies that count CPU: cpuacct (v1)
// or the unified one (v2).
func makeCgroup(rel string) error {
	var made bool
	for _, root := range node.CgroupRoots() {
		if !exists(filepath.Join(root, "cpuacct.usage")) && !exists(filepath.Join(root, "cpu.stat")) {
			continue
		}
		if err := os.MkdirAll(filepath.Join(root, rel), 0o755); err != nil {
			return err
		}
		made = true
	}
	if !made {
		return errors.New("make cgroup: found no hierarchy that counts CPU time")
	}
	return nil
}

func exists(p string) bool {
	_, err := os.Stat(p)
	return err == nil
}
