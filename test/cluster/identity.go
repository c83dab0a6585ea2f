package cluster

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	certificates "k8s.io/api/certificates/v1"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/certificate/csr"
	"k8s.io/client-go/util/keyutil"
)

const issueTimeout = time.Minute

// Request is a signing request, complete but for the key.
type Request struct {
	Signer        string // kubernetes.io/...
	CommonName    string
	Organizations []string
	DNSNames      []string
	IPs           []net.IP
	Usages        []certificates.KeyUsage
}

// Send makes a key and sends the request as client. It returns the name of the
// CertificateSigningRequest, a function that waits for the certificate, and the
// key; both are PEM.
func (r Request) Send(t testing.TB, client kubernetes.Interface) (name string, wait func(context.Context) ([]byte, error), key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if key, err = keyutil.MarshalPrivateKeyToPEM(private); err != nil {
		t.Fatal(err)
	}
	der, err := cert.MakeCSRFromTemplate(private, &x509.CertificateRequest{
		Subject:     pkix.Name{CommonName: r.CommonName, Organization: r.Organizations},
		DNSNames:    r.DNSNames,
		IPAddresses: r.IPs,
	})
	if err != nil {
		t.Fatal(err)
	}
	name, uid, err := csr.RequestCertificateWithContext(t.Context(), client, der, "", r.Signer, nil, r.Usages, private)
	if err != nil {
		t.Fatal(err)
	}
	return name, func(ctx context.Context) ([]byte, error) {
		return csr.WaitForCertificate(ctx, client, name, uid)
	}, key
}

// Node returns a client that is the node of that name. It gets its certificate
// as a kubelet does: a request with the bootstrap token, which the controller
// manager approves. There need not be a Node object.
func (c *Cluster) Node(t testing.TB, name string) *rest.Config {
	t.Helper()
	bootstrap, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfigs["bootstrap"])
	if err != nil {
		t.Fatal(err)
	}
	_, wait, key := Request{
		Signer:        certificates.KubeAPIServerClientKubeletSignerName,
		CommonName:    "system:node:" + name,
		Organizations: []string{"system:nodes"},
		Usages:        []certificates.KeyUsage{certificates.UsageDigitalSignature, certificates.UsageClientAuth},
	}.Send(t, kubernetes.NewForConfigOrDie(bootstrap))
	return c.issued(t, wait, key)
}

// User returns a client with a certificate for a user and its groups, signed
// on a request that the admin made and approved. Its rights are what RBAC says.
func (c *Cluster) User(t testing.TB, name string, groups ...string) *rest.Config {
	t.Helper()
	admin := kubernetes.NewForConfigOrDie(c.Admin)
	request, wait, key := Request{
		Signer:        certificates.KubeAPIServerClientSignerName,
		CommonName:    name,
		Organizations: groups,
		Usages:        []certificates.KeyUsage{certificates.UsageDigitalSignature, certificates.UsageClientAuth},
	}.Send(t, admin)
	requests := admin.CertificatesV1().CertificateSigningRequests()
	object, err := requests.Get(t.Context(), request, meta.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	object.Status.Conditions = append(object.Status.Conditions, certificates.CertificateSigningRequestCondition{
		Type: certificates.CertificateApproved, Status: core.ConditionTrue, Reason: "Test", Message: "approved by a test",
	})
	if _, err := requests.UpdateApproval(t.Context(), request, object, meta.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	return c.issued(t, wait, key)
}

func (c *Cluster) issued(t testing.TB, wait func(context.Context) ([]byte, error), key []byte) *rest.Config {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), issueTimeout)
	defer cancel()
	certificate, err := wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	config := rest.AnonymousClientConfig(c.Admin)
	config.CertData, config.KeyData = certificate, key
	config.QPS, config.Burst = c.Admin.QPS, c.Admin.Burst
	return config
}

// Kubeconfig writes a client configuration with a certificate or a token to a
// file of the test and returns its path.
func Kubeconfig(t testing.TB, config *rest.Config) string {
	t.Helper()
	k := clientcmdapi.NewConfig()
	k.Clusters["cluster"] = &clientcmdapi.Cluster{Server: config.Host, CertificateAuthorityData: config.CAData}
	k.AuthInfos["user"] = &clientcmdapi.AuthInfo{
		ClientCertificateData: config.CertData, ClientKeyData: config.KeyData, Token: config.BearerToken,
	}
	k.Contexts["default"] = &clientcmdapi.Context{Cluster: "cluster", AuthInfo: "user"}
	k.CurrentContext = "default"
	file := filepath.Join(t.TempDir(), strings.ReplaceAll(t.Name(), "/", "-")+".kubeconfig")
	if err := clientcmd.WriteToFile(*k, file); err != nil {
		t.Fatal(err)
	}
	return file
}
