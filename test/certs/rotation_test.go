package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	nodecerts "github.com/nodeagent/nodeagent/certs"
	"github.com/nodeagent/nodeagent/test/cluster"
)

// rotations is how many there are in a row.
const rotations = 5

// TestRotationUnderTraffic: a client that asks all the time and a server that is
// asked all the time see no failure through five rotations of both certificates.
func TestRotationUnderTraffic(t *testing.T) {
	t.Parallel()
	c := shared(t)
	register(t, admin(t, c), "rotating", "127.0.0.1")
	k := keep(t, configOf(t, c, "rotating"))
	k.untilHeld(t, "serving")

	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var asked, served atomic.Int64
	cfg := k.RESTConfig()
	cfg.QPS = -1
	node, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	hammer := func(what string, n *atomic.Int64, ask func(context.Context) error) {
		wg.Go(func() {
			for ; ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
				if err := ask(ctx); err != nil && ctx.Err() == nil {
					t.Errorf("%s, after %d that went well: %v", what, n.Load(), err)
					return
				}
				n.Add(1)
			}
		})
	}
	for range 2 {
		hammer("request of the node", &asked, func(ctx context.Context) error {
			_, err := node.CoreV1().Nodes().Get(ctx, "rotating", metav1.GetOptions{})
			return err
		})
	}
	hammer("watch of the node", &asked, func(ctx context.Context) error { return watchFor(ctx, node, 20*time.Second) })
	addr, handshakes := serve(t, k), caller(t, c)
	hammer("request to the node", &served, func(ctx context.Context) error { return handshakes(ctx, addr, nil) })
	var lasting lastingConnection
	hammer("request on one connection", &served, func(ctx context.Context) error { return handshakes(ctx, addr, &lasting) })

	serials := map[string]bool{}
	end := time.Now().Add(rotations*life + 2*time.Minute)
	for ; time.Now().Before(end) && !t.Failed(); time.Sleep(200 * time.Millisecond) {
		for _, s := range k.Status() {
			serials[s.Name+s.Serial] = true
			if s.NotAfter == nil || time.Now().After(*s.NotAfter) {
				t.Fatalf("%s: no certificate that lives: %+v", s.Name, s)
			}
		}
		if k.of("client").Renewals > rotations && k.of("serving").Renewals > rotations {
			break
		}
	}
	for _, s := range k.Status() {
		if s.Renewals <= rotations {
			t.Errorf("%s: %d certificates, want %d: %+v", s.Name, s.Renewals, rotations+1, s)
		}
	}
	if asked.Load() < 500 || served.Load() < 500 || len(serials) < 2*rotations {
		t.Errorf("%d requests of the node, %d to it, %d certificates seen", asked.Load(), served.Load(), len(serials))
	}
	t.Logf("%d requests of the node and %d to it, %d certificates", asked.Load(), served.Load(), len(serials))
}

// watchFor follows the Node; the watch has to last.
func watchFor(ctx context.Context, node *kubernetes.Clientset, d time.Duration) error {
	seconds := int64(d.Seconds())
	begin := time.Now()
	w, err := node.CoreV1().Nodes().Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=rotating", TimeoutSeconds: &seconds})
	if err != nil {
		return err
	}
	defer w.Stop()
	for e := range w.ResultChan() {
		if _, ok := e.Object.(*corev1.Node); !ok {
			return fmt.Errorf("event %s: %v", e.Type, e.Object)
		}
	}
	if lasted := time.Since(begin); lasted < d-time.Second && ctx.Err() == nil {
		return fmt.Errorf("it broke off after %s of %s", lasted, d)
	}
	return nil
}

// serve answers with the serving certificate of k.
func serve(t *testing.T, k *keeper) string {
	t.Helper()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{GetCertificate: k.GetCertificate, MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ok") })}
	go s.Serve(ln)
	t.Cleanup(func() { s.Close() })
	return ln.Addr().String()
}

// lastingConnection is a client that keeps its connection.
type lastingConnection struct{ client *http.Client }

// caller asks a server that it verifies against the cluster's CA: over a new
// connection, or over the lasting one.
func caller(t *testing.T, c *cluster.Cluster) func(context.Context, string, *lastingConnection) error {
	t.Helper()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(c.Admin.CAData) {
		t.Fatal("no CA")
	}
	fresh := func(keep bool) *http.Client {
		return &http.Client{Transport: &http.Transport{DisableKeepAlives: !keep, TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}}
	}
	return func(ctx context.Context, addr string, lasting *lastingConnection) error {
		client := fresh(false)
		if lasting != nil {
			if lasting.client == nil {
				lasting.client = fresh(true)
			}
			client = lasting.client
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+addr+"/", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		return err
	}
}

// TestAddressesOfTheNode: the serving certificate follows the Node's status, and
// is asked for only when there is an address.
func TestAddressesOfTheNode(t *testing.T) {
	t.Parallel()
	c := shared(t)
	client := admin(t, c)
	register(t, client, "moving")
	k := keep(t, configOf(t, c, "moving"))
	k.untilHeld(t, "client")
	until(t, "waiting for an address", func() bool { return k.of("serving").Waiting == "the node has no address yet" })
	for _, addresses := range [][]string{{"127.0.0.1"}, {"127.0.0.2"}, {"127.0.0.2", "127.0.0.3"}} {
		readdress(t, client, "moving", addresses...)
		want := append([]string{"moving"}, addresses...)
		until(t, "certificate for "+strings.Join(want, " "), func() bool { return slices.Equal(k.of("serving").Names, want) })
	}
	if s := k.of("serving"); s.LastError != "" {
		t.Errorf("%+v", s)
	}
}

// TestRunsOut: a certificate that is denied runs out; the Node's condition and
// an event tell it before, and both go away with the reason.
func TestRunsOut(t *testing.T) {
	t.Parallel()
	c := shared(t)
	client := admin(t, c)
	register(t, client, "denied", "127.0.0.1")
	cfg := configOf(t, c, "denied")
	cfg.Addresses = fixed("denied", net.IPv4(127, 0, 0, 1))
	k := keep(t, cfg)
	held := k.untilHeld(t, "serving")
	readdress(t, client, "denied", "127.0.0.9") // the node goes on asking for another
	until(t, "denied", func() bool { return k.of("serving").LastReason == "RequestDenied" })
	if s := k.of("serving"); !strings.Contains(s.LastError, "AddressMismatch") {
		t.Errorf("error %q does not have the approver's reason", s.LastError)
	}
	var at time.Time
	until(t, "condition", func() bool {
		n, err := client.CoreV1().Nodes().Get(t.Context(), "denied", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Type == "CertificateExpiring" })
		if i < 0 || n.Status.Conditions[i].Status != corev1.ConditionTrue {
			return false
		}
		at = n.Status.Conditions[i].LastTransitionTime.Time
		return strings.Contains(n.Status.Conditions[i].Message, "the serving certificate")
	})
	if at.After(*held.NotAfter) {
		t.Errorf("the condition came at %s, the certificate ended at %s", at, held.NotAfter)
	}
	until(t, "event", func() bool {
		l, err := client.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=denied,reason=CertificateExpiring"})
		return err == nil && len(l.Items) > 0
	})
	readdress(t, client, "denied", "127.0.0.1")
	until(t, "condition gone", func() bool {
		n, err := client.CoreV1().Nodes().Get(t.Context(), "denied", metav1.GetOptions{})
		return err == nil && slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
			return c.Type == "CertificateExpiring" && c.Status == corev1.ConditionFalse
		})
	})
}

