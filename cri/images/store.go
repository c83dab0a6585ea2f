package images

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	ctdimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/metadata/boltutil"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	ctdlog "github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sync/semaphore"
)

// namespace is ours in containerd's schema; snapshotter is the name under
// which the GC labels know the overlay snapshotter.
const (
	namespace   = "nodeagent"
	snapshotter = "overlayfs"
)

// Config of a Store. Root is required, the rest has defaults.
type Config struct {
	// Root is the directory that holds everything, made if absent.
	Root string
	Settings
	// MaxParallelUnpacks bounds the layers in unpacking on the node (0: 4).
	MaxParallelUnpacks int
	// KeepPartial is how long the remains of a failed pull wait for the next
	// attempt before they are collected (0: 10 minutes; negative: not at all).
	KeepPartial time.Duration
	// UserAgent is sent to registries (empty: "nodeagent").
	UserAgent string
	// BootIDPath tells boots apart (empty: the kernel's).
	BootIDPath string
	Log        *slog.Logger
}

func (c Config) withDefaults() Config {
	c.MaxParallelUnpacks = cmp.Or(c.MaxParallelUnpacks, 4)
	if c.KeepPartial == 0 {
		c.KeepPartial = 10 * time.Minute
	}
	if c.UserAgent == "" {
		c.UserAgent = "nodeagent"
	}
	if c.BootIDPath == "" {
		c.BootIDPath = "/proc/sys/kernel/random/boot_id"
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Store is the node's image store. See the package comment for its rules.
type Store struct {
	cfg      Config
	log      *slog.Logger
	platform platforms.MatchComparer
	live     atomic.Pointer[settings]

	libraryLog *ctdlog.Entry

	db       *metadata.DB
	sn       snapshots.Snapshotter // namespaced by db
	backend  snapshots.Snapshotter
	content  content.Store // namespaced by db
	records  ctdimages.Store
	leases   leases.Manager
	blobs    *keyLock
	unpacks  *semaphore.Weighted
	unpackMu *keyLock // per image, for unpacking again
	state    *stateFile

	collect chan struct{} // capacity 1: ask Run for a collection
	sync    chan string   // images whose layers Run is to sync

	life    context.Context // of pulls; ends at Close
	endLife context.CancelFunc
	pulls   sync.WaitGroup

	gcMu  sync.Mutex // one collection at a time; taken before recMu
	recMu sync.Mutex // orders changes of the records with those of the index; taken before mu

	mu       sync.Mutex // guards all below
	byID     map[string]*entry
	byRef    map[string]string // name -> ID
	owners   map[string]string // owner -> ID
	flights  map[flightKey]*flight
	active   int                  // pulls and imports that have not ended
	retryGC  bool                 // the last collection failed
	partial  map[string]time.Time // leases of failed pulls -> when to drop them
	restored bool
	swept    bool // the collection that looks for orphans has been
	closed   bool
	usage    *FsUsage // cached; nil when something has changed since
}

// New opens the store under cfg.Root, making it if absent. It starts nothing
// but holds the store's lock until Close.
//
// Errors: Unavailable if another process has the store open.
func New(cfg Config) (*Store, error) {
	cfg = cfg.withDefaults()
	if cfg.Root == "" {
		return nil, fmt.Errorf("open image store: no root directory given: %w", errdefs.ErrInvalidArgument)
	}
	s := &Store{
		cfg:      cfg,
		log:      cfg.Log,
		platform: platforms.Default(),
		blobs:    newKeyLock(),
		unpackMu: newKeyLock(),
		unpacks:  semaphore.NewWeighted(int64(cfg.MaxParallelUnpacks)),
		collect:  make(chan struct{}, 1),
		sync:     make(chan string, 64),
		byID:     map[string]*entry{},
		byRef:    map[string]string{},
		owners:   map[string]string{},
		flights:  map[flightKey]*flight{},
		partial:  map[string]time.Time{},
	}
	if err := s.Configure(cfg.Settings); err != nil {
		return nil, fmt.Errorf("open image store: %w", err)
	}
	s.libraryLog = containerdLog(cfg.Log)
	s.life, s.endLife = context.WithCancel(s.scoped(context.Background()))
	if err := s.open(); err != nil {
		s.endLife()
		return nil, fmt.Errorf("open image store %q: %w", cfg.Root, err)
	}
	return s, nil
}

// open opens the databases and loads the index; on error all is closed again.
func (s *Store) open() (err error) {
	if err := os.MkdirAll(s.cfg.Root, 0o700); err != nil {
		return err
	}
	opts := *bolt.DefaultOptions
	opts.Timeout = 2 * time.Second
	opts.NoStatistics = true
	bdb, err := bolt.Open(filepath.Join(s.cfg.Root, "metadata.db"), 0o600, &opts)
	if errors.Is(err, berrors.ErrTimeout) {
		return fmt.Errorf("another process has it open: %w", errdefs.ErrUnavailable)
	}
	if err != nil {
		return fmt.Errorf("open metadata.db: %w", err)
	}
	defer func() {
		if err != nil {
			bdb.Close()
		}
	}()
	if err := s.dropTornIngests(time.Now()); err != nil {
		return err
	}
	cs, err := local.NewStore(filepath.Join(s.cfg.Root, "content"))
	if err != nil {
		return fmt.Errorf("open content store: %w", err)
	}
	if s.backend, err = openSnapshotter(s.life, filepath.Join(s.cfg.Root, "snapshots")); err != nil {
		return fmt.Errorf("open snapshotter: %w", err)
	}
	defer func() {
		if err != nil {
			s.backend.Close()
		}
	}()
	s.db = metadata.NewDB(bdb, cs, map[string]snapshots.Snapshotter{snapshotter: s.backend})
	if err := s.db.Init(s.life); err != nil {
		return fmt.Errorf("prepare metadata.db: %w", err)
	}
	s.content = s.db.ContentStore()
	s.sn = s.db.Snapshotter(snapshotter)
	s.records = metadata.NewImageStore(s.db)
	s.leases = metadata.NewLeaseManager(s.db)
	if s.state, err = openState(s.cfg.Root, s.cfg.BootIDPath); err != nil {
		return err
	}
	return s.load()
}

// openSnapshotter opens the overlay snapshotter. A process killed while it made
// a snapshot can leave the directory <id> without the record; as the id is
// given out again, making the next snapshot would fail. So such directories get
// another name first; the collector deletes them.
func openSnapshotter(ctx context.Context, root string) (_ snapshots.Snapshotter, err error) {
	if err := os.MkdirAll(filepath.Join(root, "snapshots"), 0o700); err != nil {
		return nil, err
	}
	ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			ms.Close()
		}
	}()
	known := map[string]string{}
	if err := ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		if err == nil {
			known = ids
		} else if errdefs.IsNotFound(err) {
			err = nil // nothing was ever recorded
		}
		return err
	}); err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	entries, err := os.ReadDir(filepath.Join(root, "snapshots"))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if _, ok := known[e.Name()]; ok || strings.HasPrefix(e.Name(), "new-") {
			continue
		}
		path := filepath.Join(root, "snapshots", e.Name())
		if err := os.Rename(path, filepath.Join(root, "snapshots", "new-orphan-"+rand.Text())); err != nil {
			return nil, fmt.Errorf("set orphaned snapshot aside: %w", err)
		}
	}
	return overlay.NewSnapshotter(root, overlay.AsynchronousRemove, overlay.WithUpperdirLabel, overlay.WithMetaStore(ms))
}

