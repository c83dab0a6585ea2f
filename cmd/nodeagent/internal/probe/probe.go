// Package probe finds out what of the kernel and the host a node needs is
// there, by trying it, not by comparing versions.
//
// It must leave the machine as it was: mounts are made in a mount namespace of
// their own, links and nftables tables in a network namespace of their own,
// and both go with the thread they were made on. It may load kernel modules,
// as the daemon's own first use would.
//
// Caller: the commands of cmd/nodeagent. No goroutine outlives a call; no
// locks. Any kernel: a probe that cannot run says so in its Detail.
package probe

import (
	"fmt"
	"runtime"
)

// Result is the outcome of one probe.
type Result struct {
	Group     string `json:"group"` // kernel, cgroups, ...
	Name      string `json:"name"`  // within the group
	Found     bool   `json:"found"` // all of it is there
	Essential bool   `json:"essential"`
	Detail    string `json:"detail"` // what was found, or why not
	// Lost says what does not work without it; empty when Found.
	Lost string `json:"lost,omitempty"`
}

// Options are the places and the process to probe from.
type Options struct {
	// Dir is a directory on the file system that will hold images and
	// writable layers, since overlayfs depends on it. It must exist.
	Dir string
	// HoldUserNamespace starts a process in a user namespace of its own, which
	// maps ids from 100000 up, and returns the path of the namespace.
	HoldUserNamespace func() (path string, release func(), err error)
}

// probe is a row of the table: what to try and what its absence costs.
type probe struct {
	group, name string
	essential   bool
	lost        string
	try         func(Options) (detail string, err error)
}

// Run tries everything, in the order of a reader's interest.
func Run(o Options) []Result {
	var results []Result
	for _, p := range table() {
		r := Result{Group: p.group, Name: p.name, Essential: p.essential}
		detail, err := p.try(o)
		r.Found, r.Detail = err == nil, detail
		if err != nil {
			r.Detail, r.Lost = err.Error(), p.lost
		}
		results = append(results, r)
	}
	return results
}

// Complete reports whether nothing essential is missing.
func Complete(results []Result) bool {
	for _, r := range results {
		if r.Essential && !r.Found {
			return false
		}
	}
	return true
}

func table() []probe {
	return []probe{
		{"kernel", "version", true, "the daemon is not tested on older kernels", kernelVersion},
		{"kernel", "pidfd", true, "processes could be mistaken for others with the same id", pidfd},
		{"kernel", "pidfd exit info", false, "exit codes of containers are unknown if the daemon and both shim processes die together", pidfdExitInfo},
		{"kernel", "user namespaces", false, "pods with hostUsers: false are refused", userNamespaces},
		{"kernel", "pressure (PSI)", false, "no pressure figures in stats, no pressure events", pressure},
		{"kernel", "systemd", false, "the systemd cgroup driver, service supervision and descriptor store", systemd},

		{"cgroups", "hierarchy", true, "containers cannot be limited, counted or killed as a whole", cgroupMode},
		{"cgroups", "version 2", false, "memory.high, io pressure, unified resources, killing a group at once", cgroup2},
		{"cgroups", "cpu, memory, pids", true, "limits of pods and containers", requiredControllers},
		{"cgroups", "cpuset, io, hugetlb", false, "pinning to CPUs, disk weights, huge page limits (those of the missing ones)", optionalControllers},

		{"files", "root directory", true, "programs that exec starts in a container would see the host's files", ownRoot},
		{"files", "overlayfs", true, "images cannot be used as root file systems", overlay},
		{"files", "overlayfs volatile", false, "unmounting a container syncs its writable layer to disk", overlayVolatile},
		{"files", "overlayfs on idmapped layers", false, "pods with user namespaces get copied layers or are refused", overlayIDMap},
		{"files", "recursive read-only mounts", false, "recursiveReadOnly: Enabled is refused, IfPossible ignored", recursiveReadOnly},

		{"network", "network namespaces, veth", true, "the built-in network; only host-network pods run", veth},
		{"network", "nftables with NAT", true, "host ports and masquerade of the built-in network", nftablesNAT},
		{"network", "IPv4 and IPv6", false, "addresses of the missing family", families},

		{"eBPF", "programs", false, "network policy, devices of containers on cgroup v2", bpfPrograms},
		{"eBPF", "tcx", false, "network policy attaches through older tc filters", tcx},
		{"eBPF", "BTF", false, "programs that adapt to the kernel cannot be loaded", btf},
		{"eBPF", "network policy", false, "network policy is not enforced", networkPolicy},
		{"eBPF", "bpffs", false, "policy is not enforced while the daemon restarts", bpffs},

		{"security", "seccomp", true, "system call filters of containers", seccomp},
		{"security", "AppArmor", false, "AppArmor profiles of pods are refused", appArmor},
		{"security", "SELinux", false, "SELinux labels of pods are ignored", seLinux},
		{"security", "capabilities", true, "the daemon cannot make containers", requiredCapabilities},
		{"security", "CAP_SYS_RESOURCE", false, "oom_score_adj cannot be lowered, hard limits cannot be raised", sysResource},
		{"security", "other capabilities", false, "containers cannot be given the missing ones, privileged ones included", otherCapabilities},
	}
}

// onThread runs f on a thread that ends afterwards, so that whatever f
// unshares goes with it.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		done <- f()
	}()
	return <-done
}

// errMissing is a plain "not there" with words of its own.
func errMissing(format string, args ...any) error { return fmt.Errorf(format, args...) }
