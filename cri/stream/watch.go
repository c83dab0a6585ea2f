package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
)

// A session learns through its connection's channel that the client is gone:
// neither SPDY nor WebSocket tells the handler.

type goneKey struct{}

// connectionGone is closed when the client of a request has disconnected; nil
// when ctx belongs to no request.
func connectionGone(ctx context.Context) <-chan struct{} {
	c, _ := ctx.Value(goneKey{}).(<-chan struct{})
	return c
}

// whenGone calls fn if the client of a request disconnects before done is
// closed.
func (s *Server) whenGone(ctx context.Context, done <-chan struct{}, fn func()) {
	gone := connectionGone(ctx)
	s.background(func() {
		select {
		case <-done:
		case <-gone:
			fn()
		}
	})
}

// withConnection is http.Server.ConnContext.
func withConnection(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	w, ok := c.(*watchedConn)
	if !ok {
		return ctx
	}
	return context.WithValue(ctx, goneKey{}, (<-chan struct{})(w.gone))
}

// watchedListener knows its open connections: net/http forgets those that a
// handler took over.
type watchedListener struct {
	net.Listener

	mu   sync.Mutex
	open map[*watchedConn]bool
}

func watch(l net.Listener) *watchedListener {
	return &watchedListener{Listener: l, open: map[*watchedConn]bool{}}
}

func (l *watchedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	w := &watchedConn{Conn: c, gone: make(chan struct{}), forget: l.forget}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open[w] = true
	return w, nil
}

func (l *watchedListener) forget(w *watchedConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.open, w)
}

// closeAll closes what is still open; the listener must be closed already.
func (l *watchedListener) closeAll() {
	l.mu.Lock()
	open := slices.Collect(maps.Keys(l.open))
	l.mu.Unlock()
	for _, c := range open {
		c.Close()
	}
}

// watchedConn notices the first read that fails for good. Both protocols read
// all the time.
type watchedConn struct {
	net.Conn
	once   sync.Once
	gone   chan struct{}
	forget func(*watchedConn)
}

func (c *watchedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	// net/http aborts its own reads with a deadline.
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.leave()
	}
	return n, err
}

func (c *watchedConn) Close() error {
	c.leave()
	c.forget(c)
	return c.Conn.Close()
}

func (c *watchedConn) leave() { c.once.Do(func() { close(c.gone) }) }
