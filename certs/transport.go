package certs

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"

	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
)

// rotatingTransport sends requests with the newest client certificate. Each
// certificate has connections of its own: after a rotation new requests go out
// over new ones, requests that are under way end on the old ones, and an old
// one is closed when its last request has ended. No caller sees an error.
type rotatingTransport struct {
	mu   sync.RWMutex
	now  *generation // nil: there is no certificate yet
	base *url.URL    // the server of now
}

var errNoClientCertificate = errors.New("there is no client certificate yet")

// generation is the connections of one certificate to one server.
type generation struct {
	transport *http.Transport
	pair      *Pair
	cluster   *rest.Config

	mu       sync.Mutex
	requests int  // under way, until their body is closed
	retired  bool // no new ones come
}

// use makes pair and cluster those of all new requests. The same ones again
// change nothing.
func (t *rotatingTransport) use(pair *Pair, cluster *rest.Config) error {
	t.mu.RLock()
	old := t.now
	t.mu.RUnlock()
	if old != nil && old.pair.same(pair) && sameCluster(old.cluster, cluster) {
		return nil
	}
	base, _, err := rest.DefaultServerUrlFor(cluster)
	if err != nil {
		return err
	}
	transport, err := newTransport(pair, cluster)
	if err != nil {
		return err
	}
	t.mu.Lock()
	t.now, t.base = &generation{transport: transport, pair: pair, cluster: cluster}, base
	t.mu.Unlock()
	if old != nil {
		old.retire()
	}
	return nil
}

func sameCluster(a, b *rest.Config) bool {
	return a.Host == b.Host && a.ServerName == b.ServerName && a.Insecure == b.Insecure && bytes.Equal(a.CAData, b.CAData)
}

func newTransport(pair *Pair, cluster *rest.Config) (*http.Transport, error) {
	cfg := rest.AnonymousClientConfig(cluster)
	conf, err := rest.TLSConfigFor(cfg)
	if err != nil {
		return nil, err
	}
	if conf == nil {
		conf = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	conf.Certificates = []tls.Certificate{pair.tls}
	return utilnet.SetTransportDefaults(&http.Transport{
		Proxy: cluster.Proxy, DialContext: cluster.Dial, TLSClientConfig: conf,
		TLSHandshakeTimeout: 10 * time.Second, MaxIdleConnsPerHost: 25,
	}), nil
}

// RoundTrip implements http.RoundTripper.
func (t *rotatingTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	g, base := t.begin()
	if g == nil {
		if r.Body != nil {
			r.Body.Close()
		}
		return nil, errNoClientCertificate
	}
	if base.Host != r.URL.Host || base.Scheme != r.URL.Scheme {
		r = r.Clone(r.Context())
		r.URL.Scheme, r.URL.Host = base.Scheme, base.Host
	}
	resp, err := g.transport.RoundTrip(r)
	if err != nil {
		g.end()
		return nil, err
	}
	if _, upgraded := resp.Body.(io.Writer); upgraded {
		g.end() // the connection is the caller's from here on
		return resp, nil
	}
	resp.Body = &countedBody{ReadCloser: resp.Body, end: sync.OnceFunc(g.end)}
	return resp, nil
}

// begin takes the newest generation for one request.
func (t *rotatingTransport) begin() (*generation, *url.URL) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.now == nil {
		return nil, nil
	}
	t.now.mu.Lock()
	t.now.requests++
	t.now.mu.Unlock()
	return t.now, t.base
}

func (g *generation) end() {
	g.mu.Lock()
	g.requests--
	last := g.retired && g.requests == 0
	g.mu.Unlock()
	if last {
		g.transport.CloseIdleConnections()
	}
}

func (g *generation) retire() {
	g.mu.Lock()
	g.retired = true
	g.mu.Unlock()
	g.transport.CloseIdleConnections()
}

// server is where requests go, for messages.
func (t *rotatingTransport) server() string {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.base == nil {
		return "the API server"
	}
	return t.base.String()
}

// cluster is where requests go, nil before there is a certificate.
func (t *rotatingTransport) cluster() *rest.Config {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.now == nil {
		return nil
	}
	return t.now.cluster
}

// close ends connections that no request uses.
func (t *rotatingTransport) close() {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.now != nil {
		t.now.retire()
	}
}

type countedBody struct {
	io.ReadCloser
	end func()
}

func (b *countedBody) Close() error {
	defer b.end()
	return b.ReadCloser.Close()
}
