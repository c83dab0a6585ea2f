// Package images builds container images without any network or daemon, for
// tests, demos and benchmarks: layers from lists of entries or directories,
// configurations, multi-platform indexes; written as OCI layout, OCI archive
// or docker archive, or pushed to a registry by the registry protocol.
//
// It must not be imported by production code. It builds everything in memory
// and keeps no state; all functions may be called at the same time. Images are
// reproducible: the same input gives the same digests.
package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Config is what an image says about running it.
type Config struct {
	Env, Cmd, Entrypoint []string
	User, WorkingDir     string
	Volumes              []string
	StopSignal           string
	ExposedPorts         []string // "80/tcp"
	Labels               map[string]string
	Annotations          map[string]string // of the manifest
	OS, Architecture     string            // empty: this machine's
	Variant              string
}

// Compression of a layer.
type Compression int

// Compressions; Gzip is what most registries hold.
const (
	Gzip Compression = iota
	Zstd
	None
)

// Entry is one entry of a layer. A regular file's content is Data, or the file
// called Source. Typeflag 0 stands for tar.TypeReg.
type Entry struct {
	Name               string
	Typeflag           byte
	Mode               int64 // permissions and setuid etc.; 0: 0755 for directories, 0644 else
	UID, GID           int
	Data               []byte
	Source             string
	Link               string // target of a symbolic or hard link
	Xattrs             map[string]string
	DevMajor, DevMinor int64
}

// Dir, File, Symlink and Hardlink are the common entries.
func Dir(name string) Entry        { return Entry{Name: name, Typeflag: tar.TypeDir} }
func File(name, data string) Entry { return Entry{Name: name, Data: []byte(data)} }
func Symlink(name, target string) Entry {
	return Entry{Name: name, Typeflag: tar.TypeSymlink, Link: target}
}
func Hardlink(name, target string) Entry {
	return Entry{Name: name, Typeflag: tar.TypeLink, Link: target}
}

// Whiteout removes name of the layers below; Opaque hides all they have in the
// directory dir.
func Whiteout(name string) Entry {
	return Entry{Name: filepath.Join(filepath.Dir(name), ".wh."+filepath.Base(name))}
}
func Opaque(dir string) Entry { return Entry{Name: filepath.Join(dir, ".wh..wh..opq")} }

// Executable is a program of the host, at name in the image.
func Executable(name, source string) Entry {
	return Entry{Name: name, Source: source, Mode: 0o755}
}

// Blob is content with its descriptor.
type Blob struct {
	Desc ocispec.Descriptor
	Data []byte
}

// NewBlob describes data.
func NewBlob(mediaType string, data []byte) Blob {
	return Blob{Desc: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}, Data: data}
}

// Layer is a layer as distributed, and the digest of its tar.
type Layer struct {
	Blob
	DiffID digest.Digest
}

// NewLayer packs entries in the order given; names are taken as they are, so
// that tests can make what no archiver would.
func NewLayer(c Compression, entries ...Entry) (Layer, error) {
	var plain bytes.Buffer
	tw := tar.NewWriter(&plain)
	for _, e := range entries {
		if err := writeEntry(tw, e); err != nil {
			return Layer{}, fmt.Errorf("pack %q: %w", e.Name, err)
		}
	}
	if err := tw.Close(); err != nil {
		return Layer{}, err
	}
	return LayerOfTar(c, plain.Bytes())
}

// LayerOfTar makes a layer of a tar archive.
func LayerOfTar(c Compression, plain []byte) (Layer, error) {
	data, mediaType := plain, ocispec.MediaTypeImageLayer
	switch c {
	case Gzip:
		var out bytes.Buffer
		w := gzip.NewWriter(&out)
		if _, err := w.Write(plain); err != nil {
			return Layer{}, err
		}
		if err := w.Close(); err != nil {
			return Layer{}, err
		}
		data, mediaType = out.Bytes(), ocispec.MediaTypeImageLayerGzip
	case Zstd:
		enc, err := zstd.NewWriter(nil)
		if err != nil {
			return Layer{}, err
		}
		data, mediaType = enc.EncodeAll(plain, nil), ocispec.MediaTypeImageLayerZstd
		if err := enc.Close(); err != nil {
			return Layer{}, err
		}
	}
	return Layer{Blob: NewBlob(mediaType, data), DiffID: digest.FromBytes(plain)}, nil
}

