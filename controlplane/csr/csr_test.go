package csr

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"strings"
	"testing"
	"time"

	certificates "k8s.io/api/certificates/v1"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestJudge(t *testing.T) {
	node := &core.Node{ObjectMeta: meta.ObjectMeta{Name: "n"}, Status: core.NodeStatus{Addresses: []core.NodeAddress{
		{Type: core.NodeInternalIP, Address: "192.0.2.1"},
		{Type: core.NodeExternalIP, Address: "2001:db8::1"},
		{Type: core.NodeHostName, Address: "n"},
		{Type: core.NodeInternalDNS, Address: "n.internal"},
	}}}
	type request struct {
		x509.CertificateRequest
		user   string
		groups []string
		usages []certificates.KeyUsage
		raw    []byte
		node   *core.Node
	}
	for _, test := range []struct {
		name, reason, says string
		change             func(*request)
	}{
		{"all that the node has", "AddressesMatch", "node n", func(*request) {}},
		{"an address in another notation", "AddressesMatch", "", func(r *request) { r.IPAddresses = []net.IP{net.ParseIP("2001:DB8:0::1")} }},
		{"with key encipherment, for RSA", "AddressesMatch", "", func(r *request) { r.usages = append(r.usages, certificates.UsageKeyEncipherment) }},
		{"a strange address", "AddressMismatch", "192.0.2.2", func(r *request) { r.IPAddresses = append(r.IPAddresses, net.IP{192, 0, 2, 2}) }},
		{"a strange name", "AddressMismatch", "evil", func(r *request) { r.DNSNames = append(r.DNSNames, "evil") }},
		{"an address as a name", "AddressMismatch", "192.0.2.1", func(r *request) { r.DNSNames = []string{"192.0.2.1"} }},
		{"for another node", "NotTheNode", "itself only", func(r *request) { r.Subject.CommonName = "system:node:m" }},
		{"by who is no node", "NotTheNode", "", func(r *request) { r.groups = []string{"system:authenticated"} }},
		{"without a Node object", "NodeNotFound", "register it", func(r *request) { r.node = nil }},
		{"a Node without addresses", "AddressMismatch", "", func(r *request) { r.node = &core.Node{} }},
		{"no names", "NotKubeletServing", "", func(r *request) { r.DNSNames, r.IPAddresses = nil, nil }},
		{"a mail address", "NotKubeletServing", "", func(r *request) { r.EmailAddresses = []string{"a@example.com"} }},
		{"another organization", "NotKubeletServing", "", func(r *request) { r.Subject.Organization = []string{"system:masters"} }},
		{"for a client", "NotKubeletServing", "", func(r *request) { r.usages = []certificates.KeyUsage{certificates.UsageClientAuth} }},
		{"garbage", "Unreadable", "", func(r *request) { r.raw = []byte("garbage") }},
	} {
		r := request{node: node, user: "system:node:n", groups: []string{"system:nodes"}}
		r.Subject = pkix.Name{CommonName: "system:node:n", Organization: []string{"system:nodes"}}
		r.DNSNames = []string{"n", "n.internal"}
		r.IPAddresses = []net.IP{net.ParseIP("192.0.2.1"), net.ParseIP("2001:db8::1")}
		r.usages = []certificates.KeyUsage{certificates.UsageDigitalSignature, certificates.UsageServerAuth}
		test.change(&r)
		if r.raw == nil {
			r.raw = encoded(t, &r.CertificateRequest)
		}
		got := Judge(&certificates.CertificateSigningRequest{Spec: certificates.CertificateSigningRequestSpec{
			Request: r.raw, Username: r.user, Groups: r.groups, Usages: r.usages,
		}}, r.node)
		if got.Reason != test.reason || !strings.Contains(got.Message, test.says) {
			t.Errorf("%s: %s, %q; expected %s", test.name, got.Reason, got.Message, test.reason)
		}
		if approved := got.Type == certificates.CertificateApproved; approved != (test.reason == "AddressesMatch") {
			t.Errorf("%s: %s", test.name, got.Type)
		}
	}
}

func TestLifeOf(t *testing.T) {
	for asked, expected := range map[int32]time.Duration{0: time.Hour, 600: 10 * time.Minute, 7200: time.Hour} {
		request := &certificates.CertificateSigningRequest{}
		if asked > 0 {
			request.Spec.ExpirationSeconds = &asked
		}
		if got := lifeOf(request, time.Hour); got != expected {
			t.Errorf("asked for %d s: %v, expected %v", asked, got, expected)
		}
	}
}

func encoded(t *testing.T, template *x509.CertificateRequest) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}
