package spec

import (
	"encoding/json"
	"fmt"
	"path"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	selinux "github.com/opencontainers/selinux/go-selinux"
	"github.com/opencontainers/selinux/go-selinux/label"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// securityProfile is the new field, or what the deprecated path says; nil when
// neither is set.
func securityProfile(field string, p *runtimeapi.SecurityProfile, legacy string) (*runtimeapi.SecurityProfile, error) {
	if p != nil {
		if p.GetProfileType() != runtimeapi.SecurityProfile_Localhost && p.GetLocalhostRef() != "" {
			return nil, invalid(field+".localhost_ref", p.GetLocalhostRef(), "empty unless profile_type is Localhost")
		}
		if _, ok := runtimeapi.SecurityProfile_ProfileType_name[int32(p.GetProfileType())]; !ok {
			return nil, invalid(field+".profile_type", p.GetProfileType(), "RuntimeDefault, Unconfined or Localhost")
		}
		return p, nil
	}
	switch legacy {
	case "":
		return nil, nil
	case "runtime/default", "docker/default":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, nil
	case "unconfined":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, nil
	}
	ref, ok := strings.CutPrefix(legacy, "localhost/")
	if !ok {
		return nil, invalid(field+"_profile", legacy, "runtime/default, unconfined or localhost/<profile>")
	}
	return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: ref}, nil
}

func (b *builder) seccomp() error {
	const field = "linux.security_context.seccomp"
	//lint:ignore SA1019 old kubelets send the path
	p, err := securityProfile(field, b.sc.GetSeccomp(), b.sc.GetSeccompProfilePath())
	if err != nil || b.sc.GetPrivileged() {
		return err
	}
	if p == nil {
		if b.in.Defaults.SeccompUnset != SeccompUnsetRuntimeDefault || !b.in.Host.Seccomp {
			return nil
		}
		p = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	}
	if p.GetProfileType() == runtimeapi.SecurityProfile_Unconfined {
		return nil
	}
	if !b.in.Host.Seccomp {
		return lacking(field+".profile_type", p.GetProfileType(), "seccomp")
	}
	if p.GetProfileType() == runtimeapi.SecurityProfile_RuntimeDefault {
		b.spec.Linux.Seccomp = DefaultSeccomp(b.spec.Process.Capabilities.Bounding)
		return nil
	}
	b.spec.Linux.Seccomp, err = b.localSeccomp(field, strings.TrimPrefix(p.GetLocalhostRef(), "localhost/"))
	return err
}

func (b *builder) localSeccomp(field, file string) (*specs.LinuxSeccomp, error) {
	if !path.IsAbs(file) {
		return nil, invalid(field+".localhost_ref", file, "an absolute path of a seccomp profile")
	}
	data, err := b.kernel.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("%s.localhost_ref: read profile %q: %w: %w", field, file, err, errdefs.ErrNotFound)
	}
	prof := &specs.LinuxSeccomp{}
	if err := json.Unmarshal(data, prof); err != nil {
		return nil, fmt.Errorf("%s.localhost_ref: profile %q is not a seccomp profile of the OCI runtime spec: %w: %w", field, file, err, errdefs.ErrInvalidArgument)
	}
	if prof.DefaultAction == "" {
		return nil, invalid(field+".localhost_ref", file, "a profile with a defaultAction")
	}
	return prof, nil
}

func (b *builder) apparmor() error {
	const field = "linux.security_context.apparmor"
	//lint:ignore SA1019 old kubelets send the path
	p, err := securityProfile(field, b.sc.GetApparmor(), b.sc.GetApparmorProfile())
	if err != nil {
		return err
	}
	if !b.in.Host.AppArmor {
		if p != nil && p.GetProfileType() != runtimeapi.SecurityProfile_Unconfined {
			return lacking(field+".profile_type", p.GetProfileType(), "AppArmor")
		}
		return nil
	}
	switch p.GetProfileType() { // nil is RuntimeDefault
	case runtimeapi.SecurityProfile_Unconfined:
		return nil
	case runtimeapi.SecurityProfile_RuntimeDefault:
		if b.sc.GetPrivileged() {
			return nil
		}
		if b.in.Host.AppArmorDefault == "" && p != nil {
			return lacking(field+".profile_type", p.GetProfileType(), "loaded default AppArmor profile (is apparmor_parser installed?)")
		}
		b.spec.Process.ApparmorProfile = b.in.Host.AppArmorDefault
		return nil
	}
	name := strings.TrimPrefix(p.GetLocalhostRef(), "localhost/")
	loaded, err := b.kernel.AppArmorProfiles()
	if err != nil {
		return fmt.Errorf("%s: list AppArmor profiles: %w", field, err)
	}
	if name == "" || !loaded[name] {
		return fmt.Errorf("%s.localhost_ref: AppArmor profile %q is not loaded: %w", field, name, errdefs.ErrNotFound)
	}
	b.spec.Process.ApparmorProfile = name
	return nil
}

