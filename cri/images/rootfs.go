package images

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/nodeagent/nodeagent/cri/rootfs"
)

// Layers are the directories of an unpacked image, topmost first.
type Layers = rootfs.Layers

// Rootfs returns the layers of an image by ID and keeps them from collection
// until Release(owner). An owner holds one image at a time; asking again for
// the same is free. The result is cached per image; nothing is written to disk.
//
// Errors: NotFound if there is no such image.
func (s *Store) Rootfs(ctx context.Context, owner, imageID string) (Layers, error) {
	s.mu.Lock()
	e := s.byID[imageID]
	if e == nil {
		s.mu.Unlock()
		return Layers{}, fmt.Errorf("find layers of image %q: %w", imageID, errdefs.ErrNotFound)
	}
	s.pin(owner, imageID)
	lower := e.lower
	s.mu.Unlock()
	if lower != nil {
		return Layers{Lower: lower}, nil
	}
	lower, err := s.findLayers(ctx, e)
	if err != nil {
		s.Release(owner)
		return Layers{}, fmt.Errorf("find layers of image %q: %w", imageID, err)
	}
	s.mu.Lock()
	e.lower = lower
	s.mu.Unlock()
	return Layers{Lower: lower}, nil
}

// pin makes owner hold id. Callers hold s.mu.
func (s *Store) pin(owner, id string) {
	was, ok := s.owners[owner]
	if ok && was == id {
		return
	}
	if ok {
		s.unpin(owner)
	}
	s.owners[owner] = id
	s.byID[id].owners++
}

func (s *Store) unpin(owner string) {
	id, ok := s.owners[owner]
	if !ok {
		return
	}
	delete(s.owners, owner)
	if e := s.byID[id]; e != nil {
		e.owners--
		s.dropUnused(id)
	}
}

// Release ends what Rootfs began. Releasing twice does nothing.
func (s *Store) Release(owner string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unpin(owner)
}

// Restore tells, once at start, which images the containers of a former
// process use (owner -> image ID). Nothing is collected before. An owner whose
// image is gone is named in the error, the others are restored all the same.
func (s *Store) Restore(pins map[string]string) error {
	kept, err := s.keptImages(s.life)
	if err != nil {
		return fmt.Errorf("restore image owners: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var lost []string
	for owner, id := range maps.All(pins) {
		if s.byID[id] == nil {
			if !kept[id] {
				lost = append(lost, owner)
				continue
			}
			s.byID[id] = &entry{image: Image{ID: id}, refs: map[string]string{}}
		}
		s.pin(owner, id)
	}
	s.restored = true
	s.askCollect()
	if len(lost) > 0 {
		return fmt.Errorf("restore image owners: images of %s are gone: %w", strings.Join(lost, ", "), errdefs.ErrNotFound)
	}
	return nil
}

// keptImages lists the images that have their layers kept by a view.
func (s *Store) keptImages(ctx context.Context) (map[string]bool, error) {
	ids := map[string]bool{}
	err := s.sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if id, ok := viewImage(info.Name); ok {
			ids[id] = true
		}
		return nil
	})
	return ids, err
}

// findLayers reads the layer directories of an image from its view, unpacking
// the image again if the view is gone.
func (s *Store) findLayers(ctx context.Context, e *entry) ([]string, error) {
	id := e.image.ID
	mounts, err := s.sn.Mounts(s.scoped(ctx), viewName(id))
	if errdefs.IsNotFound(err) && e.image.Manifest.Digest != "" {
		if e.image.ChainID == "" {
			return s.emptyLayer()
		}
		if err := s.unpackAgain(ctx, e); err != nil {
			return nil, err
		}
		mounts, err = s.sn.Mounts(s.scoped(ctx), viewName(id))
	}
	if err != nil {
		return nil, err
	}
	return lowerDirs(mounts)
}

// lowerDirs reads the directories from the mounts of a view: an overlay of
// several or a bind of one.
func lowerDirs(mounts []mount.Mount) ([]string, error) {
	if len(mounts) != 1 {
		return nil, fmt.Errorf("layers need %d mounts: %w", len(mounts), errdefs.ErrNotImplemented)
	}
	m := mounts[0]
	if m.Type == "bind" {
		return []string{m.Source}, nil
	}
	for _, o := range m.Options {
		if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
			return strings.Split(dirs, ":"), nil
		}
	}
	return nil, fmt.Errorf("layers are mounted as %q: %w", m.Type, errdefs.ErrNotImplemented)
}

// emptyLayer is the one layer of images without layers.
func (s *Store) emptyLayer() ([]string, error) {
	dir := filepath.Join(s.cfg.Root, "empty")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return []string{dir}, nil
}

// unpackAgain unpacks an image from its blobs, without a registry.
func (s *Store) unpackAgain(ctx context.Context, e *entry) error {
	ctx = s.scoped(ctx)
	if err := s.unpackMu.Lock(ctx, e.image.ID); err != nil {
		return err
	}
	defer s.unpackMu.Unlock(e.image.ID)
	lease := leases.Lease{ID: "unpack-" + strings.TrimPrefix(e.image.ID, "sha256:")}
	if _, err := s.leases.Create(ctx, leases.WithID(lease.ID)); err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("create lease: %w", err)
	}
	ctx = leases.WithLease(ctx, lease.ID)
	err := s.fetchAndUnpack(ctx, source{target: e.image.Manifest, fetcher: absent{}}, newReporter(e.image.ID))
	if err == nil {
		err = s.keepLayers(ctx, e.image)
	}
	if err != nil {
		s.abandon(lease, err)
		return fmt.Errorf("unpack again: %w", err)
	}
	return s.leases.Delete(context.WithoutCancel(ctx), lease)
}

// makeView makes the view snapshot that roots an image's layers and config.
func (s *Store) makeView(ctx context.Context, img Image) error {
	_, err := s.sn.View(ctx, viewName(img.ID), img.ChainID.String(), snapshots.WithLabels(map[string]string{
		"containerd.io/gc.root":               "image",
		"containerd.io/gc.ref.content.config": img.ID,
	}))
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("keep layers: %w", err)
	}
	return nil
}
