package images

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"syscall"
	"time"

	ctdimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteserrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// PullOptions say what to pull.
type PullOptions struct {
	// Ref is the image's name, normalised by Pull.
	Ref  string
	Auth Auth
	// Progress is called with what happens, one call at a time, from other
	// goroutines; it must return quickly. It is not called after Pull has
	// returned. May be nil.
	Progress func(Progress)
}

// flightKey tells which pulls can be one: same image, same credentials.
type flightKey struct {
	ref  string
	auth Auth
}

// flight is a pull on the way, for one or more callers.
type flight struct {
	cancel  context.CancelCauseFunc
	report  *reporter
	done    chan struct{} // closed when img and err are final
	img     Image
	err     error
	waiters int // guarded by Store.mu; the last to leave cancels
	next    int // key of the next waiter, guarded by Store.mu
}

// errAbandoned is the cause when all who waited for a pull have gone.
var errAbandoned = fmt.Errorf("nobody waits for it any more: %w", context.Canceled)

// Pull fetches, verifies and unpacks an image, and records it by tag and
// digest. A second call for the same image with the same credentials joins the
// one in flight. When ctx ends, Pull returns at once; the work goes on if
// others wait for it and is cancelled otherwise.
//
// Errors: InvalidArgument for a name that does not parse or something that is
// not a container image; NotFound; PermissionDenied and Unauthenticated as the
// registry says; Unavailable when the registry stops sending or cannot be
// reached; DataLoss for content that does not match its digest;
// ResourceExhausted when the disk is full.
func (s *Store) Pull(ctx context.Context, opts PullOptions) (Image, error) {
	named, err := parseRef(opts.Ref)
	if err != nil {
		return Image{}, err
	}
	f, leave, err := s.join(named, opts)
	if err != nil {
		return Image{}, err
	}
	defer leave()
	select {
	case <-f.done:
		return f.img, f.err
	case <-ctx.Done():
		return Image{}, fmt.Errorf("pull image %q: %w", named.String(), context.Cause(ctx))
	}
}

// join finds or starts the flight for a pull. leave must be called once.
func (s *Store) join(named reference.Named, opts PullOptions) (_ *flight, leave func(), _ error) {
	key := flightKey{named.String(), opts.Auth}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, fmt.Errorf("pull image %q: image store is closed: %w", key.ref, errdefs.ErrUnavailable)
	}
	f := s.flights[key]
	if f == nil {
		ctx, cancel := context.WithCancelCause(s.life)
		f = &flight{cancel: cancel, report: newReporter(key.ref), done: make(chan struct{})}
		s.flights[key] = f
		s.pulls.Add(1)
		s.active++
		go func() {
			defer s.pulls.Done()
			f.img, f.err = s.pull(ctx, cancel, named, opts.Auth, f.report)
			s.mu.Lock()
			s.active--
			if s.flights[key] == f {
				delete(s.flights, key)
			}
			s.mu.Unlock()
			close(f.done)
			cancel(nil)
		}()
	}
	f.waiters++
	f.next++
	me := f.next
	f.report.add(me, opts.Progress)
	return f, func() {
		f.report.remove(me)
		s.mu.Lock()
		defer s.mu.Unlock()
		if f.waiters--; f.waiters == 0 {
			f.cancel(errAbandoned)
			if s.flights[key] == f { // newcomers must not join a dying pull
				delete(s.flights, key)
			}
		}
	}, nil
}

// pull does the work of one flight.
func (s *Store) pull(ctx context.Context, cancel context.CancelCauseFunc, named reference.Named, auth Auth, report *reporter) (_ Image, err error) {
	start := time.Now()
	dog := &watchdog{timeout: s.live.Load().ProgressTimeout, cancel: cancel}
	dog.alive()
	watched := make(chan struct{})
	go func() { defer close(watched); dog.run(ctx) }()
	defer func() { cancel(nil); <-watched; dog.closeIdle() }()

	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts:   s.registryHosts(ctx, auth, reference.Domain(named), dog),
		Headers: http.Header{"User-Agent": []string{s.cfg.UserAgent}},
	})
	src, err := resolve(ctx, resolver, named)
	if err != nil {
		return Image{}, fmt.Errorf("pull image %q: resolve: %w", named.String(), explain(ctx, err))
	}
	img, err := s.acquire(ctx, src, report)
	if err != nil {
		return Image{}, fmt.Errorf("pull image %q: %w", named.String(), explain(ctx, err))
	}
	s.log.Info("pulled image", "image", named.String(), "id", img.ID, "size", img.Size, "took", time.Since(start))
	return img, nil
}

// source is where an image comes from and what it will be called.
type source struct {
	target  ocispec.Descriptor
	names   []string
	fetcher blobSource
}

