package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"syscall"
	"time"

	ctdimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	remoteserrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/unpack"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
)

// Bounds on what a registry may make us read into memory, in bytes. Registries
// themselves refuse manifests over 4 MiB.
const (
	maxManifest = 8 << 20
	maxConfig   = 16 << 20
)

// fetchAndUnpack brings the content of src.target for our platform into the
// content store and its layers into the snapshotter, layers in parallel.
func (s *Store) fetchAndUnpack(ctx context.Context, src source, report *reporter) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	layers := &layerWriter{Snapshotter: s.sn, content: s.content, report: report, implicit: map[string][]string{}}
	unpacker, err := unpack.NewUnpacker(ctx, s.content,
		unpack.WithUnpackPlatform(unpack.Platform{
			Platform:                platforms.All,
			SnapshotterKey:          snapshotter,
			Snapshotter:             layers,
			SnapshotterCapabilities: []string{snapshots.RebaseCap},
			Applier:                 layers,
		}),
		unpack.WithLimiter(semaphore.NewWeighted(int64(s.live.Load().MaxParallelDownloads))),
		unpack.WithUnpackLimiter(s.unpacks),
		unpack.WithDuplicationSuppressor(s.blobs))
	if err != nil {
		return err
	}
	handler := unpacker.Unpack(s.handler(src, report))
	if err := ctdimages.Dispatch(ctx, handler, nil, src.target); err != nil {
		cancel()
		_, _ = unpacker.Wait() // it reports the cancellation
		return err
	}
	_, err = unpacker.Wait()
	return err
}

// handler fetches one descriptor and names its children for our platform.
func (s *Store) handler(src source, report *reporter) ctdimages.Handler {
	children := ctdimages.HandlerFunc(func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		found, err := ctdimages.Children(ctx, s.content, desc)
		if err != nil {
			return nil, fmt.Errorf("read %s %s: %w", kindOf(desc), desc.Digest, err)
		}
		if ctdimages.IsIndexType(desc.MediaType) {
			best, ok := bestMatch(found, s.platform)
			if !ok {
				return nil, fmt.Errorf("index %s has no image for %s: %w", desc.Digest, platforms.DefaultString(), errdefs.ErrNotFound)
			}
			found = []ocispec.Descriptor{best}
		}
		return found, checkChildren(desc, found)
	})
	labelled := ctdimages.SetChildrenMappedLabels(s.content, children, nil)
	return ctdimages.HandlerFunc(func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if err := s.fetchBlob(ctx, src.fetcher, desc, report); err != nil {
			return nil, fmt.Errorf("fetch %s %s: %w", kindOf(desc), desc.Digest, err)
		}
		if kindOf(desc) == "layer" || kindOf(desc) == "config" {
			return nil, nil
		}
		return labelled(ctx, desc)
	})
}

