// Package images keeps the node's container images: it pulls them from
// registries, imports archives, unpacks their layers, tells what there is, and
// collects what nothing refers to. It stands on containerd's core libraries,
// called in-process: content store, metadata on bbolt, overlay snapshotter,
// resolver with hosts.toml, unpacker.
//
// It must not mount anything for containers (that is cri/rootfs, which gets
// the lower directories from [Store.Rootfs]), must not start processes except
// the optional igzip/unpigz that containerd's decompressor finds, and must not
// write to disk on the path of a container start.
//
// Callers: the CRI image and container services, and `nodeagent image`.
//
// # State on disk
//
// Everything is under Config.Root. One process at a time opens it (the lock of
// metadata.db); a second one gets ErrUnavailable.
//
//	metadata.db   image records, leases, GC graph (containerd's schema)
//	content/      blobs by digest, partial downloads under ingest/
//	snapshots/    unpacked layers, and metadata.db of the snapshotter
//	state.json    our own record: version, boot id, images unpacked but not
//	              yet synced to disk
//
// An image record is made only when every layer is downloaded, verified
// against its digest, unpacked, and verified against its diffID. Until then a
// lease holds what has arrived: a failed pull keeps it for Config.KeepPartial,
// so that the next attempt resumes, and then it is collected. Each unpacked
// image has a view snapshot named "image-<config digest>", labelled as root of
// the garbage collection; it lasts while the image has a name or an owner.
//
// Layer files are written without fsync and synced in the background after the
// pull. After a boot that interrupted this, the image is unpacked again from
// its (always synced) blobs when it is first used.
//
// # Concurrency
//
// All methods may be called at the same time. Store.mu guards the in-memory
// index (images, names, pins) and is never held during I/O. Goroutines: one
// per pull in flight, owned by the Store and awaited by Close, with those of
// its download and unpack groups inside it; Run is the collector.
//
// Kernel: overlayfs (any kernel of the supported range).
package images
