package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestSandboxLifecycle(t *testing.T) {
	c := podConfig(t)
	c.Labels, c.Annotations = map[string]string{"a": "1"}, map[string]string{"note": "x y"}
	p := runPodOn(t, shared, c)
	s := p.status(t)
	equal(t, "state", s.State, runtimeapi.PodSandboxState_SANDBOX_READY)
	equal(t, "name", s.Metadata.Name, c.Metadata.Name)
	equal(t, "label", s.Labels["a"], "1")
	equal(t, "annotation", s.Annotations["note"], "x y")
	if s.Network.GetIp() == "" {
		t.Error("a ready sandbox has no IP")
	}
	if age := time.Since(time.Unix(0, s.CreatedAt)); age < 0 || age > time.Minute {
		t.Errorf("created %v ago", age)
	}
	ctr := p.run(t)
	for range 2 { // stopping twice is fine
		if _, err := shared.Runtime().StopPodSandbox(callCtx(t), &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
			t.Fatalf("StopPodSandbox: %v", err)
		}
	}
	equal(t, "state after stop", p.status(t).State, runtimeapi.PodSandboxState_SANDBOX_NOTREADY)
	equal(t, "container of a stopped sandbox", ctr.status(t).State, runtimeapi.ContainerState_CONTAINER_EXITED)
	for range 2 { // so is removing
		if _, err := shared.Runtime().RemovePodSandbox(callCtx(t), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
			t.Fatalf("RemovePodSandbox: %v", err)
		}
	}
}

func nsOptions(f func(*runtimeapi.NamespaceOption)) podOption {
	return func(c *runtimeapi.PodSandboxConfig) { f(c.Linux.SecurityContext.NamespaceOptions) }
}

func hostNS(t *testing.T, kind string) string {
	t.Helper()
	s, err := os.Readlink("/proc/self/ns/" + kind)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestNamespaceModes checks by inode who shares which namespace.
func TestNamespaceModes(t *testing.T) {
	const POD, CONTAINER, NODE = runtimeapi.NamespaceMode_POD, runtimeapi.NamespaceMode_CONTAINER, runtimeapi.NamespaceMode_NODE
	for _, c := range []struct {
		name           string
		net, pid, ipc  runtimeapi.NamespaceMode
		twoSharePID    bool
		ownNet, ownIPC bool
	}{
		{"pod network, container pid", POD, CONTAINER, POD, false, true, true},
		{"pod pid", POD, POD, POD, true, true, true},
		{"host network", NODE, CONTAINER, POD, false, false, true},
		{"host pid", POD, NODE, POD, true, true, true},
		{"host ipc", POD, CONTAINER, NODE, false, true, false},
		{"all host", NODE, NODE, NODE, true, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := runPod(t, nsOptions(func(o *runtimeapi.NamespaceOption) { o.Network, o.Pid, o.Ipc = c.net, c.pid, c.ipc }))
			a, b := p.run(t), p.run(t)
			ns := func(ctr *container, kind string) string { return ctr.sh(t, "readlink /proc/self/ns/"+kind) }
			for _, k := range []string{"net", "ipc"} {
				equal(t, k+" namespace of both containers", ns(a, k), ns(b, k))
			}
			equal(t, "own network", ns(a, "net") != hostNS(t, "net"), c.ownNet)
			equal(t, "own IPC", ns(a, "ipc") != hostNS(t, "ipc"), c.ownIPC)
			equal(t, "shared PID namespace", ns(a, "pid") == ns(b, "pid"), c.twoSharePID)
			equal(t, "host PID namespace", ns(a, "pid") == hostNS(t, "pid"), c.pid == NODE)
			if c.ownNet {
				equal(t, "UTS of both", ns(a, "uts"), ns(b, "uts"))
				if ns(a, "uts") == hostNS(t, "uts") {
					t.Error("the pod has the host's UTS namespace")
				}
			}
			if c.pid == POD {
				first := a.sh(t, "cat /proc/1/cmdline")
				if strings.Contains(first, "sleep") {
					t.Errorf("process 1 of a shared PID namespace is %q, want the pod's own", first)
				}
				contains(t, "processes seen from the other container", b.sh(t, "ps"), "sleep 1000")
			}
			opts := p.status(t).GetLinux().GetNamespaces().GetOptions()
			equal(t, "status network mode", opts.GetNetwork(), c.net)
			equal(t, "status pid mode", opts.GetPid(), c.pid)
			equal(t, "status ipc mode", opts.GetIpc(), c.ipc)
		})
	}
}

