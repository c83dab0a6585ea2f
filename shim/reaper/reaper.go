//go:build linux && cgo

// Package reaper makes the program that imports it answer to the arguments
//
//	reaper STATEDIR EXITDIR [flags]
//
// by being the parent of the shim: C code in a constructor, which never gets to
// the Go runtime. It starts the same program with "serve" in the place of
// "reaper" and starts it again, with a growing delay, when it dies; it ends when
// the shim exits with 0 (or 75: another shim holds the lock).
//
// As a subreaper it inherits the containers of a dead shim. Of those that the
// shim named (Conn.Watch) it appends one line to STATEDIR/orphans,
//
//	pid starttime si_code status realtime_ns
//
// before it reaps them, so that the next shim knows how they ended. It keeps
// descriptors (terminal masters, write ends of stdin) for the next shim, which
// gets them at its start.
//
// STATEDIR/reaper.lock is locked for as long as it lives. Its death hurts
// nobody: the shim runs on.
//
// The package must hold nothing else; only cmd/nodeagent-shim imports it. Conn,
// the shim's end, may be used from any goroutine. Linux 3.4 (subreaper).
package reaper

import "C"

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// Conn is the shim's connection to its reaper. The nil Conn, of a shim without
// a reaper, does nothing.
type Conn struct {
	mu sync.Mutex
	fd int
}

// Connect takes the connection that the reaper left to this process, and the
// descriptors that it kept, by name. It returns nil when there is no reaper.
func Connect() (*Conn, map[string]int, error) {
	text := os.Getenv("NODEAGENT_REAPER_FD")
	if text == "" {
		return nil, nil, nil
	}
	fd, err := strconv.Atoi(text)
	if err != nil {
		return nil, nil, fmt.Errorf("descriptor of the reaper's socket: %w", err)
	}
	unix.CloseOnExec(fd)
	kept := map[string]int{}
	for {
		name, got, err := receive(fd)
		if err != nil {
			return nil, kept, fmt.Errorf("take descriptors from the reaper: %w", err)
		}
		if name == "." {
			return &Conn{fd: fd}, kept, nil
		}
		if got >= 0 && name != "" {
			kept[name[1:]] = got
		}
	}
}

func receive(fd int) (string, int, error) {
	var (
		text    = make([]byte, 512)
		control = make([]byte, unix.CmsgSpace(4*4))
	)
	for {
		n, cn, _, _, err := unix.Recvmsg(fd, text, control, unix.MSG_CMSG_CLOEXEC)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return "", -1, err
		case n == 0:
			return "", -1, errors.New("the reaper has ended")
		}
		got := -1
		msgs, err := unix.ParseSocketControlMessage(control[:cn])
		if err != nil {
			return "", -1, err
		}
		for i := range msgs {
			fds, err := unix.ParseUnixRights(&msgs[i])
			if err == nil && len(fds) > 0 {
				got = fds[0]
			}
		}
		return string(text[:n]), got, nil
	}
}

func (c *Conn) send(text string, rights []byte) error {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		err := unix.Sendmsg(c.fd, []byte(text), rights, nil, unix.MSG_NOSIGNAL)
		if err != unix.EINTR {
			return err
		}
	}
}

// Keep hands a copy of fd to the reaper, to be given to the next shim.
func (c *Conn) Keep(name string, fd int) error { return c.send("+"+name, unix.UnixRights(fd)) }

// Drop takes back what Keep did.
func (c *Conn) Drop(name string) error { return c.send("-"+name, nil) }

// Watch asks for the exit status of pid should the shim die first.
func (c *Conn) Watch(pid int) error { return c.send("w"+strconv.Itoa(pid), nil) }

// Unwatch takes back what Watch did, before pid is reaped.
func (c *Conn) Unwatch(pid int) error { return c.send("u"+strconv.Itoa(pid), nil) }
