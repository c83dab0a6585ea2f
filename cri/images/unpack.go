package images

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	kgzip "github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// layerWriter unpacks the layers of one pull. It is the unpacker's applier, and
// its snapshotter, because the two have to work together: layers are unpacked
// at the same time, each into an empty directory. A directory that a layer
// needs but does not list would come out with default owner and mode, and hide
// those of the layers below. So the applier notes such directories, and the
// commit, which comes in order, gives them what they have below.
//
// It decompresses in-process and mounts nothing, so that nothing stays behind
// when we are killed.
type layerWriter struct {
	snapshots.Snapshotter
	content content.Provider
	report  *reporter

	mu       sync.Mutex          // guards implicit
	implicit map[string][]string // upper directory -> directories not listed, parents first
}

// Apply unpacks a layer and returns the digest of its tar.
func (w *layerWriter) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, _ ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	upper, err := upperDir(mounts)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	ra, err := w.content.ReaderAt(ctx, desc)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("read layer: %w", err)
	}
	defer ra.Close()
	p := Progress{Digest: desc.Digest, Kind: "layer", Phase: Unpacking, Total: desc.Size}
	plain, err := decompress(&progressReader{content.NewReader(ra), w.report, p})
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("decompress layer: %w", err)
	}
	defer plain.Close()
	digester := digest.Canonical.Digester()
	tee := io.TeeReader(plain, digester.Hash())
	var listed listing
	size, err := archive.Apply(ctx, upper, tee,
		archive.WithConvertWhiteout(archive.OverlayConvertWhiteout),
		archive.WithFilter(listed.add))
	if err == nil {
		_, err = io.Copy(io.Discard, tee) // padding counts for the digest
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	w.mu.Lock()
	w.implicit[upper] = listed.missing()
	w.mu.Unlock()
	p.Phase, p.Offset = Unpacked, desc.Size
	w.report.report(p)
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Size: size, Digest: digester.Digest()}, nil
}

// upperDir is the directory that the mounts of a snapshot in the making write
// to: a bind mount of it, or the upper directory of an overlay.
func upperDir(mounts []mount.Mount) (string, error) {
	if len(mounts) == 1 {
		if mounts[0].Type == "bind" {
			return mounts[0].Source, nil
		}
		for _, o := range mounts[0].Options {
			if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
				return dir, nil
			}
		}
	}
	return "", fmt.Errorf("snapshot has no upper directory: %w", errdefs.ErrNotImplemented)
}

// maxWindow is the most memory, in bytes, that a zstd layer may make us hold:
// what `zstd --long` needs.
const maxWindow = 128 << 20

