package certs

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
)

// Names are what the serving certificate has to be for, besides the node.
type Names struct {
	DNS []string
	IPs []net.IP // at least one, or there will be no request
}

// Config of a Manager.
type Config struct {
	NodeName            string // required
	Dir                 string // for keys and certificates; required
	Kubeconfig          string // written after bootstrap, read when it is there; required
	BootstrapKubeconfig string // may be absent when a certificate is there
	Serving             bool   // keep a serving certificate as well

	// Addresses calls set with the node's names whenever they change, until ctx
	// ends. nil: those in the status of the Node.
	Addresses func(ctx context.Context, set func(Names)) error

	ApprovalTimeout time.Duration    // of one attempt; 0: 15 min, as kubelet's
	RetryPause      time.Duration    // after the first failure, then doubled; 0: 2 s
	Now             func() time.Time // nil: time.Now
	Log             *slog.Logger     // nil: nothing is logged
}

// Manager keeps the certificates of one node.
type Manager struct {
	cfg     Config
	codecs  runtime.NegotiatedSerializer
	client  *rotator
	serving *rotator // nil: not kept
	wire    *rotatingTransport
	api     *api // over wire
	skew    atomic.Int64
	metrics metrics
	changed chan struct{} // capacity 1: the reporter has news

	mu    sync.Mutex
	names *Names // guarded by mu; nil: not known yet
	told  string // guarded by mu; the last trouble with kubeconfigs
}

// New checks cfg and starts nothing.
func New(cfg Config) (*Manager, error) {
	var missing []string
	for name, value := range map[string]string{"NodeName": cfg.NodeName, "Dir": cfg.Dir, "Kubeconfig": cfg.Kubeconfig} {
		if value == "" {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		return nil, fmt.Errorf("certs: Config needs %s", strings.Join(missing, ", "))
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.ApprovalTimeout == 0 {
		cfg.ApprovalTimeout = 15 * time.Minute
	}
	if cfg.RetryPause == 0 {
		cfg.RetryPause = 2 * time.Second
	}
	m := &Manager{cfg: cfg, wire: &rotatingTransport{}, changed: make(chan struct{}, 1), metrics: newMetrics()}
	var err error
	if m.codecs, err = newCodecs(); err != nil {
		return nil, err
	}
	if m.api, err = newAPI(m.RESTConfig(), m.codecs, &http.Client{Transport: m.wrap(m.wire)}); err != nil {
		return nil, err
	}
	m.client = m.rotator(clientKind)
	m.client.want = func() *identity { id := nodeIdentity(cfg.NodeName); return &id }
	m.client.onChange = m.clientChanged
	if cfg.Serving {
		m.serving = m.rotator(servingKind)
		m.serving.want = m.servingIdentity
		m.serving.waitFor = m.clientFirst
	}
	return m, nil
}

func (m *Manager) rotator(k kind) *rotator {
	r := newRotator(k, m.cfg.Dir)
	r.now, r.base, r.log = m.cfg.Now, m.cfg.RetryPause, m.cfg.Log
	r.owner = nodeIdentity(m.cfg.NodeName)
	r.waitFor = func() string { return "" }
	r.onChange = func(_, _ *Pair) { m.news() }
	r.onFail = func(*Problem) { m.news() }
	r.obtain = func(ctx context.Context, id identity) (*Pair, *Problem) { return m.obtain(ctx, r, id) }
	return r
}

func (m *Manager) rotators() []*rotator {
	if m.serving == nil {
		return []*rotator{m.client}
	}
	return []*rotator{m.client, m.serving}
}

// Run keeps the certificates until ctx ends. No failure ends it.
func (m *Manager) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer m.wire.close()
	m.adoptEmbedded()
	for _, r := range m.rotators() {
		wg.Go(func() { r.run(ctx) })
	}
	wg.Go(func() { m.followCluster(ctx) })
	wg.Go(func() { m.followAddresses(ctx) })
	wg.Go(func() { m.report(ctx) })
	<-ctx.Done()
	return nil
}

// NodeName is the node's that the certificates are for.
func (m *Manager) NodeName() string { return m.cfg.NodeName }

// RESTConfig is for clients that act as the node: their requests carry the
// newest certificate and go to the server of the newest kubeconfig (the host in
// it is for messages). Until there is a certificate they fail.
func (m *Manager) RESTConfig() *rest.Config {
	host := "https://apiserver.invalid"
	if cluster, err := m.cluster(); err == nil {
		host = cluster.Host
	}
	return &rest.Config{Host: host, Transport: m.wire, UserAgent: userAgent}
}

// GetCertificate is for tls.Config: the newest serving certificate.
func (m *Manager) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if m.serving == nil {
		return nil, errors.New("no serving certificate is kept here")
	}
	p := m.serving.held.Load()
	if p == nil {
		return nil, errors.New("there is no serving certificate yet: see nodeagent cert status")
	}
	return &p.tls, nil
}

