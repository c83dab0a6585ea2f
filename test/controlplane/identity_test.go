package controlplane

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authentication "k8s.io/api/authentication/v1"
	certificates "k8s.io/api/certificates/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/cert"

	"github.com/nodeagent/nodeagent/test/cluster"
)

func TestSecretsAreEncryptedAtRest(t *testing.T) {
	c := cluster.Shared(t)
	client := clientset(t, c.Admin)
	const secret, open = "marker-that-must-not-be-found", "marker-that-has-to-be-found"
	ns := namespace(t, client)
	_, err := client.CoreV1().Secrets(ns).Create(t.Context(), &core.Secret{
		ObjectMeta: meta.ObjectMeta{Name: "s"}, Data: map[string][]byte{"key": []byte(secret)},
	}, meta.CreateOptions{})
	check(t, err)
	_, err = client.CoreV1().ConfigMaps(ns).Create(t.Context(), &core.ConfigMap{
		ObjectMeta: meta.ObjectMeta{Name: "c"}, Data: map[string]string{"key": open},
	}, meta.CreateOptions{})
	check(t, err)
	// The ConfigMap was written after the Secret: where one is the other is.
	eventually(t, "find the ConfigMap in etcd's database", func(context.Context) error {
		return found(filepath.Join(c.Dir, "etcd/member/snap/db"), open)
	})
	check(t, filepath.WalkDir(filepath.Join(c.Dir, "etcd"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && found(path, secret) == nil {
			t.Errorf("%s holds the Secret in plain text", path)
		}
		return err
	}))
	got, err := client.CoreV1().Secrets(ns).Get(t.Context(), "s", meta.GetOptions{})
	check(t, err)
	if string(got.Data["key"]) != secret {
		t.Errorf("the API server reads %q", got.Data["key"])
	}
}

func found(file, text string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if !bytes.Contains(data, []byte(text)) {
		return errors.New("not there")
	}
	return nil
}

// TestNodeCredential: a node, with a certificate that it got by its bootstrap
// token, sees and changes what is its own.
func TestNodeCredential(t *testing.T) {
	c := cluster.Shared(t)
	admin := clientset(t, c.Admin)
	node := clientset(t, c.Node(t, "own"))
	ns := namespace(t, admin)
	register(t, node, "own")
	register(t, admin, "other")
	for _, name := range []string{"own", "other"} {
		_, err := admin.CoreV1().Secrets(ns).Create(t.Context(), &core.Secret{ObjectMeta: meta.ObjectMeta{Name: name}}, meta.CreateOptions{})
		check(t, err)
		pod := &core.Pod{ObjectMeta: meta.ObjectMeta{Name: name}, Spec: podSpec(name)}
		pod.Spec.Volumes = []core.Volume{{Name: "v", VolumeSource: core.VolumeSource{Secret: &core.SecretVolumeSource{SecretName: name}}}}
		_, err = admin.CoreV1().Pods(ns).Create(t.Context(), pod, meta.CreateOptions{})
		check(t, err)
	}
	eventually(t, "read the Secret of an own pod", func(ctx context.Context) error {
		_, err := node.CoreV1().Secrets(ns).Get(ctx, "own", meta.GetOptions{})
		return err
	})
	status := []byte(`{"status":{"phase":"Running"}}`)
	label := func(key string) []byte { return fmt.Appendf(nil, `{"metadata":{"labels":{%q:"x"}}}`, key) }
	patch := types.StrategicMergePatchType
	grace := int64(0)
	for _, try := range []struct {
		what    string
		allowed bool
		do      func(context.Context) error
	}{
		{"read the Secret of a pod of another node", false, func(ctx context.Context) error {
			_, err := node.CoreV1().Secrets(ns).Get(ctx, "other", meta.GetOptions{})
			return err
		}},
		{"list Secrets", false, func(ctx context.Context) error {
			_, err := node.CoreV1().Secrets(ns).List(ctx, meta.ListOptions{})
			return err
		}},
		{"label its Node", true, func(ctx context.Context) error {
			_, err := node.CoreV1().Nodes().Patch(ctx, "own", patch, label("example.com/x"), meta.PatchOptions{})
			return err
		}},
		{"label another Node", false, func(ctx context.Context) error {
			_, err := node.CoreV1().Nodes().Patch(ctx, "other", patch, label("example.com/x"), meta.PatchOptions{})
			return err
		}},
		{"give itself a restricted label", false, func(ctx context.Context) error {
			_, err := node.CoreV1().Nodes().Patch(ctx, "own", patch, label("node-restriction.kubernetes.io/x"), meta.PatchOptions{})
			return err
		}},
		{"report the status of its pod", true, func(ctx context.Context) error {
			_, err := node.CoreV1().Pods(ns).Patch(ctx, "own", patch, status, meta.PatchOptions{}, "status")
			return err
		}},
		{"report the status of another node's pod", false, func(ctx context.Context) error {
			_, err := node.CoreV1().Pods(ns).Patch(ctx, "other", patch, status, meta.PatchOptions{}, "status")
			return err
		}},
		{"delete another node's pod", false, func(ctx context.Context) error {
			return node.CoreV1().Pods(ns).Delete(ctx, "other", meta.DeleteOptions{GracePeriodSeconds: &grace})
		}},
		{"delete its pod", true, func(ctx context.Context) error {
			return node.CoreV1().Pods(ns).Delete(ctx, "own", meta.DeleteOptions{GracePeriodSeconds: &grace})
		}},
	} {
		err := try.do(t.Context())
		if try.allowed && err != nil {
			t.Errorf("the node may not %s: %v", try.what, err)
		}
		if !try.allowed && !apierrors.IsForbidden(err) {
			t.Errorf("the node may %s (%v)", try.what, err)
		}
	}
	eventually(t, "lose the Secret with the pod", func(ctx context.Context) error {
		if _, err := node.CoreV1().Secrets(ns).Get(ctx, "own", meta.GetOptions{}); !apierrors.IsForbidden(err) {
			return fmt.Errorf("not forbidden: %v", err)
		}
		return nil
	})
}

