package certs

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

const testNode = "n1"

// authority is a CA.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

var serials atomic.Int64

func newAuthority(t testing.TB, name string) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(serials.Add(1)), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key}
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// issue signs tmpl for pub and returns PEM.
func (a *authority) issue(tmpl *x509.Certificate, pub any) []byte {
	tmpl.SerialNumber = big.NewInt(serials.Add(1))
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, pub, a.key)
	if err != nil {
		panic(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// pair makes a pair for the node without a request.
func (a *authority) pair(t testing.TB, k kind, id identity, from, until time.Time) *Pair {
	t.Helper()
	key, keyPEM, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	certPEM := a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: id.commonName, Organization: id.organizations}, DNSNames: id.dnsNames, IPAddresses: id.ips,
		NotBefore: from, NotAfter: until, ExtKeyUsage: []x509.ExtKeyUsage{k.extKey}, KeyUsage: x509.KeyUsageDigitalSignature,
	}, key.Public())
	p, err := newPair(certPEM, keyPEM, from)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// fakeServer is an API server with the few calls that are made of it, whose
// signer can be told to misbehave.
type fakeServer struct {
	ca     *authority
	server *httptest.Server
	down   atomic.Bool // answers nothing

	mu       sync.Mutex
	requests map[string]*certificatesv1.CertificateSigningRequest
	order    []string
	version  int
	changed  chan struct{} // closed at each change
	node     *corev1.Node
	events   []corev1.Event
	token    string                                                     // the bootstrap token; others get 401
	clients  *authority                                                 // CA of client certificates
	life     time.Duration                                              // of certificates
	sign     func(csr *x509.CertificateRequest, tmpl *x509.Certificate) // changes what is issued
	decide   func(csr *certificatesv1.CertificateSigningRequest)        // instead of approving and signing
	key      crypto.Signer                                              // issued for, instead of the requester's
}

func newFakeServer(t testing.TB) *fakeServer {
	t.Helper()
	ca := newAuthority(t, "cluster")
	f := &fakeServer{
		ca: ca, clients: ca, requests: map[string]*certificatesv1.CertificateSigningRequest{}, changed: make(chan struct{}),
		token: "abcdef.0123456789abcdef", life: time.Hour,
	}
	f.start(t, "127.0.0.1:0", ca)
	return f
}

// start listens with a certificate of ca.
func (f *fakeServer) start(t testing.TB, addr string, ca *authority) {
	t.Helper()
	key, keyPEM, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	certPEM := ca.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "kube-apiserver"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, key.Public())
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(f)
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	s.Listener.Close()
	s.Listener = ln
	s.EnableHTTP2 = true
	s.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert}
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	s.StartTLS()
	f.server = s
	t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
}

func (f *fakeServer) addr() string { return f.server.Listener.Addr().String() }

func fail(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Code: int32(code), Reason: reason, Message: message,
	})
}

func (f *fakeServer) knows(r *http.Request) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.token != "" && r.Header.Get("Authorization") == "Bearer "+f.token {
		return true
	}
	if len(r.TLS.PeerCertificates) == 0 {
		return false
	}
	roots := x509.NewCertPool()
	roots.AddCert(f.clients.cert)
	_, err := r.TLS.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return err == nil
}