// TestSharedPIDReaps makes orphans in a shared PID namespace; process 1 of the
// pod has to reap them.
func TestSharedPIDReaps(t *testing.T) {
	p := runPod(t, nsOptions(func(o *runtimeapi.NamespaceOption) { o.Pid = runtimeapi.NamespaceMode_POD }))
	c := p.run(t)
	c.sh(t, `for i in 1 2 3; do sh -c 'sleep 0.05 & exit 0'; done; sleep 0.4`)
	if out := c.sh(t, `grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l`); out != "0" {
		t.Errorf("%s zombies", out)
	}
}

func TestTargetPID(t *testing.T) {
	p := runPod(t)
	target := p.run(t)
	c := p.run(t, security(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: target.id}
	}))
	equal(t, "PID namespace", c.sh(t, "readlink /proc/self/ns/pid"), target.sh(t, "readlink /proc/self/ns/pid"))
	// An ephemeral container that ends leaves its target alone.
	c.stop(t, 0)
	equal(t, "target", target.status(t).State, runtimeapi.ContainerState_CONTAINER_RUNNING)
	_, err := p.tryCreate(callCtx(t), security(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: "nobody"}
	}))
	if err == nil {
		t.Error("a container with an unknown PID target was created")
	}
}

func userns(host uint32) podOption {
	return nsOptions(func(o *runtimeapi.NamespaceOption) {
		m := []*runtimeapi.IDMapping{{ContainerId: 0, HostId: host, Length: 65536}}
		o.UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: m, Gids: m}
	})
}

func TestUserNamespace(t *testing.T) {
	p := runPod(t, userns(131072))
	host := filepath.Join(workDir, "userns-vol")
	if err := os.MkdirAll(host, 0o755); err != nil {
		t.Fatal(err)
	}
	m := []*runtimeapi.IDMapping{{ContainerId: 0, HostId: 131072, Length: 65536}}
	c := p.run(t, mount(&runtimeapi.Mount{ContainerPath: "/vol", HostPath: host, UidMappings: m, GidMappings: m}))
	equal(t, "uid_map", strings.Join(strings.Fields(c.sh(t, "cat /proc/self/uid_map")), " "), "0 131072 65536")
	equal(t, "root inside", c.sh(t, "id -u"), "0")
	equal(t, "owner of the image's files", c.sh(t, "stat -c %u:%g /bin/busybox"), "0:0")
	equal(t, "owner of a new file", c.sh(t, "touch /x && stat -c %u /x"), "0")
	if c.sh(t, "readlink /proc/self/ns/user") == hostNS(t, "user") {
		t.Error("the pod has the host's user namespace")
	}
	// Through an idmapped mount root writes as root of the host's files.
	equal(t, "volume owner inside", c.sh(t, "touch /vol/f && stat -c %u /vol/f"), "0")
	st, err := os.Stat(filepath.Join(host, "f"))
	if err != nil {
		t.Fatal(err)
	}
	if uid := fileUID(st); uid != 0 {
		t.Errorf("file made through an idmapped mount belongs to %d on the host, want 0", uid)
	}
	two := p.run(t, security(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
	}))
	equal(t, "run_as_user", two.sh(t, "id -u"), "1000")

	// Status promises UserNamespacesHostNetwork.
	h := runPod(t, userns(131072), nsOptions(func(o *runtimeapi.NamespaceOption) { o.Network = runtimeapi.NamespaceMode_NODE }))
	c = h.run(t)
	equal(t, "network of a host-network pod", c.sh(t, "readlink /proc/self/ns/net"), hostNS(t, "net"))
	equal(t, "its uid_map", strings.Join(strings.Fields(c.sh(t, "cat /proc/self/uid_map")), " "), "0 131072 65536")
	contains(t, "its sysfs", c.shFails(t, "echo 1 > /sys/kernel/mm/ksm/run"), "Read-only")
}

