//go:build linux

// Package initmode makes the program that imports it answer to the argument
// "init" by being libcontainer's init: the process that sets up a container
// from inside and then becomes its program.
//
// It runs in a package initializer and imports nothing but libcontainer, since
// Go initializes packages in the order of their paths as soon as their imports
// are ready: so none of ttrpc's and protobuf's initializers (their paths sort
// later) runs in the start of a container or an exec. Only cmd/nodeagent-shim
// imports it.
package initmode

import (
	"os"

	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // the C half of init
)

func init() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		libcontainer.Init()
	}
}
