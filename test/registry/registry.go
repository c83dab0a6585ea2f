// Package registry is a small OCI registry for tests, the demo and benchmarks:
// go-containerregistry's handler with blobs on disk, optional authentication,
// and faults on demand (hang, dropped connection, corrupted or garbage
// answers, slowness).
//
// It must not be used in production: manifests live in memory and whoever may
// pull may push. Server.mu guards faults and counters. A server has the
// goroutines of its http.Server, which Close ends.
package registry

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
)

// Config of a Server. The zero value serves blobs from memory on a free
// loopback port, to anyone.
type Config struct {
	// Addr to listen on (empty: "127.0.0.1:0").
	Addr string
	// Dir keeps blobs (empty: memory).
	Dir string
	// User and Password are required if not empty, as Bearer (a token service
	// on the same server) or Basic authentication.
	User, Password string
	Bearer         bool
	// Log gets one line per request, if not nil.
	Log io.Writer
}

// Fault changes the answer to matching requests.
type Fault struct {
	// Path is matched against the request's path, Method equals its method
	// (empty: GET).
	Path   *regexp.Regexp
	Method string
	// Times is how often it strikes (0: always).
	Times int

	// Of these one or more is set.
	Hang      bool          // no answer until the client leaves or Close
	HangAfter int64         // answer so many bytes of the body, then nothing
	DropAfter int64         // answer so many bytes of the body, then close the connection
	Drop      bool          // close the connection at once
	Corrupt   bool          // flip one bit in the middle of the body
	Garbage   bool          // answer 200 with text that is neither manifest nor layer
	Truncate  bool          // answer half of the body as if it were all
	Status    int           // answer so
	Delay     time.Duration // before the answer
	Rate      int64         // bytes per second of the body
	// Wait, if not nil, holds the answer until it is closed.
	Wait <-chan struct{}
}

// Server is a running registry.
type Server struct {
	// Addr is "host:port".
	Addr string

	cfg   Config
	http  *http.Server
	inner http.Handler
	end   chan struct{} // closed by Close, frees hanging requests
	done  chan struct{} // closed when Serve has returned

	mu     sync.Mutex // guards all below
	faults []*Fault
	served map[string]int // "METHOD path" -> requests
	bytes  int64          // of bodies sent to GETs
	closed bool
}

// Start listens and serves until Close.
func Start(cfg Config) (*Server, error) {
	if cfg.Addr == "" {
		cfg.Addr = "127.0.0.1:0"
	}
	ln, err := net.Listen("tcp", cfg.Addr)
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	var out io.Writer = io.Discard
	if cfg.Log != nil {
		out = cfg.Log
	}
	opts := []registry.Option{registry.Logger(log.New(out, "", log.LstdFlags))}
	if cfg.Dir != "" {
		opts = append(opts, registry.WithBlobHandler(registry.NewDiskBlobHandler(cfg.Dir)))
	}
	s := &Server{Addr: ln.Addr().String(), cfg: cfg, inner: registry.New(opts...),
		end: make(chan struct{}), done: make(chan struct{}), served: map[string]int{}}
	s.http = &http.Server{Handler: s, ErrorLog: log.New(out, "", log.LstdFlags)}
	go func() {
		defer close(s.done)
		if err := s.http.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			log.New(out, "", log.LstdFlags).Printf("registry: %v", err)
		}
	}()
	return s, nil
}

// Close ends the server and all connections.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	close(s.end)
	s.mu.Unlock()
	err := s.http.Close()
	<-s.done
	return err
}

// Inject adds a fault; Heal removes all.
func (s *Server) Inject(f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, &f)
}

// Heal removes all faults.
func (s *Server) Heal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = nil
}

// Requests counts the requests of a method whose path contains part.
func (s *Server) Requests(method, part string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for k, v := range s.served {
		m, path, _ := strings.Cut(k, " ")
		if m == method && strings.Contains(path, part) {
			n += v
		}
	}
	return n
}

// BytesSent is the sum of all bodies that answered GETs.
func (s *Server) BytesSent() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes
}

// fault finds the first fault for a request and counts it down.
func (s *Server) fault(r *http.Request) *Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.served[r.Method+" "+r.URL.Path]++
	for i, f := range s.faults {
		method := f.Method
		if method == "" {
			method = http.MethodGet
		}
		if r.Method != method || !f.Path.MatchString(r.URL.Path) {
			continue
		}
		if f.Times > 0 {
			if f.Times--; f.Times == 0 {
				s.faults = append(s.faults[:i:i], s.faults[i+1:]...)
			}
		}
		return f
	}
	return nil
}

// ServeHTTP checks credentials, applies faults and passes on.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f := s.fault(r)
	if f == nil {
		f = &Fault{}
	}
	if !s.before(w, r, f) {
		return
	}
	if r.URL.Path == "/token" {
		s.token(w, r)
		return
	}
	if !s.authorized(r) {
		s.challenge(w, r)
		return
	}
	s.completeRange(r)
	switch {
	case r.Method != http.MethodGet:
		s.inner.ServeHTTP(w, r)
	case f.changesBody():
		s.answer(w, r, f)
	default:
		s.inner.ServeHTTP(&countingWriter{w, s}, r)
	}
}

