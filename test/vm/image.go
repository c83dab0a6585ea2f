package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	suite  = "bookworm"
	mirror = "http://deb.debian.org/debian"
)

// What a stock server has, and what the tests use.
var packages = []string{
	"systemd", "systemd-sysv", "dbus", "udev", "kmod", "procps", "iproute2", "nftables", "ca-certificates",
	"apparmor", "bash-completion", "busybox-static", "containernetworking-plugins", "linux-image-amd64",
}

// image is what a machine boots.
type image struct{ disk, kernel, initramfs string }

// ensureImage makes the image unless the cache has it. Its name says what it
// was made of, so another recipe makes another image.
func ensureImage(ctx context.Context, cache string) (image, error) {
	recipe := sha256.Sum256(fmt.Append(nil, suite, mirror, packages, initModules, setUp))
	dir := filepath.Join(cache, fmt.Sprintf("image-%x", recipe[:6]))
	img := image{filepath.Join(dir, "root.ext4"), filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initramfs")}
	if _, err := os.Stat(dir); err == nil {
		return img, nil
	}
	root, tmp := filepath.Join(cache, "rootfs"), dir+".new"
	for _, d := range []string{root, tmp} {
		if err := os.RemoveAll(d); err != nil {
			return image{}, err
		}
	}
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return image{}, err
	}
	fmt.Println("making a Debian root file system (a few minutes, kept for the next run)")
	if err := bootstrap(ctx, root); err != nil {
		return image{}, err
	}
	if err := pack(ctx, root, tmp); err != nil {
		return image{}, err
	}
	if err := os.RemoveAll(root); err != nil {
		return image{}, err
	}
	return img, os.Rename(tmp, dir)
}

// setUp is run in the new root file system.
const setUp = `
echo nodeagent-vm > /etc/hostname
echo 127.0.0.1 localhost nodeagent-vm > /etc/hosts
echo '/dev/vda / ext4 defaults,noatime 0 1' > /etc/fstab
passwd -d root >/dev/null
systemctl mask -q apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
	systemd-timesyncd.service getty@tty1.service
rm -rf /var/cache/apt/archives/*.deb /var/lib/apt/lists/* /usr/share/doc/* /usr/share/locale/*
`

// bootstrap fills root. It runs in a mount namespace of its own: nothing of
// /proc or /dev is left mounted, whatever happens.
func bootstrap(ctx context.Context, root string) error {
	debs := filepath.Join(filepath.Dir(root), "debs")
	if err := os.MkdirAll(debs, 0o755); err != nil {
		return err
	}
	include := strings.Join(packages, ",")
	// The kernel's package need not make an initramfs: the machine has its own.
	if err := command(ctx, "env", "INITRD=No", "unshare", "--mount", "--propagation", "private",
		"debootstrap", "--variant=minbase", "--cache-dir="+debs, "--include="+include, suite, root, mirror); err != nil {
		return err
	}
	return command(ctx, "chroot", root, "/bin/sh", "-euc", setUp)
}

// pack makes disk, kernel and initramfs of root in dir.
func pack(ctx context.Context, root, dir string) error {
	kernels, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return fmt.Errorf("find the kernel in %s/boot: %v %w", root, kernels, err)
	}
	if err := command(ctx, "cp", kernels[0], filepath.Join(dir, "vmlinuz")); err != nil {
		return err
	}
	version := strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-")
	if err := writeInitramfs(root, version, filepath.Join(dir, "initramfs")); err != nil {
		return fmt.Errorf("make the initramfs: %w", err)
	}
	return command(ctx, "mke2fs", "-q", "-t", "ext4", "-d", root, filepath.Join(dir, "root.ext4"), "6G")
}

// command runs a program and shows its output only if it fails.
func command(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	// What it has started ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, out[max(0, len(out)-4000):])
	}
	return nil
}
