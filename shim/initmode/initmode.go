//go:build linux

// Package initmode makes the program that imports it answer to the argument
// "init" by being libcontainer's init: the process that sets up a container
// from inside and then becomes its program.
//
// It runs in a package initializer, as runc's does, so that main's other packages
// are not all initialized first. Only cmd/nodeagent-shim imports it.
package initmode

import (
	"os"

	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // the C half of init
	"golang.org/x/sys/unix"
)

func init() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		// The kernel's default for the container; the shim has set another
		// for its threads, and this one, which becomes the container's program,
		// inherited it.
		_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 50_000, 0, 0, 0)
		libcontainer.Init()
	}
}
