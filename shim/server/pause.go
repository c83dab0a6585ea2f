//go:build linux

package server

import "os"

// WritePause makes the root filesystem of pause containers at dir.
func WritePause(dir string) error { return os.MkdirAll(dir, 0o755) }
