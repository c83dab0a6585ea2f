package spec

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// devices: what the config asks for, each with a cgroup rule; privileged
// containers get every device of the host and a rule that allows all.
func (b *builder) devices() error {
	linux := b.spec.Linux
	for i, d := range b.in.Container.GetDevices() {
		field := fmt.Sprintf("devices[%d]", i)
		if p := d.GetPermissions(); p == "" || strings.Trim(p, "rwm") != "" {
			return invalid(field+".permissions", p, "one or more of r, w, m")
		}
		if !path.IsAbs(d.GetHostPath()) {
			return invalid(field+".host_path", d.GetHostPath(), "an absolute path")
		}
		dst := d.GetContainerPath()
		if dst != "" && !path.IsAbs(dst) {
			return invalid(field+".container_path", dst, "an absolute path, or empty for the host's")
		}
		found, err := b.kernel.Devices(d.GetHostPath())
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s.host_path %q: %w: %w", field, d.GetHostPath(), err, errdefs.ErrNotFound)
		}
		if err != nil {
			return fmt.Errorf("%s.host_path %q: %w", field, d.GetHostPath(), err)
		}
		for _, dev := range found {
			dev.Path = devicePath(d.GetHostPath(), dst, dev.Path)
			b.own(&dev)
			linux.Devices = append(linux.Devices, dev)
			linux.Resources.Devices = append(linux.Resources.Devices, specs.LinuxDeviceCgroup{
				Allow: true, Type: dev.Type, Major: ptr(dev.Major), Minor: ptr(dev.Minor), Access: d.GetPermissions(),
			})
		}
	}
	if !b.sc.GetPrivileged() {
		return nil
	}
	linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	if b.in.Defaults.PrivilegedWithoutHostDevices {
		return nil
	}
	host, err := b.kernel.Devices("/dev")
	if err != nil {
		return fmt.Errorf("list host devices: %w", err)
	}
	have := map[string]bool{}
	for _, d := range linux.Devices {
		have[d.Path] = true
	}
	for _, d := range host {
		if !have[d.Path] {
			linux.Devices = append(linux.Devices, d)
		}
	}
	return nil
}

// devicePath places a device found at or below host into the container.
// host may be a link: a single device keeps the asked path.
func devicePath(host, container, found string) string {
	if container == "" {
		container = host
	}
	if rest, ok := strings.CutPrefix(found, host+"/"); ok {
		return path.Join(container, rest)
	}
	return container
}

func (b *builder) own(d *specs.LinuxDevice) {
	if !b.in.Defaults.DeviceOwnership {
		return
	}
	if uid := b.sc.GetRunAsUser().GetValue(); uid != 0 {
		d.UID = ptr(uint32(uid))
	}
	if gid := b.sc.GetRunAsGroup().GetValue(); gid != 0 {
		d.GID = ptr(uint32(gid))
	}
}