// selinuxLevel is an MLS/MCS range such as s0:c1,c2 or s0-s0:c0.c1023.
const selinuxLevel = `^s\d(-s\d)??(:c\d{1,4}(\.c\d{1,4})?(,c\d{1,4}(\.c\d{1,4})?)*)?$`

// selinux sets the labels; on a host without SELinux the options are checked
// and otherwise ignored, as every runtime does.
//
// With SELinux, a label without categories reserves a pair of categories in
// the selinux library: give it back with [ReleaseLabel].
func (b *builder) selinux() error {
	opts, err := SELinuxOptions("linux.security_context.selinux_options", b.sc.GetSelinuxOptions())
	if err != nil || !b.in.Host.SELinux {
		return err
	}
	if len(opts) == 0 {
		if opts, err = selinux.DupSecOpt(b.in.SandboxLabel); err != nil {
			return fmt.Errorf("SELinux label of the sandbox %q: %w", b.in.SandboxLabel, err)
		}
	}
	process, mount, err := label.InitLabels(opts)
	if err != nil {
		return fmt.Errorf("linux.security_context.selinux_options %v: %w: %w", opts, err, errdefs.ErrInvalidArgument)
	}
	b.spec.Linux.MountLabel = mount
	if b.sc.GetPrivileged() {
		selinux.ReleaseLabel(process)
		return nil
	}
	b.spec.Process.SelinuxLabel = process
	return nil
}

// SandboxLabel reserves the SELinux process label of a pod, for
// [Input.SandboxLabel] of its containers: they share files, so they must share
// categories. "" on a host without SELinux and for privileged pods. Keep it in
// the sandbox's record and give it back with [ReleaseSandboxLabel].
//
// Errors: InvalidArgument for options that make no label.
func SandboxLabel(c *runtimeapi.PodSandboxConfig, host HostInfo) (string, error) {
	sc := c.GetLinux().GetSecurityContext()
	opts, err := SELinuxOptions("linux.security_context.selinux_options", sc.GetSelinuxOptions())
	if err != nil || !host.SELinux || sc.GetPrivileged() {
		return "", err
	}
	process, _, err := label.InitLabels(opts)
	if err != nil {
		return "", fmt.Errorf("linux.security_context.selinux_options %v: %w: %w", opts, err, errdefs.ErrInvalidArgument)
	}
	return process, nil
}

// ReleaseSandboxLabel gives a label's categories back; "" and a second call do
// nothing.
func ReleaseSandboxLabel(processLabel string) {
	if processLabel != "" {
		selinux.ReleaseLabel(processLabel)
	}
}

// SELinuxOptions checks o and returns it as options of the selinux library.
//
// Errors: InvalidArgument for a malformed level.
func SELinuxOptions(field string, o *runtimeapi.SELinuxOption) ([]string, error) {
	if l := o.GetLevel(); l != "" && !regexp.MustCompile(selinuxLevel).MatchString(l) {
		return nil, invalid(field+".level", l, "a level such as s0:c123,c456")
	}
	var out []string
	for _, kv := range [][2]string{{"user", o.GetUser()}, {"role", o.GetRole()}, {"type", o.GetType()}, {"level", o.GetLevel()}} {
		if kv[1] != "" {
			out = append(out, kv[0]+":"+kv[1])
		}
	}
	return out, nil
}

// ReleaseLabel gives back what building a spec reserved for SELinux. It is
// safe for specs without a label and may be called twice.
func ReleaseLabel(s *specs.Spec) {
	if s != nil && s.Process != nil && s.Process.SelinuxLabel != "" {
		selinux.ReleaseLabel(s.Process.SelinuxLabel)
	}
}
