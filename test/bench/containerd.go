package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// startContainerd starts Debian's containerd with the given OCI runtime, as a
// distribution would set it up: overlayfs, CNI bridge with host-local and
// portmap. It listens and stores in a directory of its own.
func startContainerd(oci string) func(context.Context, options, *images, string) (*runtime, func(), error) {
	return func(ctx context.Context, o options, images *images, cg string) (*runtime, func(), error) {
		for _, bin := range []string{"containerd", "containerd-shim-runc-v2", oci, "iptables"} {
			if _, err := exec.LookPath(bin); err != nil {
				return nil, nil, fmt.Errorf("%w (install Debian's containerd, %s, containernetworking-plugins and iptables)", err, oci)
			}
		}
		dir := filepath.Join(o.dir, "cd-"+oci)
		c := ctrd{dir: dir, oci: oci, bridge: "nab" + oci, subnet: map[string]string{"runc": "10.204.0.0/20", "crun": "10.205.0.0/20"}[oci]}
		if err := c.write(images.pauseRef()); err != nil {
			return nil, nil, err
		}
		forward, _ := os.ReadFile(ipForward)
		down := func() {
			c.stop(context.WithoutCancel(ctx))
			os.WriteFile(ipForward, forward, 0) // the bridge plugin switches it on
		}
		if err := c.start(cgroupDirs(cg + "/runtime")); err != nil {
			return nil, down, err
		}
		r := &runtime{handler: oci, pid: func() int { return c.cmd.Process.Pid }, mark: dir}
		if err := r.dial(c.socket()); err != nil {
			return nil, down, err
		}
		c.rs = r.rs
		return r, down, c.wait(ctx)
	}
}

const unified = "/sys/fs/cgroup/unified"

const ipForward = "/proc/sys/net/ipv4/ip_forward"

type ctrd struct {
	dir, oci, bridge, subnet string
	cmd                      *exec.Cmd
	done                     chan struct{}
	rs                       runtimeapi.RuntimeServiceClient
}

func (c *ctrd) socket() string { return filepath.Join(c.dir, "c.sock") }

func (c *ctrd) write(pause string) error {
	if err := os.MkdirAll(filepath.Join(c.dir, "cni"), 0o755); err != nil {
		return err
	}
	conflist := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"%s","plugins":[
 {"type":"bridge","bridge":"%s","isGateway":true,"ipMasq":true,"promiscMode":true,
  "ipam":{"type":"host-local","dataDir":"%s","ranges":[[{"subnet":"%s"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
 {"type":"portmap","capabilities":{"portMappings":true}}]}
`, c.bridge, c.bridge, filepath.Join(c.dir, "ipam"), c.subnet)
	if err := os.WriteFile(filepath.Join(c.dir, "cni", "10-bench.conflist"), []byte(conflist), 0o644); err != nil {
		return err
	}
	// restrict_oom_score_adj: machines without CAP_SYS_RESOURCE refuse -998.
	config := fmt.Sprintf(`version = 2
root = "%[1]s/root"
state = "%[1]s/state"
[grpc]
  address = "%[1]s/c.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "%[2]s"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "%[1]s/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "%[3]s"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.%[3]s]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.%[3]s.options]
        BinaryName = "%[3]s"
`, c.dir, pause, c.oci)
	return os.WriteFile(filepath.Join(c.dir, "config.toml"), []byte(config), 0o644)
}

func (c *ctrd) start(cgroups []string) error {
	log, err := os.Create(filepath.Join(c.dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	var join strings.Builder
	for _, g := range cgroups {
		fmt.Fprintf(&join, "echo $$ > %s/cgroup.procs && ", g)
	}
	args := []string{"/bin/sh", "-c", join.String() + `exec "$@"`, "sh"}
	if b, err := os.ReadFile(unified + "/cgroup.controllers"); err == nil && len(b) > 1 && c.oci == "crun" {
		// crun 1.8 refuses a hybrid hierarchy whose v2 half has controllers:
		// hide that half from it.
		args = append(args, "unshare", "-m", "/bin/sh", "-c", "umount "+unified+` && exec "$@"`, "sh")
	}
	args = append(args, "containerd", "-c", filepath.Join(c.dir, "config.toml"))
	c.cmd = exec.Command(args[0], args[1:]...)
	c.cmd.Stdout, c.cmd.Stderr = log, log
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	c.done = make(chan struct{})
	if err := c.cmd.Start(); err != nil {
		return err
	}
	go func() { c.cmd.Wait(); close(c.done) }()
	return nil
}

func (c *ctrd) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		s, err := c.rs.Status(ctx, &runtimeapi.StatusRequest{})
		if err == nil {
			ready := true
			for _, cond := range s.Status.Conditions {
				ready = ready && cond.Status
			}
			if ready {
				return nil
			}
			err = errors.New(s.Status.String())
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for containerd: %w", err)
		case <-c.done:
			b, _ := os.ReadFile(filepath.Join(c.dir, "log"))
			return fmt.Errorf("containerd ended: %s", b)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// stop removes what is left of the pods, ends containerd and its shims by
// process id, and removes its bridge, its iptables chains and its mounts.
func (c *ctrd) stop(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	if c.cmd != nil && c.cmd.Process != nil {
		if c.rs != nil {
			if l, err := c.rs.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{}); err == nil {
				for _, s := range l.Items {
					c.rs.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: s.Id})
					c.rs.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: s.Id})
				}
			}
		}
		c.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-c.done:
		case <-time.After(10 * time.Second):
			c.cmd.Process.Kill()
			<-c.done
		}
	}
	for _, pid := range node.ProcessesNaming(c.dir) {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	exec.Command("ip", "link", "delete", c.bridge).Run()
	removeChains(c.bridge)
	node.UnmountBelow(c.dir)
	os.RemoveAll(c.dir)
}

// removeChains deletes the nat rules that CNI's masquerading and portmap left
// for the network called name, and portmap's top chains if nobody uses them.
func removeChains(name string) {
	save, err := exec.Command("iptables-save", "-t", "nat").Output()
	if err != nil {
		return
	}
	var chains []string
	for line := range strings.Lines(string(save)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "-A" || !strings.Contains(line, `"`+name+`"`) {
			continue
		}
		exec.Command("/bin/sh", "-c", "iptables -w -t nat -D "+strings.TrimSpace(strings.TrimPrefix(line, "-A"))).Run()
		for i, w := range f {
			if w == "-j" && i+1 < len(f) && strings.HasPrefix(f[i+1], "CNI-") {
				chains = append(chains, f[i+1])
			}
		}
	}
	for _, c := range chains {
		exec.Command("iptables", "-w", "-t", "nat", "-F", c).Run()
		exec.Command("iptables", "-w", "-t", "nat", "-X", c).Run()
	}
}