// resolve asks the registry (or a mirror) what a name stands for.
func resolve(ctx context.Context, resolver remotes.Resolver, named reference.Named) (source, error) {
	_, target, err := resolver.Resolve(ctx, named.String())
	if err != nil {
		return source{}, err
	}
	if d, ok := named.(reference.Digested); ok && d.Digest() != target.Digest {
		return source{}, fmt.Errorf("the registry answers with %s: %w", target.Digest, errdefs.ErrDataLoss)
	}
	if err := checkChildren(ocispec.Descriptor{MediaType: "name", Digest: target.Digest}, []ocispec.Descriptor{target}); err != nil {
		return source{}, err
	}
	fetcher, err := resolver.Fetcher(ctx, named.String())
	if err != nil {
		return source{}, err
	}
	return source{target: target, names: namesFor(named, target.Digest), fetcher: remoteBlobs{fetcher}}, nil
}

// present finds an image that has all of src's names already, pointing to just
// this target: the usual outcome of pulling again. Nothing is to be done then.
func (s *Store) present(src source) (Image, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var e *entry
	for _, name := range src.names {
		if e = s.byID[s.byRef[name]]; e == nil || e.refs[name] != src.target.Digest.String() {
			return Image{}, false
		}
	}
	if e == nil {
		return Image{}, false
	}
	return e.view(s.live.Load().pins), true
}

// acquire brings an image into the store under a lease: fetch and unpack it,
// then make the records and drop the lease in one transaction. On failure the
// lease keeps what has arrived for a while.
func (s *Store) acquire(ctx context.Context, src source, report *reporter) (_ Image, err error) {
	if img, ok := s.present(src); ok {
		return img, nil
	}
	lease := leases.Lease{ID: "pull-" + rand.Text()}
	if _, err := s.leases.Create(ctx, leases.WithID(lease.ID)); err != nil {
		return Image{}, fmt.Errorf("create lease: %w", err)
	}
	ctx = leases.WithLease(ctx, lease.ID)
	defer func() {
		if err != nil {
			s.abandon(lease, err)
		}
	}()
	if err := s.fetchAndUnpack(ctx, src, report); err != nil {
		return Image{}, err
	}
	img, err := readImage(ctx, s.content, src.target, s.platform)
	if err != nil {
		return Image{}, err
	}
	if len(src.names) == 0 {
		src.names = []string{img.ID}
	}
	// From here on the image exists, whatever becomes of the caller.
	ctx = context.WithoutCancel(ctx)
	s.recMu.Lock()
	defer s.recMu.Unlock()
	if err := s.keepLayers(ctx, img); err != nil {
		return Image{}, err
	}
	if err := s.update(ctx, func(ctx context.Context) error {
		if err := s.record(ctx, src.names, ctdimages.Image{Target: src.target}); err != nil {
			return err
		}
		return s.leases.Delete(ctx, lease)
	}); err != nil {
		return Image{}, fmt.Errorf("record image: %w", err)
	}
	s.askCollect()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range src.names {
		s.index(img, name, src.target.Digest.String())
	}
	return s.byID[img.ID].view(s.live.Load().pins), nil
}

// abandon deals with the lease of a failed pull: what can help the next
// attempt is kept for a while, but nothing when the disk is full.
func (s *Store) abandon(lease leases.Lease, cause error) {
	keep := s.cfg.KeepPartial
	if isDiskFull(cause) {
		keep = 0
	}
	s.mu.Lock()
	s.partial[lease.ID] = time.Now().Add(max(keep, 0))
	s.usage = nil
	s.mu.Unlock()
	s.askCollect()
}

func isDiskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// explain gives a pull's error its class and, where the context was ended for
// a reason of ours, that reason.
func explain(ctx context.Context, err error) error {
	var stalled errStalled
	cause := context.Cause(ctx)
	switch {
	case errors.As(cause, &stalled):
		return cause
	case isDiskFull(err):
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	case cause != nil && errors.Is(err, context.Canceled):
		return cause
	}
	err = withoutAborted(err)
	var status remoteserrors.ErrUnexpectedStatus
	switch {
	case errors.Is(err, docker.ErrInvalidAuthorization):
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnauthenticated)
	case errors.As(err, &status):
		return fmt.Errorf("%w: %w", err, statusClass(status.StatusCode))
	case isNetwork(err):
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return err
}

// withoutAborted drops from the unpacker's error what it says of layers that it
// gave up because of another one.
func withoutAborted(err error) error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return err
	}
	var kept []error
	for _, e := range joined.Unwrap() {
		if e = withoutAborted(e); e != nil && e.Error() != "aborted" {
			kept = append(kept, e)
		}
	}
	if len(kept) == 1 {
		return kept[0]
	}
	return errors.Join(kept...)
}

// statusClass is the error class of an HTTP status from a registry.
func statusClass(code int) error {
	switch code {
	case http.StatusUnauthorized:
		return errdefs.ErrUnauthenticated
	case http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	case http.StatusNotFound:
		return errdefs.ErrNotFound
	}
	return errdefs.ErrUnavailable
}

// keepLayers makes the persistent GC root of an image's layers, and has them
// synced, unless both are done since an earlier pull.
func (s *Store) keepLayers(ctx context.Context, img Image) error {
	if img.ChainID == "" {
		return nil
	}
	if _, err := s.sn.Stat(ctx, viewName(img.ID)); err == nil {
		return nil
	}
	defer s.askSync(img.ID)
	if err := s.state.unsynced(img.ID); err != nil {
		return err
	}
	return s.makeView(ctx, img)
}
