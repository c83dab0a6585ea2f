package certs

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

// obtain gets a certificate for id: one request object from its creation to the
// certificate in it. The key is on disk before the request exists, and the
// request's name follows from key and content: who dies meanwhile, or does not
// hear the answer, finds the same request again and leaves no second one.
func (m *Manager) obtain(ctx context.Context, r *rotator, id identity) (*Pair, *Problem) {
	cred, p := m.credential(r)
	if p != nil {
		return nil, p
	}
	pair, p := m.ask(ctx, r, cred, id)
	if p != nil {
		switch p.Reason {
		case RequestDenied, RequestFailed, WrongCertificate, requestGone:
			r.dropKey() // the next attempt is another request
		case CredentialRefused, ServerNotTrusted:
			if cred.bootstrap {
				m.client.accepted()
			} else {
				m.client.refuse(p)
				p.Advice += m.lacksBootstrap(p.Reason)
			}
		}
		return nil, p
	}
	r.dropKey()
	if cred.bootstrap {
		if err := writeKubeconfig(m.cfg.Kubeconfig, cred.cluster, m.client.store.current()); err != nil {
			m.cfg.Log.Error("the kubeconfig is not written; the certificate is used without it", "err", explainWrite(err, m.cfg.Kubeconfig))
		}
	}
	return pair, nil
}

// lacksBootstrap adds to the advice when only a bootstrap credential can help
// and there is none.
func (m *Manager) lacksBootstrap(r Reason) string {
	if _, err := loadKubeconfig(m.cfg.BootstrapKubeconfig); r != CredentialRefused || !missing(err) {
		return ""
	}
	return fmt.Sprintf("; put a bootstrap kubeconfig at %s (kubeadm token create, or copy it from another node), which gets a new one", m.cfg.BootstrapKubeconfig)
}

// credential is what a request is made with.
type credential struct {
	api       *api
	file      string       // the kubeconfig, for messages
	cluster   *rest.Config // of the file
	bootstrap bool
}

// credential chooses between the node's certificate and the bootstrap one.
func (m *Manager) credential(r *rotator) (credential, *Problem) {
	client := m.client.held.Load()
	own := credential{api: m.api, file: m.cfg.Kubeconfig}
	if r.kind.name == servingKind.name || !useBootstrap(client, m.client.refused(), m.cfg.Now()) {
		return own, nil
	}
	cfg, err := loadKubeconfig(m.cfg.BootstrapKubeconfig)
	alive := client != nil && !client.expired(m.cfg.Now())
	switch {
	case missing(err) && alive:
		return own, nil
	case missing(err):
		return own, problem(NoBootstrap, "put a bootstrap kubeconfig there (kubeadm token create, or copy it from another node)",
			"there is no valid client certificate in %s and no bootstrap kubeconfig at %s", m.cfg.Dir, m.cfg.BootstrapKubeconfig)
	case err != nil:
		return own, &Problem{NoBootstrap, err, "put the bootstrap kubeconfig right"}
	}
	transport, err := rest.TransportFor(cfg)
	if err != nil {
		return own, &Problem{NoBootstrap, err, "put the bootstrap kubeconfig " + m.cfg.BootstrapKubeconfig + " right"}
	}
	bare := rest.CopyConfig(cfg) // the transport has the credential
	bare.BearerToken, bare.BearerTokenFile = "", ""
	a, err := newAPI(bare, m.codecs, &http.Client{Transport: m.wrap(transport)})
	if err != nil {
		return own, &Problem{NoBootstrap, err, "put the bootstrap kubeconfig " + m.cfg.BootstrapKubeconfig + " right"}
	}
	return credential{api: a, file: m.cfg.BootstrapKubeconfig, cluster: cfg, bootstrap: true}, nil
}

