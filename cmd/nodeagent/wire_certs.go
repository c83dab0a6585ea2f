package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"

	"github.com/nodeagent/nodeagent/certs"
	"github.com/nodeagent/nodeagent/certs/gate"
	"github.com/nodeagent/nodeagent/config"
)

// newCerts builds the keeper of the node's certificates, nil when it is off.
func newCerts(cfg config.Config, log *slog.Logger) (*certs.Manager, error) {
	n := cfg.Node
	if n.Mode == "off" {
		return nil, nil
	}
	name, err := nodeName(n)
	if err != nil {
		return nil, err
	}
	c := certs.Config{
		NodeName: name, Dir: n.CertDir, Kubeconfig: n.Kubeconfig, BootstrapKubeconfig: n.BootstrapKubeconfig,
		Serving: n.Listen != "", Log: log,
	}
	if len(n.Addresses) > 0 {
		c.Addresses = fixedAddresses(name, n)
	}
	return certs.New(c)
}

// nodeName is the configured one, or what kubelet takes.
func nodeName(n config.Node) (string, error) {
	if n.Name != "" {
		return n.Name, nil
	}
	host, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("find the node's name (or set node.name): %w", err)
	}
	return strings.ToLower(strings.TrimSpace(host)), nil
}

func fixedAddresses(name string, n config.Node) func(context.Context, func(certs.Names)) error {
	names := certs.Names{DNS: []string{name}}
	for _, a := range n.Addresses {
		names.IPs = append(names.IPs, net.IP(a.Unmap().AsSlice()))
	}
	return func(ctx context.Context, set func(certs.Names)) error {
		set(names)
		<-ctx.Done()
		return nil
	}
}

// handleMore adds requests to the admin socket's.
func (d *node) handleMore(mux *http.ServeMux) {
	mux.Handle("POST "+adminReload, d.reloads)
	if d.certs != nil {
		handleCerts(mux, d.certs.NodeName(), d.certs)
	}
}

// serveEndpoint answers on the node's HTTPS endpoint until ctx ends: to those
// whom the API server knows and allows it.
func (d *node) serveEndpoint(ctx context.Context) error {
	n := d.cfg.Node
	ln, err := net.Listen("tcp", n.Listen)
	if err != nil {
		return fmt.Errorf("listen for the node's HTTPS endpoint (node.listen; a kubelet beside it needs another one): %w", err)
	}
	var ca *gate.CAFile
	if n.ClientCAFile != "" {
		ca = gate.NewCAFile(n.ClientCAFile)
		if _, err := ca.Pool(); err != nil {
			d.log.Warn("client certificates are refused until the CA can be read (node.clientCAFile)", "err", err)
		}
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", d.metrics.Handler())
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		if err := answers(r.Context(), d.cfg.CRI.Socket); err != nil {
			http.Error(w, "the CRI does not answer: "+err.Error(), http.StatusInternalServerError)
			return
		}
		io.WriteString(w, "ok")
	})
	d.log.Info("serving the node's HTTPS endpoint", "address", ln.Addr().String())
	guard := gate.New(gate.Config{NodeName: d.certs.NodeName(), Reviewer: d.certs, ClientCA: ca, Log: d.log.Logger})
	// Certificates are verified with each request, against the CA of then; a
	// resumed session would go by what held when it began.
	tlsLn := tls.NewListener(ln, &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}, SessionTicketsDisabled: true,
		ClientAuth: tls.RequestClientCert, GetCertificate: d.certs.GetCertificate,
	})
	if err := serveSocket(ctx, tlsLn, guard.Guard(mux), d.log.Logger); err != nil {
		return fmt.Errorf("serve the node's HTTPS endpoint %s: %w", ln.Addr(), err)
	}
	return nil
}