// decompress recognises gzip and zstd by their first bytes, whatever the media
// type says, as containerd does.
func decompress(r io.Reader) (io.ReadCloser, error) {
	start := make([]byte, 10)
	n, err := io.ReadFull(r, start)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, err
	}
	whole := io.MultiReader(strings.NewReader(string(start[:n])), r)
	switch compression.DetectCompression(start[:n]) {
	case compression.Gzip:
		return kgzip.NewReader(whole)
	case compression.Zstd:
		d, err := zstd.NewReader(whole, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(whole), nil
}

// progressReader reports how much of a layer is unpacked.
type progressReader struct {
	next   io.Reader
	report *reporter
	p      Progress
}

func (r *progressReader) Read(b []byte) (int, error) {
	n, err := r.next.Read(b)
	r.p.Offset += int64(n)
	r.report.report(r.p)
	return n, err
}

// listing notes which directories a layer lists and which it needs.
type listing struct {
	listed, needed map[string]bool
	last           string // the last parent seen; layers come in order
}

// add is the archive filter; it lets everything pass.
func (l *listing) add(h *tar.Header) (bool, error) {
	if l.listed == nil {
		l.listed, l.needed = map[string]bool{}, map[string]bool{}
	}
	name := path.Clean("/" + h.Name)
	if h.Typeflag == tar.TypeDir {
		l.listed[name] = true
	}
	if parent := path.Dir(name); parent != l.last {
		l.last = parent
		for ; parent != "/" && !l.needed[parent]; parent = path.Dir(parent) {
			l.needed[parent] = true
		}
	}
	return true, nil
}

// missing are the directories needed but not listed, parents first.
func (l *listing) missing() []string {
	var out []string
	for dir := range l.needed {
		if !l.listed[dir] {
			out = append(out, dir)
		}
	}
	slices.Sort(out)
	return out
}

// Commit gives directories that the layer did not list the attributes they
// have in the layers below, and commits.
func (w *layerWriter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	if err := w.inherit(ctx, key, opts); err != nil {
		return fmt.Errorf("complete directories of layer: %w", err)
	}
	return w.Snapshotter.Commit(ctx, name, key, opts...)
}

const upperLabel = "containerd.io/snapshot/overlay.upperdir"

func (w *layerWriter) inherit(ctx context.Context, key string, opts []snapshots.Opt) error {
	info, err := w.Stat(ctx, key)
	if err != nil {
		return err
	}
	for _, o := range opts { // the parent comes as an option
		if err := o(&info); err != nil {
			return err
		}
	}
	upper := info.Labels[upperLabel]
	w.mu.Lock()
	dirs := w.implicit[upper]
	delete(w.implicit, upper)
	w.mu.Unlock()
	if len(dirs) == 0 || info.Parent == "" {
		return nil
	}
	below, err := w.dirsBelow(ctx, info.Parent)
	if err != nil {
		return err
	}
	// Children first, so that setting a parent's times is not undone.
	for _, dir := range slices.Backward(dirs) {
		if err := inheritDir(filepath.Join(upper, dir), dir, below); err != nil {
			return err
		}
	}
	return nil
}

// dirsBelow are the directories of a snapshot and its ancestors, topmost first.
func (w *layerWriter) dirsBelow(ctx context.Context, name string) ([]string, error) {
	var out []string
	for name != "" {
		info, err := w.Stat(ctx, name)
		if err != nil {
			return nil, err
		}
		out = append(out, info.Labels[upperLabel])
		name = info.Parent
	}
	return out, nil
}

// inheritDir copies owner, mode, times and attributes of dir in the topmost
// layer that has it. If that is not a directory (a whiteout, a file), it was
// new in this layer. dir is absolute within the layer; in none of the layers
// may a symbolic link be followed.
func inheritDir(to, dir string, below []string) error {
	if st, err := os.Lstat(to); err != nil || !st.IsDir() {
		return nil // the layer itself has replaced it later on
	}
	for _, layer := range below {
		fd, err := openInLayer(layer, dir)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			return nil
		}
		if err != nil {
			return &fs.PathError{Op: "open", Path: layer + dir, Err: err}
		}
		err = copyAttributes(to, fd)
		unix.Close(fd)
		return err
	}
	return nil
}

func openInLayer(layer, dir string) (int, error) {
	root, err := unix.Open(layer, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(root)
	// dir is clean, so no rename elsewhere can make this fail with EAGAIN.
	return unix.Openat2(root, strings.TrimPrefix(dir, "/"), &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
}

// copyAttributes copies from an open directory to a path in a layer that is
// still private to us.
func copyAttributes(to string, from int) error {
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return fmt.Errorf("stat directory of layer: %w", err)
	}
	if err := copyXattrs(to, from); err != nil {
		return err
	}
	if err := os.Lchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Chmod(to, st.Mode&0o7777); err != nil { // after chown, which drops setuid
		return &fs.PathError{Op: "chmod", Path: to, Err: err}
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, to, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "utimes", Path: to, Err: err}
	}
	return nil
}

// copyXattrs copies extended attributes, but not overlayfs's own.
func copyXattrs(to string, from int) error {
	names := make([]byte, 64<<10)
	n, err := unix.Flistxattr(from, names)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list attributes of directory: %w", err)
	}
	value := make([]byte, 64<<10)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "security.selinux") {
			continue
		}
		size, err := unix.Fgetxattr(from, name, value)
		if err != nil {
			return fmt.Errorf("read attribute %s of directory: %w", name, err)
		}
		if err := unix.Lsetxattr(to, name, value[:size], 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("set attribute %s of %q: %w", name, to, err)
		}
	}
	return nil
}