func writeEntry(tw *tar.Writer, e Entry) error {
	data := e.Data
	if e.Source != "" {
		var err error
		if data, err = os.ReadFile(e.Source); err != nil {
			return err
		}
	}
	h := &tar.Header{Name: e.Name, Typeflag: e.Typeflag, Mode: e.Mode, Uid: e.UID, Gid: e.GID, Linkname: e.Link,
		Devmajor: e.DevMajor, Devminor: e.DevMinor, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
	if h.Typeflag == 0 {
		h.Typeflag = tar.TypeReg
	}
	if h.Mode == 0 {
		h.Mode = 0o644
		if h.Typeflag == tar.TypeDir {
			h.Mode = 0o755
		}
	}
	if h.Typeflag == tar.TypeReg {
		h.Size = int64(len(data))
	}
	for k, v := range e.Xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+k] = v
	}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	_, err := tw.Write(data[:h.Size])
	return err
}

// FromDir lists the entries of a root filesystem directory, with owners,
// modes and security.capability, sorted by name.
func FromDir(dir string) ([]Entry, error) {
	var out []Entry
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		e, err := fromFile(path, rel)
		if err == nil {
			out = append(out, e)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list root filesystem %q: %w", dir, err)
	}
	return out, nil
}

func fromFile(path, rel string) (Entry, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return Entry{}, err
	}
	st := info.Sys().(*syscall.Stat_t)
	e := Entry{Name: rel, Mode: int64(st.Mode & 0o7777), UID: int(st.Uid), GID: int(st.Gid)}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.Typeflag = tar.TypeDir
	case unix.S_IFLNK:
		e.Typeflag = tar.TypeSymlink
		e.Link, err = os.Readlink(path)
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			e.Typeflag = tar.TypeBlock
		}
		e.DevMajor, e.DevMinor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	case unix.S_IFIFO:
		e.Typeflag = tar.TypeFifo
	default:
		e.Source = path
	}
	buf := make([]byte, 256)
	if n, xerr := unix.Lgetxattr(path, "security.capability", buf); xerr == nil {
		e.Xattrs = map[string]string{"security.capability": string(buf[:n])}
	}
	return e, err
}

// Artifact is an Image or an Index.
type Artifact interface {
	// Blobs are all configurations and layers, Manifests all manifests and
	// indexes, children before parents: the last one is the artifact's own.
	Blobs() []Blob
	Manifests() []Blob
}

// Image is one platform's image.
type Image struct {
	Manifest Blob
	Config   Blob
	Layers   []Layer
}

// New makes an image of layers, the lowest first.
func New(cfg Config, layers ...Layer) (Image, error) {
	conf := ocispec.Image{
		Platform: ocispec.Platform{OS: cfg.OS, Architecture: cfg.Architecture, Variant: cfg.Variant},
		Config: ocispec.ImageConfig{
			User: cfg.User, Env: cfg.Env, Entrypoint: cfg.Entrypoint, Cmd: cfg.Cmd, WorkingDir: cfg.WorkingDir,
			Labels: cfg.Labels, StopSignal: cfg.StopSignal, Volumes: set(cfg.Volumes), ExposedPorts: set(cfg.ExposedPorts),
		},
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}},
	}
	if conf.OS == "" {
		conf.OS = "linux"
	}
	if conf.Architecture == "" {
		conf.Architecture = runtime.GOARCH
	}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Annotations: cfg.Annotations, Layers: []ocispec.Descriptor{}}
	for _, l := range layers {
		conf.RootFS.DiffIDs = append(conf.RootFS.DiffIDs, l.DiffID)
		conf.History = append(conf.History, ocispec.History{CreatedBy: "nodeagent test/images"})
		m.Layers = append(m.Layers, l.Desc)
	}
	raw, err := json.Marshal(conf)
	if err != nil {
		return Image{}, err
	}
	img := Image{Config: NewBlob(ocispec.MediaTypeImageConfig, raw), Layers: layers}
	m.Config = img.Config.Desc
	if raw, err = json.Marshal(m); err != nil {
		return Image{}, err
	}
	img.Manifest = NewBlob(ocispec.MediaTypeImageManifest, raw)
	img.Manifest.Desc.Platform = &conf.Platform
	return img, nil
}

func set(in []string) map[string]struct{} {
	if len(in) == 0 {
		return nil
	}
	out := map[string]struct{}{}
	for _, s := range in {
		out[s] = struct{}{}
	}
	return out
}

// Build makes a one-layer image of entries.
func Build(cfg Config, entries ...Entry) (Image, error) {
	l, err := NewLayer(Gzip, entries...)
	if err != nil {
		return Image{}, err
	}
	return New(cfg, l)
}

