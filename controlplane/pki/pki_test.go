package pki

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"
)

func TestAuthorityStays(t *testing.T) {
	dir := t.TempDir()
	first, err := LoadAuthority(dir, "ca")
	if err != nil {
		t.Fatal(err)
	}
	second, err := LoadAuthority(dir, "ca")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.CertPEM, second.CertPEM) {
		t.Error("the authority was made anew")
	}
	if err := second.IssueFiles(dir, "server", Leaf{CommonName: "s", Hosts: []string{"localhost", "127.0.0.1"}}); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"ca.key", "server.key"} {
		info, err := os.Stat(filepath.Join(dir, key))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", key, info, err)
		}
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "server.crt"), filepath.Join(dir, "server.key"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(first.Cert)
	for _, name := range []string{"localhost", "127.0.0.1"} {
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name}); err != nil {
			t.Errorf("as %s: %v", name, err)
		}
	}
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err == nil {
		t.Error("a server's certificate is a client's")
	}
}

func TestBrokenFilesAreNamed(t *testing.T) {
	dir := t.TempDir()
	if _, err := LoadAuthority(dir, "ca"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ca.key", "ca.crt"} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte("not PEM"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadAuthority(dir, "ca"); err == nil || !bytes.Contains([]byte(err.Error()), []byte(file)) {
			t.Errorf("with a broken %s: %v", name, err)
		}
	}
}
