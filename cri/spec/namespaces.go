package spec

import (
	"fmt"
	"math"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func (b *builder) namespaces() error {
	opts := b.sc.GetNamespaceOptions()
	ns := b.in.Namespaces
	out := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	join := func(t specs.LinuxNamespaceType, path string) {
		if path != "" {
			out = append(out, specs.LinuxNamespace{Type: t, Path: path})
		}
	}
	join(specs.NetworkNamespace, ns.Net)
	join(specs.IPCNamespace, ns.IPC)
	join(specs.UTSNamespace, ns.UTS)

	switch mode := opts.GetPid(); mode {
	case runtimeapi.NamespaceMode_CONTAINER:
		out = append(out, specs.LinuxNamespace{Type: specs.PIDNamespace})
	case runtimeapi.NamespaceMode_NODE:
	case runtimeapi.NamespaceMode_POD, runtimeapi.NamespaceMode_TARGET:
		if ns.PID == "" {
			return invalid("linux.security_context.namespace_options.pid", mode, "a mode whose PID namespace exists")
		}
		join(specs.PIDNamespace, ns.PID)
	default:
		return invalid("linux.security_context.namespace_options.pid", mode, "POD, CONTAINER, NODE or TARGET")
	}
	for field, mode := range map[string]runtimeapi.NamespaceMode{"network": opts.GetNetwork(), "ipc": opts.GetIpc()} {
		if mode != runtimeapi.NamespaceMode_POD && mode != runtimeapi.NamespaceMode_NODE {
			return invalid("linux.security_context.namespace_options."+field, mode, "POD or NODE")
		}
	}

	pod, err := UserNamespace(b.in.Sandbox.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions())
	if err != nil {
		return err
	}
	if o := opts.GetUsernsOptions(); o != nil || pod != nil {
		own, err := UserNamespace(o)
		if err != nil {
			return err
		}
		if !own.equal(pod) {
			return invalid("linux.security_context.namespace_options.userns_options", o, "what the sandbox has (%v)",
				b.in.Sandbox.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions())
		}
	}
	if pod != nil {
		if ns.User == "" {
			return invalid("linux.security_context.namespace_options.userns_options.mode", "POD", "NODE: the sandbox has no user namespace")
		}
		// A path only: libcontainer reads the mappings from it, and warns when
		// it is given both.
		join(specs.UserNamespace, ns.User)
	}
	// As containerd does: a cgroup namespace hides the host's tree on v2; on v1
	// and for privileged containers none, for compatibility.
	if b.in.Host.CgroupUnified && !b.sc.GetPrivileged() {
		out = append(out, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	b.spec.Linux.Namespaces = out
	return nil
}

// IDMaps are the mappings of a pod's user namespace.
type IDMaps struct {
	UIDs, GIDs []specs.LinuxIDMapping
}

func (m *IDMaps) equal(o *IDMaps) bool {
	if m == nil || o == nil {
		return m == o
	}
	return m.UIDs[0] == o.UIDs[0] && m.GIDs[0] == o.GIDs[0]
}

// UserNamespace checks the user namespace that a pod asks for; nil without an
// error is the host's user namespace.
//
// Errors: InvalidArgument for a mode other than POD and NODE, for more or less
// than one mapping of each kind (that is what kubelet sends, and what idmapped
// overlays can be made from), for one that does not map id 0, is empty or
// overflows.
func UserNamespace(o *runtimeapi.UserNamespace) (*IDMaps, error) {
	const field = "linux.security_context.namespace_options.userns_options"
	switch o.GetMode() {
	case runtimeapi.NamespaceMode_NODE:
		if n := len(o.GetUids()) + len(o.GetGids()); n > 0 {
			return nil, invalid(field+".mode", o.GetMode(), "POD with mappings (there are %d), or NODE without", n)
		}
		return nil, nil
	case runtimeapi.NamespaceMode_POD:
		if o == nil {
			return nil, nil // an old kubelet: no user namespaces
		}
	default:
		return nil, invalid(field+".mode", o.GetMode(), "POD or NODE")
	}
	uids, err := podMapping(field+".uids", o.GetUids())
	if err != nil {
		return nil, err
	}
	gids, err := podMapping(field+".gids", o.GetGids())
	if err != nil {
		return nil, err
	}
	return &IDMaps{UIDs: uids, GIDs: gids}, nil
}

func podMapping(field string, in []*runtimeapi.IDMapping) ([]specs.LinuxIDMapping, error) {
	if len(in) != 1 || in[0] == nil {
		return nil, invalid(field, fmt.Sprintf("%d mappings", len(in)), "exactly one mapping")
	}
	out, err := idMappings(field, in)
	if err != nil {
		return nil, err
	}
	if out[0].ContainerID != 0 {
		return nil, invalid(field+".container_id", out[0].ContainerID, "0: the container's root must be mapped")
	}
	return out, nil
}

// idMappings converts mappings of the CRI; each must have a length and not
// wrap around.
func idMappings(field string, in []*runtimeapi.IDMapping) ([]specs.LinuxIDMapping, error) {
	var out []specs.LinuxIDMapping
	for _, m := range in {
		if m.GetLength() == 0 {
			return nil, invalid(field+".length", 0, "at least 1")
		}
		for _, start := range []uint32{m.GetHostId(), m.GetContainerId()} {
			if uint64(start)+uint64(m.GetLength()) > math.MaxUint32 {
				return nil, invalid(field, m, "ranges below %d", uint32(math.MaxUint32))
			}
		}
		out = append(out, specs.LinuxIDMapping{HostID: m.GetHostId(), ContainerID: m.GetContainerId(), Size: m.GetLength()})
	}
	return out, nil
}
