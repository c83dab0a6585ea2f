package certs

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	nodecerts "github.com/nodeagent/nodeagent/certs"
	"github.com/nodeagent/nodeagent/test/cluster"
)

// TestDisturbed does to a control plane of its own what others could not share.
// Its certificates live for an hour: none is renewed because its time has come.
func TestDisturbed(t *testing.T) {
	t.Parallel()
	c := cluster.Start(t, cluster.Config{})
	t.Run("never approved", func(t *testing.T) { neverApproved(t, c) })
	t.Run("CA rotated", func(t *testing.T) { caRotated(t, c) })
}

// unbind removes a ClusterRoleBinding until the end of the test.
func unbind(t *testing.T, client *kubernetes.Clientset, name string) {
	t.Helper()
	bindings := client.RbacV1().ClusterRoleBindings()
	b, err := bindings.Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := bindings.Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		b.ObjectMeta = metav1.ObjectMeta{Name: name}
		if _, err := bindings.Create(context.Background(), b, metav1.CreateOptions{}); err != nil {
			t.Error(err)
		}
	})
}

// approve does what kubectl certificate approve does.
func approve(t *testing.T, client *kubernetes.Clientset, request string) {
	t.Helper()
	requests := client.CertificatesV1().CertificateSigningRequests()
	csr, err := requests.Get(t.Context(), request, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	csr.Status.Conditions = append(csr.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{
		Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Test", Message: "approved by hand",
	})
	if _, err := requests.UpdateApproval(t.Context(), request, csr, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// requestsOf are the names of a node's requests.
func requestsOf(t *testing.T, client *kubernetes.Clientset, node string) (names []string) {
	t.Helper()
	all, err := client.CertificatesV1().CertificateSigningRequests().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range all.Items {
		if asksFor(r.Spec.Request, "system:node:"+node) {
			names = append(names, r.Name)
		}
	}
	return names
}

// untilUnapproved waits for a second attempt that nobody approves.
func (k *keeper) untilUnapproved(t *testing.T, name string) {
	t.Helper()
	until(t, "two attempts for the "+name+" certificate", func() bool { return k.of(name).Failures >= 2 })
	k.untilTold(t, name, nodecerts.NotApproved, "kubectl certificate approve node-csr-")
}

// untilTold waits for a failure that says so.
func (k *keeper) untilTold(t *testing.T, name string, why nodecerts.Reason, says string) {
	t.Helper()
	until(t, fmt.Sprintf("%s of %s, with %q", why, k.cfg.NodeName, says), func() bool {
		s := k.of(name)
		return s.LastReason == why && strings.Contains(s.LastError, says)
	})
}

// neverApproved: without the approvers there is one request and no more, over
// any number of attempts and a restart; what we print is what has to be done.
func neverApproved(t *testing.T, c *cluster.Cluster) {
	client := admin(t, c)
	unbind(t, client, "controlplane:certificates.k8s.io:certificatesigningrequests:nodeclient")
	unbind(t, client, "controlplane:kubelet-serving-approver")
	t.Run("manager", func(t *testing.T) {
		t.Parallel()
		register(t, client, "unseen", "127.0.0.1")
		cfg := configOf(t, c, "unseen")
		cfg.ApprovalTimeout = 2 * time.Second
		k := keep(t, cfg)
		k.untilUnapproved(t, "client")
		k.stop()
		k = keep(t, cfg)
		k.untilUnapproved(t, "client")
		all := requestsOf(t, client, "unseen")
		if len(all) != 1 {
			t.Fatalf("requests %q, want one", all)
		}
		approve(t, client, all[0])
		first := k.untilHeld(t, "client")
		k.untilUnapproved(t, "serving")
		next := slices.DeleteFunc(requestsOf(t, client, "unseen"), func(r string) bool { return r == all[0] })
		if len(next) != 1 {
			t.Fatalf("requests %q besides the first, want one", next)
		}
		approve(t, client, next[0])
		k.untilHeld(t, "serving")
		if now := k.of("client"); now.Serial != first.Serial {
			t.Errorf("the client certificate was renewed meanwhile: %+v", now)
		}
	})
	t.Run("command", func(t *testing.T) {
		t.Parallel()
		register(t, client, "unheard", "127.0.0.1")
		d := startDaemon(t, c, "unheard")
		for _, name := range []string{"client", "serving"} {
			until(t, "request for the "+name+" certificate", func() bool { return d.status(t)[name].Request != "" })
			out, err := d.cert("renew", name, "--timeout", "2s")
			hint := regexp.MustCompile(`not renewed within 2s: certificate request (\S+) waits for approval \(kubectl certificate approve (\S+)\)`).FindStringSubmatch(out)
			if err == nil || hint == nil || hint[1] != hint[2] {
				t.Fatalf("%v: %s", err, out)
			}
			approve(t, client, hint[2])
			until(t, name+" certificate", func() bool { return d.status(t)[name].NotAfter != nil })
		}
		if all := requestsOf(t, client, "unheard"); len(all) != 2 {
			t.Errorf("requests %q, want two", all)
		}
	})
}

// caRotated: servers and clients have another CA from one moment to the next,
// without a time in which both are trusted. Each node says what it lacks, and
// comes back without a restart once an operator gives it that.
func caRotated(t *testing.T, c *cluster.Cluster) {
	client := admin(t, c)
	old := c.Admin.CAData
	nodes := map[string]*keeper{}
	for _, name := range []string{"both", "bootstrap", "alone"} {
		register(t, client, name, "127.0.0.1")
		cfg := configOf(t, c, name)
		cfg.BootstrapKubeconfig = filepath.Join(filepath.Dir(cfg.Kubeconfig), "bootstrap.conf")
		copyFile(t, c.Kubeconfigs["bootstrap"], cfg.BootstrapKubeconfig)
		nodes[name] = keep(t, cfg)
	}
	before := map[string]nodecerts.Status{}
	for name, k := range nodes {
		before[name] = k.untilHeld(t, "client")
		k.untilHeld(t, "serving")
	}
	if err := os.Remove(nodes["alone"].cfg.BootstrapKubeconfig); err != nil {
		t.Fatal(err)
	}
	rotateCA(t, c)
	if bytes.Equal(c.Admin.CAData, old) {
		t.Fatal("the control plane has its old CA")
	}
	const notTrusted = "if the CA was rotated put the new one there"
	for name, k := range nodes {
		file := k.cfg.BootstrapKubeconfig
		if name == "alone" {
			file = k.cfg.Kubeconfig
		}
		k.untilTold(t, "client", nodecerts.ServerNotTrusted, "is not of the CA in "+file+"; "+notTrusted)
	}

	rebundle(t, nodes["both"].cfg.Kubeconfig, old, c.Admin.CAData)
	rebundle(t, nodes["both"].cfg.BootstrapKubeconfig, old, c.Admin.CAData)
	rebundle(t, nodes["bootstrap"].cfg.BootstrapKubeconfig, c.Admin.CAData)
	rebundle(t, nodes["alone"].cfg.Kubeconfig, c.Admin.CAData)
	file := nodes["alone"].cfg.BootstrapKubeconfig
	nodes["alone"].untilTold(t, "client", nodecerts.CredentialRefused, "put a bootstrap kubeconfig at "+file)
	copyFile(t, c.Kubeconfigs["bootstrap"], file)
	for name, k := range nodes {
		until(t, name+" with a certificate of the new CA", func() bool {
			now := k.of("client")
			return now.Serial != before[name].Serial && now.LastError == ""
		})
		works(t, c, k)
	}
}

// works: the node is accepted by the API server, and others accept the node.
func works(t *testing.T, c *cluster.Cluster, k *keeper) {
	t.Helper()
	name := k.cfg.NodeName
	node, err := kubernetes.NewForConfig(k.RESTConfig())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := node.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{}); err != nil {
		t.Errorf("%s: %v", name, err)
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", k.cfg.Kubeconfig)
	if err != nil || !bytes.Contains(cfg.CAData, c.Admin.CAData) {
		t.Errorf("%s: its kubeconfig lacks the new CA (%v)", name, err)
	}
	addr, ask := serve(t, k), caller(t, c)
	until(t, name+" with a serving certificate of the new CA", func() bool { return ask(t.Context(), addr, nil) == nil })
}

// rotateCA has the control plane start again with keys of another authority.
// It is killed: its clean stop waits for the nodes' watches.
func rotateCA(t *testing.T, c *cluster.Cluster) {
	t.Helper()
	c.Kill()
	files, err := filepath.Glob(filepath.Join(c.Dir, "pki", "ca.*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no CA in %s (%v)", c.Dir, err)
	}
	for _, f := range files {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
	c.Restart(t)
}

// rebundle puts authorities into a kubeconfig, as an operator would.
func rebundle(t *testing.T, kubeconfig string, authorities ...[]byte) {
	t.Helper()
	cfg, err := clientcmd.LoadFromFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	for _, cl := range cfg.Clusters {
		cl.CertificateAuthorityData = bytes.Join(authorities, nil)
	}
	if err := clientcmd.WriteToFile(*cfg, kubeconfig); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