// ask creates or finds the request and waits for its certificate.
func (m *Manager) ask(ctx context.Context, r *rotator, cred credential, id identity) (*Pair, *Problem) {
	key, keyPEM, p := m.pendingKey(r)
	if p != nil {
		return nil, p
	}
	csr, err := newRequest(r.kind, key, id)
	if err != nil {
		return nil, &Problem{OtherFailure, err, ""}
	}
	made, err := cred.api.createRequest(ctx, csr)
	if apierrors.IsAlreadyExists(err) {
		if made, err = cred.api.request(ctx, csr.Name); err == nil && !asksFor(made, r.kind, key, id) {
			return nil, problem(requestGone, "the next attempt has another name", "certificate request %s exists and asks for something else", csr.Name)
		}
	}
	if err != nil {
		return nil, explain(err, fmt.Sprintf("create certificate request %s at %s", csr.Name, cred.server(m)), cred.file)
	}
	r.setWaiting(csr.Name)
	m.news()
	certPEM, p := m.await(ctx, cred, made)
	if p != nil {
		return nil, p
	}
	return m.accept(r, csr.Name, certPEM, keyPEM, id)
}

func (c credential) server(m *Manager) string {
	if c.cluster != nil {
		return c.cluster.Host
	}
	return m.wire.server()
}

// accept checks what the signer issued.
func (m *Manager) accept(r *rotator, name string, certPEM, keyPEM []byte, id identity) (*Pair, *Problem) {
	const advice = "see the signer (kube-controller-manager, or what signs in its place) and who may change certificate requests"
	now := m.cfg.Now()
	p, err := newPair(certPEM, keyPEM, now)
	if err != nil {
		return nil, problem(WrongCertificate, advice, "certificate request %s: what %s issued does not fit the key: %v", name, r.kind.signer, err)
	}
	if err := r.kind.check(p.Leaf(), id); err != nil {
		return nil, problem(WrongCertificate, advice, "certificate request %s: %s issued a wrong certificate: %v", name, r.kind.signer, err)
	}
	skew := time.Duration(m.skew.Load())
	if there := now.Add(skew); p.expired(there) {
		return nil, problem(requestGone, "the next attempt makes another request", "certificate request %s: its certificate has expired at %s", name, p.Leaf().NotAfter.Format(time.RFC3339))
	}
	r.setClock(clockProblem(now, p.Leaf(), skew))
	return p, nil
}

// pendingKey is the key of a request under way, or a new one, on disk if the
// disk takes it.
func (m *Manager) pendingKey(r *rotator) (crypto.Signer, []byte, *Problem) {
	for _, keyPEM := range [][]byte{r.key, r.store.pendingKey()} {
		if key, err := parseKey(keyPEM); err == nil {
			return key, keyPEM, nil
		}
	}
	key, keyPEM, err := newKey()
	if err != nil {
		return nil, nil, &Problem{OtherFailure, err, ""}
	}
	if err := r.store.savePendingKey(keyPEM); err != nil {
		r.key = keyPEM
		m.cfg.Log.Warn("the request's key is in memory only: after a restart there will be another request", "err", explainWrite(err, m.cfg.Dir))
	}
	return key, keyPEM, nil
}

// newRequest is the object that asks for id, with a name that follows from its
// content, as kubelet's first one has.
func newRequest(k kind, key crypto.Signer, id identity) (*certificatesv1.CertificateSigningRequest, error) {
	csr, err := signingRequest(key, id)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	h := sha512.New512_256()
	fmt.Fprintf(h, "%s|%s|%s|%v", der, id, k.signer, k.usages())
	return &certificatesv1.CertificateSigningRequest{
		TypeMeta:   metav1.TypeMeta{APIVersion: "certificates.k8s.io/v1", Kind: "CertificateSigningRequest"},
		ObjectMeta: metav1.ObjectMeta{Name: "node-csr-" + base64.RawURLEncoding.EncodeToString(h.Sum(nil))},
		Spec:       certificatesv1.CertificateSigningRequestSpec{Request: csr, SignerName: k.signer, Usages: k.usages()},
	}, nil
}

// asksFor says whether an existing request is ours.
func asksFor(csr *certificatesv1.CertificateSigningRequest, k kind, key crypto.Signer, id identity) bool {
	block, _ := pem.Decode(csr.Spec.Request)
	if block == nil || csr.Spec.SignerName != k.signer {
		return false
	}
	asked, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return false
	}
	has, err1 := x509.MarshalPKIXPublicKey(asked.PublicKey)
	wants, err2 := x509.MarshalPKIXPublicKey(key.Public())
	return err1 == nil && err2 == nil && bytes.Equal(has, wants) && id.equal(identity{
		commonName: asked.Subject.CommonName, organizations: asked.Subject.Organization, dnsNames: asked.DNSNames, ips: asked.IPAddresses,
	})
}

