package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

var (
	bucketSandboxes  = []byte("sandboxes")
	bucketContainers = []byte("containers")
	bucketSpecs      = []byte("specs")
)

// Config of a DB.
type Config struct {
	Path      string        // file; its directory is made if missing
	LazyDelay time.Duration // how long a lazy write may wait; 0 means 250 ms
	Log       *slog.Logger  // nil means none
}

// DB is the file of records.
type DB struct {
	bolt *bbolt.DB
	log  *slog.Logger
	lazy time.Duration

	mu      sync.Mutex // guards what follows
	queue   []*write
	leading bool // somebody commits
	timer   *time.Timer
	closed  bool
}

type write struct {
	ops  []op
	done chan result // nil: lazy, nobody waits
}

type result struct {
	err  error
	lead bool // not committed yet: the receiver commits what is queued
}

type op struct {
	bucket []byte
	key    string
	value  []byte // nil: delete
}

// Open opens or makes the file. It fails with ErrUnavailable when another
// process has it open.
func Open(cfg Config) (*DB, error) {
	if cfg.Path == "" {
		return nil, fmt.Errorf("open records: no path given: %w", errdefs.ErrInvalidArgument)
	}
	if cfg.LazyDelay <= 0 {
		cfg.LazyDelay = 250 * time.Millisecond
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(filepath.Dir(cfg.Path), 0o711); err != nil {
		return nil, fmt.Errorf("open records %s: %w", cfg.Path, err)
	}
	b, err := bbolt.Open(cfg.Path, 0o600, &bbolt.Options{
		Timeout:        2 * time.Second,
		NoFreelistSync: true, // one page fewer to sync per commit; rebuilt at open
		FreelistType:   bbolt.FreelistMapType,
	})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("open records %s: another process has it open; is a daemon running on the same root? %w", cfg.Path, errdefs.ErrUnavailable)
	}
	if err != nil {
		return nil, fmt.Errorf("open records %s: %w", cfg.Path, err)
	}
	err = b.View(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketSandboxes, bucketContainers, bucketSpecs} {
			if tx.Bucket(name) == nil {
				return errdefs.ErrNotFound
			}
		}
		return nil
	})
	if err != nil {
		err = b.Update(func(tx *bbolt.Tx) error {
			for _, name := range [][]byte{bucketSandboxes, bucketContainers, bucketSpecs} {
				if _, err := tx.CreateBucketIfNotExists(name); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open records %s: make buckets: %w", cfg.Path, err), b.Close())
	}
	return &DB{bolt: b, log: cfg.Log, lazy: cfg.LazyDelay}, nil
}

// Close writes what is queued and closes the file.
func (d *DB) Close() error {
	err := d.commit(&write{done: make(chan result, 1)})
	d.mu.Lock()
	d.closed = true
	if d.timer != nil {
		d.timer.Stop()
	}
	d.mu.Unlock()
	return errors.Join(err, d.bolt.Close())
}

// PutSandbox stores s; it is on disk when PutSandbox returns nil.
func (d *DB) PutSandbox(s *Sandbox) error {
	data, err := EncodeSandbox(s)
	if err != nil {
		return err
	}
	return d.commit(&write{ops: []op{{bucketSandboxes, s.ID, data}}, done: make(chan result, 1)})
}

// DeleteSandbox removes the record; a missing one is no error.
func (d *DB) DeleteSandbox(id string) error {
	return d.commit(&write{ops: []op{{bucketSandboxes, id, nil}}, done: make(chan result, 1)})
}

// PutContainer stores c, and its OCI spec unless spec is nil; both are on disk
// when PutContainer returns nil.
func (d *DB) PutContainer(c *Container, spec []byte) error {
	data, err := EncodeContainer(c)
	if err != nil {
		return err
	}
	ops := []op{{bucketContainers, c.ID, data}}
	if spec != nil {
		ops = append(ops, op{bucketSpecs, c.ID, spec})
	}
	return d.commit(&write{ops: ops, done: make(chan result, 1)})
}

// PutContainerLazy stores c with the next commit, or after LazyDelay. For
// facts that can be had from the shim should we die before that.
func (d *DB) PutContainerLazy(c *Container) error {
	data, err := EncodeContainer(c)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return errClosed
	}
	d.queue = append(d.queue, &write{ops: []op{{bucketContainers, c.ID, data}}})
	d.armLocked()
	return nil
}

// DeleteContainer removes the record and the spec; missing ones are no error.
func (d *DB) DeleteContainer(id string) error {
	return d.commit(&write{ops: []op{{bucketContainers, id, nil}, {bucketSpecs, id, nil}}, done: make(chan result, 1)})
}

// Spec returns the stored OCI spec of a container, or ErrNotFound.
func (d *DB) Spec(id string) ([]byte, error) {
	var spec []byte
	err := d.bolt.View(func(tx *bbolt.Tx) error {
		v := tx.Bucket(bucketSpecs).Get([]byte(id))
		if v == nil {
			return fmt.Errorf("read OCI spec of container %s: %w", id, errdefs.ErrNotFound)
		}
		spec = append([]byte(nil), v...)
		return nil
	})
	return spec, err
}

// Refused is a record that cannot be read, and what it holds on to as far as
// that can be told.
type Refused struct {
	Err         error
	NamespaceID string
	Images      []string // IDs, that of the root filesystem first
}

func refuse(data []byte, err error) Refused {
	var r struct {
		Namespaces Namespaces `json:"namespaces"`
		ImageID    string     `json:"imageID"`
		Volumes    []string   `json:"imageVolumes"`
	}
	_ = json.Unmarshal(data, &r) // a guess is better than nothing
	out := Refused{Err: err, NamespaceID: r.Namespaces.ID}
	if r.ImageID != "" {
		out.Images = append([]string{r.ImageID}, r.Volumes...)
	}
	return out
}

// Load reads every record. Records that cannot be read are returned by key in
// refused, with the reason; they stay on disk.
func (d *DB) Load() (sandboxes []*Sandbox, containers []*Container, refused map[string]Refused, err error) {
	refused = map[string]Refused{}
	err = d.bolt.View(func(tx *bbolt.Tx) error {
		err := tx.Bucket(bucketSandboxes).ForEach(func(k, v []byte) error {
			s, err := DecodeSandbox(v)
			if err == nil && s.ID != string(k) {
				err = fmt.Errorf("decode sandbox record: it says id %q: %w", s.ID, errdefs.ErrInvalidArgument)
			}
			if err != nil {
				refused[string(k)] = refuse(v, err)
				return nil
			}
			sandboxes = append(sandboxes, s)
			return nil
		})
		if err != nil {
			return err
		}
		return tx.Bucket(bucketContainers).ForEach(func(k, v []byte) error {
			c, err := DecodeContainer(v)
			if err == nil && c.ID != string(k) {
				err = fmt.Errorf("decode container record: it says id %q: %w", c.ID, errdefs.ErrInvalidArgument)
			}
			if err != nil {
				refused[string(k)] = refuse(v, err)
				return nil
			}
			containers = append(containers, c)
			return nil
		})
	})
	if err != nil {
		return nil, nil, nil, fmt.Errorf("load records: %w", err)
	}
	return sandboxes, containers, refused, nil
}

var errClosed = fmt.Errorf("write record: the store is closed: %w", errdefs.ErrUnavailable)

// commit queues w and returns when it is on disk. One of the waiting callers
// writes for all.
func (d *DB) commit(w *write) error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return errClosed
	}
	d.queue = append(d.queue, w)
	if d.leading {
		d.mu.Unlock()
		r := <-w.done
		if !r.lead {
			return r.err
		}
		d.mu.Lock() // leadership was handed over: leading is still true
	}
	d.leading = true
	batch := d.queue
	d.queue = nil
	d.mu.Unlock()

	err := d.write(batch)

	d.mu.Lock()
	if err != nil {
		// Facts that nobody waits for are tried again with the next commit,
		// before anything newer about the same container.
		var keep []*write
		for _, b := range batch {
			if b.done == nil {
				keep = append(keep, b)
			}
		}
		if len(keep) > 0 {
			d.queue = append(keep, d.queue...)
			d.armLocked()
		}
	}
	d.leading = false
	for _, next := range d.queue {
		if next.done != nil {
			d.leading = true
			next.done <- result{lead: true}
			break
		}
	}
	d.mu.Unlock()
	for _, b := range batch {
		if b.done != nil && b != w {
			b.done <- result{err: err}
		}
	}
	return err
}

