package cri

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/spec"
)

// shmSize is the size of a pod's /dev/shm in bytes, the same as elsewhere.
const shmSize = 64 << 20

// makeSandboxFiles makes what all containers of a pod see: host name,
// resolv.conf and, unless the pod uses the host's IPC, /dev/shm.
func makeSandboxFiles(dir string, c *runtimeapi.PodSandboxConfig, hostname string) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return fmt.Errorf("make sandbox directory: %w", err)
	}
	f := spec.FilesIn(dir)
	if err := os.WriteFile(f.Hostname, []byte(hostname+"\n"), 0o644); err != nil {
		return fmt.Errorf("write sandbox host name: %w", err)
	}
	resolv, err := resolvConf(c.GetDnsConfig())
	if err != nil {
		return err
	}
	if err := os.WriteFile(f.ResolvConf, resolv, 0o644); err != nil {
		return fmt.Errorf("write sandbox resolv.conf: %w", err)
	}
	if hostIPC(c) {
		return nil
	}
	if err := os.MkdirAll(f.Shm, 0o700); err != nil {
		return fmt.Errorf("make sandbox shm: %w", err)
	}
	err = unix.Mount("shm", f.Shm, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, fmt.Sprintf("mode=1777,size=%d", shmSize))
	if err != nil {
		return fmt.Errorf("mount sandbox shm on %s: %w", f.Shm, err)
	}
	return nil
}

// unmountShm is idempotent.
func unmountShm(dir string) error {
	shm := spec.FilesIn(dir).Shm
	for {
		err := unix.Unmount(shm, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // not mounted, not there
			return nil
		}
		if err != nil {
			return fmt.Errorf("unmount sandbox shm %s: %w", shm, err)
		}
	}
}

// removeSandboxFiles is idempotent.
func removeSandboxFiles(dir string) error {
	if err := unmountShm(dir); err != nil {
		return err
	}
	// What we made, by name; the slower way is for what we did not expect.
	f := spec.FilesIn(dir)
	for _, p := range []string{f.Hostname, f.ResolvConf} {
		_ = unix.Unlink(p)
	}
	_ = unix.Rmdir(f.Shm)
	if unix.Rmdir(dir) == nil {
		return nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove sandbox directory: %w", err)
	}
	return nil
}

// resolvConf is the pod's resolver configuration; without one in the request
// the host's as it is now.
func resolvConf(d *runtimeapi.DNSConfig) ([]byte, error) {
	if len(d.GetServers())+len(d.GetSearches())+len(d.GetOptions()) > 0 {
		text, err := spec.ResolvConf(d)
		return []byte(text), err
	}
	data, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("copy the host's resolv.conf: %w", err)
	}
	return data, nil
}

// makeLogDir makes the directory of a log file where it is missing. The
// kubelet makes it before; others may not.
func makeLogDir(logPath string) error {
	if logPath == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(logPath), 0o755); err != nil {
		return fmt.Errorf("make log directory: %w", err)
	}
	return nil
}
