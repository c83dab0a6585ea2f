package spec

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// DefaultCapabilities are those of an ordinary container.
// Source: containerd pkg/oci/spec.go, defaultUnixCaps.
func DefaultCapabilities() []string {
	return []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD",
		"CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP",
		"CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
	}
}

// capabilityNames in kernel order: the index is the bit.
// Source: include/uapi/linux/capability.h of Linux 6.18.
func capabilityNames() []string {
	return strings.Fields(`CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID
		CAP_KILL CAP_SETGID CAP_SETUID CAP_SETPCAP CAP_LINUX_IMMUTABLE CAP_NET_BIND_SERVICE
		CAP_NET_BROADCAST CAP_NET_ADMIN CAP_NET_RAW CAP_IPC_LOCK CAP_IPC_OWNER CAP_SYS_MODULE
		CAP_SYS_RAWIO CAP_SYS_CHROOT CAP_SYS_PTRACE CAP_SYS_PACCT CAP_SYS_ADMIN CAP_SYS_BOOT
		CAP_SYS_NICE CAP_SYS_RESOURCE CAP_SYS_TIME CAP_SYS_TTY_CONFIG CAP_MKNOD CAP_LEASE
		CAP_AUDIT_WRITE CAP_AUDIT_CONTROL CAP_SETFCAP CAP_MAC_OVERRIDE CAP_MAC_ADMIN CAP_SYSLOG
		CAP_WAKE_ALARM CAP_BLOCK_SUSPEND CAP_AUDIT_READ CAP_PERFMON CAP_BPF CAP_CHECKPOINT_RESTORE`)
}

// capabilities: ALL first (add, then drop), then the single ones (add, then
// drop), so that {add: ALL, drop: CHOWN} is everything but CHOWN and
// {drop: ALL, add: CHOWN} is CHOWN alone. An ambient capability is put into
// every set: the kernel wants it permitted and inheritable.
func (b *builder) capabilities() error {
	if b.sc.GetPrivileged() {
		all := slices.Clone(b.in.Host.Capabilities)
		b.spec.Process.Capabilities = &specs.LinuxCapabilities{
			Bounding: all, Effective: slices.Clone(all), Permitted: slices.Clone(all),
		}
		return nil
	}
	caps := slices.Clone(b.in.Defaults.Capabilities)
	if caps == nil {
		caps = DefaultCapabilities()
	}
	ask := b.sc.GetCapabilities()
	add, addAll, err := b.capSet("add_capabilities", ask.GetAddCapabilities(), true)
	if err != nil {
		return err
	}
	drop, dropAll, err := b.capSet("drop_capabilities", ask.GetDropCapabilities(), false)
	if err != nil {
		return err
	}
	ambient, ambientAll, err := b.capSet("add_ambient_capabilities", ask.GetAddAmbientCapabilities(), true)
	if err != nil {
		return err
	}
	if addAll {
		caps = slices.Clone(b.in.Host.Capabilities)
	}
	if ambientAll {
		ambient = slices.Clone(b.in.Host.Capabilities)
	}
	if dropAll {
		caps = nil
	}
	caps = union(union(caps, add), ambient)
	isDropped := func(c string) bool { return slices.Contains(drop, c) }
	caps = slices.DeleteFunc(caps, isDropped)
	ambient = slices.DeleteFunc(ambient, isDropped)
	b.spec.Process.Capabilities = &specs.LinuxCapabilities{
		Bounding:    caps,
		Effective:   slices.Clone(caps),
		Permitted:   slices.Clone(caps),
		Inheritable: slices.Clone(ambient),
		Ambient:     ambient,
	}
	return nil
}

// capSet returns the CAP_ names of asked without ALL, and whether ALL was asked.
// With need, a capability that this daemon does not hold itself is refused: the
// kernel would refuse it when the container starts.
func (b *builder) capSet(field string, asked []string, need bool) (caps []string, all bool, err error) {
	known := capabilityNames()
	for _, c := range asked {
		name := strings.ToUpper(c)
		if name == "ALL" {
			all = true
			continue
		}
		if !strings.HasPrefix(name, "CAP_") {
			name = "CAP_" + name
		}
		if !slices.Contains(known, name) {
			return nil, false, invalid("linux.security_context.capabilities."+field, c, "ALL or one of %s",
				strings.ReplaceAll(strings.Join(known, " "), "CAP_", ""))
		}
		if need && !slices.Contains(b.in.Host.Capabilities, name) {
			return nil, false, fmt.Errorf("linux.security_context.capabilities.%s is %q: this daemon does not hold it: %w",
				field, c, errdefs.ErrFailedPrecondition)
		}
		caps = union(caps, []string{name})
	}
	return caps, all, nil
}

// union appends to a what it lacks of more.
func union(a, more []string) []string {
	for _, m := range more {
		if !slices.Contains(a, m) {
			a = append(a, m)
		}
	}
	return a
}
