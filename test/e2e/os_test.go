package e2e

import (
	"io/fs"
	"syscall"
)

func fileUID(i fs.FileInfo) uint32 { return i.Sys().(*syscall.Stat_t).Uid }
