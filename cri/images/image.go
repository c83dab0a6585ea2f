package images

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	ctdimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is one image of the node. It is a value: callers may keep it.
type Image struct {
	// ID is the digest of the image's configuration, "sha256:...". It is the
	// image_ref of PullImageResponse and the image_id of containers.
	ID string
	// RepoTags are names like "docker.io/library/busybox:latest", sorted.
	RepoTags []string
	// RepoDigests are names like "docker.io/library/busybox@sha256:...", sorted.
	RepoDigests []string
	// Size in bytes of manifest, configuration and layers as distributed
	// (compressed), as containerd reports it.
	Size uint64
	// Config is the image's configuration.
	Config ocispec.Image
	// UID is the numeric user of the configuration, nil if it names none or
	// names it by Username.
	UID      *int64
	Username string
	// Pinned images are not to be collected by the kubelet.
	Pinned bool
	// ChainID identifies the unpacked layers; empty for an image of no layers.
	ChainID digest.Digest
	// Manifest is the descriptor of the platform's manifest.
	Manifest ocispec.Descriptor
	// Annotations of the manifest.
	Annotations map[string]string

	layers []ocispec.Descriptor // as distributed, the lowest first
}

// entry is what the index keeps of an image: all but its names.
type entry struct {
	image  Image             // without RepoTags, RepoDigests, Pinned
	refs   map[string]string // name -> digest of the descriptor it points to
	owners int               // containers that use the layers
	lower  []string          // cached layer directories, topmost first; nil: not looked up
}

// view is the Image as a caller sees it now.
func (e *entry) view(pinned *pinSet) Image {
	img := e.image
	for name := range e.refs {
		switch {
		case strings.HasPrefix(name, "sha256:"): // imported without a name
		case strings.Contains(name, "@"):
			img.RepoDigests = append(img.RepoDigests, name)
		default:
			img.RepoTags = append(img.RepoTags, name)
		}
		img.Pinned = img.Pinned || pinned.match(name)
	}
	slices.Sort(img.RepoTags)
	slices.Sort(img.RepoDigests)
	return img
}

// readImage reads what the content store has of the image that target (an
// index or a manifest) describes for this platform.
func readImage(ctx context.Context, cs content.Provider, target ocispec.Descriptor, platform platforms.MatchComparer) (Image, error) {
	desc, err := platformManifest(ctx, cs, target, platform)
	if err != nil {
		return Image{}, err
	}
	raw, err := content.ReadBlob(ctx, cs, desc)
	if err != nil {
		return Image{}, fmt.Errorf("read manifest %s: %w", desc.Digest, err)
	}
	var manifest ocispec.Manifest
	if err := json.Unmarshal(raw, &manifest); err != nil {
		return Image{}, fmt.Errorf("parse manifest %s: %w", desc.Digest, err)
	}
	if !ctdimages.IsConfigType(manifest.Config.MediaType) {
		return Image{}, fmt.Errorf("manifest %s is not of a container image: its config is %q: %w",
			desc.Digest, manifest.Config.MediaType, errdefs.ErrInvalidArgument)
	}
	raw, err = content.ReadBlob(ctx, cs, manifest.Config)
	if err != nil {
		return Image{}, fmt.Errorf("read image config %s: %w", manifest.Config.Digest, err)
	}
	img := Image{
		ID:          manifest.Config.Digest.String(),
		Size:        uint64(desc.Size + manifest.Config.Size),
		Manifest:    desc,
		Annotations: manifest.Annotations,
		layers:      manifest.Layers,
	}
	if err := json.Unmarshal(raw, &img.Config); err != nil {
		return Image{}, fmt.Errorf("parse image config %s: %w", manifest.Config.Digest, err)
	}
	if target.Digest != desc.Digest {
		img.Size += uint64(target.Size)
	}
	for _, l := range manifest.Layers {
		img.Size += uint64(l.Size)
	}
	if ids := img.Config.RootFS.DiffIDs; len(ids) > 0 {
		img.ChainID = identity.ChainID(ids)
	}
	img.UID, img.Username = parseUser(img.Config.Config.User)
	return img, nil
}

// platformManifest descends from target to the manifest for the platform.
func platformManifest(ctx context.Context, cs content.Provider, target ocispec.Descriptor, platform platforms.MatchComparer) (ocispec.Descriptor, error) {
	desc := target
	for range 4 { // indexes nest, but not deeper than this in practice
		if !ctdimages.IsIndexType(desc.MediaType) {
			return desc, nil
		}
		raw, err := content.ReadBlob(ctx, cs, desc)
		if err != nil {
			return desc, fmt.Errorf("read index %s: %w", desc.Digest, err)
		}
		var index ocispec.Index
		if err := json.Unmarshal(raw, &index); err != nil {
			return desc, fmt.Errorf("parse index %s: %w", desc.Digest, err)
		}
		best, ok := bestMatch(index.Manifests, platform)
		if !ok {
			return desc, fmt.Errorf("index %s has no image for %s: %w", desc.Digest, platforms.DefaultString(), errdefs.ErrNotFound)
		}
		desc = best
	}
	return desc, fmt.Errorf("index %s nests too deeply: %w", target.Digest, errdefs.ErrInvalidArgument)
}