// dropTornIngests removes partial downloads that a process had only begun to
// note down before that time, when it was killed or the disk was full; the
// content store cannot name them. No pull of that time may be in flight.
func (s *Store) dropTornIngests(before time.Time) error {
	dir := filepath.Join(s.cfg.Root, "content", "ingest")
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("list partial downloads: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if st, err := os.Stat(filepath.Join(path, "ref")); err == nil && st.Size() > 0 {
			continue
		}
		if st, err := os.Stat(path); err != nil || st.ModTime().After(before) {
			continue
		}
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("drop partial download: %w", err)
		}
	}
	return nil
}

// load fills the index from the records. A record whose content is damaged or
// gone is logged and left alone, invisible.
func (s *Store) load() error {
	records, err := s.records.List(s.life)
	if err != nil {
		return fmt.Errorf("list image records: %w", err)
	}
	for _, r := range records {
		img, err := readImage(s.life, s.content, r.Target, s.platform)
		if err != nil {
			s.log.Error("image record cannot be read", "image", r.Name, "err", err)
			continue
		}
		s.index(img, r.Name, r.Target.Digest.String())
	}
	old, err := s.leases.List(s.life)
	if err != nil {
		return fmt.Errorf("list leases: %w", err)
	}
	for _, l := range old { // of pulls that a former process did not finish
		s.partial[l.ID] = time.Now().Add(max(s.cfg.KeepPartial, 0))
	}
	return s.dropTorn()
}

