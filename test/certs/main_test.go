// Package certs tests the node's certificates against a real control plane,
// whose signer issues for a minute: package certs in this process, and the built
// daemon. It needs bin/controlplane, for the daemon also root and bin/nodeagent.
package certs

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	nodecerts "github.com/nodeagent/nodeagent/certs"
	"github.com/nodeagent/nodeagent/test/cluster"
)

// life is that of every certificate here: short enough for real rotations, and
// long enough that a busy machine can stall for 9 s, a tenth, while one is due.
const life = 90 * time.Second

var once struct {
	sync.Mutex
	cluster *cluster.Cluster
}

// TestMain stops the control plane that the tests share.
func TestMain(m *testing.M) {
	// They wait more than they work, so the number of processors says nothing.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	code := m.Run()
	if once.cluster != nil {
		once.cluster.Kill()
		os.RemoveAll(once.cluster.Dir)
	}
	os.Exit(code)
}

// shared is one control plane for all tests; nodes have names of their own.
func shared(t *testing.T) *cluster.Cluster {
	t.Helper()
	once.Lock()
	defer once.Unlock()
	if once.cluster == nil {
		dir := mustTemp(t)
		defer func() {
			if once.cluster == nil { // it did not start
				os.RemoveAll(dir)
			}
		}()
		once.cluster = cluster.Start(nobody{t}, cluster.Config{Dir: dir, SigningDuration: life})
	}
	return once.cluster
}

// nobody is a test whose end ends nothing: TestMain does.
type nobody struct{ *testing.T }

// Cleanup drops f.
func (nobody) Cleanup(func()) {}

func mustTemp(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "certs-")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func admin(t *testing.T, c *cluster.Cluster) *kubernetes.Clientset {
	t.Helper()
	client, err := kubernetes.NewForConfig(c.Admin)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// register makes a Node with addresses.
func register(t *testing.T, client *kubernetes.Clientset, name string, addresses ...string) {
	t.Helper()
	node, err := client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{
		Name: name, Labels: map[string]string{corev1.LabelHostname: name},
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	readdress(t, client, node.Name, addresses...)
}

// readdress gives a Node other addresses.
func readdress(t *testing.T, client *kubernetes.Clientset, name string, addresses ...string) {
	t.Helper()
	until(t, "addresses of "+name, func() bool {
		node, err := client.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: name}}
		for _, a := range addresses {
			node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
		}
		_, err = client.CoreV1().Nodes().UpdateStatus(t.Context(), node, metav1.UpdateOptions{})
		return err == nil
	})
}

// keeper is a Manager that runs.
type keeper struct {
	*nodecerts.Manager
	cfg  nodecerts.Config
	log  *lockedLog
	stop func()
}

type lockedLog struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// configOf is that of a node that bootstraps from c's token.
func configOf(t *testing.T, c *cluster.Cluster, name string) nodecerts.Config {
	t.Helper()
	dir := t.TempDir()
	return nodecerts.Config{
		NodeName: name, Dir: filepath.Join(dir, "pki"), Kubeconfig: filepath.Join(dir, "kubelet.conf"),
		BootstrapKubeconfig: c.Kubeconfigs["bootstrap"], Serving: true, RetryPause: 500 * time.Millisecond,
	}
}

func keep(t *testing.T, cfg nodecerts.Config) *keeper {
	t.Helper()
	k := &keeper{log: &lockedLog{}}
	cfg.Log = slog.New(slog.NewTextHandler(k.log, nil))
	m, err := nodecerts.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	k.Manager, k.cfg = m, cfg
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := m.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	k.stop = func() { cancel(); <-done }
	t.Cleanup(func() {
		k.stop()
		if t.Failed() {
			t.Logf("log of %s:\n%s", cfg.NodeName, k.log)
		}
		if strings.Contains(k.log.String(), "PRIVATE") {
			t.Error("a key is in the log")
		}
	})
	return k
}

// of is the status of one certificate.
func (k *keeper) of(name string) nodecerts.Status {
	for _, s := range k.Status() {
		if s.Name == name {
			return s
		}
	}
	return nodecerts.Status{}
}

func (k *keeper) untilHeld(t *testing.T, name string) nodecerts.Status {
	t.Helper()
	until(t, fmt.Sprintf("%s certificate of %s", name, k.cfg.NodeName), func() bool { return k.of(name).NotAfter != nil })
	return k.of(name)
}

// until waits for a condition, two minutes at most.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("after two minutes still not: %s", what)
}

// through writes a bootstrap kubeconfig that goes by way of addr.
func through(t *testing.T, c *cluster.Cluster, addr string) string {
	t.Helper()
	cfg, err := clientcmd.LoadFromFile(c.Kubeconfigs["bootstrap"])
	if err != nil {
		t.Fatal(err)
	}
	for _, cl := range cfg.Clusters {
		cl.Server = "https://" + addr
	}
	path := filepath.Join(t.TempDir(), "bootstrap.conf")
	if err := clientcmd.WriteToFile(*cfg, path); err != nil {
		t.Fatal(err)
	}
	return path
}

func freePort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}
