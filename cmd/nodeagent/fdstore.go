package main

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/cri"
)

// keptSocket keeps the CRI's socket listening while the daemon is restarted,
// upgraded or has crashed: systemd holds it (FDSTORE of sd_notify(3)), so that
// callers wait in its queue instead of being refused. A stop of the service
// ends it.
type keptSocket struct {
	log    *slog.Logger
	held   []*os.File // what systemd has handed over
	notify func(state string, keep ...*os.File) error
}

// newKeptSocket takes over what systemd holds, nil without systemd.
func newKeptSocket(log *slog.Logger) *keptSocket {
	held := activation.Files(true)
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return nil
	}
	return &keptSocket{log: log, held: held, notify: sdNotify}
}

// listen is the socket at path that is held, or a new one.
func (k *keptSocket) listen(path string) (net.Listener, error) {
	var found net.Listener
	for _, f := range k.held {
		if found == nil && f.Name() == socketName(path) {
			if ln, err := net.FileListener(f); err == nil {
				found = ln
			}
		}
		if found == nil {
			k.drop(f.Name())
		}
		f.Close()
	}
	k.held = nil
	if found != nil {
		return found, nil
	}
	ln, err := cri.Listen(path)
	if err != nil {
		return nil, err
	}
	if err := k.keep(ln.(*net.UnixListener), path); err != nil {
		k.log.Warn("callers are refused while the daemon restarts: systemd does not hold the CRI's socket", "err", err)
	}
	return ln, nil
}

// keep gives systemd the socket. Its file then has to outlive this process.
func (k *keptSocket) keep(ln *net.UnixListener, path string) error {
	f, err := ln.File()
	if err != nil {
		return fmt.Errorf("keep socket %s: %w", path, err)
	}
	defer f.Close()
	if err := k.notify("FDSTORE=1\nFDNAME="+socketName(path), f); err != nil {
		return err
	}
	ln.SetUnlinkOnClose(false)
	return nil
}

func (k *keptSocket) drop(name string) {
	if err := k.notify("FDSTOREREMOVE=1\nFDNAME=" + name); err != nil {
		k.log.Warn("systemd holds a descriptor that is of no use", "name", name, "err", err)
	}
}

// socketName names the socket whose file is at path now, "" if there is none.
// Nobody reaches a socket whose file was replaced.
func socketName(path string) string {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return ""
	}
	return strings.ReplaceAll(fmt.Sprintf("cri-%x-%x-%s", st.Dev, st.Ino, path), ":", "_")
}

// rightsOf is the message that hands over the files' descriptors. It does not
// call File.Fd, which makes a descriptor block, and with it the listener that
// shares its description: Accept would sit in the kernel and Close wait for it.
func rightsOf(files []*os.File) ([]byte, error) {
	if len(files) == 0 {
		return nil, nil
	}
	fds := make([]int, len(files))
	for i, f := range files {
		conn, err := f.SyscallConn()
		if err != nil {
			return nil, err
		}
		if err := conn.Control(func(fd uintptr) { fds[i] = int(fd) }); err != nil {
			return nil, err
		}
	}
	return unix.UnixRights(fds...), nil
}
