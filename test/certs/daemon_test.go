package certs

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	nodecerts "github.com/nodeagent/nodeagent/certs"
	"github.com/nodeagent/nodeagent/test/cluster"
	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// daemon is the built nodeagent as a node of a cluster.
type daemon struct {
	*node.Node
	name, addr, certDir string
}

func startDaemon(t *testing.T, c *cluster.Cluster, name string) *daemon {
	t.Helper()
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.crt")
	if err := os.WriteFile(ca, c.Admin.CAData, 0o600); err != nil {
		t.Fatal(err)
	}
	d := &daemon{name: name, addr: freePort(t), certDir: filepath.Join(dir, "pki")}
	extra := fmt.Sprintf("node:\n  mode: certificates\n  name: %s\n  kubeconfig: %s\n  bootstrapKubeconfig: %s\n  certDir: %s\n  listen: %q\n  clientCAFile: %s",
		name, filepath.Join(dir, "kubelet.conf"), c.Kubeconfigs["bootstrap"], d.certDir, d.addr, ca)
	d.Node = node.StartTest(t, node.Config{Extra: extra})
	return d
}

// cert runs `nodeagent cert`.
func (d *daemon) cert(args ...string) (string, error) {
	out, err := exec.Command(d.Config.Binary, append(append([]string{"cert"}, args...), "--config", d.ConfigPath())...).CombinedOutput()
	return string(out), err
}

func (d *daemon) status(t *testing.T) map[string]nodecerts.Status {
	t.Helper()
	out, _ := d.cert("status", "-o", "json")
	var report struct {
		Running      bool
		Node         string
		Certificates []nodecerts.Status
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	all := map[string]nodecerts.Status{}
	for _, s := range report.Certificates {
		all[s.Name] = s
	}
	return all
}

// get asks the endpoint with a token, a certificate or nothing.
func (d *daemon) get(t *testing.T, c *cluster.Cluster, path, token string, pair *tls.Certificate) (int, string) {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(c.Admin.CAData)
	conf := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	if pair != nil {
		conf.Certificates = []tls.Certificate{*pair}
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true, ForceAttemptHTTP2: true}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+d.addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(body)
}

// account makes a service account that may get the subresources of nodes given,
// and returns a token of it.
func account(t *testing.T, client *kubernetes.Clientset, name string, resources ...string) string {
	t.Helper()
	const ns = "default"
	if _, err := client.CoreV1().ServiceAccounts(ns).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if len(resources) > 0 {
		allow(t, client, name, rbacv1.Subject{Kind: "ServiceAccount", Namespace: ns, Name: name}, resources...)
	}
	tr, err := client.CoreV1().ServiceAccounts(ns).CreateToken(t.Context(), name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return tr.Status.Token
}

func allow(t *testing.T, client *kubernetes.Clientset, name string, who rbacv1.Subject, resources ...string) {
	t.Helper()
	meta := metav1.ObjectMeta{Name: name}
	if _, err := client.RbacV1().ClusterRoles().Create(t.Context(), &rbacv1.ClusterRole{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: resources, Verbs: []string{"get"}},
	}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: meta, Subjects: []rbacv1.Subject{who}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// TestDaemon: commands, endpoint, metrics, and what the daemon says when it does
// not run.
func TestDaemon(t *testing.T) {
	t.Parallel()
	c := shared(t)
	client := admin(t, c)
	register(t, client, "daemon", "127.0.0.1")
	d := startDaemon(t, c, "daemon")
	until(t, "both certificates", func() bool {
		_, err := d.cert("status")
		return err == nil
	})
	t.Run("endpoint", func(t *testing.T) { endpoint(t, c, client, d) })
	t.Run("renew", func(t *testing.T) {
		before := d.status(t)
		out, err := d.cert("renew")
		if err != nil || !strings.Contains(out, "next renewal") {
			t.Fatalf("%v: %s", err, out)
		}
		after := d.status(t)
		for _, name := range []string{"client", "serving"} {
			if after[name].Serial == before[name].Serial || after[name].Issuer == "" || after[name].Renewal == nil {
				t.Errorf("%s: before %+v\nafter %+v", name, before[name], after[name])
			}
		}
		if out, err := d.cert("renew", "nonsense"); err == nil || !strings.Contains(out, `invalid argument "nonsense"`) {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("killed", func(t *testing.T) {
		before := d.status(t)["client"]
		if err := d.Kill(); err != nil {
			t.Fatal(err)
		}
		out, _ := d.cert("status")
		if !strings.Contains(out, "no daemon runs") || !strings.Contains(out, "CN=system:node:daemon") {
			t.Errorf("status without a daemon: %s", out)
		}
		if err := d.Up(t.Context()); err != nil {
			t.Fatal(err)
		}
		if after := d.status(t)["client"]; after.NotBefore == nil || after.NotBefore.Before(*before.NotBefore) {
			t.Errorf("before %+v\nafter %+v", before, after)
		}
	})
	log, err := os.ReadFile(d.LogPath())
	if err != nil || strings.Contains(string(log), "PRIVATE") {
		t.Errorf("the log has a key in it, or cannot be read: %v", err)
	}
}

func endpoint(t *testing.T, c *cluster.Cluster, client *kubernetes.Clientset, d *daemon) {
	scraper := account(t, client, "scraper", "nodes/metrics")
	prober := account(t, client, "prober", "nodes/proxy")
	stranger := account(t, client, "stranger")
	user := c.User(t, "operator", "operators")
	pair, err := tls.X509KeyPair(user.CertData, user.KeyData)
	if err != nil {
		t.Fatal(err)
	}
	allow(t, client, "operators", rbacv1.Subject{Kind: "Group", APIGroup: rbacv1.GroupName, Name: "operators"}, "nodes/metrics", "nodes/healthz")
	for _, tt := range []struct {
		who, token string
		pair       *tls.Certificate
		path       string
		want       int
	}{
		{"anonymous", "", nil, "/metrics", 401},
		{"anonymous", "", nil, "/healthz", 401},
		{"anonymous", "", nil, "/", 401},
		{"nonsense", "nonsense", nil, "/metrics", 401},
		{"stranger", stranger, nil, "/metrics", 403},
		{"stranger", stranger, nil, "/healthz", 403},
		{"scraper", scraper, nil, "/metrics", 200},
		{"scraper", scraper, nil, "/healthz", 403},
		{"prober", prober, nil, "/healthz", 200},
		{"prober", prober, nil, "/nothing", 404},
		{"operator", "", &pair, "/metrics", 200},
		{"operator", "", &pair, "/healthz", 200},
		{"operator", "", &pair, "/nothing", 403},
	} {
		code, body := d.get(t, c, tt.path, tt.token, tt.pair)
		if code != tt.want {
			t.Errorf("%s %s: %d %s, want %d", tt.who, tt.path, code, body, tt.want)
		}
		if code == 200 && tt.path == "/metrics" && !strings.Contains(body, `nodeagent_certificate_expiration_timestamp_seconds{certificate="client"}`) {
			t.Errorf("%s: metrics lack the certificates: %s", tt.who, body)
		}
	}
}