// BuildDir makes a one-layer image of a root filesystem directory.
func BuildDir(cfg Config, dir string) (Image, error) {
	entries, err := FromDir(dir)
	if err != nil {
		return Image{}, err
	}
	return Build(cfg, entries...)
}

// ID is the image's ID: the digest of its configuration.
func (i Image) ID() string { return i.Config.Desc.Digest.String() }

func (i Image) Blobs() []Blob {
	out := []Blob{i.Config}
	for _, l := range i.Layers {
		out = append(out, l.Blob)
	}
	return out
}

func (i Image) Manifests() []Blob { return []Blob{i.Manifest} }

// Index is a multi-platform image.
type Index struct {
	Index    Blob
	Children []Artifact
}

// NewIndex makes an index of images or indexes.
func NewIndex(children ...Artifact) (Index, error) {
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, c := range children {
		idx.Manifests = append(idx.Manifests, Top(c).Desc)
	}
	raw, err := json.Marshal(idx)
	if err != nil {
		return Index{}, err
	}
	return Index{Index: NewBlob(ocispec.MediaTypeImageIndex, raw), Children: children}, nil
}

func (x Index) Blobs() []Blob {
	var out []Blob
	for _, c := range x.Children {
		out = append(out, c.Blobs()...)
	}
	return out
}

func (x Index) Manifests() []Blob {
	var out []Blob
	for _, c := range x.Children {
		out = append(out, c.Manifests()...)
	}
	return append(out, x.Index)
}

// Top is the manifest or index that a name of the artifact points to.
func Top(a Artifact) Blob {
	m := a.Manifests()
	return m[len(m)-1]
}

// WriteLayout writes artifacts by name into an OCI layout directory, which is
// made if absent and overwritten otherwise.
func WriteLayout(dir string, named map[string]Artifact) error {
	return layout(named, func(name string, data []byte) error {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		return os.WriteFile(path, data, 0o644)
	})
}

// WriteArchive writes artifacts by name as an OCI archive (a tar).
func WriteArchive(w io.Writer, named map[string]Artifact) error {
	tw := tar.NewWriter(w)
	err := layout(named, func(name string, data []byte) error { return writeEntry(tw, Entry{Name: name, Data: data}) })
	if err != nil {
		return err
	}
	return tw.Close()
}

// layout puts the files of an OCI layout in a stable order.
func layout(named map[string]Artifact, put func(name string, data []byte) error) error {
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	if err := put(ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
		return err
	}
	seen := map[digest.Digest]bool{}
	for _, name := range sortedKeys(named) {
		a := named[name]
		for _, b := range append(a.Blobs(), a.Manifests()...) {
			if seen[b.Desc.Digest] {
				continue
			}
			seen[b.Desc.Digest] = true
			if err := put("blobs/"+b.Desc.Digest.Algorithm().String()+"/"+b.Desc.Digest.Encoded(), b.Data); err != nil {
				return err
			}
		}
		desc := Top(a).Desc
		desc.Annotations = map[string]string{ocispec.AnnotationRefName: name}
		if name == "" {
			desc.Annotations = nil
		}
		idx.Manifests = append(idx.Manifests, desc)
	}
	raw, err := json.Marshal(idx)
	if err != nil {
		return err
	}
	return put(ocispec.ImageIndexFile, raw)
}

// WriteDockerArchive writes images by name as `docker save` does (layers are
// stored as they are).
func WriteDockerArchive(w io.Writer, named map[string]Image) error {
	type item struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	var items []item
	tw := tar.NewWriter(w)
	seen := map[string]bool{}
	put := func(name string, data []byte) error {
		if seen[name] {
			return nil
		}
		seen[name] = true
		return writeEntry(tw, Entry{Name: name, Data: data})
	}
	for _, name := range sortedKeys(named) {
		img := named[name]
		it := item{Config: img.Config.Desc.Digest.Encoded() + ".json", RepoTags: []string{name}}
		if err := put(it.Config, img.Config.Data); err != nil {
			return err
		}
		for _, l := range img.Layers {
			file := l.DiffID.Encoded() + "/layer.tar"
			it.Layers = append(it.Layers, file)
			if err := put(file, l.Data); err != nil {
				return err
			}
		}
		items = append(items, it)
	}
	raw, err := json.Marshal(items)
	if err != nil {
		return err
	}
	if err := put("manifest.json", raw); err != nil {
		return err
	}
	return tw.Close()
}

func sortedKeys[V any](m map[string]V) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.SortFunc(out, strings.Compare)
	return out
}