// checkChildren refuses descriptors that make no sense before acting on them.
func checkChildren(parent ocispec.Descriptor, children []ocispec.Descriptor) error {
	for _, c := range children {
		kind, limit := kindOf(c), int64(1)<<62
		switch kind {
		case "manifest", "index":
			limit = maxManifest
		case "config":
			limit = maxConfig
		case "layer":
		default:
			return fmt.Errorf("%s %s is not of a container image: it refers to %q: %w", kindOf(parent), parent.Digest, c.MediaType, errdefs.ErrInvalidArgument)
		}
		if err := c.Digest.Validate(); err != nil {
			return fmt.Errorf("%s %s: digest %q of its %s: %s: %w", kindOf(parent), parent.Digest, c.Digest, kind, err, errdefs.ErrInvalidArgument)
		}
		if c.Size <= 0 || c.Size > limit {
			return fmt.Errorf("%s %s: its %s claims to have %d bytes: %w", kindOf(parent), parent.Digest, kind, c.Size, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// kindOf names what a descriptor describes.
func kindOf(desc ocispec.Descriptor) string {
	switch mt := desc.MediaType; {
	case ctdimages.IsManifestType(mt):
		return "manifest"
	case ctdimages.IsIndexType(mt):
		return "index"
	case ctdimages.IsConfigType(mt):
		return "config"
	case ctdimages.IsLayerType(mt):
		return "layer"
	}
	return "blob"
}

// maxAttempts to fetch one blob; each continues where the last one stopped.
const maxAttempts = 5

// fetchBlob brings one blob into the content store, verified by its digest.
func (s *Store) fetchBlob(ctx context.Context, fetcher blobSource, desc ocispec.Descriptor, report *reporter) error {
	p := Progress{Digest: desc.Digest, Kind: kindOf(desc), Phase: Downloading, Total: desc.Size}
	report.report(p)
	ref := remotes.MakeRefKey(ctx, desc)
	for attempt, wait := 1, 200*time.Millisecond; ; attempt, wait = attempt+1, wait*2 {
		counted := &countingFetcher{next: fetcher, report: report, progress: p}
		err := remotes.Fetch(ctx, s.content, counted, desc)
		switch {
		case err == nil, errdefs.IsAlreadyExists(err):
			p.Phase, p.Offset = Downloaded, p.Total
			report.report(p)
			return nil
		case ctx.Err() != nil:
			return err
		case isWrongContent(err):
			if abortErr := s.content.Abort(ctx, ref); abortErr != nil && !errdefs.IsNotFound(abortErr) {
				err = errors.Join(err, abortErr)
			}
			if counted.resumed && attempt < maxAttempts {
				continue // the fault may be in what was left from before
			}
			return fmt.Errorf("the content is not what its digest says: %w: %w", err, errdefs.ErrDataLoss)
		case isDiskFull(err):
			return errors.Join(err, s.dropIngest(ctx, ref))
		case fetcher.isLocal() || !isTransient(err) || attempt == maxAttempts:
			return err
		}
		s.log.Debug("fetch again", "digest", desc.Digest, "attempt", attempt, "err", err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return err
		}
	}
}

func (s *Store) dropIngest(ctx context.Context, ref string) error {
	if err := s.content.Abort(ctx, ref); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("drop partial download: %w", err)
	}
	return nil
}

// isWrongContent recognises the content store's refusal to commit. The local
// store has no error of its own for it, only the class.
func isWrongContent(err error) bool {
	return errdefs.IsFailedPrecondition(err) &&
		(strings.Contains(err.Error(), "unexpected commit") || strings.Contains(err.Error(), "expected size"))
}

// isTransient tells errors that another attempt may not meet.
func isTransient(err error) bool {
	var status remoteserrors.ErrUnexpectedStatus
	if errors.As(err, &status) {
		return status.StatusCode >= 500 || status.StatusCode == 429
	}
	return isNetwork(err)
}

// isNetwork tells errors of connections from those of files. (Every errno is a
// net.Error, so that interface does not tell.)
func isNetwork(err error) bool {
	var op *net.OpError
	var request *url.Error
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) ||
		errors.As(err, &op) || errors.As(err, &request) && !errors.Is(err, context.Canceled)
}

// blobSource is where blobs come from. From a local one, trying again is of no
// use.
type blobSource interface {
	remotes.Fetcher
	isLocal() bool
}

type remoteBlobs struct{ remotes.Fetcher }

func (remoteBlobs) isLocal() bool { return false }

// absent is the source when all is in the store already: what is not there is
// nowhere.
type absent struct{}

func (absent) isLocal() bool { return true }

func (absent) Fetch(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	return nil, fmt.Errorf("blob is not in the archive: %w", errdefs.ErrNotFound)
}

// countingFetcher reports the bytes that pass.
type countingFetcher struct {
	next     remotes.Fetcher
	report   *reporter
	progress Progress
	resumed  bool
}

func (f *countingFetcher) Fetch(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	rc, err := f.next.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	c := countingReader{ReadCloser: rc, of: f}
	if seeker, ok := rc.(io.Seeker); ok {
		return &countingSeeker{countingReader: c, seeker: seeker}, nil
	}
	return &c, nil
}

type countingReader struct {
	io.ReadCloser
	of *countingFetcher
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.of.progress.Offset += int64(n)
	c.of.report.report(c.of.progress)
	return n, err
}

type countingSeeker struct {
	countingReader
	seeker io.Seeker
}

func (c *countingSeeker) Seek(offset int64, whence int) (int64, error) {
	n, err := c.seeker.Seek(offset, whence)
	if err == nil {
		c.of.resumed = c.of.resumed || n > 0
		c.of.progress.Offset = n
		c.of.report.jump(c.of.progress)
	}
	return n, err
}