// TestServingCertificates: the approver lets through what the Node object has,
// and says why it denies.
func TestServingCertificates(t *testing.T) {
	c := cluster.Shared(t)
	config := c.Node(t, "server")
	node := clientset(t, config)
	register(t, node, "server",
		core.NodeAddress{Type: core.NodeInternalIP, Address: "192.0.2.7"},
		core.NodeAddress{Type: core.NodeInternalIP, Address: "2001:db8::7"},
		core.NodeAddress{Type: core.NodeHostName, Address: "server"})
	serving := func(change func(*cluster.Request)) cluster.Request {
		r := cluster.Request{
			Signer:        certificates.KubeletServingSignerName,
			CommonName:    "system:node:server",
			Organizations: []string{"system:nodes"},
			DNSNames:      []string{"server"},
			IPs:           []net.IP{net.ParseIP("192.0.2.7"), net.ParseIP("2001:db8::7")},
			Usages:        []certificates.KeyUsage{certificates.UsageDigitalSignature, certificates.UsageServerAuth},
		}
		change(&r)
		return r
	}

	_, wait, _ := serving(func(*cluster.Request) {}).Send(t, node)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	data, err := wait(ctx)
	check(t, err)
	issued, err := cert.ParseCertsPEM(data)
	check(t, err)
	check(t, issued[0].VerifyHostname("server"))
	check(t, issued[0].VerifyHostname("2001:db8::7"))

	strangers := clientset(t, c.Node(t, "stranger"))
	for _, deny := range []struct {
		reason string
		as     kubernetes.Interface
		change func(*cluster.Request)
	}{
		{"AddressMismatch", node, func(r *cluster.Request) { r.IPs = append(r.IPs, net.ParseIP("192.0.2.8")) }},
		{"AddressMismatch", node, func(r *cluster.Request) { r.DNSNames = []string{"kubernetes.default.svc"} }},
		{"NotKubeletServing", node, func(r *cluster.Request) { r.DNSNames, r.IPs = nil, nil }},
		{"NotKubeletServing", node, func(r *cluster.Request) { r.Usages = append(r.Usages, certificates.UsageClientAuth) }},
		{"NotTheNode", clientset(t, c.Admin), func(*cluster.Request) {}},
		{"NodeNotFound", strangers, func(r *cluster.Request) { r.CommonName = "system:node:stranger" }},
	} {
		name, _, _ := serving(deny.change).Send(t, deny.as)
		eventually(t, "deny with "+deny.reason, func(ctx context.Context) error {
			request, err := clientset(t, c.Admin).CertificatesV1().CertificateSigningRequests().Get(ctx, name, meta.GetOptions{})
			if err != nil {
				return err
			}
			for _, condition := range request.Status.Conditions {
				if condition.Type == certificates.CertificateApproved {
					t.Fatalf("approved: %+v", condition)
				}
				if condition.Type == certificates.CertificateDenied && condition.Reason == deny.reason && condition.Message != "" {
					return nil
				}
			}
			return fmt.Errorf("conditions are %v", request.Status.Conditions)
		})
	}
}