func (f *Fault) changesBody() bool {
	return f.Corrupt || f.Truncate || f.HangAfter > 0 || f.DropAfter > 0 || f.Rate > 0
}

// countingWriter counts what is sent.
type countingWriter struct {
	http.ResponseWriter
	s *Server
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.s.mu.Lock()
	c.s.bytes += int64(n)
	c.s.mu.Unlock()
	return n, err
}

// before applies the faults that come before any answer.
func (s *Server) before(w http.ResponseWriter, r *http.Request, f *Fault) (goOn bool) {
	switch {
	case f.Hang:
		s.hang(r)
		return false
	case f.Drop:
		panic(http.ErrAbortHandler)
	case f.Status != 0:
		http.Error(w, `{"errors":[{"code":"UNKNOWN","message":"injected"}]}`, f.Status)
		return false
	case f.Garbage:
		_, _ = io.WriteString(w, strings.Repeat("<html>this is not what you asked for</html>\n", 20))
		return false
	}
	for _, wait := range []<-chan struct{}{f.Wait, after(f.Delay)} {
		if wait == nil {
			continue
		}
		select {
		case <-wait:
		case <-r.Context().Done():
			return false
		case <-s.end:
			return false
		}
	}
	return true
}

func after(d time.Duration) <-chan struct{} {
	if d == 0 {
		return nil
	}
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(d, cancel)
	return ctx.Done()
}

func (s *Server) hang(r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-s.end:
	}
}

// answer gets the inner registry's answer and sends it as the fault says.
func (s *Server) answer(w http.ResponseWriter, r *http.Request, f *Fault) {
	rec := httptest.NewRecorder()
	s.inner.ServeHTTP(rec, r)
	body := rec.Body.Bytes()
	if f.Corrupt && len(body) > 0 {
		body[len(body)/2] ^= 1
	}
	if f.Truncate {
		body = body[:len(body)/2]
		rec.Header().Set("Content-Length", strconv.Itoa(len(body)))
	}
	for k, v := range rec.Header() {
		w.Header()[k] = v
	}
	w.WriteHeader(rec.Code)
	stop := f.DropAfter + f.HangAfter
	if stop == 0 || stop > int64(len(body)) {
		s.send(w, body, f.Rate)
		return
	}
	s.send(w, body[:stop], f.Rate)
	if fl, ok := w.(http.Flusher); ok {
		fl.Flush()
	}
	if f.DropAfter > 0 {
		panic(http.ErrAbortHandler)
	}
	s.hang(r)
}

func (s *Server) send(w http.ResponseWriter, body []byte, rate int64) {
	for len(body) > 0 {
		n := len(body)
		if rate > 0 {
			n = min(n, max(int(rate/20), 1))
		}
		n, err := w.Write(body[:n])
		s.mu.Lock()
		s.bytes += int64(n)
		s.mu.Unlock()
		if err != nil {
			return
		}
		body = body[n:]
		if rate > 0 {
			if fl, ok := w.(http.Flusher); ok {
				fl.Flush()
			}
			select {
			case <-time.After(50 * time.Millisecond):
			case <-s.end:
				return
			}
		}
	}
}

// completeRange gives open ranges ("bytes=5-") an end: the inner handler only
// knows closed ones.
func (s *Server) completeRange(r *http.Request) {
	start, open := strings.CutSuffix(r.Header.Get("Range"), "-")
	if !open {
		return
	}
	head := r.Clone(r.Context())
	head.Method = http.MethodHead
	head.Header.Del("Range")
	rec := httptest.NewRecorder()
	s.inner.ServeHTTP(rec, head)
	size, err := strconv.ParseInt(rec.Header().Get("Content-Length"), 10, 64)
	if err == nil {
		r.Header.Set("Range", fmt.Sprintf("%s-%d", start, size-1))
	}
}

// The token that the token service gives out, and the refresh token it takes.
const (
	Token        = "registry-token"
	RefreshToken = "registry-refresh-token"
)

func (s *Server) authorized(r *http.Request) bool {
	if s.cfg.User == "" {
		return true
	}
	user, password, basic := r.BasicAuth()
	return basic && user == s.cfg.User && password == s.cfg.Password ||
		s.cfg.Bearer && r.Header.Get("Authorization") == "Bearer "+Token
}

func (s *Server) challenge(w http.ResponseWriter, r *http.Request) {
	challenge := `Basic realm="registry"`
	if s.cfg.Bearer {
		challenge = fmt.Sprintf(`Bearer realm="http://%s/token",service="registry"`, r.Host)
	}
	w.Header().Set("WWW-Authenticate", challenge)
	http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
}

// token answers the token service: GET with Basic, POST with OAuth2.
func (s *Server) token(w http.ResponseWriter, r *http.Request) {
	user, password, _ := r.BasicAuth()
	if r.Method == http.MethodPost {
		user, password = r.FormValue("username"), r.FormValue("password")
	}
	ok := user == s.cfg.User && password == s.cfg.Password || r.FormValue("refresh_token") == RefreshToken
	if !ok {
		http.Error(w, `{"details":"wrong credentials"}`, http.StatusUnauthorized)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = fmt.Fprintf(w, `{"token":%q,"access_token":%q,"expires_in":300}`, Token, Token)
}

// BasicAuth is what the CRI's AuthConfig.auth holds for user and password.
func BasicAuth(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
}
