package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/client-go/util/certificate"
)

// TestBootstrap goes from a token to both certificates, and a restart asks for
// nothing.
func TestBootstrap(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	s.cfg.Serving = true
	s.run(t)
	client, serving := s.untilHeld(t, "client"), s.untilHeld(t, "serving")
	if client.Subject != "CN=system:node:n1,O=system:nodes" || len(client.Names) != 0 {
		t.Errorf("client: %+v", client)
	}
	if !slices.Equal(serving.Names, []string{testNode, "192.0.2.1"}) {
		t.Errorf("serving: %+v", serving)
	}
	kubeconfig, err := clientcmd.BuildConfigFromFlags("", s.cfg.Kubeconfig)
	if err != nil || kubeconfig.CertFile != s.manager.client.store.current() || kubeconfig.Host != "https://"+s.addr() {
		t.Errorf("kubeconfig: %v %v", kubeconfig, err)
	}
	s.stop()
	made := s.made()
	s.token = "" // the bootstrap credential is not needed any more
	s.run(t)
	s.untilHeld(t, "client")
	s.untilHeld(t, "serving")
	if err := s.manager.Renew(t.Context()); err != nil {
		t.Error(err)
	}
	if n := s.made(); made != 2 || n != 4 {
		t.Errorf("%d requests, then %d; want 2, and 4 after a renewal of both", made, n)
	}
}

// TestBootstrapWithCertificate: the bootstrap credential may be a certificate, in
// the kubeconfig itself.
func TestBootstrapWithCertificate(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	now := time.Now()
	boot := s.ca.pair(t, clientKind, identity{commonName: "bootstrapper"}, now.Add(-time.Minute), now.Add(time.Hour))
	s.writeKubeconfig(t, s.cfg.BootstrapKubeconfig, &clientcmdapi.AuthInfo{ClientCertificateData: boot.certPEM, ClientKeyData: boot.keyPEM})
	s.token = ""
	s.run(t)
	if st := s.untilHeld(t, "client"); st.Subject != "CN=system:node:n1,O=system:nodes" {
		t.Errorf("%+v", st)
	}
}

// TestEmbeddedCertificate: a kubeconfig that carries the node's certificate, as
// older installers wrote it, is as good as the files, which are made from it.
func TestEmbeddedCertificate(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	now := time.Now()
	p := s.ca.pair(t, clientKind, nodeIdentity(testNode), now.Add(-time.Minute), now.Add(time.Hour))
	s.writeKubeconfig(t, s.cfg.Kubeconfig, &clientcmdapi.AuthInfo{ClientCertificateData: p.certPEM, ClientKeyData: p.keyPEM})
	s.run(t)
	until(t, "files", func() bool {
		saved, err := s.manager.client.store.load()
		return err == nil && saved.same(p)
	})
	if n := s.made(); n != 0 {
		t.Errorf("%d requests", n)
	}
}

// TestServerDown at start and at renewal: told, and made good by itself.
func TestServerDown(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	s.down.Store(true)
	s.run(t)
	s.untilProblem(t, ServerUnreachable)
	s.down.Store(false)
	first := s.untilHeld(t, "client")
	s.down.Store(true)
	if err := s.manager.Renew(t.Context(), "client"); err == nil || !strings.Contains(err.Error(), "renew the client certificate: create certificate request") {
		t.Errorf("renewal without a server: %v", err)
	}
	if got := s.status("client"); got.Serial != first.Serial || got.LastError == "" {
		t.Errorf("after a renewal that failed: %+v", got)
	}
	s.down.Store(false)
	if err := s.manager.Renew(t.Context(), "client"); err != nil {
		t.Error(err)
	}
	if got := s.status("client"); got.Serial == first.Serial || got.LastError != "" {
		t.Errorf("after the renewal: %+v", got)
	}
}

