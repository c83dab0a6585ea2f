package images

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	ctdimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ImportOptions say how to take in an archive.
type ImportOptions struct {
	// Name is for images whose archive gives a tag only or nothing: a
	// repository ("example.com/app") or a full name.
	Name     string
	Progress func(Progress)
}

// Import takes in the images of an OCI layout directory, an OCI archive or a
// docker archive (each of these plain, gzip or zstd), for this platform. All
// of them or, on an error, those before the faulty one are there afterwards.
// Each image is returned once, with all its names.
//
// Errors: InvalidArgument if it is none of these; DataLoss for content that
// does not match its digest; NotFound if blobs are missing or no image is for
// this platform.
func (s *Store) Import(ctx context.Context, path string, opts ImportOptions) ([]Image, error) {
	ctx = s.scoped(ctx)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil, fmt.Errorf("import %q: image store is closed: %w", path, errdefs.ErrUnavailable)
	}
	s.pulls.Add(1)
	s.active++
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.active--
		s.mu.Unlock()
		s.pulls.Done()
	}()

	lease := leases.Lease{ID: "import-" + rand.Text()}
	if _, err := s.leases.Create(ctx, leases.WithID(lease.ID)); err != nil {
		return nil, fmt.Errorf("import %q: create lease: %w", path, err)
	}
	defer func() {
		if err := s.leases.Delete(context.WithoutCancel(ctx), lease); err != nil {
			s.log.Error("lease of import cannot be deleted", "path", path, "err", err)
		}
		s.askCollect()
	}()

	found, err := s.readArchive(leases.WithLease(ctx, lease.ID), path)
	if err != nil {
		return nil, fmt.Errorf("import %q: %w", path, explain(ctx, err))
	}
	var out []Image
	for _, f := range found {
		if f.desc.Platform != nil && !s.platform.Match(*f.desc.Platform) {
			continue
		}
		report := newReporter(path)
		report.add(0, opts.Progress)
		names, err := importNames(f, opts.Name)
		if err != nil {
			return out, fmt.Errorf("import %q: image %s: %w", path, f.desc.Digest, err)
		}
		img, err := s.acquire(ctx, source{target: f.desc, names: names, fetcher: f.fetcher}, report)
		if err != nil {
			return out, fmt.Errorf("import %q: image %s: %w", path, f.desc.Digest, explain(ctx, err))
		}
		// An image of several names is one image; what came last has them all.
		out = append(slices.DeleteFunc(out, func(o Image) bool { return o.ID == img.ID }), img)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("import %q: no image in it is for %s: %w", path, platforms.DefaultString(), errdefs.ErrNotFound)
	}
	return out, nil
}

// archived is one image of an archive.
type archived struct {
	desc    ocispec.Descriptor
	fetcher dirFetcher // zero: the blobs are in the content store
	local   bool       // the manifest was made here, its digest means nothing elsewhere
}

// readArchive finds the images in path, taking blobs into the content store
// where path is a stream.
func (s *Store) readArchive(ctx context.Context, path string) ([]archived, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, notFound(err)
	}
	if st.IsDir() {
		return readLayout(path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	plain, err := compression.DecompressStream(f)
	if err != nil {
		return nil, fmt.Errorf("decompress: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	defer plain.Close()
	// Cancellation reaches the reading through the reader.
	index, err := archive.ImportIndex(ctx, s.content, &ctxReader{ctx, plain})
	if err != nil {
		if ctx.Err() == nil && !isDiskFull(err) && !errdefs.IsUnavailable(err) {
			err = fmt.Errorf("read archive: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		return nil, err
	}
	raw, err := content.ReadBlob(ctx, s.content, index)
	if err != nil {
		return nil, fmt.Errorf("read index: %w", err)
	}
	return parseIndex(raw, dirFetcher{})
}

// readLayout reads index.json of an OCI layout directory.
func readLayout(dir string) ([]archived, error) {
	raw, err := os.ReadFile(filepath.Join(dir, ocispec.ImageIndexFile))
	if err != nil {
		return nil, fmt.Errorf("not an OCI layout: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return parseIndex(raw, dirFetcher{dir})
}

func parseIndex(raw []byte, from dirFetcher) ([]archived, error) {
	var index ocispec.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return nil, fmt.Errorf("parse index: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	var out []archived
	for _, d := range index.Manifests {
		if k := kindOf(d); k != "manifest" && k != "index" {
			continue
		}
		if err := checkChildren(ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex}, []ocispec.Descriptor{d}); err != nil {
			return nil, err
		}
		// containerd's importer makes Docker manifests itself and gives them
		// the full name; they are not what any registry has.
		local := d.MediaType == ctdimages.MediaTypeDockerSchema2Manifest && d.Annotations[ctdimages.AnnotationImageName] != ""
		out = append(out, archived{desc: d, fetcher: from, local: local})
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("the index names no images: %w", errdefs.ErrInvalidArgument)
	}
	return out, nil
}

// importNames are the names to record an archived image by; none if the
// archive gives none and the caller neither.
func importNames(a archived, base string) ([]string, error) {
	name := a.desc.Annotations[ctdimages.AnnotationImageName]
	if name == "" {
		name = a.desc.Annotations[ocispec.AnnotationRefName]
	}
	if !strings.ContainsAny(name, "/:@") { // a bare tag, or nothing
		if base == "" {
			if name == "" {
				return nil, nil
			}
			return nil, fmt.Errorf("the archive names it by its tag %q only, a repository is needed: %w", name, errdefs.ErrInvalidArgument)
		}
		if name == "" || strings.Contains(base[strings.LastIndex(base, "/")+1:], ":") {
			name = base
		} else {
			name = base + ":" + name
		}
	}
	named, err := parseRef(name)
	if err != nil {
		return nil, err
	}
	names := namesFor(named, a.desc.Digest)
	if a.local {
		names = names[1:]
	}
	return names, nil
}

// dirFetcher reads blobs of an OCI layout directory.
type dirFetcher struct{ dir string }

func (dirFetcher) isLocal() bool { return true }

func (f dirFetcher) Fetch(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if f.dir == "" {
		return absent{}.Fetch(ctx, desc)
	}
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	blob, err := os.Open(filepath.Join(f.dir, ocispec.ImageBlobsDir, desc.Digest.Algorithm().String(), desc.Digest.Encoded()))
	return blob, notFound(err)
}

func notFound(err error) error {
	if os.IsNotExist(err) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

// ctxReader stops reading when its context ends. It lives for one call only.
type ctxReader struct {
	ctx  context.Context
	next io.Reader
}

func (r *ctxReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.next.Read(p)
}
