package rootfs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// overlay is the description of one overlay mount.
type overlay struct {
	lower       []string // topmost first
	upper, work string   // empty: read-only
	label       string   // SELinux label of all files, if not empty
	volatile    bool
}

// options other than layers, as key and value (empty: a flag).
func (o overlay) options() [][2]string {
	opts := [][2]string{{"index", "off"}, {"xino", "off"}, {"metacopy", "off"}}
	if o.upper != "" {
		opts = append(opts, [2]string{"upperdir", o.upper}, [2]string{"workdir", o.work})
		if o.volatile {
			opts = append(opts, [2]string{"volatile", ""})
		}
	}
	if o.label != "" {
		opts = append(opts, [2]string{"context", o.label})
	}
	return opts
}

// maxParam is the longest value that fsconfig(2) takes, in bytes.
const maxParam = 255

// unknownOption is one that overlay does not have.
const unknownOption = "nodeagent_probe"

// errNoMountAPI says that this kernel cannot take layers one by one.
var errNoMountAPI = errors.New("the kernel's mount API does not take overlay layers one by one (before 6.5)")

// mountAt mounts the overlay at target with mount attributes attr. A signal
// (the Go scheduler sends them) can interrupt any step; the context is of no use
// then, so all steps are done again.
func (o overlay) mountAt(target string, attr int) (err error) {
	for range 100 {
		if err = o.tryMountAt(target, attr); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return err
}

func (o overlay) tryMountAt(target string, attr int) error {
	fd, err := o.open(attr)
	if errors.Is(err, errNoMountAPI) {
		return o.mountClassic(target, attr)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach overlay to %q: %w", target, err)
	}
	return nil
}

// open makes the overlay as a mount that is attached nowhere.
func (o overlay) open(attr int) (int, error) {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENOSYS) {
		return -1, errNoMountAPI
	}
	if err != nil {
		return -1, fmt.Errorf("open overlay filesystem: %w", err)
	}
	defer unix.Close(fs)
	// Before 6.5 overlay has no parser of its own: everything is taken now and
	// refused only at the end.
	if unix.FsconfigSetFlag(fs, unknownOption) == nil {
		return -1, errNoMountAPI
	}
	var long fdSet
	defer long.close()
	for i, dir := range o.lower {
		if len(dir) > maxParam {
			if dir, err = long.open(dir); err != nil {
				return -1, err
			}
		}
		if err := unix.FsconfigSetString(fs, "lowerdir+", dir); err != nil {
			if i == 0 && errors.Is(err, unix.EINVAL) {
				return -1, errNoMountAPI
			}
			return -1, o.explain(fs, fmt.Errorf("add layer %q: %w", dir, err))
		}
	}
	for _, kv := range o.options() {
		value := kv[1]
		switch {
		case value == "":
			err = unix.FsconfigSetFlag(fs, kv[0])
		case len(value) > maxParam && (kv[0] == "upperdir" || kv[0] == "workdir"):
			if value, err = long.open(value); err != nil {
				return -1, err
			}
			fallthrough
		default:
			err = unix.FsconfigSetString(fs, kv[0], value)
		}
		if err != nil {
			return -1, o.explain(fs, fmt.Errorf("set overlay option %s=%q: %w", kv[0], kv[1], err))
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, o.explain(fs, fmt.Errorf("create overlay: %w", err))
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return -1, fmt.Errorf("make overlay mount: %w", err)
	}
	return fd, nil
}

// explain adds what the kernel logged in the filesystem context.
func (o overlay) explain(fs int, err error) error {
	var texts []string
	buf := make([]byte, 512)
	for range 8 {
		n, e := unix.Read(fs, buf)
		if e != nil || n <= 0 {
			break
		}
		if bytes.Contains(buf[:n], []byte(unknownOption)) {
			continue
		}
		texts = append(texts, strings.TrimSpace(strings.TrimPrefix(string(buf[:n]), "e overlay: ")))
	}
	if len(texts) > 0 {
		return fmt.Errorf("%w (%s)", err, strings.Join(texts, "; "))
	}
	return err
}

// mountClassic mounts through mount(2), whose options must fit one page.
func (o overlay) mountClassic(target string, attr int) error {
	var fds fdSet
	defer fds.close()
	lower := make([]string, len(o.lower))
	for i, dir := range o.lower {
		p, err := fds.open(dir)
		if err != nil {
			return err
		}
		lower[i] = p
	}
	data := []string{"lowerdir=" + strings.Join(lower, ":")}
	for _, kv := range o.options() {
		switch kv[0] {
		case "volatile":
			data = append(data, kv[0])
		case "context":
			data = append(data, kv[0]+`="`+kv[1]+`"`)
		case "upperdir", "workdir":
			p, err := fds.open(kv[1])
			if err != nil {
				return err
			}
			data = append(data, kv[0]+"="+p)
		default:
			data = append(data, kv[0]+"="+kv[1])
		}
	}
	all := strings.Join(data, ",")
	if len(all) >= os.Getpagesize() {
		return fmt.Errorf("mount overlay of %d layers: options of %d bytes do not fit a page, kernel 6.5 is needed: %w",
			len(o.lower), len(all), errdefs.ErrNotImplemented)
	}
	var flags uintptr
	for a, f := range map[int]uintptr{unix.MOUNT_ATTR_RDONLY: unix.MS_RDONLY, unix.MOUNT_ATTR_NOSUID: unix.MS_NOSUID,
		unix.MOUNT_ATTR_NODEV: unix.MS_NODEV, unix.MOUNT_ATTR_NOEXEC: unix.MS_NOEXEC} {
		if attr&a != 0 {
			flags |= f
		}
	}
	if err := unix.Mount("overlay", target, "overlay", flags, all); err != nil {
		return fmt.Errorf("mount overlay at %q: %w", target, err)
	}
	return nil
}

// fdSet holds directories open so that /proc/self/fd/<n> names them shortly.
type fdSet []int

func (s *fdSet) open(dir string) (string, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC|unix.O_DIRECTORY, 0)
	if err != nil {
		return "", fmt.Errorf("open layer %q: %w", dir, err)
	}
	*s = append(*s, fd)
	return "/proc/self/fd/" + strconv.Itoa(fd), nil
}

func (s *fdSet) close() {
	for _, fd := range *s {
		unix.Close(fd)
	}
}