func TestUserNamespaceRefused(t *testing.T) {
	m := func(host, length uint32) []*runtimeapi.IDMapping {
		return []*runtimeapi.IDMapping{{HostId: host, Length: length}}
	}
	for name, mode := range map[string]podOption{
		"host PID": nsOptions(func(o *runtimeapi.NamespaceOption) { o.Pid = runtimeapi.NamespaceMode_NODE }),
		"host IPC": nsOptions(func(o *runtimeapi.NamespaceOption) { o.Ipc = runtimeapi.NamespaceMode_NODE }),
	} {
		_, err := shared.Runtime().RunPodSandbox(callCtx(t), &runtimeapi.RunPodSandboxRequest{Config: podConfig(t, userns(131072), mode)})
		wantCode(t, name, err, codes.InvalidArgument)
	}
	for name, u := range map[string]*runtimeapi.UserNamespace{
		"mode CONTAINER":      {Mode: runtimeapi.NamespaceMode_CONTAINER, Uids: m(1000, 10), Gids: m(1000, 10)},
		"no mappings":         {Mode: runtimeapi.NamespaceMode_POD},
		"several mappings":    {Mode: runtimeapi.NamespaceMode_POD, Uids: append(m(1000, 10), m(5000, 10)...), Gids: append(m(1000, 10), m(5000, 10)...)},
		"NODE with mappings":  {Mode: runtimeapi.NamespaceMode_NODE, Uids: m(1000, 10), Gids: m(1000, 10)},
		"mapping of length 0": {Mode: runtimeapi.NamespaceMode_POD, Uids: m(1000, 0), Gids: m(1000, 0)},
	} {
		t.Run(name, func(t *testing.T) {
			c := podConfig(t, nsOptions(func(o *runtimeapi.NamespaceOption) { o.UsernsOptions = u }))
			r, err := shared.Runtime().RunPodSandbox(callCtx(t), &runtimeapi.RunPodSandboxRequest{Config: c})
			if err == nil {
				(&pod{node: shared, id: r.PodSandboxId, config: c}).remove(t)
				t.Fatal("accepted")
			}
		})
	}
}

func TestHostname(t *testing.T) {
	p := runPod(t, func(c *runtimeapi.PodSandboxConfig) { c.Hostname = "tall-tower" })
	c := p.run(t)
	equal(t, "hostname", c.sh(t, "hostname"), "tall-tower")
	contains(t, "/etc/hostname", c.sh(t, "cat /etc/hostname"), "tall-tower")
	contains(t, "HOSTNAME", c.sh(t, "echo $HOSTNAME"), "tall-tower")
	host, _ := os.Hostname()
	h := runPod(t, nsOptions(func(o *runtimeapi.NamespaceOption) { o.Network = runtimeapi.NamespaceMode_NODE }))
	equal(t, "hostname of a host-network pod", h.run(t).sh(t, "hostname"), host)
}

func TestDNS(t *testing.T) {
	p := runPod(t, func(c *runtimeapi.PodSandboxConfig) {
		c.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"10.9.9.9", "fd00::9"}, Searches: []string{"a.example", "b.example"}, Options: []string{"ndots:5", "edns0"}}
	})
	got := p.run(t).sh(t, "cat /etc/resolv.conf")
	for _, want := range []string{"nameserver 10.9.9.9", "nameserver fd00::9", "search a.example b.example", "options ndots:5 edns0"} {
		contains(t, "/etc/resolv.conf", got, want)
	}
	// Without a configuration a pod resolves as the node does.
	host, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		t.Skip(err)
	}
	equal(t, "resolv.conf without DNS configuration", runPod(t).run(t).sh(t, "cat /etc/resolv.conf"), strings.TrimSpace(string(host)))
}