func TestServerRefusesConnections(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	addr := s.addr()
	s.server.Close()
	s.run(t)
	if st := s.untilProblem(t, ServerUnreachable); !strings.Contains(st.LastError, "connection refused") || !strings.Contains(st.LastError, addr) || !strings.Contains(st.LastError, s.cfg.BootstrapKubeconfig) {
		t.Errorf("error %q does not say what refuses, where, and which file says so", st.LastError)
	}
	s.start(t, addr, s.ca)
	s.untilHeld(t, "client")
}

func TestDenied(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	s.decide = func(csr *certificatesv1.CertificateSigningRequest) {
		csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateDenied, Status: corev1.ConditionTrue, Reason: "NotToday", Message: "come back"}}
	}
	s.run(t)
	if st := s.untilProblem(t, RequestDenied); !strings.Contains(st.LastError, "NotToday: come back") {
		t.Errorf("error %q", st.LastError)
	}
	s.with(func() { s.decide = nil })
	s.untilHeld(t, "client")
}

// TestNeverApproved: one request, however often it is tried and the daemon
// restarted; approved at last it is used.
func TestNeverApproved(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	s.cfg.ApprovalTimeout = 300 * time.Millisecond
	s.decide = func(*certificatesv1.CertificateSigningRequest) {}
	for range 2 {
		s.run(t)
		until(t, "two attempts", func() bool { return s.status("client").Failures >= 2 })
		if st := s.untilProblem(t, NotApproved); !strings.Contains(st.LastError, "kubectl certificate approve node-csr-") {
			t.Errorf("error %q does not say what to do", st.LastError)
		}
		s.stop()
	}
	s.run(t)
	if n := s.made(); n != 1 {
		t.Errorf("%d requests were made, want 1", n)
	}
	s.with(func() {
		csr := s.requests[s.order[0]]
		s.approve(csr)
		s.bump(csr)
	})
	s.untilHeld(t, "client")
}

func TestRequestDeletedWhileWaiting(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	s.decide = func(*certificatesv1.CertificateSigningRequest) {}
	s.run(t)
	until(t, "request", func() bool { return s.status("client").Request != "" })
	s.with(func() {
		s.decide = nil
		clear(s.requests)
		close(s.changed)
		s.changed = make(chan struct{})
	})
	s.server.CloseClientConnections() // the fake's watch does not tell of deletions
	s.untilHeld(t, "client")
}

// TestWrongCertificate: nothing that does not fit is ever used.
func TestWrongCertificate(t *testing.T) {
	t.Parallel()
	otherKey, _, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		set  func(*setup)
		want string
	}{
		"name": {func(s *setup) {
			s.sign = func(_ *x509.CertificateRequest, c *x509.Certificate) { c.Subject.CommonName = "system:node:n2" }
		}, `it is for "system:node:n2"`},
		"organization": {func(s *setup) {
			s.sign = func(_ *x509.CertificateRequest, c *x509.Certificate) { c.Subject.Organization = nil }
		}, `it lacks the organization "system:nodes"`},
		"usage": {func(s *setup) {
			s.sign = func(_ *x509.CertificateRequest, c *x509.Certificate) {
				c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
			}
		}, "it is not for client auth"},
		"key": {func(s *setup) { s.key = otherKey }, "does not fit the key"},
		"garbage": {func(s *setup) {
			s.decide = func(csr *certificatesv1.CertificateSigningRequest) {
				s.approve(csr)
				csr.Status.Certificate = []byte("garbage")
			}
		}, "does not fit the key"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSetup(t)
			tt.set(s)
			s.run(t)
			st := s.untilProblem(t, WrongCertificate)
			if !strings.Contains(st.LastError, tt.want) || !strings.Contains(st.LastError, "see the signer") {
				t.Errorf("error %q, want %q in it", st.LastError, tt.want)
			}
			if st.NotAfter != nil {
				t.Errorf("it is used: %+v", st)
			}
			if _, err := s.manager.client.store.load(); !missing(err) {
				t.Errorf("it is in the files: %v", err)
			}
			s.with(func() { s.sign, s.key, s.decide = nil, nil, nil })
			s.untilHeld(t, "client")
		})
	}
}

