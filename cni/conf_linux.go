package cni

import (
	"io/fs"
	"syscall"
)

func markOf(st fs.FileInfo) fileMark {
	m := fileMark{size: st.Size(), mtime: st.ModTime()}
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		m.ino = s.Ino
	}
	return m
}