func (f *fakeServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if f.down.Load() {
		panic(http.ErrAbortHandler)
	}
	if !f.knows(r) {
		fail(w, 401, metav1.StatusReasonUnauthorized, "Unauthorized")
		return
	}
	const requests = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
	name, single := strings.CutPrefix(r.URL.Path, requests+"/")
	switch {
	case r.Method == "POST" && r.URL.Path == requests:
		f.create(w, r)
	case r.URL.Path == requests && r.URL.Query().Get("watch") == "1":
		f.watch(w, r, strings.TrimPrefix(r.URL.Query().Get("fieldSelector"), "metadata.name="))
	case single:
		f.mu.Lock()
		csr := f.requests[name]
		if csr == nil {
			fail(w, 404, metav1.StatusReasonNotFound, "not found")
		} else {
			answer(w, 200, csr)
		}
		f.mu.Unlock()
	case strings.HasPrefix(r.URL.Path, "/api/v1/nodes/"+testNode):
		f.nodes(w, r)
	case strings.HasSuffix(r.URL.Path, "/events"):
		var e corev1.Event
		json.NewDecoder(r.Body).Decode(&e)
		f.mu.Lock()
		f.events = append(f.events, e)
		f.mu.Unlock()
		answer(w, 201, &e)
	default:
		fail(w, 404, metav1.StatusReasonNotFound, r.URL.Path)
	}
}

func answer(w http.ResponseWriter, code int, o any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(o)
}

func (f *fakeServer) create(w http.ResponseWriter, r *http.Request) {
	csr := &certificatesv1.CertificateSigningRequest{}
	if err := json.NewDecoder(r.Body).Decode(csr); err != nil {
		fail(w, 400, metav1.StatusReasonBadRequest, err.Error())
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.requests[csr.Name] != nil {
		fail(w, 409, metav1.StatusReasonAlreadyExists, "exists")
		return
	}
	f.requests[csr.Name] = csr
	f.order = append(f.order, csr.Name)
	f.bump(csr)
	answer(w, 201, csr)
	if f.decide != nil {
		f.decide(csr)
	} else {
		f.approve(csr)
	}
	f.bump(csr)
}

// bump makes a change visible; f.mu is held.
func (f *fakeServer) bump(csr *certificatesv1.CertificateSigningRequest) {
	f.version++
	csr.TypeMeta = metav1.TypeMeta{APIVersion: "certificates.k8s.io/v1", Kind: "CertificateSigningRequest"}
	csr.ResourceVersion = fmt.Sprint(f.version)
	close(f.changed)
	f.changed = make(chan struct{})
}

// approve approves and signs; f.mu is held.
func (f *fakeServer) approve(csr *certificatesv1.CertificateSigningRequest) {
	block, _ := pem.Decode(csr.Spec.Request)
	asked, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		panic(err)
	}
	use := x509.ExtKeyUsageClientAuth
	if csr.Spec.SignerName == servingKind.signer {
		use = x509.ExtKeyUsageServerAuth
	}
	tmpl := &x509.Certificate{
		Subject: asked.Subject, DNSNames: asked.DNSNames, IPAddresses: asked.IPAddresses, ExtKeyUsage: []x509.ExtKeyUsage{use},
		KeyUsage: x509.KeyUsageDigitalSignature, NotBefore: time.Now().Add(-5 * time.Minute), NotAfter: time.Now().Add(f.life),
	}
	if f.sign != nil {
		f.sign(asked, tmpl)
	}
	pub := asked.PublicKey
	if f.key != nil {
		pub = f.key.Public()
	}
	csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue}}
	csr.Status.Certificate = f.clients.issue(tmpl, pub)
}

func (f *fakeServer) watch(w http.ResponseWriter, r *http.Request, name string) {
	w.Header().Set("Content-Type", "application/json")
	sent := ""
	for {
		f.mu.Lock()
		csr, changed := f.requests[name], f.changed
		if csr != nil && csr.ResourceVersion != sent {
			sent = csr.ResourceVersion
			raw, _ := json.Marshal(csr)
			fmt.Fprintf(w, `{"type":"MODIFIED","object":%s}`+"\n", raw)
			w.(http.Flusher).Flush()
		}
		f.mu.Unlock()
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		case <-time.After(20 * time.Second):
			return
		}
	}
}

func (f *fakeServer) nodes(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.node == nil {
		fail(w, 404, metav1.StatusReasonNotFound, "no such node")
		return
	}
	if r.Method == "PATCH" {
		var patch corev1.Node
		json.NewDecoder(r.Body).Decode(&patch)
		f.node.Status.Conditions = patch.Status.Conditions
	}
	answer(w, 200, f.node)
}