// TestWrongClock: told with what to do, no storm of requests, and all is well
// once the clock is right.
func TestWrongClock(t *testing.T) {
	t.Parallel()
	for name, off := range map[string]time.Duration{"ahead": 10 * time.Hour, "behind": -10 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSetup(t)
			var offset atomic.Int64
			offset.Store(int64(off))
			s.cfg.Now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
			s.run(t)
			st := s.untilHeld(t, "client")
			until(t, "clock problem", func() bool { return s.status("client").ClockProblem != "" })
			if st = s.status("client"); !strings.Contains(st.ClockProblem, "timedatectl") || !strings.Contains(st.ClockProblem, "ahead of this node's") {
				t.Errorf("clock problem %q", st.ClockProblem)
			}
			time.Sleep(time.Second)
			if n := s.made(); n > 4 {
				t.Errorf("%d requests within a second", n)
			}
			offset.Store(0)
			if err := s.manager.Renew(t.Context()); err != nil {
				t.Error(err)
			}
			if st := s.status("client"); st.ClockProblem != "" {
				t.Errorf("with the right clock: %q", st.ClockProblem)
			}
		})
	}
}

// TestExpired: a node that was off for too long gets a new certificate with the
// bootstrap credential.
func TestExpired(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	now := time.Now()
	old := s.ca.pair(t, clientKind, nodeIdentity(testNode), now.Add(-2*time.Hour), now.Add(-time.Hour))
	if err := (store{s.cfg.Dir, clientKind.prefix}).save(old); err != nil {
		t.Fatal(err)
	}
	boot, err := loadKubeconfig(s.cfg.BootstrapKubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	if err := writeKubeconfig(s.cfg.Kubeconfig, boot, clientKind.prefix+"-current.pem"); err != nil {
		t.Fatal(err)
	}
	s.run(t)
	until(t, "a new certificate", func() bool { st := s.status("client"); return st.NotAfter != nil && st.NotAfter.After(now) })
}

// TestNoBootstrap: the error names the file; when it comes all goes on.
func TestNoBootstrap(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	aside := s.cfg.BootstrapKubeconfig + ".aside"
	if err := os.Rename(s.cfg.BootstrapKubeconfig, aside); err != nil {
		t.Fatal(err)
	}
	s.run(t)
	if st := s.untilProblem(t, NoBootstrap); !strings.Contains(st.LastError, s.cfg.BootstrapKubeconfig) || !strings.Contains(st.LastError, "kubeadm token create") {
		t.Errorf("error %q", st.LastError)
	}
	if err := os.Rename(aside, s.cfg.BootstrapKubeconfig); err != nil {
		t.Fatal(err)
	}
	s.untilHeld(t, "client")
}

func TestBootstrapRefused(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	good := s.token
	s.with(func() { s.token = "abcdef.expired" })
	s.run(t)
	if st := s.untilProblem(t, CredentialRefused); !strings.Contains(st.LastError, "a bootstrap token may have expired") {
		t.Errorf("error %q", st.LastError)
	}
	s.with(func() { s.token = good })
	s.untilHeld(t, "client")
}

// TestClientCARotated: the certificate is refused from one moment to the next;
// the bootstrap credential gets another.
func TestClientCARotated(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	s.cfg.Addresses = nil // the Node is asked for
	s.run(t)
	first := s.untilHeld(t, "client")
	s.with(func() { s.clients = newAuthority(t, "next") })
	until(t, "a certificate of the next CA", func() bool { return s.status("client").Issuer == "CN=next" })
	if st := s.status("client"); st.Serial == first.Serial {
		t.Errorf("%+v", st)
	}
}

// TestClientCARotatedAlone: without a bootstrap credential it is told where one
// is looked for.
func TestClientCARotatedAlone(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	s.cfg.Addresses = nil
	s.run(t)
	s.untilHeld(t, "client")
	aside := s.cfg.BootstrapKubeconfig + ".aside"
	if err := os.Rename(s.cfg.BootstrapKubeconfig, aside); err != nil {
		t.Fatal(err)
	}
	s.with(func() { s.clients = newAuthority(t, "next") })
	if st := s.untilProblem(t, CredentialRefused); !strings.Contains(st.LastError, "put a bootstrap kubeconfig at "+s.cfg.BootstrapKubeconfig) {
		t.Errorf("error %q", st.LastError)
	}
	if err := os.Rename(aside, s.cfg.BootstrapKubeconfig); err != nil {
		t.Fatal(err)
	}
	until(t, "a certificate of the next CA", func() bool { return s.status("client").Issuer == "CN=next" })
}

// TestServerCARotated: told which file to change; changed, all goes on.
func TestServerCARotated(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	s.cfg.Addresses = nil
	s.run(t)
	s.untilHeld(t, "client")
	addr, next := s.addr(), newAuthority(t, "next")
	s.server.CloseClientConnections()
	s.server.Close()
	s.start(t, addr, next)
	if st := s.untilProblem(t, ServerNotTrusted); !strings.Contains(st.LastError, "if the CA was rotated put the new one there") {
		t.Errorf("error %q", st.LastError)
	}
	s.bootstrap(t, next)
	until(t, "a renewal", func() bool { st := s.status("client"); return st.Renewals == 2 && st.LastError == "" })
	cfg, err := loadKubeconfig(s.cfg.Kubeconfig)
	if err != nil || string(cfg.CAData) != string(next.pem()) {
		t.Errorf("the kubeconfig does not have the next CA (%v)", err)
	}
}

// TestTampered: what is in use survives what happens to the files, and they are
// made good.
func TestTampered(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(t *testing.T, s *setup){
		"garbage":           func(t *testing.T, s *setup) { mustWrite(t, s.manager.client.store.current(), []byte("garbage")) },
		"removed":           func(t *testing.T, s *setup) { os.Remove(s.manager.client.store.current()) },
		"directory removed": func(t *testing.T, s *setup) { os.RemoveAll(s.cfg.Dir) },
		"another node's": func(t *testing.T, s *setup) {
			now := time.Now()
			p := s.ca.pair(t, clientKind, nodeIdentity("n2"), now, now.Add(9*time.Hour))
			mustWrite(t, s.manager.client.store.current(), append(p.certPEM, p.keyPEM...))
		},
		"an older one": func(t *testing.T, s *setup) {
			now := time.Now()
			if err := s.manager.client.store.save(s.ca.pair(t, clientKind, nodeIdentity(testNode), now.Add(-time.Hour), now.Add(time.Minute))); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSetup(t)
			s.run(t)
			first := s.untilHeld(t, "client")
			change(t, s)
			until(t, "repair", func() bool {
				p, err := s.manager.client.store.load()
				return err == nil && p.same(s.manager.client.held.Load())
			})
			if st := s.status("client"); st.Serial != first.Serial || s.made() != 1 {
				t.Errorf("%d requests, %+v", s.made(), st)
			}
		})
	}
}

