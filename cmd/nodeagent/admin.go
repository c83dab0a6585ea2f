package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/nodeagent/nodeagent/cri/images"
	"github.com/opencontainers/go-digest"
)

// The admin socket carries what the CRI has no call for: pulls that report
// progress, imports of archives, reloads of the configuration, certificates
// (cert.go). It is HTTP with one JSON object in and a stream of JSON lines
// (adminEvent) out, or one object. Only root can open the socket.
const (
	adminPull   = "/v1/images/pull"
	adminImport = "/v1/images/import"
	adminReload = "/v1/reload"
)

// pullRequest is the body of adminPull.
type pullRequest struct {
	Ref  string      `json:"ref"`
	Auth images.Auth `json:"auth"`
}

// importRequest is the body of adminImport.
type importRequest struct {
	Path string `json:"path"` // absolute; the daemon opens it
	Name string `json:"name"` // for images that the archive does not name
}

// adminEvent is one line of an answer. The last line has Images or Error.
type adminEvent struct {
	Progress *images.Progress `json:"progress,omitempty"`
	Images   []adminImage     `json:"images,omitempty"`
	Error    string           `json:"error,omitempty"`
}

type adminImage struct {
	ID          string   `json:"id"`
	RepoTags    []string `json:"repoTags,omitempty"`
	RepoDigests []string `json:"repoDigests,omitempty"`
	Size        uint64   `json:"size"` // bytes, as distributed
}

// imageSource is the image store as the admin socket needs it.
type imageSource interface {
	Pull(context.Context, images.PullOptions) (images.Image, error)
	Import(ctx context.Context, path string, o images.ImportOptions) ([]images.Image, error)
}

// serveAdmin answers on the socket at path until ctx ends, and waits for the
// requests it has taken, which end with ctx too. more adds requests to its own.
func serveAdmin(ctx context.Context, path string, source imageSource, more func(*http.ServeMux), log *slog.Logger) error {
	ln, err := listenPrivate(path)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+adminPull, func(w http.ResponseWriter, r *http.Request) {
		var req pullRequest
		answer(w, r, &req, func(ctx context.Context, report func(images.Progress)) ([]images.Image, error) {
			img, err := source.Pull(ctx, images.PullOptions{Ref: req.Ref, Auth: req.Auth, Progress: report})
			return []images.Image{img}, err
		})
	})
	mux.HandleFunc("POST "+adminImport, func(w http.ResponseWriter, r *http.Request) {
		var req importRequest
		answer(w, r, &req, func(ctx context.Context, report func(images.Progress)) ([]images.Image, error) {
			if !filepath.IsAbs(req.Path) {
				return nil, fmt.Errorf("import %q: not an absolute path", req.Path)
			}
			return source.Import(ctx, req.Path, images.ImportOptions{Name: req.Name, Progress: report})
		})
	})
	more(mux)
	if err := serveSocket(ctx, ln, mux, log); err != nil {
		return fmt.Errorf("serve admin socket %s: %w", path, err)
	}
	return nil
}

// serveSocket answers on ln until ctx ends, and waits for the requests it has
// taken, which end with ctx too.
func serveSocket(ctx context.Context, ln net.Listener, h http.Handler, log *slog.Logger) error {
	server := &http.Server{
		Handler:           h,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		server.Shutdown(context.WithoutCancel(ctx)) // no deadline, so nothing but a closed listener's error
	})
	err := server.Serve(ln)
	if !stop() {
		<-closed
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// listenPrivate makes a unix socket that only root can connect to, in place
// of one that a former process left. The caller holds the state directory's
// lock, so no live daemon is robbed.
func listenPrivate(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove old socket: %w", err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for administration: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return nil, fmt.Errorf("protect socket: %w", err)
	}
	return ln, nil
}

// maxAdminRequest bounds a request's body, in bytes.
const maxAdminRequest = 1 << 20

// answer decodes the request into req, does the work and streams its progress
// and outcome. The client going away cancels the work.
func answer(w http.ResponseWriter, r *http.Request, req any, work func(context.Context, func(images.Progress)) ([]images.Image, error)) {
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxAdminRequest))
	dec.DisallowUnknownFields()
	if err := dec.Decode(req); err != nil {
		http.Error(w, "decode request: "+err.Error(), http.StatusBadRequest)
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	feed := newFeed()
	var last adminEvent
	go func() {
		defer feed.close()
		list, err := work(ctx, feed.put)
		if err != nil {
			last.Error = strings.ReplaceAll(err.Error(), "\n", ": ") // joined errors
			return
		}
		last.Images = adminImages(list)
	}()

	w.Header().Set("Content-Type", "application/x-ndjson")
	enc, flush := json.NewEncoder(w), http.NewResponseController(w)
	send := func(e adminEvent) {
		if enc.Encode(e) != nil || flush.Flush() != nil {
			cancel() // and drain the feed until the work has ended
		}
	}
	for batch := range feed.batches() {
		for _, p := range batch {
			send(adminEvent{Progress: &p})
		}
	}
	send(last)
}

func adminImages(list []images.Image) []adminImage {
	out := make([]adminImage, 0, len(list))
	for _, img := range list {
		out = append(out, adminImage{ID: img.ID, RepoTags: img.RepoTags, RepoDigests: img.RepoDigests, Size: img.Size})
	}
	return out
}

// feed hands progress from the store's goroutines, which must not wait, to a
// client that may be slow: of each blob and phase only the latest is kept.
type feed struct {
	wake chan struct{} // capacity 1; closed when no more comes

	mu      sync.Mutex
	pending []images.Progress // guarded by mu, in order of arrival
	at      map[feedKey]int   // guarded by mu, index into pending
}

type feedKey struct {
	digest digest.Digest
	phase  images.Phase
}

func newFeed() *feed {
	return &feed{wake: make(chan struct{}, 1), at: map[feedKey]int{}}
}

func (f *feed) put(p images.Progress) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := feedKey{p.Digest, p.Phase}
	if i, ok := f.at[key]; ok {
		f.pending[i] = p
		return
	}
	f.at[key] = len(f.pending)
	f.pending = append(f.pending, p)
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

func (f *feed) close() { close(f.wake) }

// batches yields what has come since the last one until the feed is closed.
func (f *feed) batches() func(yield func([]images.Progress) bool) {
	return func(yield func([]images.Progress) bool) {
		for range f.wake {
			if !yield(f.take()) {
				return
			}
		}
		yield(f.take())
	}
}

func (f *feed) take() []images.Progress {
	f.mu.Lock()
	defer f.mu.Unlock()
	batch := f.pending
	f.pending = nil
	clear(f.at)
	return batch
}
