package spec

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Kernel is what the package reads of the host while it builds a spec. All
// methods may be called concurrently and change nothing.
type Kernel interface {
	// EvalSymlinks resolves every link of an existing host path.
	EvalSymlinks(path string) (string, error)
	// MountPropagation describes the mount that holds path (absolute, resolved).
	MountPropagation(path string) (Propagation, error)
	// Devices returns the device at path, or with a directory every device
	// below it. Paths are host paths.
	Devices(path string) ([]specs.LinuxDevice, error)
	// ReadInRootfs reads a regular file of an untrusted root filesystem; links
	// never lead out of it.
	ReadInRootfs(rootfs, name string) ([]byte, error)
	// ReadFile reads a file of the host.
	ReadFile(path string) ([]byte, error)
	// AppArmorProfiles returns the names of the loaded profiles.
	AppArmorProfiles() (map[string]bool, error)
}

// Propagation of one mount.
type Propagation struct {
	Mountpoint    string
	Shared, Slave bool
}

// hostKernel is the Kernel of this machine.
type hostKernel struct{}

func (hostKernel) EvalSymlinks(path string) (string, error) { return filepath.EvalSymlinks(path) }

func (hostKernel) ReadFile(path string) ([]byte, error) { return os.ReadFile(path) }

// maxUserFile bounds what is read of an image's passwd or group file.
const maxUserFile = 16 << 20

// ReadInRootfs opens with openat2(RESOLVE_IN_ROOT), kernel 5.6; without it
// through the slower lookup of pathrs-lite. Anything but a regular file is
// refused: a fifo would block, a device could do anything.
func (hostKernel) ReadInRootfs(rootfs, name string) ([]byte, error) {
	f, err := openInRootfs(rootfs, name)
	if err != nil {
		return nil, err
	}
	return readRegular(f, name)
}

// readRegular reads and closes f.
func readRegular(f *os.File, name string) ([]byte, error) {
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file: %w", name, unix.EINVAL)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxUserFile+1))
	if err == nil && len(data) > maxUserFile {
		err = fmt.Errorf("%s is larger than %d bytes: %w", name, maxUserFile, unix.EFBIG)
	}
	return data, err
}

func openInRootfs(rootfs, name string) (*os.File, error) {
	const flags = unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
	dir, err := os.OpenFile(rootfs, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	for {
		fd, err := unix.Openat2(int(dir.Fd()), strings.TrimLeft(name, "/"), &unix.OpenHow{
			Flags: flags, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
		})
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), name), nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			// EAGAIN: a rename raced with the lookup.
			continue
		case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM):
			return openSlow(rootfs, name, flags)
		case errors.Is(err, unix.ENOTDIR):
			// "etc" is a file: like no file at all.
			err = unix.ENOENT
		}
		return nil, &fs.PathError{Op: "openat2", Path: filepath.Join(rootfs, name), Err: err}
	}
}

func openSlow(rootfs, name string, flags int) (*os.File, error) {
	h, err := pathrs.OpenInRoot(rootfs, name)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	return pathrs.Reopen(h, flags)
}

// MountPropagation reads mountinfo; of mounts on the same place the last one
// counts. It reads the thread's: the main thread, which /proc/self shows, may
// have been left in another mount namespace by a library.
func (hostKernel) MountPropagation(path string) (Propagation, error) {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return Propagation{}, err
	}
	defer f.Close()
	return findPropagation(f, path)
}

// findPropagation parses lines "id parent maj:min root mountpoint options
// [shared:N] [master:N] - type source super".
func findPropagation(mountinfo io.Reader, path string) (best Propagation, err error) {
	sc := bufio.NewScanner(mountinfo)
	sc.Buffer(nil, 1<<20)
	found := false
	for sc.Scan() {
		fields := strings.Fields(sc.Text())
		if len(fields) < 7 {
			continue
		}
		mp := unescapeMount(fields[4])
		if !within(path, mp) || (found && len(mp) < len(best.Mountpoint)) {
			continue
		}
		best, found = Propagation{Mountpoint: mp}, true
		for _, tag := range fields[6:] {
			if tag == "-" {
				break
			}
			best.Shared = best.Shared || strings.HasPrefix(tag, "shared:")
			best.Slave = best.Slave || strings.HasPrefix(tag, "master:")
		}
	}
	if err := sc.Err(); err != nil {
		return Propagation{}, err
	}
	if !found {
		return Propagation{}, fmt.Errorf("no mount holds %q: %w", path, fs.ErrNotExist)
	}
	return best, nil
}

func within(path, dir string) bool {
	return dir == "/" || path == dir || strings.HasPrefix(path, dir+"/")
}

// unescapeMount undoes the octal escapes (space, tab, newline, backslash).
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && isOctal(s[i+1:i+4]) {
			b.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func isOctal(s string) bool { return strings.Trim(s, "01234567") == "" && s[0] < '4' }

// Devices skips what is not a device of the host for a container: pts, shm,
// fd, mqueue, console, and fifos.
// Source: containerd pkg/oci/utils_unix.go, getDevices.
func (hostKernel) Devices(path string) ([]specs.LinuxDevice, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	st, err := os.Stat(real)
	if err != nil {
		return nil, err
	}
	if !st.IsDir() {
		d, err := deviceAt(real, path)
		if err != nil {
			return nil, err
		}
		return []specs.LinuxDevice{d}, nil
	}
	return devicesBelow(real, path)
}

// errNoDevice is a file that is neither a block nor a character device.
var errNoDevice = errors.New("not a device node")

func devicesBelow(dir, show string) ([]specs.LinuxDevice, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []specs.LinuxDevice
	for _, e := range entries {
		name, shown := filepath.Join(dir, e.Name()), filepath.Join(show, e.Name())
		if e.IsDir() {
			switch e.Name() {
			case "pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev":
				continue
			}
			more, err := devicesBelow(name, shown)
			if err != nil {
				return nil, err
			}
			out = append(out, more...)
			continue
		}
		if e.Type()&fs.ModeDevice == 0 || e.Name() == "console" {
			continue
		}
		d, err := deviceAt(name, shown)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNoDevice) {
			continue // gone since the listing
		}
		if err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

func deviceAt(path, show string) (specs.LinuxDevice, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return specs.LinuxDevice{}, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	var kind string
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		kind = "b"
	case unix.S_IFCHR:
		kind = "c"
	default:
		return specs.LinuxDevice{}, fmt.Errorf("%s: %w", path, errNoDevice)
	}
	rdev := uint64(st.Rdev) //nolint:unconvert // 32 bits on mips
	return specs.LinuxDevice{
		Path:     show,
		Type:     kind,
		Major:    int64(unix.Major(rdev)),
		Minor:    int64(unix.Minor(rdev)),
		FileMode: ptr(os.FileMode(st.Mode &^ unix.S_IFMT)),
		UID:      ptr(st.Uid),
		GID:      ptr(st.Gid),
	}, nil
}

func (hostKernel) AppArmorProfiles() (map[string]bool, error) {
	f, err := os.Open("/sys/kernel/security/apparmor/profiles")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseAppArmorProfiles(f)
}

// parseAppArmorProfiles parses lines "name (mode)".
func parseAppArmorProfiles(r io.Reader) (map[string]bool, error) {
	out := map[string]bool{}
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		if i := strings.LastIndex(sc.Text(), " ("); i > 0 {
			out[sc.Text()[:i]] = true
		}
	}
	return out, sc.Err()
}
