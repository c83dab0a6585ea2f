// Package pki makes the keys and certificates of a control plane for tests:
// authorities that stay on disk, and leaves that they issue anew at each
// start. Files are PEM, keys are 0600 and ECDSA P-256.
//
// It must not know who uses which certificate. It has no goroutines.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

const (
	authorityLife = 10 * 365 * 24 * time.Hour
	leafLife      = 365 * 24 * time.Hour
	backdate      = 5 * time.Minute // for clients whose clock is behind
)

// Authority signs certificates. CertPEM is its own certificate.
type Authority struct {
	Cert    *x509.Certificate
	Key     crypto.Signer
	CertPEM []byte
}

// Leaf says whom a certificate names. With Hosts (DNS names and addresses) it
// is a server's, without a client's.
type Leaf struct {
	CommonName    string
	Organizations []string
	Hosts         []string
}

// LoadAuthority reads dir/name.crt and dir/name.key; if neither is there, it
// makes a new authority and writes both.
func LoadAuthority(dir, name string) (*Authority, error) {
	certFile, keyFile := filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	certPEM, err := os.ReadFile(certFile)
	if errors.Is(err, fs.ErrNotExist) {
		return newAuthority(certFile, keyFile, name)
	}
	if err != nil {
		return nil, fmt.Errorf("read authority %s: %w", name, err)
	}
	block, _ := pem.Decode(certPEM)
	if block == nil {
		return nil, fmt.Errorf("read authority %s: %s holds no PEM", name, certFile)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse %s: %w", certFile, err)
	}
	key, err := LoadKey(keyFile)
	if err != nil {
		return nil, err
	}
	return &Authority{cert, key, certPEM}, nil
}

func newAuthority(certFile, keyFile, name string) (*Authority, error) {
	key, err := LoadKey(keyFile)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		NotAfter:              time.Now().Add(authorityLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := sign(template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make authority %s: %w", name, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse new authority %s: %w", name, err)
	}
	a := &Authority{cert, key, encode("CERTIFICATE", der)}
	return a, os.WriteFile(certFile, a.CertPEM, 0o644)
}

// LoadKey reads a private key (SEC 1, the only form of an ECDSA key in which
// kube-apiserver finds a service account's public key), or makes one if the
// file is not there.
func LoadKey(file string) (crypto.Signer, error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		key, data, err := newKey()
		if err != nil {
			return nil, err
		}
		return key, os.WriteFile(file, data, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("%s holds no PEM", file)
	}
	key, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse key %s: %w", file, err)
	}
	return key, nil
}

// Issue makes a key and a certificate for it, both in PEM.
func (a *Authority) Issue(leaf Leaf) (certPEM, keyPEM []byte, err error) {
	key, keyPEM, err := newKey()
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: leaf.CommonName, Organization: leaf.Organizations},
		NotAfter:    time.Now().Add(leafLife),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, host := range leaf.Hosts {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	der, err := sign(template, a.Cert, key.Public(), a.Key)
	if err != nil {
		return nil, nil, fmt.Errorf("issue certificate for %s: %w", leaf.CommonName, err)
	}
	return encode("CERTIFICATE", der), keyPEM, nil
}

// IssueFiles writes what Issue makes to dir/name.crt and dir/name.key.
func (a *Authority) IssueFiles(dir, name string, leaf Leaf) error {
	certPEM, keyPEM, err := a.Issue(leaf)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, name+".crt"), certPEM, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name+".key"), keyPEM, 0o600)
}

func sign(template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	template.NotBefore = time.Now().Add(-backdate)
	return x509.CreateCertificate(rand.Reader, template, parent, public, key)
}

func newKey() (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make key: %w", err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("encode key: %w", err)
	}
	return key, encode("EC PRIVATE KEY", der), nil
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