// TestServiceAccountIssuer: tokens are issued, accepted, and can be verified by
// others with what the issuer publishes.
func TestServiceAccountIssuer(t *testing.T) {
	c := cluster.Shared(t)
	admin := clientset(t, c.Admin)
	token, err := admin.CoreV1().ServiceAccounts("default").CreateToken(t.Context(), "default", &authentication.TokenRequest{}, meta.CreateOptions{})
	check(t, err)
	config := rest.AnonymousClientConfig(c.Admin)
	config.BearerToken = token.Status.Token
	who, err := clientset(t, config).AuthenticationV1().SelfSubjectReviews().Create(t.Context(), &authentication.SelfSubjectReview{}, meta.CreateOptions{})
	check(t, err)
	if who.Status.UserInfo.Username != "system:serviceaccount:default:default" {
		t.Errorf("the token is of %q", who.Status.UserInfo.Username)
	}
	for path, part := range map[string]string{
		"/.well-known/openid-configuration": `"issuer":"https://kubernetes.default.svc.cluster.local"`,
		"/openid/v1/jwks":                   `"kty":"EC"`,
	} {
		body, err := admin.Discovery().RESTClient().Get().AbsPath(path).Do(t.Context()).Raw()
		check(t, err)
		if !strings.Contains(string(body), part) {
			t.Errorf("%s is %s, without %s", path, body, part)
		}
	}
}

// TestBootstrapTokenIsNoMore: the token is for requests only.
func TestBootstrapTokenIsNoMore(t *testing.T) {
	c := cluster.Shared(t)
	bootstrap := clientset(t, kubeconfig(t, c.Kubeconfigs["bootstrap"]))
	if _, err := bootstrap.CoreV1().Nodes().List(t.Context(), meta.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("the bootstrap token may list nodes (%v)", err)
	}
	anonymous := clientset(t, rest.AnonymousClientConfig(c.Admin))
	if _, err := anonymous.CoreV1().Nodes().List(t.Context(), meta.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("anybody may list nodes (%v)", err)
	}
}

// TestKubeconfigs: each role's file is the role's.
func TestKubeconfigs(t *testing.T) {
	c := cluster.Shared(t)
	for role, user := range map[string]string{
		"admin":                    "admin",
		"kube-controller-manager":  "system:kube-controller-manager",
		"kube-scheduler":           "system:kube-scheduler",
		"kubelet-serving-approver": "kubelet-serving-approver",
	} {
		config := kubeconfig(t, c.Kubeconfigs[role])
		who, err := clientset(t, config).AuthenticationV1().SelfSubjectReviews().Create(t.Context(), &authentication.SelfSubjectReview{}, meta.CreateOptions{})
		check(t, err)
		if who.Status.UserInfo.Username != user {
			t.Errorf("kubeconfig %s is of %q", role, who.Status.UserInfo.Username)
		}
		if info, err := os.Stat(c.Kubeconfigs[role]); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("kubeconfig %s: %v, %v", role, info.Mode(), err)
		}
	}
	// A user of a test has the rights that RBAC gives, none.
	if _, err := clientset(t, c.User(t, "somebody")).CoreV1().Pods("default").List(t.Context(), meta.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a new user may list pods (%v)", err)
	}
}

// register makes a Node object in the shared control plane, with its addresses,
// for as long as the test runs.
func register(t *testing.T, client kubernetes.Interface, name string, addresses ...core.NodeAddress) {
	t.Helper()
	_, err := client.CoreV1().Nodes().Create(t.Context(), &core.Node{
		ObjectMeta: meta.ObjectMeta{Name: name, Labels: map[string]string{core.LabelHostname: name}},
	}, meta.CreateOptions{})
	check(t, err)
	t.Cleanup(func() {
		check(t, clientset(t, cluster.Shared(t).Admin).CoreV1().Nodes().Delete(context.Background(), name, meta.DeleteOptions{}))
	})
	status, err := json.Marshal(map[string]any{"status": core.NodeStatus{Addresses: addresses}})
	check(t, err)
	_, err = client.CoreV1().Nodes().Patch(t.Context(), name, types.StrategicMergePatchType, status, meta.PatchOptions{}, "status")
	check(t, err)
}

// httpsGet asks the API server's port without a client certificate.
func httpsGet(config *rest.Config, path string) (*http.Response, error) {
	client, err := rest.HTTPClientFor(rest.AnonymousClientConfig(config))
	if err != nil {
		return nil, err
	}
	client.Timeout = 10 * time.Second
	return client.Get(config.Host + path)
}