type names = nodecerts.Names

func fixed(name string, ips ...net.IP) func(context.Context, func(names)) error {
	return func(ctx context.Context, set func(names)) error {
		set(names{DNS: []string{name}, IPs: ips})
		<-ctx.Done()
		return nil
	}
}

// TestOffForTooLong: a node whose certificate has expired meanwhile comes back
// with its bootstrap credential.
func TestOffForTooLong(t *testing.T) {
	t.Parallel()
	c := shared(t)
	cfg := configOf(t, c, "sleeper")
	cfg.Serving = false
	k := keep(t, cfg)
	s := k.untilHeld(t, "client")
	k.stop()
	time.Sleep(time.Until(*s.NotAfter) + time.Second)
	k = keep(t, cfg)
	until(t, "a new certificate", func() bool {
		now := k.of("client")
		return now.NotAfter != nil && now.Serial != s.Serial && now.NotAfter.After(time.Now())
	})
}

// TestBrokenConnections breaks the connection to the API server after every so
// many bytes of the exchange, in either direction. The certificate comes all the
// same, and one request is all that was made.
func TestBrokenConnections(t *testing.T) {
	t.Parallel()
	c := shared(t)
	client := admin(t, c)
	for _, answers := range []bool{false, true} {
		for after := int64(0); after <= 8000; after += 500 {
			name := fmt.Sprintf("cut-%d-%v", after, answers)
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				cut := newCutter(t, strings.TrimPrefix(c.Server, "https://"), after, answers)
				cfg := configOf(t, c, name)
				cfg.Serving, cfg.BootstrapKubeconfig = false, through(t, c, cut.addr)
				k := keep(t, cfg)
				k.untilHeld(t, "client")
				k.stop()
				if after < 1000 && !cut.done.Load() {
					t.Error("the connection was not broken")
				}
				all, err := client.CertificatesV1().CertificateSigningRequests().List(t.Context(), metav1.ListOptions{})
				if err != nil {
					t.Fatal(err)
				}
				n := 0
				for _, r := range all.Items {
					if asksFor(r.Spec.Request, "system:node:"+name) {
						n++
					}
				}
				if n != 1 {
					t.Errorf("%d requests, want 1", n)
				}
			})
		}
	}
}

func asksFor(csr []byte, commonName string) bool {
	block, _ := pem.Decode(csr)
	if block == nil {
		return false
	}
	asked, err := x509.ParseCertificateRequest(block.Bytes)
	return err == nil && asked.Subject.CommonName == commonName
}

// cutter is a proxy that breaks its first connection after a number of bytes
// that went in one direction.
type cutter struct {
	addr string
	done atomic.Bool // it has broken one
}

func newCutter(t *testing.T, target string, after int64, answers bool) *cutter {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	c := &cutter{addr: ln.Addr().String()}
	go func() {
		for first := true; ; first = false {
			down, err := ln.Accept()
			if err != nil {
				return
			}
			go c.carry(down, target, first, after, answers)
		}
	}()
	return c
}

func (c *cutter) carry(down net.Conn, target string, breaks bool, after int64, answers bool) {
	defer down.Close()
	up, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer up.Close()
	limit := func(r io.Reader, here bool) io.Reader {
		if breaks && here {
			return io.LimitReader(r, after)
		}
		return r
	}
	done := make(chan error, 2)
	go func() { _, err := io.Copy(up, limit(down, !answers)); done <- err }()
	go func() { _, err := io.Copy(down, limit(up, answers)); done <- err }()
	if err := <-done; errors.Is(err, net.ErrClosed) {
		return
	}
	if breaks {
		c.done.Store(true)
		down.(*net.TCPConn).SetLinger(0) // a reset, as when a machine goes
	}
}