// TestKubeconfigGone: written again; one that cannot be read costs nothing while
// the bootstrap kubeconfig names the server.
func TestKubeconfigGone(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	s.run(t)
	s.untilHeld(t, "client")
	want, err := os.ReadFile(s.cfg.Kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(s.cfg.Kubeconfig)
	until(t, "kubeconfig", func() bool {
		got, err := os.ReadFile(s.cfg.Kubeconfig)
		return err == nil && string(got) == string(want)
	})
	mustWrite(t, s.cfg.Kubeconfig, []byte("{nonsense"))
	if err := s.manager.Renew(t.Context()); err != nil {
		t.Error(err)
	}
	if st := s.status("client"); st.Renewals != 2 {
		t.Errorf("%+v", st)
	}
}

// TestHandOver: a pair that a kubelet puts there is used from then on.
func TestHandOver(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	s.run(t)
	s.untilHeld(t, "client")
	kubelets, err := certificate.NewFileStore(clientKind.prefix, s.cfg.Dir, s.cfg.Dir, "", "")
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	p := s.ca.pair(t, clientKind, nodeIdentity(testNode), now.Add(-time.Minute), now.Add(3*time.Hour))
	time.Sleep(time.Second) // kubelet's files have a second in their name
	if _, err := kubelets.Update(p.certPEM, p.keyPEM); err != nil {
		t.Fatal(err)
	}
	until(t, "kubelet's pair in use", func() bool { return s.manager.client.held.Load().same(p) })
	if got, err := kubelets.Current(); err != nil || !got.Leaf.Equal(p.Leaf()) || s.made() != 1 {
		t.Errorf("kubelet's file was changed (%v), or %d requests", err, s.made())
	}
}

// TestUnreadableAtStart: a new certificate by way of the bootstrap credential.
func TestUnreadableAtStart(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	if err := os.MkdirAll(s.cfg.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	current := filepath.Join(s.cfg.Dir, "kubelet-client-current.pem")
	mustWrite(t, current, []byte("-----BEGIN CERTIFICATE-----\nnonsense"))
	s.run(t)
	s.untilHeld(t, "client")
	until(t, "files", func() bool { st := s.status("client"); return st.FileProblem == "" })
	if !strings.Contains(s.log.String(), current) {
		t.Error("the log does not name the file that could not be read")
	}
	if _, err := os.Stat(current + ".replaced"); err != nil {
		t.Errorf("what was there is not kept: %v", err)
	}
}

// TestDiskFull: used from memory, told, written when there is room.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for a small file system")
	}
	t.Parallel()
	s := newSetup(t)
	if err := os.MkdirAll(s.cfg.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", s.cfg.Dir, "tmpfs", 0, "size=16k"); err != nil {
		t.Skipf("mount tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(s.cfg.Dir, unix.MNT_DETACH) })
	filler := filepath.Join(s.cfg.Dir, "filler")
	os.WriteFile(filler, make([]byte, 16<<10), 0o600)
	s.run(t)
	if st := s.untilProblem(t, FilesNotWritten); st.NotAfter == nil || !strings.Contains(st.LastError, "make room in the file system of "+s.cfg.Dir) {
		t.Errorf("%+v", st)
	}
	if left, _ := filepath.Glob(filepath.Join(s.cfg.Dir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	until(t, "files written", func() bool {
		p, err := s.manager.client.store.load()
		return err == nil && p.same(s.manager.client.held.Load()) && s.status("client").LastError == ""
	})
	if n := s.made(); n != 1 {
		t.Errorf("%d requests", n)
	}
}

// TestAddressesChange: a new serving certificate at once, also while an older
// request waits.
func TestAddressesChange(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	s.cfg.Serving = true
	names := make(chan Names)
	s.cfg.Addresses = func(ctx context.Context, set func(Names)) error {
		for {
			select {
			case n := <-names:
				set(n)
			case <-ctx.Done():
				return nil
			}
		}
	}
	s.run(t)
	s.untilHeld(t, "client")
	until(t, "waiting for an address", func() bool { return s.status("serving").Waiting == "the node has no address yet" })
	if n := s.made(); n != 1 {
		t.Errorf("%d requests before there is an address", n)
	}
	names <- Names{DNS: []string{"b", "a"}, IPs: []net.IP{net.IPv4(192, 0, 2, 1)}}
	s.untilHeld(t, "serving")
	s.with(func() { s.decide = func(*certificatesv1.CertificateSigningRequest) {} })
	names <- Names{DNS: []string{"a", "b"}, IPs: []net.IP{net.IPv4(192, 0, 2, 2)}}
	until(t, "request", func() bool { return s.status("serving").Request != "" })
	s.with(func() { s.decide = nil })
	names <- Names{DNS: []string{"a", "b"}, IPs: []net.IP{net.IPv4(192, 0, 2, 3), net.IPv4(192, 0, 2, 2)}}
	until(t, "certificate for the last addresses", func() bool {
		return slices.Equal(s.status("serving").Names, []string{"a", "b", "192.0.2.2", "192.0.2.3"})
	})
	made := s.made()
	names <- Names{DNS: []string{"a"}, IPs: []net.IP{net.IPv4(192, 0, 2, 3)}}
	time.Sleep(300 * time.Millisecond)
	if s.made() != made {
		t.Error("fewer names had a new certificate requested")
	}
}

// TestConditionAndEvent before the end, and the condition goes again.
func TestConditionAndEvent(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	s.node = &corev1.Node{}
	s.node.APIVersion, s.node.Kind, s.node.Name = "v1", "Node", testNode
	s.life = 40 * time.Second
	s.run(t)
	s.untilHeld(t, "client")
	condition := func() (c corev1.NodeCondition) {
		s.with(func() {
			if l := s.node.Status.Conditions; len(l) > 0 {
				c = l[0]
			}
		})
		return c
	}
	until(t, "condition", func() bool { return condition().Status == corev1.ConditionFalse })
	s.with(func() {
		s.decide = func(csr *certificatesv1.CertificateSigningRequest) {
			csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateDenied, Status: corev1.ConditionTrue, Reason: "No"}}
		}
	})
	until(t, "condition True", func() bool { return condition().Status == corev1.ConditionTrue })
	if c := condition(); c.Type != ConditionType || c.Reason != string(RequestDenied) || !strings.Contains(c.Message, "the client certificate expires at") {
		t.Errorf("%+v", c)
	}
	until(t, "event", func() (ok bool) { s.with(func() { ok = len(s.events) == 1 }); return ok })
	s.with(func() {
		if e := s.events[0]; e.InvolvedObject.Kind != "Node" || e.InvolvedObject.Name != testNode || e.Type != "Warning" {
			t.Errorf("%+v", e)
		}
		s.decide = nil
		s.life = time.Hour
	})
	until(t, "condition False", func() bool { return condition().Status == corev1.ConditionFalse })
}

// TestRequestsSurviveRotation: a slow answer ends on the old connection while
// new requests carry the new certificate.
func TestRequestsSurviveRotation(t *testing.T) {
	t.Parallel()
	s := newSetup(t)
	s.run(t)
	first := s.untilHeld(t, "client")
	release := make(chan struct{})
	seen := make(chan string, 10)
	srv := newEcho(t, s.ca, release, seen)
	boot, err := loadKubeconfig(s.cfg.BootstrapKubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	boot.Host = srv
	wire := &rotatingTransport{}
	if err := wire.use(s.manager.client.held.Load(), boot); err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: wire}
	resp, err := client.Get(srv + "/slow")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.manager.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	old := wire.now
	if err := wire.use(s.manager.client.held.Load(), boot); err != nil {
		t.Fatal(err)
	}
	fast, err := client.Get(srv + "/fast")
	if err != nil {
		t.Fatal(err)
	}
	fast.Body.Close()
	close(release)
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "begin end" {
		t.Errorf("the slow answer: %q, %v", body, err)
	}
	resp.Body.Close()
	a, b := <-seen, <-seen
	if a == b || a != first.Serial {
		t.Errorf("requests came with %s and %s, the first certificate is %s", a, b, first.Serial)
	}
	if old.requests != 0 || !old.retired {
		t.Errorf("the old connections: %d requests", old.requests)
	}
}

// TestNoCertificateYet: callers get an error, no request without a credential.
func TestNoCertificateYet(t *testing.T) {
	s := newSetup(t)
	m, err := New(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	_, err = (&http.Client{Transport: m.RESTConfig().Transport}).Get("https://x.invalid/")
	if !errors.Is(err, errNoClientCertificate) {
		t.Errorf("%v", err)
	}
	if _, err := m.GetCertificate(&tls.ClientHelloInfo{}); err == nil {
		t.Error("a serving certificate out of nothing")
	}
	if _, err := New(Config{}); err == nil || err.Error() != "certs: Config needs Dir, Kubeconfig, NodeName" {
		t.Errorf("%v", err)
	}
}
