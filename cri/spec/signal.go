package spec

import (
	"strconv"
	"strings"
	"syscall"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"golang.org/x/sys/unix"
)

// StopSignal is the signal that asks the container to end: the config's, the
// image's ("SIGTERM", "TERM", "15", "SIGRTMIN+3"), or SIGTERM. A signal of the
// image that makes no sense counts as none, as with containerd and Docker.
// The first result is what ContainerStatus.stop_signal shows.
//
// Errors: InvalidArgument for an unknown signal of the config.
func StopSignal(c *runtimeapi.ContainerConfig, image string) (runtimeapi.Signal, syscall.Signal, error) {
	if s := c.GetStopSignal(); s != runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
		n, ok := signalNumber(s)
		if !ok {
			return 0, 0, invalid("stop_signal", s, "a signal of the CRI")
		}
		return s, n, nil
	}
	if n, ok := ParseSignal(image); ok {
		return criSignal(n), n, nil
	}
	return runtimeapi.Signal_SIGNAL_SIGTERM, syscall.SIGTERM, nil
}

// sigRTMin is the first real-time signal that libc leaves to programs (the
// kernel's is 32, glibc keeps two), sigRTMax the last.
const (
	sigRTMin = 34
	sigRTMax = 64
)

// ParseSignal takes a number, or a name with or without SIG.
func ParseSignal(s string) (syscall.Signal, bool) {
	if n, err := strconv.Atoi(s); err == nil {
		return syscall.Signal(n), n > 0 && n <= sigRTMax
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if base, off, ok := strings.Cut(name, "+"); ok && base == "RTMIN" {
		return realtime(sigRTMin, off, 1)
	}
	if base, off, ok := strings.Cut(name, "-"); ok && base == "RTMAX" {
		return realtime(sigRTMax, off, -1)
	}
	switch name {
	case "RTMIN":
		return sigRTMin, true
	case "RTMAX":
		return sigRTMax, true
	case "IOT":
		return syscall.SIGABRT, true
	case "CLD":
		return syscall.SIGCHLD, true
	case "POLL":
		return syscall.SIGIO, true
	}
	n := unix.SignalNum("SIG" + name)
	return n, n != 0
}

func realtime(base int, off string, sign int) (syscall.Signal, bool) {
	n, err := strconv.Atoi(off)
	sig := base + sign*n
	return syscall.Signal(sig), err == nil && n >= 0 && sig >= sigRTMin && sig <= sigRTMax
}

// signalNumber translates names such as SIGNAL_SIGRTMINPLUS3.
func signalNumber(s runtimeapi.Signal) (syscall.Signal, bool) {
	name, ok := runtimeapi.Signal_name[int32(s)]
	if !ok {
		return 0, false
	}
	name = strings.TrimPrefix(name, "SIGNAL_")
	name = strings.Replace(name, "RTMINPLUS", "RTMIN+", 1)
	name = strings.Replace(name, "RTMAXMINUS", "RTMAX-", 1)
	return ParseSignal(name)
}

// criSignal is the first name of n in the CRI.
func criSignal(n syscall.Signal) runtimeapi.Signal {
	for s := range int32(len(runtimeapi.Signal_name)) {
		if num, ok := signalNumber(runtimeapi.Signal(s)); ok && num == n {
			return runtimeapi.Signal(s)
		}
	}
	return runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT
}
