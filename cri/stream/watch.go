package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
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

type watchedListener struct{ net.Listener }

func (l watchedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &watchedConn{Conn: c, gone: make(chan struct{})}, nil
}

// watchedConn notices the first read that fails for good. Both protocols read
// all the time.
type watchedConn struct {
	net.Conn
	once sync.Once
	gone chan struct{}
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
	return c.Conn.Close()
}

func (c *watchedConn) leave() { c.once.Do(func() { close(c.gone) }) }
