package spec

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"
)

// DeviceInjector puts CDI devices into a spec. [CDI] is the usual one.
type DeviceInjector interface {
	Inject(s *specs.Spec, devices ...string) error
}

// cdi injects the devices of the CRI field and of the annotations
// cdi.k8s.io/*, each once.
func (b *builder) cdi() error {
	var names []string
	for _, d := range b.in.Container.GetCDIDevices() {
		names = append(names, d.GetName())
	}
	_, more, err := cdi.ParseAnnotations(b.in.Container.GetAnnotations())
	if err != nil {
		return fmt.Errorf("annotations %s*: %w: %w", cdi.AnnotationPrefix, err, errdefs.ErrInvalidArgument)
	}
	names = union(union(nil, names), more)
	if len(names) == 0 {
		return nil
	}
	if b.in.CDI == nil {
		return lacking("CDI_devices", strings.Join(names, ", "), "CDI enabled")
	}
	if err := b.in.CDI.Inject(b.spec, names...); err != nil {
		return fmt.Errorf("inject CDI devices %s: %w", strings.Join(names, ", "), err)
	}
	return nil
}

// CDI injects devices from the CDI spec directories. The directories are read
// again for each container that asks for devices: no watcher, no goroutine.
type CDI struct{ dirs []string }

// NewCDI returns an injector on dirs; none: /etc/cdi and /var/run/cdi.
func NewCDI(dirs ...string) *CDI {
	if len(dirs) == 0 {
		dirs = []string{cdi.DefaultStaticDir, cdi.DefaultDynamicDir}
	}
	return &CDI{dirs: dirs}
}

// Inject applies the edits of all devices, or fails without any.
//
// Errors: NotFound for devices that no spec defines, InvalidArgument otherwise.
func (c *CDI) Inject(s *specs.Spec, devices ...string) error {
	cache, err := cdi.NewCache(cdi.WithSpecDirs(c.dirs...), cdi.WithAutoRefresh(false))
	if err != nil {
		return fmt.Errorf("read CDI specs in %v: %w", c.dirs, err)
	}
	unresolved, err := cache.InjectDevices(s, devices...)
	if len(unresolved) > 0 {
		return fmt.Errorf("no CDI spec in %v defines %s: %w", c.dirs, strings.Join(unresolved, ", "), errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}