// bestMatch picks the descriptor that containerd's LimitManifests picks: the
// first of the best platform; one without a platform only if none has one.
func bestMatch(descs []ocispec.Descriptor, platform platforms.MatchComparer) (ocispec.Descriptor, bool) {
	var best *ocispec.Descriptor
	for i := range descs {
		d := &descs[i]
		if !ctdimages.IsManifestType(d.MediaType) && !ctdimages.IsIndexType(d.MediaType) {
			continue
		}
		if d.Platform != nil && !platform.Match(*d.Platform) {
			continue
		}
		switch {
		case best == nil, best.Platform == nil && d.Platform != nil:
			best = d
		case d.Platform != nil && platform.Less(*d.Platform, *best.Platform):
			best = d
		}
	}
	if best == nil {
		return ocispec.Descriptor{}, false
	}
	return *best, true
}

// parseUser reads the user of an image config, "user[:group]" or "uid[:gid]".
func parseUser(s string) (*int64, string) {
	user, _, _ := strings.Cut(s, ":")
	if user == "" {
		return nil, ""
	}
	if uid, err := strconv.ParseInt(user, 10, 64); err == nil {
		return &uid, ""
	}
	return nil, user
}

// parseRef normalises a name ("busybox" -> "docker.io/library/busybox:latest").
func parseRef(ref string) (reference.Named, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, fmt.Errorf("parse image name %q: %s: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return named, nil
}

// namesFor are the names under which an image pulled as named is recorded.
func namesFor(named reference.Named, target digest.Digest) []string {
	names := []string{named.Name() + "@" + target.String()}
	if t, ok := named.(reference.NamedTagged); ok {
		names = append(names, named.Name()+":"+t.Tag())
	}
	return names
}

// minPrefix is the shortest prefix of an ID that Get accepts.
const minPrefix = 4

// lookup finds the ID for a name, digest name, ID, ID without algorithm, or
// unambiguous prefix of one. Callers hold s.mu.
func (s *Store) lookup(ref string) (string, error) {
	if ref == "" {
		return "", fmt.Errorf("look up image: no name given: %w", errdefs.ErrInvalidArgument)
	}
	visible := func(id string) bool { e := s.byID[id]; return e != nil && len(e.refs) > 0 }
	if visible(ref) {
		return ref, nil
	}
	if visible("sha256:" + ref) {
		return "sha256:" + ref, nil
	}
	if named, err := reference.ParseDockerRef(ref); err == nil {
		if id, ok := s.byRef[named.String()]; ok {
			return id, nil
		}
	}
	hex := strings.TrimPrefix(ref, "sha256:")
	if len(hex) >= minPrefix && len(hex) < 64 && isHex(hex) {
		var found []string
		for id, e := range s.byID {
			if len(e.refs) > 0 && strings.HasPrefix(id, "sha256:"+hex) {
				found = append(found, id)
			}
		}
		switch len(found) {
		case 1:
			return found[0], nil
		case 0:
		default:
			return "", fmt.Errorf("look up image %q: %d images have this prefix: %w", ref, len(found), errdefs.ErrInvalidArgument)
		}
	}
	return "", fmt.Errorf("look up image %q: %w", ref, errdefs.ErrNotFound)
}

func isHex(s string) bool {
	return strings.Trim(s, "0123456789abcdef") == ""
}

// List returns every image that has a name (or was imported without one),
// ordered by ID. It reads memory only.
func (s *Store) List(context.Context) ([]Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Image, 0, len(s.byID))
	for _, id := range slices.Sorted(maps.Keys(s.byID)) {
		if e := s.byID[id]; len(e.refs) > 0 {
			out = append(out, e.view(s.live.Load().pins))
		}
	}
	return out, nil
}

// Get finds an image by name (normalised first), digest name, ID, or a prefix
// of at least four hex digits of an ID. It reads memory only.
//
// Errors: NotFound; InvalidArgument if the prefix is ambiguous.
func (s *Store) Get(_ context.Context, ref string) (Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id, err := s.lookup(ref)
	if err != nil {
		return Image{}, err
	}
	return s.byID[id].view(s.live.Load().pins), nil
}

// pinSet matches image names against the patterns of the configuration.
type pinSet struct{ exprs []*regexp.Regexp }

// newPinSet compiles glob patterns; "*" matches any run of characters, slashes
// included, "?" one. A pattern without a tag or digest matches any tag.
func newPinSet(patterns []string) (*pinSet, error) {
	set := &pinSet{}
	for _, p := range patterns {
		q := regexp.QuoteMeta(p)
		q = strings.ReplaceAll(q, `\*`, `.*`)
		q = strings.ReplaceAll(q, `\?`, `.`)
		expr, err := regexp.Compile(`^(?:docker\.io/|docker\.io/library/)?` + q + `(?:[:@][^/]*)?$`)
		if err != nil {
			return nil, fmt.Errorf("pattern %q of pinned images: %w: %w", p, err, errdefs.ErrInvalidArgument)
		}
		set.exprs = append(set.exprs, expr)
	}
	return set, nil
}

func (p *pinSet) match(name string) bool {
	for _, e := range p.exprs {
		if e.MatchString(name) {
			return true
		}
	}
	return false
}
