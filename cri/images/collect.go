package images

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	ctdlog "github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// collectDelay gathers removals that come together into one collection.
const collectDelay = 200 * time.Millisecond

// Run syncs freshly unpacked layers to disk and collects what nothing refers
// to, until ctx ends. It collects nothing before Restore.
func (s *Store) Run(ctx context.Context) error {
	for {
		timer := time.NewTimer(s.nextExpiry())
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case id := <-s.sync:
			s.syncLayers(id)
		case <-timer.C:
			s.collectLogged(ctx)
		case <-s.collect:
			if !sleep(ctx, collectDelay) {
				return nil
			}
			s.collectLogged(ctx)
		}
		timer.Stop()
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func (s *Store) collectLogged(ctx context.Context) {
	err := s.GC(ctx)
	if ctx.Err() != nil || errdefs.IsFailedPrecondition(err) {
		err = nil
	}
	if err != nil {
		s.log.Error("image garbage collection failed", "err", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retryGC = err != nil
}

// nextExpiry is the time until the remains of a failed pull are due, or a
// failed collection is tried again.
func (s *Store) nextExpiry() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := time.Hour
	if s.retryGC {
		next = 10 * time.Second
	}
	for _, at := range s.partial {
		next = min(next, max(time.Until(at), time.Second))
	}
	return next
}

// askCollect has Run collect soon.
func (s *Store) askCollect() {
	select {
	case s.collect <- struct{}{}:
	default:
	}
}

// askSync has Run sync the layers of id; when its list is full, the note in
// state.json stays and the image is unpacked again should the host crash.
func (s *Store) askSync(id string) {
	select {
	case s.sync <- id:
	default:
	}
}

func (s *Store) syncLayers(id string) {
	err := syncFilesystem(s.cfg.Root)
	if err == nil {
		err = s.state.synced(id)
	}
	if err != nil {
		s.log.Error("sync of image layers failed", "image", id, "err", err)
	}
	if s.idle() {
		// The buffers of the pull would stay with us for minutes.
		debug.FreeOSMemory()
	}
}

// idle reports whether no pull or import is in flight.
func (s *Store) idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.active == 0
}

// GC collects now: images without name and owner, the remains of failed pulls
// that are due, and all blobs and layers that nothing refers to.
//
// Errors: FailedPrecondition before Restore.
func (s *Store) GC(ctx context.Context) error {
	ctx = s.scoped(ctx)
	s.gcMu.Lock()
	defer s.gcMu.Unlock()
	s.recMu.Lock()
	err := s.dropViews(ctx)
	s.recMu.Unlock()
	if err != nil {
		return fmt.Errorf("collect images: %w", err)
	}
	if err := s.dropPartial(ctx); err != nil {
		return fmt.Errorf("collect images: %w", err)
	}
	// What a pull that begins after this check notes down is younger than that.
	if before := time.Now().Add(-time.Second); s.idle() {
		if err := s.dropTornIngests(before); err != nil {
			return fmt.Errorf("collect images: %w", err)
		}
	}
	if _, err := s.db.GarbageCollect(ctx); err != nil {
		return fmt.Errorf("collect images: %w", err)
	}
	if err := s.collectOrphans(ctx); err != nil {
		return fmt.Errorf("collect orphaned blobs and layers: %w", err)
	}
	s.mu.Lock()
	s.usage = nil
	s.mu.Unlock()
	return nil
}

// dropViews removes the roots of images that have neither name nor owner.
// Callers hold recMu, under which pulls make a view together with its names.
func (s *Store) dropViews(ctx context.Context) error {
	s.mu.Lock()
	restored := s.restored
	s.mu.Unlock()
	if !restored {
		return fmt.Errorf("owners of images are not restored yet: %w", errdefs.ErrFailedPrecondition)
	}
	kept, err := s.keptImages(ctx)
	if err != nil {
		return err
	}
	for id := range kept {
		s.mu.Lock()
		used := s.byID[id] != nil
		s.mu.Unlock()
		if used {
			continue
		}
		if err := s.sn.Remove(ctx, viewName(id)); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		if err := s.state.synced(id); err != nil {
			// Of no harm: the next boot will look for layers that are gone.
			s.log.Warn("cannot note that an image is gone", "image", id, "err", err)
		}
	}
	return nil
}

// collectOrphans looks, once in a process, for blobs and layers on disk that
// the metadata does not know: what a killed process has left between a deletion
// in the metadata and on disk. containerd compares the two only after a
// deletion, so something is made and deleted.
func (s *Store) collectOrphans(ctx context.Context) error {
	s.mu.Lock()
	swept := s.swept
	s.mu.Unlock()
	if swept {
		return nil
	}
	const probe = "collection-probe"
	desc := ocispec.Descriptor{Digest: digest.FromString(probe), Size: int64(len(probe))}
	if err := content.WriteBlob(ctx, s.content, probe, strings.NewReader(probe), desc); err != nil {
		return err
	}
	if err := s.content.Delete(ctx, desc.Digest); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if _, err := s.sn.Prepare(ctx, probe, ""); err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	if err := s.sn.Remove(ctx, probe); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if _, err := s.db.GarbageCollect(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.swept = true
	return nil
}

// dropPartial deletes the leases of failed pulls that are due.
func (s *Store) dropPartial(ctx context.Context) error {
	s.mu.Lock()
	var due []string
	for id, at := range s.partial {
		if !time.Now().Before(at) {
			due = append(due, id)
			delete(s.partial, id)
		}
	}
	s.mu.Unlock()
	var errs []error
	for _, id := range due {
		if err := s.leases.Delete(ctx, leases.Lease{ID: id}); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Remove removes an image with all its names, whichever name or ID it is
// called by (the CRI's rule). Its layers stay while a container uses them.
// What is not there is no error.
func (s *Store) Remove(ctx context.Context, ref string) error {
	return s.remove(ctx, ref, true)
}

// Untag removes one name of an image, and the image with the last one. A
// digest name made by the same pull goes with the last tag.
//
// Errors: NotFound.
func (s *Store) Untag(ctx context.Context, name string) error {
	return s.remove(ctx, name, false)
}

func (s *Store) remove(ctx context.Context, ref string, all bool) error {
	s.recMu.Lock()
	defer s.recMu.Unlock()
	s.mu.Lock()
	id, err := s.lookup(ref)
	var names []string
	if err == nil {
		names = s.namesToRemove(id, ref, all)
	}
	s.mu.Unlock()
	if errdefs.IsNotFound(err) && all {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove image: %w", err)
	}
	ctx = context.WithoutCancel(s.scoped(ctx))
	if err := s.update(ctx, func(ctx context.Context) error {
		for _, name := range names {
			if err := s.records.Delete(ctx, name); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("delete record %q: %w", name, err)
			}
		}
		return nil
	}); err != nil {
		return fmt.Errorf("remove image %q: %w", ref, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range names {
		s.unindex(name)
	}
	s.askCollect()
	return nil
}

// FsUsage is what the image store takes on disk.
type FsUsage struct {
	// Mountpoint is a directory of the filesystem that holds the store.
	Mountpoint string
	// Bytes and Inodes of blobs and unpacked layers, from the store's own
	// records.
	Bytes, Inodes uint64
	At            time.Time
}

// FsInfo adds up the records of blobs and layers; no file is looked at, and
// the sum is kept until something changes.
func (s *Store) FsInfo(ctx context.Context) (FsUsage, error) {
	s.mu.Lock()
	cached := s.usage
	s.mu.Unlock()
	if cached != nil {
		u := *cached
		u.At = time.Now()
		return u, nil
	}
	u, err := s.measure(s.scoped(ctx))
	if err != nil {
		return FsUsage{}, fmt.Errorf("measure image store: %w", err)
	}
	s.mu.Lock()
	s.usage = &u
	s.mu.Unlock()
	return u, nil
}

// scoped gives a caller's context our namespace in containerd's schema, and
// our log.
func (s *Store) scoped(ctx context.Context) context.Context {
	return ctdlog.WithLogger(namespaces.WithNamespace(ctx, namespace), s.libraryLog)
}