func (d *DB) write(batch []*write) error {
	n := 0
	for _, w := range batch {
		n += len(w.ops)
	}
	if n == 0 {
		return nil
	}
	err := d.bolt.Update(func(tx *bbolt.Tx) error {
		for _, w := range batch {
			for _, o := range w.ops {
				b := tx.Bucket(o.bucket)
				var err error
				if o.value == nil {
					err = b.Delete([]byte(o.key))
				} else {
					err = b.Put([]byte(o.key), o.value)
				}
				if err != nil {
					return fmt.Errorf("%s/%s: %w", o.bucket, o.key, err)
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("write %d records to %s: %w", n, d.bolt.Path(), err)
	}
	return nil
}

// armLocked makes sure that lazy writes are committed some time.
func (d *DB) armLocked() {
	if d.timer == nil {
		d.timer = time.AfterFunc(d.lazy, d.flush)
		return
	}
	d.timer.Reset(d.lazy)
}

func (d *DB) flush() {
	d.mu.Lock()
	idle := len(d.queue) == 0 || d.closed
	d.mu.Unlock()
	if idle {
		return
	}
	if err := d.Flush(context.Background()); err != nil {
		d.log.Warn("records could not be written, will try again", "err", err)
	}
}

// Flush commits all lazy writes.
func (d *DB) Flush(context.Context) error {
	return d.commit(&write{done: make(chan result, 1)})
}