// setup is one node with a fake API server.
type setup struct {
	*fakeServer
	cfg     Config
	log     *lockedBuffer
	manager *Manager
	stop    func() // ends the manager and waits
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newSetup(t *testing.T) *setup {
	t.Helper()
	dir := t.TempDir()
	s := &setup{fakeServer: newFakeServer(t), log: &lockedBuffer{}}
	s.cfg = Config{
		NodeName: testNode, Dir: filepath.Join(dir, "pki"), Kubeconfig: filepath.Join(dir, "kubelet.conf"),
		BootstrapKubeconfig: filepath.Join(dir, "bootstrap.conf"), Log: slog.New(slog.NewTextHandler(s.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		RetryPause: 50 * time.Millisecond,
		Addresses: func(ctx context.Context, set func(Names)) error {
			set(Names{DNS: []string{testNode}, IPs: []net.IP{net.IPv4(192, 0, 2, 1)}})
			<-ctx.Done()
			return nil
		},
	}
	s.bootstrap(t, s.ca)
	t.Cleanup(func() {
		s.noSecretLogged(t)
		if t.Failed() {
			t.Log(s.log)
		}
	})
	return s
}

// noSecretLogged looks for keys and tokens in all that was logged.
func (s *setup) noSecretLogged(t *testing.T) {
	secrets := []string{"PRIVATE KEY", "0123456789abcdef"}
	files, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "*"))
	for _, f := range files {
		data, _ := os.ReadFile(f)
		if key := onlyKey(data); len(key) > 120 {
			secrets = append(secrets, string(key[60:100]))
		}
	}
	for _, secret := range secrets {
		if strings.Contains(s.log.String(), secret) {
			t.Errorf("the log holds %q", secret)
		}
	}
}

// bootstrap writes the bootstrap kubeconfig, with the token.
func (s *setup) bootstrap(t *testing.T, ca *authority) {
	t.Helper()
	s.writeKubeconfigOf(t, ca, s.cfg.BootstrapKubeconfig, &clientcmdapi.AuthInfo{Token: s.token})
}

func (s *setup) writeKubeconfig(t *testing.T, path string, user *clientcmdapi.AuthInfo) {
	t.Helper()
	s.writeKubeconfigOf(t, s.ca, path, user)
}

func (s *setup) writeKubeconfigOf(t *testing.T, ca *authority, path string, user *clientcmdapi.AuthInfo) {
	t.Helper()
	err := clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"c": {Server: "https://" + s.addr(), CertificateAuthorityData: ca.pem()}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"u": user},
		Contexts:       map[string]*clientcmdapi.Context{"x": {Cluster: "c", AuthInfo: "u"}},
		CurrentContext: "x",
	}, path)
	if err != nil {
		t.Fatal(err)
	}
}

// run starts the manager.
func (s *setup) run(t *testing.T) {
	t.Helper()
	m, err := New(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := m.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	s.manager = m
	s.stop = func() { cancel(); <-done }
	t.Cleanup(s.stop)
}

// status is that of one certificate.
func (s *setup) status(name string) Status {
	for _, st := range s.manager.Status() {
		if st.Name == name {
			return st
		}
	}
	return Status{}
}

// until waits for a condition, a minute at most.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("after a minute still not: %s", what)
}

func (s *setup) untilHeld(t *testing.T, name string) Status {
	t.Helper()
	until(t, name+" certificate held", func() bool { return s.status(name).NotAfter != nil })
	return s.status(name)
}

// untilProblem waits until the client certificate's last error has the reason.
func (s *setup) untilProblem(t *testing.T, r Reason) Status {
	t.Helper()
	until(t, "problem "+string(r), func() bool { return s.status("client").LastReason == r })
	return s.status("client")
}

// with changes the server under its lock.
func (f *fakeServer) with(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeServer) made() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.order)
}

func mustWrite(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
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
