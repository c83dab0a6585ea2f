package cgroups

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
	ocicgroups "github.com/opencontainers/cgroups"
	ocimanager "github.com/opencontainers/cgroups/manager"
	ocisystemd "github.com/opencontainers/cgroups/systemd"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

var errNoHierarchy = fmt.Errorf("no cgroup hierarchy is mounted: %w", errdefs.ErrNotFound)

// Config of a Manager. The zero value detects the host and picks its driver.
type Config struct {
	Host   Host   // zero: Detect
	Driver Driver // "": Host.PreferredDriver
	Name   string // of the group that holds pods without a parent; "": "nodeagent"
	Log    *slog.Logger
}

// Manager makes and removes the groups of pods and resolves paths.
type Manager struct {
	host   Host
	driver Driver
	name   string
	log    *slog.Logger
	pages  []string // huge page sizes of the host, "2MB"

	watcher   watcher
	expecting expecting

	mu    sync.Mutex
	users map[string]int // pods of this process that use a group, by its path
}

// New returns a Manager; it touches nothing yet.
//
// Errors: InvalidArgument for a driver that does not exist or a bad name,
// FailedPrecondition for the systemd driver without systemd.
func New(cfg Config) (*Manager, error) {
	if cfg.Host.Mode == Unknown {
		h, err := Detect()
		if err != nil {
			return nil, err
		}
		cfg.Host = h
	}
	if cfg.Driver == "" {
		cfg.Driver = cfg.Host.PreferredDriver()
	}
	if cfg.Name == "" {
		cfg.Name = "nodeagent"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	var errs []error
	switch {
	case cfg.Driver != CgroupFS && cfg.Driver != Systemd:
		errs = append(errs, fmt.Errorf("cgroup driver %q: want %q or %q: %w", cfg.Driver, CgroupFS, Systemd, errdefs.ErrInvalidArgument))
	case cfg.Driver == Systemd && !cfg.Host.SystemdRunning:
		errs = append(errs, fmt.Errorf("cgroup driver %q: systemd does not run on this host: %w", cfg.Driver, errdefs.ErrFailedPrecondition))
	}
	if len(cfg.Name) > 200 || strings.ContainsAny(cfg.Name, "/-:") || strings.HasPrefix(cfg.Name, ".") {
		errs = append(errs, fmt.Errorf("cgroup name %q: may not have more than 200 bytes, hold '/', '-' or ':' nor start with a dot: %w", cfg.Name, errdefs.ErrInvalidArgument))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return &Manager{
		host: cfg.Host, driver: cfg.Driver, name: cfg.Name, log: cfg.Log,
		pages: ocicgroups.HugePageSizes(),
		users: map[string]int{},
	}, nil
}

// Host is what New detected or was given.
func (m *Manager) Host() Host { return m.host }

// Driver is the one in use.
func (m *Manager) Driver() Driver { return m.driver }

// PodParent is the group of a pod: the parent that the kubelet gave, or for
// none ("") a group of the pod's own below ours: "/nodeagent/pod<id>", with
// systemd "/nodeagent.slice/nodeagent-pod<id>.slice". Record the result and
// hand it to the other methods.
//
// Errors: InvalidArgument if the parent does not fit the driver.
func (m *Manager) PodParent(parent, sandboxID string) (string, error) {
	if parent == "" {
		if err := checkID(sandboxID); err != nil {
			return "", err
		}
		if m.driver == CgroupFS {
			return "/" + m.name + "/pod" + sandboxID, nil
		}
		// In a slice's name '-' separates levels.
		unit := m.name + "-pod" + strings.ReplaceAll(sandboxID, "-", "_") + ".slice"
		return "/" + m.name + ".slice/" + unit, nil
	}
	return m.parentPath(parent)
}

// ContainerPath is the OCI linux.cgroupsPath of a container in the pod group
// parent: a path, or "slice:nodeagent:<id>" for the systemd driver.
//
// Errors: InvalidArgument if the parent does not fit the driver.
func (m *Manager) ContainerPath(parent, id string) (string, error) {
	rel, err := m.parentPath(parent)
	if err != nil {
		return "", err
	}
	if err := checkID(id); err != nil {
		return "", err
	}
	if m.driver == Systemd {
		return sliceOf(rel) + ":" + scopePrefix + ":" + id, nil
	}
	return path.Join(rel, id), nil
}

// scopePrefix: libcontainer names a container's unit <prefix>-<id>.scope.
const scopePrefix = "nodeagent"

// parentPath checks a parent and returns it relative to a hierarchy's mount
// point, with a leading slash. "" is the group that holds our pods.
func (m *Manager) parentPath(parent string) (string, error) {
	if parent == "" {
		return m.root(), nil
	}
	rel := "/" + strings.TrimPrefix(parent, "/")
	err := checkPath(rel)
	if err == nil && m.driver == Systemd {
		err = checkSlice(rel)
	}
	if err != nil {
		return "", fmt.Errorf("cgroup parent %q: %w: %w", parent, err, errdefs.ErrInvalidArgument)
	}
	if m.driver == Systemd {
		return ocisystemd.ExpandSlice(sliceOf(rel))
	}
	return rel, nil
}

// checkPath refuses what could lead elsewhere than it seems to, and names that
// the kernel does not take (kernel/cgroup/cgroup.c, cgroup_mkdir).
func checkPath(rel string) error {
	if rel == "/" {
		return nil
	}
	for name := range strings.SplitSeq(rel[1:], "/") {
		switch {
		case name == "":
			return errors.New("it has an empty segment: write one slash between names and none at the end")
		case name == "." || name == "..":
			return fmt.Errorf("the segment %q is not the name of a group: write the whole path from the root of the hierarchy", name)
		case len(name) > unix.NAME_MAX:
			return fmt.Errorf("a segment is %d bytes long, at most %d are possible", len(name), unix.NAME_MAX)
		case strings.ContainsFunc(name, unicode.IsControl):
			return errors.New("it has a control character")
		}
	}
	return nil
}

// unitName holds the characters of systemd's unit names (systemd.unit(5)).
var unitName = regexp.MustCompile(`^[a-zA-Z0-9:_.\\-]+$`)

// checkSlice wants rel to be a slice's path, or its name alone.
func checkSlice(rel string) error {
	const want = `the systemd driver wants a slice, as "/kubepods.slice/kubepods-pod1.slice"`
	unit := sliceOf(rel)
	if !unitName.MatchString(unit) {
		return fmt.Errorf("%s: a unit's name has letters, digits and :_.\\- only", want)
	}
	at, err := ocisystemd.ExpandSlice(unit)
	if err != nil {
		return fmt.Errorf("%s: %w", want, err)
	}
	if rel != at && rel != "/"+unit {
		return fmt.Errorf("%s: %s is at %s", want, unit, at)
	}
	return nil
}

// sliceOf is the name of the slice at rel; the root's is "-.slice".
func sliceOf(rel string) string {
	if rel == "/" {
		return "-.slice"
	}
	return path.Base(rel)
}

func checkID(id string) error {
	if id == "" || id == "." || id == ".." || strings.ContainsAny(id, "/:\x00") {
		return fmt.Errorf("cgroup name %q: %w", id, errdefs.ErrInvalidArgument)
	}
	return nil
}

// EnsurePod makes the group of a pod where it does not exist, and sets the
// limits of res (pod-level resources plus overhead; nil for none) on it if it
// is one of ours. A group that someone else made (the kubelet) is used as it
// is: its limits are theirs. On an error nothing new is left.
func (m *Manager) EnsurePod(ctx context.Context, parent string, res *specs.LinuxResources) error {
	rel, err := m.parentPath(parent)
	if err != nil {
		return err
	}
	r, err := m.resources(res)
	if err != nil {
		return fmt.Errorf("make pod cgroup %s: %w", rel, err)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("make pod cgroup %s: %w", rel, err)
	}
	// Counted first, so that no removal takes what this one stands on.
	m.use(rel, 1)
	if m.driver == Systemd {
		err = m.ensureSlice(rel, r)
	} else {
		err = m.ensureDirs(rel, r)
	}
	if err != nil {
		m.use(rel, -1)
		return fmt.Errorf("make pod cgroup %s: %w", rel, err)
	}
	return nil
}

func (m *Manager) use(rel string, n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.users[rel] += n; m.users[rel] <= 0 {
		delete(m.users, rel)
	}
}

// ensureDirs is EnsurePod for the cgroupfs driver.
func (m *Manager) ensureDirs(rel string, r *ocicgroups.Resources) (err error) {
	// The lock keeps a removal from taking a parent away between two mkdirs.
	m.mu.Lock()
	defer m.mu.Unlock()
	var made []string
	defer func() {
		if err != nil {
			for _, dir := range slices.Backward(made) {
				_ = unix.Rmdir(dir)
			}
		}
	}()
	for _, mount := range m.host.hierarchies() {
		if err := m.mkdirAll(mount, rel, &made); err != nil {
			return err
		}
	}
	ours, err := m.ours(rel)
	if err != nil || (!ours && len(made) == 0) {
		return err
	}
	oci, err := m.oci(rel, r)
	if err != nil {
		return err
	}
	// Not to join anything: on v1 it fills an empty cpuset, on v2 it enables
	// the controllers from the root downwards.
	if err := oci.Apply(-1); err != nil || !ours {
		return err
	}
	return oci.Set(r)
}

// mkdirAll makes rel below mount step by step and appends what it made.
func (m *Manager) mkdirAll(mount, rel string, made *[]string) error {
	dir := mount
	for step := range strings.SplitSeq(strings.Trim(rel, "/"), "/") {
		dir += "/" + step
		isNew, err := mkdir(dir, m.name)
		if err != nil {
			return err
		}
		if isNew {
			*made = append(*made, dir)
		}
	}
	return nil
}

// ensureSlice is EnsurePod for the systemd driver.
func (m *Manager) ensureSlice(rel string, r *ocicgroups.Resources) error {
	existed, err := m.exists(rel)
	if err != nil {
		return err
	}
	if existed {
		if ours, err := m.ours(rel); err != nil || !ours {
			return err
		}
	}
	var missing []string // groups that systemd makes on the way to ours
	for p := rel; p != "/"; p = path.Dir(p) {
		if ok, err := m.exists(p); err != nil {
			return err
		} else if ok {
			break
		}
		missing = append(missing, p)
	}
	oci, err := m.oci(rel, r)
	if err != nil {
		return err
	}
	if err := oci.Apply(-1); err != nil {
		return err
	}
	err = oci.Set(r)
	for _, p := range missing {
		err = errors.Join(err, m.markAll(p))
	}
	if err != nil && !existed {
		_ = oci.Destroy()
	}
	return err
}

// markAll marks rel in each hierarchy that has it.
func (m *Manager) markAll(rel string) error {
	for _, mount := range m.host.hierarchies() {
		if err := mark(mount+rel, m.name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// ours reports whether we made the group, which its name says below our own
// root and elsewhere the mark. On v1 memory's hierarchy decides: the kubelet
// makes groups in the hierarchies that it knows, and we in the others.
func (m *Manager) ours(rel string) (bool, error) {
	if m.ownPod(rel) {
		return true, nil
	}
	return marked(m.primary()+rel, m.name)
}

// primary is the mount point of the hierarchy whose groups matter most.
func (m *Manager) primary() string {
	return firstOf(m.host.Mounts["memory"], m.host.Mounts["cpu"], m.host.Mounts["pids"], m.host.Mounts[Unified])
}

// root is the group that holds the pods without a parent.
func (m *Manager) root() string {
	if m.driver == Systemd {
		return "/" + m.name + ".slice"
	}
	return "/" + m.name
}

// ownPod: is rel a pod group that PodParent named?
func (m *Manager) ownPod(rel string) bool {
	return path.Dir(rel) == m.root()
}

func (m *Manager) exists(rel string) (bool, error) {
	for _, mount := range m.host.hierarchies() {
		switch err := unix.Access(mount+rel, unix.F_OK); {
		case err == nil:
			return true, nil
		case !errors.Is(err, unix.ENOENT):
			return false, &os.PathError{Op: "access", Path: mount + rel, Err: err}
		}
	}
	return false, nil
}

// oci is libcontainer's manager of a group.
func (m *Manager) oci(rel string, r *ocicgroups.Resources) (ocicgroups.Manager, error) {
	cg := &ocicgroups.Cgroup{Resources: r}
	if m.driver == Systemd {
		cg.Systemd = true
		cg.Name, cg.Parent = sliceOf(rel), sliceOf(path.Dir(rel))
		return ocimanager.New(cg)
	}
	cg.Path = rel
	paths := make(map[string]string, len(m.host.Mounts))
	for controller, mount := range m.host.Mounts {
		paths[controller] = mount + rel
	}
	return ocimanager.NewWithPaths(cg, paths)
}

// UpdatePod sets the limits of res on a pod's group if it is one of ours; the
// kubelet's groups are updated by the kubelet.
//
// Errors: NotFound if the group is gone.
func (m *Manager) UpdatePod(ctx context.Context, parent string, res *specs.LinuxResources) error {
	rel, err := m.parentPath(parent)
	if err != nil {
		return err
	}
	r, err := m.resources(res)
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		err = m.updatePod(rel, r)
	}
	if err != nil {
		return fmt.Errorf("update pod cgroup %s: %w", rel, err)
	}
	return nil
}

func (m *Manager) updatePod(rel string, r *ocicgroups.Resources) error {
	if ok, err := m.exists(rel); err != nil {
		return err
	} else if !ok {
		return errdefs.ErrNotFound
	}
	if ours, err := m.ours(rel); err != nil || !ours {
		return err
	}
	oci, err := m.oci(rel, r)
	if err != nil {
		return err
	}
	return oci.Set(r)
}

// RemovePod removes the group of a pod if it is one of ours and no other pod
// uses it, and then those of its ancestors that we made and that are empty.
// Idempotent; a group that is not ours is left alone and is no error.
//
// Errors: FailedPrecondition if processes are left in the pod's own group.
func (m *Manager) RemovePod(ctx context.Context, parent string) error {
	rel, err := m.parentPath(parent)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.users[rel]--; m.users[rel] > 0 {
		return nil // another pod with the same parent
	}
	delete(m.users, rel)
	if err := m.remove(rel); err != nil {
		return fmt.Errorf("remove pod cgroup %s: %w", rel, err)
	}
	return nil
}

// remove takes rel and its empty, marked ancestors away. Caller holds mu.
func (m *Manager) remove(rel string) error {
	if m.driver == Systemd {
		if err := m.stopSlices(rel); err != nil {
			return err
		}
	}
	// The first that is busy ends it: nothing is gained by a pod group that
	// exists in half of the hierarchies.
	for _, mount := range m.host.hierarchies() {
		if err := m.removeDir(mount, rel); err != nil {
			return err
		}
	}
	return nil
}

// removeDir is remove in one hierarchy.
func (m *Manager) removeDir(mount, rel string) error {
	if m.ownPod(rel) {
		// What containers left below is dead, or else this says so.
		err := removeTree(mount+rel, time.Now().Add(removeWait))
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
		}
		if err != nil {
			return err
		}
	}
	for p := rel; p != "/"; p = path.Dir(p) {
		dir := mount + p
		ours, err := marked(dir, m.name)
		if err != nil {
			return err
		}
		if !ours && unix.Access(dir, unix.F_OK) == nil {
			return nil
		}
		// Another pod or a process in it: theirs to remove, later.
		switch err := unix.Rmdir(dir); {
		case err == nil, errors.Is(err, unix.ENOENT):
		case errors.Is(err, unix.EBUSY), errors.Is(err, unix.ENOTEMPTY):
			return nil
		default:
			return &os.PathError{Op: "rmdir", Path: dir, Err: err}
		}
	}
	return nil
}

// removeWait is how long a group may stay busy after its last process was
// reaped; the kernel takes it out of its group a moment later.
const removeWait = 200 * time.Millisecond

// removeTree removes a group and those below it.
func removeTree(dir string, deadline time.Time) error {
	for delay := time.Millisecond; ; delay *= 2 {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EINTR) {
			return &os.PathError{Op: "rmdir", Path: dir, Err: err}
		}
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			if !e.IsDir() {
				continue
			}
			if err := removeTree(filepath.Join(dir, e.Name()), deadline); err != nil {
				return err
			}
		}
		if err := unix.Rmdir(dir); err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if time.Now().Add(delay).After(deadline) {
			return &os.PathError{Op: "rmdir", Path: dir, Err: unix.EBUSY}
		}
		time.Sleep(delay)
	}
}

// stopSlices stops the units of rel and its ancestors that are ours and hold
// no process: stopping a slice would kill what is in it. Caller holds mu.
func (m *Manager) stopSlices(rel string) error {
	for p := rel; p != "/"; p = path.Dir(p) {
		ours, err := m.ours(p)
		if err != nil || !ours {
			return err
		}
		if busy := m.populated(p); busy && m.ownPod(p) {
			return fmt.Errorf("processes are left in it: %w", errdefs.ErrFailedPrecondition)
		} else if busy {
			return nil
		}
		// A slice that is being started below p must not lose its parent.
		if p != rel && (len(m.users) > 0 || m.hasChildren(p)) {
			return nil
		}
		oci, err := m.oci(p, &ocicgroups.Resources{SkipDevices: true})
		if err != nil {
			return err
		}
		if err := oci.Destroy(); err != nil {
			return err
		}
	}
	return nil
}

// populated: is there a process in rel or below, in any hierarchy?
func (m *Manager) populated(rel string) bool {
	for _, mount := range m.host.hierarchies() {
		if pids, err := ocicgroups.GetAllPids(mount + rel); err == nil && len(pids) > 0 {
			return true
		}
	}
	return false
}

func (m *Manager) hasChildren(rel string) bool {
	for _, mount := range m.host.hierarchies() {
		var st unix.Stat_t
		if unix.Stat(mount+rel, &st) == nil && st.Nlink > 2 {
			return true
		}
	}
	return false
}

// Reconcile removes every group of ours that no live pod needs; live holds the
// parents as PodParent gave them. It is for the start, when the records are
// loaded and before the first pod is made. It goes on after an error.
func (m *Manager) Reconcile(ctx context.Context, live []string) error {
	keep := map[string]bool{}
	for _, parent := range live {
		rel, err := m.parentPath(parent)
		if err != nil {
			return err
		}
		keep[rel] = true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	found := map[string]bool{}
	for _, mount := range m.host.hierarchies() {
		if err := m.findOurs(mount, found); err != nil {
			return fmt.Errorf("find cgroups of ours in %s: %w", mount, err)
		}
	}
	var errs []error
	// Deepest first, so that a parent is empty when its turn comes.
	for _, rel := range slices.Backward(slices.Sorted(maps.Keys(found))) {
		if keep[rel] || ctx.Err() != nil {
			continue
		}
		if err := m.remove(rel); err != nil {
			errs = append(errs, fmt.Errorf("remove stale cgroup %s: %w", rel, err))
			continue
		}
		m.log.Info("removed stale cgroup", "path", rel)
	}
	return errors.Join(append(errs, ctx.Err())...)
}

// findOurs adds the marked groups of one hierarchy, and all pod groups below
// our root.
func (m *Manager) findOurs(mount string, found map[string]bool) error {
	return filepath.WalkDir(mount, func(dir string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone since it was listed
		}
		if err != nil {
			return err
		}
		if !d.IsDir() || dir == mount {
			return nil
		}
		rel := strings.TrimPrefix(dir, mount)
		ours := m.ownPod(rel)
		if !ours {
			// An unknown mark is not ours to judge: leave it.
			ours, _ = marked(dir, m.name)
		}
		if ours {
			found[rel] = true
		}
		return nil
	})
}

// resources turns OCI limits into libcontainer's. Devices are never limited
// on a pod's group: its containers' groups do that.
func (m *Manager) resources(res *specs.LinuxResources) (*ocicgroups.Resources, error) {
	r := &ocicgroups.Resources{SkipDevices: true, SkipFreezeOnSet: true}
	if res == nil {
		return r, nil
	}
	if mem := res.Memory; mem != nil {
		set(&r.Memory, mem.Limit)
		set(&r.MemoryReservation, mem.Reservation)
		set(&r.MemorySwap, mem.Swap)
	}
	if cpu := res.CPU; cpu != nil {
		set(&r.CpuShares, cpu.Shares)
		set(&r.CpuQuota, cpu.Quota)
		set(&r.CpuPeriod, cpu.Period)
		r.CpuBurst = cpu.Burst
		r.CpusetCpus, r.CpusetMems = cpu.Cpus, cpu.Mems
		if m.host.Mode == V2 {
			r.CpuWeight = ocicgroups.ConvertCPUSharesToCgroupV2Value(r.CpuShares)
		}
	}
	if res.Pids != nil {
		r.PidsLimit = res.Pids.Limit
	}
	for _, h := range res.HugepageLimits {
		r.HugetlbLimit = append(r.HugetlbLimit, &ocicgroups.HugepageLimit{Pagesize: h.Pagesize, Limit: h.Limit})
	}
	if len(res.Unified) > 0 {
		if m.host.Mode != V2 {
			return nil, fmt.Errorf("unified resources need cgroup v2, this host is %s: %w", m.host.Mode, errdefs.ErrInvalidArgument)
		}
		r.Unified = res.Unified
	}
	return r, nil
}

func set[T any](to *T, from *T) {
	if from != nil {
		*to = *from
	}
}
