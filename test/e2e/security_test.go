package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type secCtx = runtimeapi.LinuxContainerSecurityContext

func int64p(v int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: v} }

// procStatus is a field of /proc/self/status in the container.
func procStatus(t testing.TB, c *container, field string) string {
	t.Helper()
	return strings.Join(strings.Fields(c.sh(t, "grep '^"+field+":' /proc/self/status | cut -d: -f2")), " ")
}

func capSet(t testing.TB, c *container, field string) uint64 {
	t.Helper()
	v, err := strconv.ParseUint(procStatus(t, c, field), 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// Capability bits, from linux/capability.h.
const (
	capChown    = 1 << 0
	capNetRaw   = 1 << 13
	capNetAdmin = 1 << 12
	capSysAdmin = 1 << 21
	capNetBind  = 1 << 10
)

func TestCapabilities(t *testing.T) {
	p := runPod(t)
	caps := func(f func(*runtimeapi.Capability)) containerOption {
		return security(func(s *secCtx) { s.Capabilities = &runtimeapi.Capability{}; f(s.Capabilities) })
	}
	def := capSet(t, p.run(t), "CapEff")
	if def&capChown == 0 || def&(capNetAdmin|capSysAdmin) != 0 {
		t.Errorf("default capabilities %#x", def)
	}
	add := capSet(t, p.run(t, caps(func(c *runtimeapi.Capability) { c.AddCapabilities = []string{"NET_ADMIN", "CAP_SYS_ADMIN"} })), "CapEff")
	equal(t, "added", add, def|capNetAdmin|capSysAdmin)
	drop := capSet(t, p.run(t, caps(func(c *runtimeapi.Capability) { c.DropCapabilities = []string{"NET_RAW", "chown"} })), "CapEff")
	equal(t, "dropped", drop, def&^(capNetRaw|capChown))
	none := p.run(t, caps(func(c *runtimeapi.Capability) { c.DropCapabilities = []string{"ALL"} }))
	equal(t, "all dropped, effective", capSet(t, none, "CapEff"), 0)
	equal(t, "all dropped, bounding", capSet(t, none, "CapBnd"), 0)
	all := capSet(t, p.run(t, caps(func(c *runtimeapi.Capability) { c.AddCapabilities = []string{"ALL"} })), "CapEff")
	if all&(capNetAdmin|capSysAdmin) != capNetAdmin|capSysAdmin {
		t.Errorf("all added: %#x", all)
	}
	but := capSet(t, p.run(t, caps(func(c *runtimeapi.Capability) {
		c.DropCapabilities, c.AddCapabilities = []string{"ALL"}, []string{"NET_BIND_SERVICE"}
	})), "CapEff")
	equal(t, "drop ALL, add one", but, capNetBind)
	ambient := p.run(t, caps(func(c *runtimeapi.Capability) {
		c.AddAmbientCapabilities = []string{"NET_BIND_SERVICE"}
	}), security(func(s *secCtx) { s.RunAsUser = int64p(1000) }))
	equal(t, "ambient", capSet(t, ambient, "CapAmb"), capNetBind)
	equal(t, "ambient is effective for a user", capSet(t, ambient, "CapEff"), capNetBind)
	user := p.run(t, security(func(s *secCtx) { s.RunAsUser = int64p(1000) }))
	equal(t, "effective of a user", capSet(t, user, "CapEff"), 0)
	equal(t, "inheritable", capSet(t, user, "CapInh"), 0)
	if _, err := p.tryCreate(callCtx(t), caps(func(c *runtimeapi.Capability) { c.AddCapabilities = []string{"FLY"} })); err == nil {
		c, err := p.tryCreate(callCtx(t), caps(func(c *runtimeapi.Capability) { c.AddCapabilities = []string{"FLY"} }))
		if err == nil {
			err = c.tryStart(callCtx(t))
		}
		if err == nil {
			t.Error("an unknown capability was accepted")
		}
	}
}

func TestUsers(t *testing.T) {
	p := runPod(t)
	strict, merge := runtimeapi.SupplementalGroupsPolicy_Strict, runtimeapi.SupplementalGroupsPolicy_Merge
	for _, c := range []struct {
		name   string
		image  string
		sc     func(*secCtx)
		id     string // id -u:id -g
		groups string // id -G
	}{
		{"root by default", busybox, func(*secCtx) {}, "0:0", "0"},
		{"uid", busybox, func(s *secCtx) { s.RunAsUser = int64p(33) }, "33:34", "34"},
		{"uid without an entry", busybox, func(s *secCtx) { s.RunAsUser = int64p(4242) }, "4242:0", "0"},
		{"uid and gid", busybox, func(s *secCtx) { s.RunAsUser, s.RunAsGroup = int64p(33), int64p(77) }, "33:77", "77"},
		{"name", busybox, func(s *secCtx) { s.RunAsUsername = "web" }, "33:34", "34"},
		{"name and gid", busybox, func(s *secCtx) { s.RunAsUsername, s.RunAsGroup = "web", int64p(78) }, "33:78", "78"},
		{"image's uid", userUID, func(*secCtx) {}, "1002:0", "0"},
		{"image's name", userName, func(*secCtx) {}, "33:34", "34"},
		{"supplemental", busybox, func(s *secCtx) { s.RunAsUser, s.SupplementalGroups = int64p(33), []int64{5, 6} }, "33:34", "34 5 6"},
		{"groups of the image, merge", grouped, func(s *secCtx) { s.SupplementalGroups, s.SupplementalGroupsPolicy = []int64{9}, merge }, "1000:1000", "1000 9 50000"},
		{"groups of the image, strict", grouped, func(s *secCtx) { s.SupplementalGroups, s.SupplementalGroupsPolicy = []int64{9}, strict }, "1000:1000", "1000 9"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctr := p.run(t, image(c.image), security(c.sc))
			equal(t, "uid:gid", ctr.sh(t, "echo $(id -u):$(id -g)"), c.id)
			want := map[string]bool{}
			for _, g := range strings.Fields(c.groups) {
				want[g] = true
			}
			got := map[string]bool{}
			for _, g := range strings.Fields(ctr.sh(t, "id -G")) {
				got[g] = true
			}
			equal(t, "groups", fmt.Sprint(got), fmt.Sprint(want))
			u := ctr.status(t).GetUser().GetLinux()
			equal(t, "user in status", fmt.Sprintf("%d:%d", u.GetUid(), u.GetGid()), c.id)
			for _, g := range u.GetSupplementalGroups() {
				if !want[fmt.Sprint(g)] {
					t.Errorf("status reports group %d, not one of %s", g, c.groups)
				}
			}
			equal(t, "groups in status", len(u.GetSupplementalGroups()), len(want))
		})
	}
	for name, sc := range map[string]func(*secCtx){
		"group without user": func(s *secCtx) { s.RunAsGroup = int64p(1) },
		"unknown name":       func(s *secCtx) { s.RunAsUsername = "nobody-here" },
		"negative uid":       func(s *secCtx) { s.RunAsUser = int64p(-1) },
	} {
		if c, err := p.tryCreate(callCtx(t), security(sc)); err == nil {
			if err := c.tryStart(callCtx(t)); err == nil {
				t.Errorf("%s: accepted", name)
			}
		}
	}
}

func TestNoNewPrivs(t *testing.T) {
	p := runPod(t)
	for _, on := range []bool{false, true} {
		c := p.run(t, image(setuid), security(func(s *secCtx) { s.RunAsUser, s.NoNewPrivs = int64p(1000), on }))
		equal(t, "NoNewPrivs", procStatus(t, c, "NoNewPrivs"), map[bool]string{false: "0", true: "1"}[on])
		got := c.sh(t, "/bin/suid id")
		if root := strings.Contains(got, `"euid":0`); root == on {
			t.Errorf("no_new_privs %v: a setuid-root program says %s", on, got)
		}
	}
}

func TestReadonlyRootfs(t *testing.T) {
	p := runPod(t)
	c := p.run(t, security(func(s *secCtx) { s.ReadonlyRootfs = true }))
	contains(t, "write to a read-only root", c.shFails(t, "touch /x"), "Read-only")
	c.sh(t, "echo x > /dev/shm/x && echo > /dev/null")
	p.run(t).sh(t, "touch /x")
}

func TestMaskedAndReadonlyPaths(t *testing.T) {
	p := runPod(t)
	c := p.run(t, security(func(s *secCtx) {
		s.MaskedPaths = []string{"/etc/passwd", "/usr", "/not/there", "/proc/timer_list"}
		s.ReadonlyPaths = []string{"/tmp", "/not/there/either", "/proc/sys"}
	}))
	equal(t, "masked file", c.sh(t, "cat /etc/passwd"), "")
	equal(t, "masked directory", c.sh(t, "ls -A /usr"), "")
	contains(t, "read-only path", c.shFails(t, "touch /tmp/x"), "Read-only")
	contains(t, "read-only /proc/sys", c.shFails(t, "echo x > /proc/sys/kernel/domainname"), "Read-only")
}

func TestPrivileged(t *testing.T) {
	p := runPod(t, func(c *runtimeapi.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	c := p.run(t, security(func(s *secCtx) {
		s.Privileged = true
		s.MaskedPaths = []string{"/proc/timer_list"} // ignored, as kubelet and others expect
	}))
	equal(t, "seccomp", procStatus(t, c, "Seccomp"), "0")
	if caps := capSet(t, c, "CapEff"); caps&capSysAdmin == 0 {
		t.Errorf("capabilities %#x", caps)
	}
	c.sh(t, "mkdir -p /m && mount -t tmpfs none /m && umount /m")
	c.sh(t, "test -e /dev/kmsg -o -e /dev/loop0 -o -e /dev/vda")
	c.sh(t, "echo 1 > /proc/sys/kernel/shm_rmid_forced; echo 0 > /proc/sys/kernel/shm_rmid_forced")
	c.sh(t, "mkdir /sys/fs/cgroup/cpu/x 2>/dev/null && rm -r /sys/fs/cgroup/cpu/x || mkdir /sys/fs/cgroup/x && rmdir /sys/fs/cgroup/x || true")
	ordinary := runPod(t)
	if ctr, err := ordinary.tryCreate(callCtx(t), security(func(s *secCtx) { s.Privileged = true })); err == nil {
		if err := ctr.tryStart(callCtx(t)); err == nil {
			t.Error("a privileged container was accepted in an unprivileged sandbox")
		}
	}
	plain := ordinary.run(t, security(func(s *secCtx) { s.ReadonlyPaths = []string{"/proc/sys"} }))
	plain.shFails(t, "mkdir -p /m && mount -t tmpfs none /m")
	plain.shFails(t, "echo 1 > /proc/sys/kernel/shm_rmid_forced")
}

const denyChmod = `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["chmod","fchmod","fchmodat","fchmodat2"],"action":"SCMP_ACT_ERRNO"}]}`

func TestSeccomp(t *testing.T) {
	profile := filepath.Join(workDir, "deny-chmod.json")
	if err := os.WriteFile(profile, []byte(denyChmod), 0o644); err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(workDir, "broken.json")
	if err := os.WriteFile(broken, []byte(`{"defaultAction":`), 0o644); err != nil {
		t.Fatal(err)
	}
	p := runPod(t)
	sec := func(kind runtimeapi.SecurityProfile_ProfileType, ref string) containerOption {
		return security(func(s *secCtx) { s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: kind, LocalhostRef: ref} })
	}
	const (
		Default    = runtimeapi.SecurityProfile_RuntimeDefault
		Localhost  = runtimeapi.SecurityProfile_Localhost
		Unconfined = runtimeapi.SecurityProfile_Unconfined
	)
	equal(t, "unset, with unsetSeccompProfile: RuntimeDefault", procStatus(t, p.run(t), "Seccomp"), "2")
	equal(t, "RuntimeDefault", procStatus(t, p.run(t, sec(Default, "")), "Seccomp"), "2")
	equal(t, "Unconfined", procStatus(t, p.run(t, sec(Unconfined, "")), "Seccomp"), "0")
	local := p.run(t, sec(Localhost, profile))
	contains(t, "denied call", local.shFails(t, "chmod 700 /tmp"), "not permitted")
	for name, path := range map[string]string{"missing": "/no/such/profile", "broken": broken, "relative": "deny-chmod.json", "empty": ""} {
		c, err := p.tryCreate(callCtx(t), sec(Localhost, path))
		if err == nil {
			err = c.tryStart(callCtx(t))
		}
		if err == nil {
			t.Errorf("a %s profile was accepted", name)
		}
	}
}