// dropTorn forgets the unpacked layers of images that the end of the last boot
// came too early for. They are unpacked again when first used.
func (s *Store) dropTorn() error {
	for _, id := range s.state.tornImages() {
		if e := s.byID[id]; e != nil {
			if err := s.dropLayers(e.image); err != nil {
				return fmt.Errorf("drop unsynced layers of image %q: %w", id, err)
			}
			if err := s.dropIncomplete(e); err != nil {
				return fmt.Errorf("drop image %q: %w", id, err)
			}
			s.log.Warn("layers of image were not synced before the last boot ended, unpacking again", "image", id)
		}
		if err := s.state.synced(id); err != nil {
			return err
		}
	}
	return nil
}

// dropIncomplete forgets an image if not all of its blobs are there to unpack
// it again: when its layers were there from an earlier pull, they were not
// fetched. It has to be pulled once more.
func (s *Store) dropIncomplete(e *entry) error {
	for _, l := range e.image.layers {
		_, err := s.content.Info(s.life, l.Digest)
		if err == nil {
			continue
		}
		if !errdefs.IsNotFound(err) {
			return err
		}
		for _, name := range keys(e.refs) {
			if err := s.records.Delete(s.life, name); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
			s.unindex(name)
		}
		return nil
	}
	return nil
}

// dropLayers removes the snapshots of an image from the top down to the first
// that another image builds on. If that is torn as well, its own turn comes.
func (s *Store) dropLayers(img Image) error {
	if err := s.sn.Remove(s.life, viewName(img.ID)); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	for _, chain := range slices.Backward(chainIDs(img)) {
		err := s.sn.Remove(s.life, chain.String())
		if errdefs.IsFailedPrecondition(err) {
			return nil
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// chainIDs name the snapshots of an image's layers, the lowest first.
func chainIDs(img Image) []digest.Digest {
	return identity.ChainIDs(slices.Clone(img.Config.RootFS.DiffIDs))
}

// index notes that name points to img. Callers hold s.mu or are alone.
func (s *Store) index(img Image, name, target string) {
	if was, ok := s.byRef[name]; ok && was != img.ID {
		s.unindex(name)
	}
	e := s.byID[img.ID]
	if e == nil {
		e = &entry{image: img, refs: map[string]string{}}
		s.byID[img.ID] = e
	}
	e.refs[name] = target
	s.byRef[name] = img.ID
	s.usage = nil
}

// unindex forgets a name, and the image with it unless it is used otherwise.
// Callers hold s.mu.
func (s *Store) unindex(name string) {
	id := s.byRef[name]
	delete(s.byRef, name)
	if e := s.byID[id]; e != nil {
		delete(e.refs, name)
		s.dropUnused(id)
	}
	s.usage = nil
}

// dropUnused forgets an image without names and owners. Callers hold s.mu.
func (s *Store) dropUnused(id string) {
	if e := s.byID[id]; e != nil && len(e.refs) == 0 && e.owners == 0 {
		delete(s.byID, id)
		s.askCollect()
	}
}

// update runs fn with all changes to the metadata in one transaction (one
// sync of the disk).
func (s *Store) update(ctx context.Context, fn func(context.Context) error) error {
	return s.db.Update(func(tx *bolt.Tx) error {
		return fn(boltutil.WithTransaction(ctx, tx))
	})
}

// record makes or changes the records called names. Runs inside update.
func (s *Store) record(ctx context.Context, names []string, img ctdimages.Image) error {
	for _, name := range names {
		img.Name = name
		_, err := s.records.Create(ctx, img)
		if errdefs.IsAlreadyExists(err) {
			_, err = s.records.Update(ctx, img, "target")
		}
		if err != nil {
			return fmt.Errorf("record image %q: %w", name, err)
		}
	}
	return nil
}

// Close ends the pulls in flight, waits for them, and releases the store.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.endLife()
	s.pulls.Wait()
	return errors.Join(s.backend.Close(), s.db.Close())
}

// viewName is the snapshot that keeps the layers of an image.
func viewName(id string) string { return "image-" + strings.TrimPrefix(id, "sha256:") }

// viewImage is the inverse of viewName.
func viewImage(name string) (id string, ok bool) {
	hex, ok := strings.CutPrefix(name, "image-")
	return "sha256:" + hex, ok
}