// watchPause is what passes between two looks when the watch breaks.
const watchPause = time.Second

// await waits until the request is issued, denied or failed. Broken connections
// and a server that restarts are waited out; the last trouble is told when the
// time is over.
func (m *Manager) await(ctx context.Context, cred credential, csr *certificatesv1.CertificateSigningRequest) ([]byte, *Problem) {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.ApprovalTimeout)
	defer cancel()
	var trouble error
	for {
		if certPEM, p := outcome(csr); certPEM != nil || p != nil {
			return certPEM, p
		}
		next, err := m.nextState(ctx, cred.api, csr)
		switch {
		case err == nil:
			csr, trouble = next, nil
			continue
		case apierrors.IsNotFound(err):
			return nil, problem(requestGone, "the next attempt makes another one", "certificate request %s was deleted", csr.Name)
		case apierrors.IsUnauthorized(err), apierrors.IsForbidden(err):
			return nil, explain(err, "look at certificate request "+csr.Name, cred.file)
		case ctx.Err() == nil:
			trouble = err
		}
		select {
		case <-ctx.Done():
			return nil, notApproved(csr, m.cfg.ApprovalTimeout, trouble, cred.file)
		case <-time.After(watchPause):
		}
	}
}

func notApproved(csr *certificatesv1.CertificateSigningRequest, waited time.Duration, trouble error, file string) *Problem {
	if trouble != nil {
		return explain(trouble, "look at certificate request "+csr.Name, file)
	}
	what := "approved"
	if approved(csr) {
		what = "signed, although it is approved,"
	}
	return problem(NotApproved, "it is waited for further; kubectl certificate approve "+csr.Name+" (and see whether an approver and the signer "+csr.Spec.SignerName+" run)",
		"certificate request %s was not %s within %s", csr.Name, what, waited)
}

// errWatchEnded is no failure: the server ends each watch after a while.
var errWatchEnded = errors.New("the watch ended")

// nextState is the request once it differs from csr.
func (m *Manager) nextState(ctx context.Context, a *api, csr *certificatesv1.CertificateSigningRequest) (*certificatesv1.CertificateSigningRequest, error) {
	now, err := a.request(ctx, csr.Name)
	if err != nil || now.ResourceVersion != csr.ResourceVersion {
		return now, err
	}
	w, err := a.watchRequest(ctx, csr.Name)
	if err != nil {
		return nil, err
	}
	defer w.Stop()
	for e := range w.ResultChan() {
		next, ok := e.Object.(*certificatesv1.CertificateSigningRequest)
		if ok && (next.ResourceVersion != csr.ResourceVersion || e.Type == watch.Deleted) {
			return next, nil // a deleted one is not found at the next look
		}
		if e.Type == watch.Error {
			return nil, apierrors.FromObject(e.Object)
		}
	}
	return nil, errWatchEnded
}

// outcome is what the request has come to; nothing while it is open.
func outcome(csr *certificatesv1.CertificateSigningRequest) ([]byte, *Problem) {
	for _, c := range csr.Status.Conditions {
		switch c.Type {
		case certificatesv1.CertificateDenied:
			return nil, problem(RequestDenied, "see why the approver denies it; a new request follows", "certificate request %s was denied: %s: %s", csr.Name, c.Reason, c.Message)
		case certificatesv1.CertificateFailed:
			return nil, problem(RequestFailed, "see the signer's log; a new request follows", "certificate request %s failed at the signer: %s: %s", csr.Name, c.Reason, c.Message)
		}
	}
	if approved(csr) && len(csr.Status.Certificate) > 0 {
		return csr.Status.Certificate, nil
	}
	return nil, nil
}

func approved(csr *certificatesv1.CertificateSigningRequest) bool {
	for _, c := range csr.Status.Conditions {
		if c.Type == certificatesv1.CertificateApproved && c.Status == corev1.ConditionTrue {
			return true
		}
	}
	return false
}
