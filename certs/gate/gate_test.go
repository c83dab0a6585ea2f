package gate

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
)

// reviewer is an API server that knows one token, and notes what it is asked.
type reviewer struct {
	err    error
	allow  map[string]bool // "user verb subresource"
	tokens int
	asked  []string
}

func (r *reviewer) ReviewToken(_ context.Context, token string) (authenticationv1.UserInfo, bool, error) {
	r.tokens++
	return authenticationv1.UserInfo{Username: "scraper", Extra: map[string]authenticationv1.ExtraValue{"k": {"v"}}}, token == "good", r.err
}

func (r *reviewer) ReviewAccess(_ context.Context, s authorizationv1.SubjectAccessReviewSpec) (bool, string, error) {
	a := s.ResourceAttributes
	if a.Resource != "nodes" || a.Name != "n1" || a.Group != "" {
		return false, "", fmt.Errorf("asked about %+v", a)
	}
	what := s.User + " " + a.Verb + " " + a.Subresource
	r.asked = append(r.asked, what)
	return r.allow[what], "", r.err
}

func TestGate(t *testing.T) {
	for name, tt := range map[string]struct {
		method, path, auth string
		err                error
		want               int
		asked              string
	}{
		"anonymous":            {"GET", "/metrics", "", nil, 401, ""},
		"anonymous, healthz":   {"GET", "/healthz", "", nil, 401, ""},
		"anonymous, elsewhere": {"POST", "/exec/a/b/c", "", nil, 401, ""},
		"basic":                {"GET", "/metrics", "Basic Z29vZDpnb29k", nil, 401, ""},
		"empty token":          {"GET", "/metrics", "Bearer ", nil, 401, ""},
		"bad token":            {"GET", "/metrics", "Bearer bad", nil, 401, ""},
		"metrics":              {"GET", "/metrics", "Bearer good", nil, 200, "scraper get metrics"},
		"below metrics":        {"GET", "/metrics/cadvisor", "bearer good", nil, 200, "scraper get metrics"},
		"healthz by proxy":     {"GET", "/healthz", "Bearer good", nil, 200, "scraper get healthz,scraper get proxy"},
		"not allowed":          {"POST", "/run/a/b/c", "Bearer good", nil, 403, "scraper create proxy"},
		"stats":                {"GET", "/stats/summary", "Bearer good", nil, 403, "scraper get stats"},
		"a longer name":        {"GET", "/metricsx", "Bearer good", nil, 200, "scraper get proxy"},
		"no server":            {"GET", "/metrics", "Bearer good", errors.New("down"), 503, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := &reviewer{err: tt.err, allow: map[string]bool{"scraper get metrics": true, "scraper get proxy": true}}
			code, _ := ask(New(Config{NodeName: "n1", Reviewer: r}), tt.method, tt.path, tt.auth, nil)
			if asked := strings.Join(r.asked, ","); code != tt.want || asked != tt.asked {
				t.Errorf("%d, asked %q; want %d, %q", code, asked, tt.want, tt.asked)
			}
		})
	}
}

func ask(g *Gate, method, path, auth string, peers []*x509.Certificate) (int, string) {
	req := httptest.NewRequest(method, path, nil)
	req.TLS = &tls.ConnectionState{PeerCertificates: peers}
	if auth != "" {
		req.Header.Set("Authorization", auth)
	}
	w := httptest.NewRecorder()
	g.Guard(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "in") })).ServeHTTP(w, req)
	return w.Code, w.Body.String()
}

// TestAnswersAreKept, and not longer than kubelet keeps them.
func TestAnswersAreKept(t *testing.T) {
	now := time.Now()
	r := &reviewer{allow: map[string]bool{"scraper get metrics": true}}
	g := New(Config{NodeName: "n1", Reviewer: r, Now: func() time.Time { return now }})
	step := func(d time.Duration, path string, tokens, asked int) {
		t.Helper()
		now = now.Add(d)
		ask(g, "GET", path, "Bearer good", nil)
		if r.tokens != tokens || len(r.asked) != asked {
			t.Errorf("%s: %d token reviews, %d access reviews; want %d, %d", path, r.tokens, len(r.asked), tokens, asked)
		}
	}
	step(0, "/metrics", 1, 1)
	step(time.Minute, "/metrics", 1, 1)
	step(time.Minute, "/metrics", 2, 1)
	step(3*time.Minute, "/metrics", 3, 2)
	step(0, "/stats", 3, 3)
	step(29*time.Second, "/stats", 3, 3)
	step(time.Second, "/stats", 3, 4)
	r.err = errors.New("down")
	step(0, "/metrics", 3, 4)
	for i := range answersKept + 10 {
		g.access.put(fmt.Sprint(i), verdict{}, now.Add(time.Hour), now)
	}
	if n := len(g.access.kept); n > answersKept {
		t.Errorf("%d answers are kept", n)
	}
}

type issuer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newIssuer(t *testing.T) issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := issuer{&x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}, key}
	c.cert = c.leaf(t, c.cert)
	return c
}

func (i issuer) leaf(t *testing.T, tmpl *x509.Certificate) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, i.cert, i.key.Public(), i.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func (i issuer) client(t *testing.T, use x509.ExtKeyUsage, until time.Duration) []*x509.Certificate {
	return []*x509.Certificate{i.leaf(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "apiserver", Organization: []string{"g"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(until), ExtKeyUsage: []x509.ExtKeyUsage{use},
	})}
}

// TestClientCertificates of the CA of now only, for clients, that live.
func TestClientCertificates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.crt")
	ours, other := newIssuer(t), newIssuer(t)
	write := func(i issuer) {
		t.Helper()
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.cert.Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r := &reviewer{allow: map[string]bool{"apiserver get metrics": true}}
	g := New(Config{NodeName: "n1", Reviewer: r, ClientCA: NewCAFile(path)})
	expect := func(what string, peers []*x509.Certificate, want int) {
		t.Helper()
		if code, _ := ask(g, "GET", "/metrics", "", peers); code != want {
			t.Errorf("%s: %d, want %d", what, code, want)
		}
	}
	good := ours.client(t, x509.ExtKeyUsageClientAuth, time.Hour)
	expect("no CA file", good, 401)
	write(ours)
	expect("good", good, 200)
	expect("another CA's", other.client(t, x509.ExtKeyUsageClientAuth, time.Hour), 401)
	expect("a server's", ours.client(t, x509.ExtKeyUsageServerAuth, time.Hour), 401)
	expect("expired", ours.client(t, x509.ExtKeyUsageClientAuth, -time.Minute), 401)
	os.Remove(path)
	expect("CA file gone: the last one counts", good, 200)
	write(other)
	os.Chtimes(path, time.Now(), time.Now().Add(time.Second))
	expect("CA rotated", good, 401)
	if code, _ := ask(New(Config{NodeName: "n1", Reviewer: r}), "GET", "/metrics", "", good); code != 401 {
		t.Errorf("no CA configured: %d", code)
	}
}