// Renew has the certificates named ("client", "serving"; none: all) renewed now
// and waits for the outcome.
func (m *Manager) Renew(ctx context.Context, names ...string) error {
	var errs []error
	for _, n := range names {
		if !slices.ContainsFunc(m.rotators(), func(r *rotator) bool { return r.kind.name == n }) {
			return fmt.Errorf("there is no certificate %q here", n)
		}
	}
	for _, r := range m.rotators() {
		if len(names) > 0 && !slices.Contains(names, r.kind.name) {
			continue
		}
		if err := r.ask(ctx, "an operator wants it"); err != nil {
			errs = append(errs, fmt.Errorf("renew the %s certificate: %w", r.kind.name, err))
		}
	}
	return errors.Join(errs...)
}

// clientFirst: the serving certificate is asked for as the node.
func (m *Manager) clientFirst() string {
	if p := m.client.held.Load(); p == nil || p.expired(m.cfg.Now()) {
		return "the client certificate comes first"
	}
	return ""
}

// servingIdentity is the node's with its names, nil before it has an address.
func (m *Manager) servingIdentity() *identity {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.names == nil || len(m.names.IPs) == 0 {
		return nil
	}
	id := nodeIdentity(m.cfg.NodeName)
	id.dnsNames, id.ips = m.names.DNS, m.names.IPs
	return &id
}

// setNames notes the node's names in the order that requests have.
func (m *Manager) setNames(n Names) {
	n.DNS, n.IPs = slices.Clone(n.DNS), slices.Clone(n.IPs)
	slices.Sort(n.DNS)
	slices.SortFunc(n.IPs, func(a, b net.IP) int { return strings.Compare(a.String(), b.String()) })
	n.DNS = slices.Compact(n.DNS)
	n.IPs = slices.CompactFunc(n.IPs, net.IP.Equal)
	m.mu.Lock()
	m.names = &n
	m.mu.Unlock()
	if m.serving != nil {
		m.serving.poke()
	}
}

// adoptEmbedded takes the certificate that the kubeconfig itself carries, if
// the files have none, as kubelet does.
func (m *Manager) adoptEmbedded() {
	if _, err := m.client.store.load(); err == nil {
		return
	}
	cfg, err := loadKubeconfig(m.cfg.Kubeconfig)
	if err != nil {
		return
	}
	p, err := embeddedPair(cfg)
	if err != nil || p == nil || p.expired(m.cfg.Now()) || m.client.kind.check(p.Leaf(), m.client.owner) != nil {
		return
	}
	m.client.state.unsaved = true
	m.client.adopt(p)
}

// clientChanged moves the node's connections to the newest certificate. Another
// issuer than before means a new CA, and soon nobody trusts what the old one
// issued for serving.
func (m *Manager) clientChanged(before, now *Pair) {
	m.useNewest()
	switch {
	case m.serving == nil:
	case before != nil && !before.sameIssuer(now):
		m.serving.renewSoon("the CA of the client certificate has changed")
	default:
		m.serving.poke()
	}
	m.news()
}

// useNewest gives the transport the certificate in use and the cluster of now.
func (m *Manager) useNewest() {
	p := m.client.held.Load()
	if p == nil {
		return
	}
	cluster, err := m.cluster()
	if err == nil {
		err = m.wire.use(p, cluster)
	}
	m.tellOnce(err)
}

// cluster is that of the kubeconfig, or of the bootstrap kubeconfig while the
// other cannot be used.
func (m *Manager) cluster() (*rest.Config, error) {
	cfg, err := loadKubeconfig(m.cfg.Kubeconfig)
	if err == nil {
		return cfg, nil
	}
	if boot, bootErr := loadKubeconfig(m.cfg.BootstrapKubeconfig); bootErr == nil {
		return boot, nil
	}
	return nil, err
}

// tellOnce logs an error when it is another than the last time.
func (m *Manager) tellOnce(err error) {
	now := ""
	if err != nil {
		now = err.Error()
	}
	m.mu.Lock()
	before := m.told
	m.told = now
	m.mu.Unlock()
	if now != "" && now != before {
		m.cfg.Log.Error("the client certificate cannot be used for want of a kubeconfig: put it right, or the bootstrap kubeconfig", "err", now)
	}
}

// followCluster notices when the kubeconfig names another server or CA, and
// writes it again when it is gone.
func (m *Manager) followCluster(ctx context.Context) {
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		m.useNewest()
		cluster := m.wire.cluster()
		if _, err := os.Lstat(m.cfg.Kubeconfig); !missing(err) || cluster == nil {
			continue
		}
		if err := writeKubeconfig(m.cfg.Kubeconfig, cluster, m.client.store.current()); err != nil {
			m.tellOnce(explainWrite(err, m.cfg.Kubeconfig))
		}
	}
}

// wrap adds what all our own calls have.
func (m *Manager) wrap(next http.RoundTripper) http.RoundTripper {
	return dates{next: next, now: m.cfg.Now, skew: &m.skew}
}

func (m *Manager) news() {
	select {
	case m.changed <- struct{}{}:
	default:
	}
}
