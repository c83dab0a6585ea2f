package probe

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

const minMajor, minMinor = 5, 15

func kernelVersion(Options) (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	release := unix.ByteSliceToString(u.Release[:])
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return "", fmt.Errorf("cannot read kernel release %q: %w", release, err)
	}
	if major < minMajor || major == minMajor && minor < minMinor {
		return "", errMissing("%s is older than %d.%d", release, minMajor, minMinor)
	}
	return release, nil
}

func pidfd(Options) (string, error) {
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return "", fmt.Errorf("pidfd_open: %w", err)
	}
	return "pidfd_open", unix.Close(fd)
}

// pidfdInfo is struct pidfd_info of include/uapi/linux/pidfd.h, first version.
type pidfdInfo struct {
	Mask     uint64
	CgroupID uint64
	IDs      [11]uint32
	ExitCode int32
}

const (
	// pidfdGetInfo is _IOWR(0xFF, 11, struct pidfd_info).
	pidfdGetInfo = 3<<30 | unsafe.Sizeof(pidfdInfo{})<<16 | 0xFF<<8 | 11
	// pidfdInfoExit asks for the exit code after the process was reaped
	// (Linux 6.15, 7477d7dce48a "pidfs: allow to retrieve exit information").
	pidfdInfoExit = 1 << 3
)

// pidfdExitInfo lets a child end, reaps it and asks how it ended.
func pidfdExitInfo(Options) (string, error) {
	child := exec.Command("/proc/self/exe", "hold")
	child.Stdin = strings.NewReader("")
	if err := child.Start(); err != nil {
		return "", fmt.Errorf("start a process to look at: %w", err)
	}
	fd, err := unix.PidfdOpen(child.Process.Pid, 0)
	waitErr := child.Wait()
	if err != nil || waitErr != nil {
		return "", errors.Join(err, waitErr)
	}
	defer unix.Close(fd)
	info := pidfdInfo{Mask: pidfdInfoExit}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), pidfdGetInfo, uintptr(unsafe.Pointer(&info))); errno != 0 {
		return "", fmt.Errorf("PIDFD_GET_INFO of a reaped process: %w (Linux 6.15 has it)", errno)
	}
	if info.Mask&pidfdInfoExit == 0 {
		return "", errMissing("the kernel keeps no exit code (Linux 6.15 does)")
	}
	return "exit codes outlive the process", nil
}

func userNamespaces(o Options) (string, error) {
	_, release, err := o.HoldUserNamespace()
	if err != nil {
		return "", fmt.Errorf("make a user namespace: %w", err)
	}
	release()
	limit, _ := readString("/proc/sys/user/max_user_namespaces")
	return "up to " + limit, nil
}

func pressure(Options) (string, error) {
	var have []string
	for _, what := range []string{"cpu", "memory", "io"} {
		if _, err := os.ReadFile("/proc/pressure/" + what); err != nil {
			return "", errMissing("/proc/pressure/%s cannot be read (psi=1 on the kernel command line turns it on)", what)
		}
		have = append(have, what)
	}
	return strings.Join(have, ", "), nil
}

func systemd(Options) (string, error) {
	// sd_booted(3): this directory itself.
	if fi, err := os.Lstat("/run/systemd/system"); err != nil || !fi.IsDir() {
		return "", errMissing("this machine was not booted with systemd")
	}
	if _, err := os.Stat("/run/systemd/private"); err != nil {
		return "", errMissing("systemd's bus is not there")
	}
	return "running", nil
}

func readString(path string) (string, error) {
	data, err := os.ReadFile(path)
	return strings.TrimSpace(string(data)), err
}
