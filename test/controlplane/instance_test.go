package controlplane

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/cert"

	"github.com/nodeagent/nodeagent/test/cluster"
)

// auditPolicy lets ConfigMaps named "seen" through, and nothing else.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Request
    verbs: [create]
    namespaces: [default]
    resources: [{group: "", resources: [configmaps]}]
  - level: None
`

// event is what we need of audit.k8s.io/v1 Event.
type event struct {
	Level, Verb   string
	User          struct{ Username string }
	ObjectRef     struct{ Resource, Namespace, Name string }
	RequestObject json.RawMessage
}

// receiver is an audit webhook.
type receiver struct {
	mu     sync.Mutex
	events []event
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	var list struct{ Items []event }
	body, err := io.ReadAll(request.Body)
	if err == nil {
		err = json.Unmarshal(body, &list)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, list.Items...)
}

func (r *receiver) received() []event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events)
}

// TestSecondInstance: everything that needs a control plane of its own, beside
// the shared one.
func TestSecondInstance(t *testing.T) {
	shared := cluster.Shared(t)
	webhook := &receiver{}
	server := httptest.NewServer(webhook)
	defer server.Close()
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	check(t, os.WriteFile(policy, []byte(auditPolicy), 0o600))
	c := cluster.Start(t, cluster.Config{
		Listen:          "127.0.0.2",
		SigningDuration: time.Minute,
		AuditPolicy:     policy,
		AuditWebhook:    server.URL,
	})
	client := clientset(t, c.Admin)

	t.Run("side by side", func(t *testing.T) {
		if !strings.HasPrefix(c.Server, "https://127.0.0.2:") || !strings.HasPrefix(shared.Server, "https://127.0.0.1:") {
			t.Errorf("they serve on %s and %s", c.Server, shared.Server)
		}
		create(t, c, "here-only")
		if err := get(t, shared, "here-only"); err == nil {
			t.Error("what one holds is in the other")
		}
	})
	t.Run("audit", func(t *testing.T) {
		_, err := client.CoreV1().Secrets("default").Create(t.Context(), &core.Secret{ObjectMeta: meta.ObjectMeta{Name: "unseen"}}, meta.CreateOptions{})
		check(t, err)
		create(t, c, "seen")
		eventually(t, "receive the event", func(context.Context) error {
			for _, e := range webhook.received() {
				if e.ObjectRef.Name == "seen" && e.User.Username == "admin" && e.Level == "Request" && len(e.RequestObject) > 0 {
					return nil
				}
			}
			return fmt.Errorf("received %d others", len(webhook.received()))
		})
		for _, e := range webhook.received() {
			if e.Verb != "create" || e.ObjectRef.Resource != "configmaps" || e.ObjectRef.Namespace != "default" {
				t.Errorf("the policy let through %+v", e)
			}
		}
	})
	t.Run("short certificates", func(t *testing.T) {
		node := c.Node(t, "short")
		issued, err := cert.ParseCertsPEM(node.CertData)
		check(t, err)
		life := issued[0].NotAfter.Sub(issued[0].NotBefore)
		if life < time.Minute || life > 67*time.Second {
			t.Errorf("a certificate for a minute is valid for %v", life)
		}
		_, err = clientset(t, node).CoreV1().Nodes().Get(t.Context(), "short", meta.GetOptions{})
		if !apierrors.IsNotFound(err) { // it is not registered; the certificate is good
			t.Errorf("the node asks for itself: %v", err)
		}
	})
	t.Run("restart on its data", func(t *testing.T) {
		server := c.Server
		c.Restart(t)
		if c.Server != server {
			t.Errorf("came back on %s, was on %s", c.Server, server)
		}
		check(t, get(t, c, "here-only"))
		_, err := client.CoreV1().Secrets("default").Get(t.Context(), "unseen", meta.GetOptions{})
		check(t, err) // with the admin's old certificate, decrypted with the old key
		c.Node(t, "after-restart")
	})
	t.Run("restart after a kill", func(t *testing.T) {
		create(t, c, "before-the-kill")
		c.Kill()
		c.Restart(t)
		check(t, get(t, c, "before-the-kill"))
	})
	t.Run("restart with a new authority", func(t *testing.T) {
		old := c.Admin
		check(t, os.Remove(filepath.Join(c.Dir, "pki/ca.crt")))
		check(t, os.Remove(filepath.Join(c.Dir, "pki/ca.key")))
		c.Restart(t)
		if response, err := httpsGet(old, "/livez"); err == nil {
			response.Body.Close()
			t.Error("the old authority still vouches for the server")
		}
		check(t, get(t, c, "before-the-kill"))
		c.Node(t, "of-the-new-authority")
	})
	t.Run("stop", func(t *testing.T) {
		pid := c.PID()
		open, err := clientset(t, c.Admin).CoreV1().ConfigMaps("default").Watch(t.Context(), meta.ListOptions{})
		check(t, err)
		defer open.Stop() // a watch that its client does not end does not hold the server up
		check(t, syscall.Kill(pid, syscall.SIGTERM))
		c.Stop(t) // fails if it did not end, or not well
		if err := syscall.Kill(-pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("processes of the control plane are left: %v", err)
		}
		for _, name := range []string{"ready.json", "etcd.sock", "etcd-peer.sock"} {
			if _, err := os.Stat(filepath.Join(c.Dir, name)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is left (%v)", name, err)
			}
		}
		if response, err := httpsGet(c.Admin, "/livez"); err == nil {
			response.Body.Close()
			t.Error("its port still answers")
		}
	})
}

// TestRefusals: what cannot work is said at once and changes nothing.
func TestRefusals(t *testing.T) {
	shared := cluster.Shared(t)
	binary, err := cluster.Binary()
	check(t, err)
	foreign := t.TempDir()
	check(t, os.WriteFile(filepath.Join(foreign, "letter"), nil, 0o600))
	_, port, err := net.SplitHostPort(strings.TrimPrefix(shared.Server, "https://"))
	check(t, err)
	for _, test := range []struct {
		args []string
		says string
	}{
		{nil, "--dir is required"},
		{[]string{"--dir", foreign}, "is not empty and not of an earlier run"},
		{[]string{"--dir", shared.Dir}, "another control plane runs in " + shared.Dir},
		{[]string{"--dir", t.TempDir(), "--listen", "here"}, "invalid IP address: here"},
		{[]string{"--dir", t.TempDir(), "--port", port}, "open the API server's port"},
		{[]string{"--dir", t.TempDir(), "--signing-duration", "1s"}, "at least 10s"},
		{[]string{"--dir", t.TempDir(), "--audit-policy", "nowhere.yaml"}, "nowhere.yaml: no such file"},
		{[]string{"--dir", t.TempDir(), "extra"}, `unexpected argument "extra"`},
	} {
		out, err := exec.CommandContext(t.Context(), binary, test.args...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), test.says) {
			t.Errorf("%v: %v, %s; expected %q", test.args, err, out, test.says)
		}
	}
	if _, err := os.Stat(filepath.Join(foreign, "letter")); err != nil {
		t.Errorf("a file of others is gone: %v", err)
	}
	check(t, get(t, shared, "kube-root-ca.crt"))
}

func create(t *testing.T, c *cluster.Cluster, name string) {
	t.Helper()
	_, err := clientset(t, c.Admin).CoreV1().ConfigMaps("default").Create(t.Context(), &core.ConfigMap{ObjectMeta: meta.ObjectMeta{Name: name}}, meta.CreateOptions{})
	check(t, err)
}

func get(t *testing.T, c *cluster.Cluster, name string) error {
	_, err := clientset(t, c.Admin).CoreV1().ConfigMaps("default").Get(t.Context(), name, meta.GetOptions{})
	return err
}

// BenchmarkStart is the time from nothing to a pod that could be made, and back.
func BenchmarkStart(b *testing.B) {
	for b.Loop() {
		begin := time.Now()
		c := cluster.Start(b, cluster.Config{})
		b.ReportMetric(time.Since(begin).Seconds(), "s/ready")
		c.Stop(b)
	}
}
