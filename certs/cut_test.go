package certs

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
)

// cutter is a proxy that breaks its first connection after a number of bytes
// that went in one direction.
type cutter struct {
	addr string
	cut  atomic.Bool // it has broken one
}

func newCutter(t *testing.T, target string, after int64, answers bool) *cutter {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	c := &cutter{addr: ln.Addr().String()}
	go func() {
		for first := true; ; first = false {
			down, err := ln.Accept()
			if err != nil {
				return
			}
			go c.carry(down, target, first, after, answers)
		}
	}()
	return c
}

func (c *cutter) carry(down net.Conn, target string, breaks bool, after int64, answers bool) {
	defer down.Close()
	up, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer up.Close()
	limit := func(r io.Reader, cuts bool) io.Reader {
		if breaks && cuts {
			return io.LimitReader(r, after)
		}
		return r
	}
	done := make(chan struct{}, 2)
	go func() { io.Copy(up, limit(down, !answers)); done <- struct{}{} }()
	go func() { io.Copy(down, limit(up, answers)); done <- struct{}{} }()
	<-done
	if breaks {
		c.cut.Store(true)
		down.(*net.TCPConn).SetLinger(0) // a reset, as when a machine goes
	}
}

// TestBrokenConnections breaks the connection after every so many bytes of the
// whole exchange, in both directions. The certificate comes all the same, and
// one request is all that was made.
func TestBrokenConnections(t *testing.T) {
	t.Parallel()
	for _, answers := range []bool{false, true} {
		for after := int64(0); after <= 6000; after += 300 {
			t.Run(fmt.Sprintf("answers=%v,after=%d", answers, after), func(t *testing.T) {
				t.Parallel()
				s := newSetup(t)
				c := newCutter(t, s.addr(), after, answers)
				s.toward(t, c.addr)
				s.run(t)
				s.untilHeld(t, "client")
				if n := s.made(); n != 1 {
					t.Errorf("%d requests were made, want 1", n)
				}
				if after < 1000 && !c.cut.Load() {
					t.Error("the connection was not broken")
				}
			})
		}
	}
}

// newEcho serves what tells of its requests' certificates.
func newEcho(t *testing.T, ca *authority, release chan struct{}, seen chan string) string {
	t.Helper()
	key, keyPEM, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(ca.issue(&x509.Certificate{
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: ca.cert.NotBefore, NotAfter: ca.cert.NotAfter,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, key.Public()), keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen <- fmt.Sprintf("%x", r.TLS.PeerCertificates[0].SerialNumber)
		io.WriteString(w, "begin")
		w.(http.Flusher).Flush()
		if strings.HasSuffix(r.URL.Path, "slow") {
			<-release
		}
		io.WriteString(w, " end")
	}))
	s.EnableHTTP2 = true
	s.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL
}
