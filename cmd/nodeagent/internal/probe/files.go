package probe

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// OwnRoot checks that this process's root directory is that of its mount
// namespace, and not one below it as after chroot(2). pivot_root(2) leaves the
// namespace's root as it is then, so whoever joins a container's namespace, as
// an exec does, would find the host's files there.
func OwnRoot() error {
	return onThread(func() error {
		var own, namespace unix.Stat_t
		if err := unix.Stat("/", &own); err != nil {
			return fmt.Errorf("look at the root directory: %w", err)
		}
		ns, err := os.Open("/proc/thread-self/ns/mnt")
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare the root directory: %w", err)
		}
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("join the mount namespace: %w", err)
		}
		if err := unix.Stat("/", &namespace); err != nil {
			return fmt.Errorf("look at the namespace's root directory: %w", err)
		}
		if own.Dev != namespace.Dev || own.Ino != namespace.Ino {
			return errMissing("this process runs in a chroot; containers need it to run at the root of a mount namespace")
		}
		return nil
	})
}

func ownRoot(Options) (string, error) { return "that of the mount namespace", OwnRoot() }

func overlay(o Options) (string, error) {
	return "on " + o.Dir, inScratch(o.Dir, func(dir string) error { return mountOverlay(dir, dir+"/lower", "") })
}

func overlayVolatile(o Options) (string, error) {
	return "writable layers are not synced", inScratch(o.Dir, func(dir string) error {
		return mountOverlay(dir, dir+"/lower", ",volatile") // Linux 5.10
	})
}

// overlayIDMap mounts an overlay on a lower directory that is mapped for a
// user namespace (Linux 5.19; file systems joined one by one).
func overlayIDMap(o Options) (string, error) {
	userns, release, err := o.HoldUserNamespace()
	if err != nil {
		return "", fmt.Errorf("make a user namespace: %w", err)
	}
	defer release()
	return "on " + o.Dir, inScratch(o.Dir, func(dir string) error {
		ns, err := os.Open(userns)
		if err != nil {
			return err
		}
		defer ns.Close()
		tree, err := unix.OpenTree(unix.AT_FDCWD, dir+"/lower", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return fmt.Errorf("open_tree: %w", err)
		}
		defer unix.Close(tree)
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return fmt.Errorf("map ids of %s: %w", dir, err)
		}
		mapped := filepath.Join(dir, "mapped")
		if err := os.Mkdir(mapped, 0o700); err != nil {
			return err
		}
		if err := unix.MoveMount(tree, "", unix.AT_FDCWD, mapped, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("move_mount: %w", err)
		}
		defer unix.Unmount(mapped, unix.MNT_DETACH)
		return mountOverlay(dir, mapped, "")
	})
}

func recursiveReadOnly(Options) (string, error) {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	err := unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr)
	if err == unix.EBADF { // the call is there and looked at the descriptor
		return "mount_setattr", nil
	}
	return "", fmt.Errorf("mount_setattr: %w (Linux 5.12 has it)", err)
}

// inScratch runs f on a thread with its own mount namespace, in a directory
// with what an overlay needs, and removes both.
func inScratch(parent string, f func(dir string) error) error {
	dir, err := os.MkdirTemp(parent, ".nodeagent-check-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			return err
		}
	}
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
			return fmt.Errorf("make a mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		return f(dir)
	})
}

func mountOverlay(dir, lower, more string) error {
	merged := dir + "/merged"
	data := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work%s", lower, dir, dir, more)
	if err := unix.Mount("overlay", merged, "overlay", 0, data); err != nil {
		return fmt.Errorf("mount overlay: %w", err)
	}
	return unix.Unmount(merged, unix.MNT_DETACH)
}