func TestSysctls(t *testing.T) {
	p := runPod(t, func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"net.ipv4.ip_local_port_range": "30000 40000", "kernel.shm_rmid_forced": "1", "kernel/msgmax": "4096"}
	})
	c := p.run(t)
	equal(t, "port range", strings.Join(strings.Fields(c.sh(t, "cat /proc/sys/net/ipv4/ip_local_port_range")), " "), "30000 40000")
	equal(t, "shm_rmid_forced", c.sh(t, "cat /proc/sys/kernel/shm_rmid_forced"), "1")
	equal(t, "msgmax", c.sh(t, "cat /proc/sys/kernel/msgmax"), "4096")
	for name, sysctls := range map[string]map[string]string{
		"of the node": {"vm.swappiness": "10"},
		"unknown":     {"net.ipv4.no_such_thing": "1"},
	} {
		cfg := podConfig(t, func(c *runtimeapi.PodSandboxConfig) { c.Linux.Sysctls = sysctls })
		r, err := shared.Runtime().RunPodSandbox(callCtx(t), &runtimeapi.RunPodSandboxRequest{Config: cfg})
		if err == nil {
			t.Errorf("a sysctl %s was accepted", name)
			(&pod{node: shared, id: r.PodSandboxId, config: cfg}).remove(t)
		}
	}
	// The host's sysctls stay the host's.
	h := podConfig(t, nsOptions(func(o *runtimeapi.NamespaceOption) { o.Network = runtimeapi.NamespaceMode_NODE }),
		func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{"net.ipv4.ip_local_port_range": "30000 40000"}
		})
	if r, err := shared.Runtime().RunPodSandbox(callCtx(t), &runtimeapi.RunPodSandboxRequest{Config: h}); err == nil {
		t.Error("a network sysctl of a host-network pod was accepted")
		(&pod{node: shared, id: r.PodSandboxId, config: h}).remove(t)
	}
}

func TestSharedMemoryOfPod(t *testing.T) {
	p := runPod(t)
	a, b := p.run(t), p.run(t)
	a.sh(t, "echo hello > /dev/shm/x")
	equal(t, "/dev/shm of the other container", b.sh(t, "cat /dev/shm/x"), "hello")
}

func TestRuntimeHandlers(t *testing.T) {
	s, err := shared.Runtime().Status(callCtx(t), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var known []string
	for _, h := range s.RuntimeHandlers {
		known = append(known, h.Name)
		if !h.Features.GetUserNamespaces() || !h.Features.GetRecursiveReadOnlyMounts() {
			t.Errorf("handler %q: features %v, want user namespaces and recursive read-only mounts", h.Name, h.Features)
		}
	}
	if len(known) < 2 {
		t.Errorf("handlers %q, want the default and a named one", known)
	}
	for _, h := range known {
		c := podConfig(t)
		r, err := shared.Runtime().RunPodSandbox(callCtx(t), &runtimeapi.RunPodSandboxRequest{Config: c, RuntimeHandler: h})
		if err != nil {
			t.Errorf("handler %q: %v", h, err)
			continue
		}
		p := &pod{node: shared, id: r.PodSandboxId, config: c}
		equal(t, "handler in status", p.status(t).RuntimeHandler, h)
		p.remove(t)
	}
	c := podConfig(t)
	_, err = shared.Runtime().RunPodSandbox(callCtx(t), &runtimeapi.RunPodSandboxRequest{Config: c, RuntimeHandler: "no-such-handler"})
	if err == nil {
		t.Error("an unknown runtime handler was accepted")
	}
}
