//go:build linux

package server

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/shim/record"
)

// si_code values of SIGCHLD.
const (
	cldExited = 1
	cldKilled = 2
)

// siginfo is siginfo_t as waitid fills it (x86-64, arm64 and other 64-bit).
type siginfo struct {
	signo, errno, code int32
	_                  int32
	pid, uid, status   int32
	_                  [100]byte
}

func waitid(pid int, info *siginfo, options int) error {
	_, _, errno := unix.Syscall6(unix.SYS_WAITID, unix.P_PID, uintptr(pid), uintptr(unsafe.Pointer(info)), uintptr(options), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// pidfdStatus asks the kernel how the process ended. It knows that once the
// process is reaped, since Linux 6.15.
func pidfdStatus(pidfd *os.File) (record.Exit, bool) {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return record.Exit{}, false
	}
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	var ierr error
	err = raw.Control(func(fd uintptr) { ierr = unix.IoctlPidfdInfo(int(fd), &info) })
	if err != nil || ierr != nil || info.Mask&unix.PIDFD_INFO_EXIT == 0 {
		return record.Exit{}, false
	}
	return waitStatus(uint32(info.Exit_code)), true
}

// stat is what this package needs of /proc/PID/stat.
type stat struct {
	state     byte
	ppid      int
	session   int
	startTime uint64
	exitCode  uint32 // as wait(2) gives it; readable with CAP_SYS_PTRACE
}

func procStat(pid int) (stat, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return stat{}, err
	}
	return parseStat(b)
}

// parseStat reads the text of /proc/PID/stat; see proc_pid_stat(5).
func parseStat(b []byte) (stat, error) {
	i := bytes.LastIndexByte(b, ')') // the name before it may hold anything
	if i < 0 {
		return stat{}, fmt.Errorf("process status %q: no name", b)
	}
	f := bytes.Fields(b[i+1:]) // f[0] is field 3
	if len(f) < 50 || len(f[0]) != 1 {
		return stat{}, fmt.Errorf("process status %q: %d fields", b, len(f))
	}
	var (
		st   = stat{state: f[0][0]}
		errs [4]error
		code uint64
	)
	st.ppid, errs[0] = strconv.Atoi(string(f[1]))
	st.session, errs[1] = strconv.Atoi(string(f[3]))
	st.startTime, errs[2] = strconv.ParseUint(string(f[19]), 10, 64)
	code, errs[3] = strconv.ParseUint(string(f[49]), 10, 32)
	st.exitCode = uint32(code)
	for _, err := range errs {
		if err != nil {
			return stat{}, fmt.Errorf("process status %q: %w", b, err)
		}
	}
	return st, nil
}
