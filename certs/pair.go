package certs

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
)

// Pair is a certificate chain with its key. It is not changed once made.
type Pair struct {
	tls      tls.Certificate // Leaf is set
	certPEM  []byte          // leaf, then intermediates
	keyPEM   []byte
	received time.Time // when it came here: the file's time
}

// newPair joins a chain and a key that belong together.
func newPair(certPEM, keyPEM []byte, received time.Time) (*Pair, error) {
	t, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, err
	}
	if t.Leaf == nil {
		if t.Leaf, err = x509.ParseCertificate(t.Certificate[0]); err != nil {
			return nil, err
		}
	}
	p := &Pair{tls: t, keyPEM: keyPEM, received: received}
	for _, der := range t.Certificate {
		p.certPEM = append(p.certPEM, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return p, nil
}

// Leaf is the node's certificate itself.
func (p *Pair) Leaf() *x509.Certificate { return p.tls.Leaf }

func (p *Pair) expired(now time.Time) bool { return !now.Before(p.Leaf().NotAfter) }

func (p *Pair) same(o *Pair) bool {
	return p == o || p != nil && o != nil && bytes.Equal(p.tls.Certificate[0], o.tls.Certificate[0])
}

// sameIssuer says that one key has signed both; a new CA may have the old name.
func (p *Pair) sameIssuer(o *Pair) bool {
	a, b := p.Leaf(), o.Leaf()
	return bytes.Equal(a.RawIssuer, b.RawIssuer) && bytes.Equal(a.AuthorityKeyId, b.AuthorityKeyId)
}

// newer says that p was issued after o, or lives longer.
func (p *Pair) newer(o *Pair) bool {
	return p.Leaf().NotBefore.After(o.Leaf().NotBefore) || p.Leaf().NotAfter.After(o.Leaf().NotAfter)
}

// String has nothing secret in it; Format and LogValue see to it that no verb
// and no logger prints more.
func (p *Pair) String() string {
	if p == nil {
		return "no certificate"
	}
	return fmt.Sprintf("%s until %s", p.Leaf().Subject.CommonName, p.Leaf().NotAfter.Format(time.RFC3339))
}

// Format implements fmt.Formatter.
func (p *Pair) Format(f fmt.State, _ rune) { fmt.Fprint(f, p.String()) }

// LogValue implements slog.LogValuer.
func (p *Pair) LogValue() slog.Value { return slog.StringValue(p.String()) }

// kind is one of the two certificates of a node.
type kind struct {
	name   string // in commands, metrics and messages
	prefix string // of its files, kubelet's
	signer string
	usage  certificatesv1.KeyUsage
	extKey x509.ExtKeyUsage
}

var (
	clientKind = kind{
		name: "client", prefix: "kubelet-client", signer: certificatesv1.KubeAPIServerClientKubeletSignerName,
		usage: certificatesv1.UsageClientAuth, extKey: x509.ExtKeyUsageClientAuth,
	}
	servingKind = kind{
		name: "serving", prefix: "kubelet-server", signer: certificatesv1.KubeletServingSignerName,
		usage: certificatesv1.UsageServerAuth, extKey: x509.ExtKeyUsageServerAuth,
	}
)

// usages are what a request has to name exactly, for keys that only sign.
func (k kind) usages() []certificatesv1.KeyUsage {
	return []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, k.usage}
}

// identity is what a certificate has to say of the node.
type identity struct {
	commonName    string
	organizations []string
	dnsNames      []string // sorted
	ips           []net.IP // sorted by text
}

// nodeIdentity is that of the node's client certificate; the serving one has
// names besides.
func nodeIdentity(nodeName string) identity {
	return identity{commonName: "system:node:" + nodeName, organizations: []string{"system:nodes"}}
}

func (id identity) equal(o identity) bool {
	return id.commonName == o.commonName && slices.Equal(id.organizations, o.organizations) &&
		slices.Equal(id.dnsNames, o.dnsNames) && slices.EqualFunc(id.ips, o.ips, net.IP.Equal)
}

// String is unique for what equal distinguishes.
func (id identity) String() string {
	parts := append([]string{id.commonName, strings.Join(id.organizations, ",")}, id.dnsNames...)
	for _, ip := range id.ips {
		parts = append(parts, ip.String())
	}
	return strings.Join(parts, " ")
}

// check says what leaf lacks to be a certificate of this kind for id; names
// beyond those that were asked for are fine, as they are for kubelet.
func (k kind) check(leaf *x509.Certificate, id identity) error {
	var lacks []string
	if leaf.Subject.CommonName != id.commonName {
		lacks = append(lacks, fmt.Sprintf("it is for %q", leaf.Subject.CommonName))
	}
	for _, o := range id.organizations {
		if !slices.Contains(leaf.Subject.Organization, o) {
			lacks = append(lacks, fmt.Sprintf("it lacks the organization %q", o))
		}
	}
	for _, n := range id.dnsNames {
		if !slices.Contains(leaf.DNSNames, n) {
			lacks = append(lacks, fmt.Sprintf("it lacks the name %q", n))
		}
	}
	for _, ip := range id.ips {
		if !slices.ContainsFunc(leaf.IPAddresses, ip.Equal) {
			lacks = append(lacks, fmt.Sprintf("it lacks the address %s", ip))
		}
	}
	if !slices.Contains(leaf.ExtKeyUsage, k.extKey) {
		lacks = append(lacks, fmt.Sprintf("it is not for %s", k.usage))
	}
	if len(lacks) > 0 {
		return errors.New(strings.Join(lacks, ", "))
	}
	return nil
}

// newKey makes what kubelet makes, ECDSA P-256.
func newKey() (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make private key: %w", err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("encode private key: %w", err)
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

// parseKey is the inverse of newKey. Its errors hold nothing of the key.
func parseKey(keyPEM []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(keyPEM)
	if block == nil || block.Type != "EC PRIVATE KEY" {
		return nil, errors.New("no EC private key in PEM")
	}
	key, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("the private key cannot be parsed")
	}
	return key, nil
}

// signingRequest is the CSR in PEM.
func signingRequest(key crypto.Signer, id identity) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: id.commonName, Organization: id.organizations},
		DNSNames: id.dnsNames, IPAddresses: id.ips,
	}, key)
	if err != nil {
		return nil, fmt.Errorf("make certificate request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}
