// Package rootfs mounts root filesystems: for each container an overlay of its
// image's layers with a writable directory of its own, and image volumes
// (read-only overlays, or a path inside one).
//
// It must not know images, containers or the CRI: it gets layer directories
// and an id, and gives back a path. It must not sync anything to disk: the
// writable layer of a container dies with the container.
//
// Called by the CRI core on the path of container start and removal.
//
// # Layout
//
//	Root/containers/<id>/{upper,work}    writable layer
//	Root/containers/<id>/volumes         anonymous volumes, for the caller
//	Root/containers/.trash/              what is being deleted
//	State/containers/<id>/rootfs         the container's mount point
//	State/containers/<id>/images/<n>/    image volumes
//
// Unmount renames the writable layer into the trash and returns; Run deletes
// it. A process that dies in between leaves trash, which the next Run deletes,
// or directories and mounts of an id that Reconcile then removes.
//
// # Concurrency
//
// Calls for different ids may run at the same time; calls for one id must be
// ordered by the caller. Mounter.mu guards the usage cache. Run is the only
// goroutine.
//
// Kernel: 5.2 for the mount API; "volatile" from 5.10, idmapped layers from
// 5.19, layers one by one ("lowerdir+") from 6.5. Without the last, the
// options of all layers must fit a page; they are given as /proc/self/fd/<n>
// so that hundreds do.
package rootfs
