package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/nodeagent/nodeagent/certs"
)

// What `nodeagent cert` asks of the admin socket.
const (
	adminCertStatus = "/v1/certs"       // GET: certReport
	adminCertRenew  = "/v1/certs/renew" // POST ?name=client&name=serving; no body
)

// certReport is what `nodeagent cert status -o json` prints.
type certReport struct {
	Node         string         `json:"node"`
	Running      bool           `json:"running"` // false: read from the files
	Certificates []certs.Status `json:"certificates"`
}

// certAdmin is the keeper of certificates as the admin socket needs it.
type certAdmin interface {
	Status() []certs.Status
	Renew(ctx context.Context, names ...string) error
}

// handleCerts adds the requests about certificates.
func handleCerts(mux *http.ServeMux, node string, m certAdmin) {
	mux.HandleFunc("GET "+adminCertStatus, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(certReport{Node: node, Running: true, Certificates: m.Status()})
	})
	mux.HandleFunc("POST "+adminCertRenew, func(w http.ResponseWriter, r *http.Request) {
		if err := m.Renew(r.Context(), r.URL.Query()["name"]...); err != nil {
			http.Error(w, strings.ReplaceAll(err.Error(), "\n", "; "), http.StatusBadGateway)
		}
	})
}

func newCertCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cert",
		Short: "See and renew the node's TLS certificates",
		Long:  "The configuration has to say node.mode: certificates.",
	}
	cmd.AddCommand(newCertStatusCommand(a), newCertRenewCommand(a))
	return cmd
}

func newCertStatusCommand(a *app) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what is held, for whom, until when, and what went wrong last",
		Long: `Asks the running daemon; without one it reads the files. The exit code is 1
when a certificate is missing or has expired.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := oneOfFlag("output", output, "table", "json"); err != nil {
				return err
			}
			report, err := a.certReport(cmd.Context())
			if err != nil {
				return err
			}
			if output == "json" {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				err = enc.Encode(report)
			} else {
				err = printCerts(cmd.OutOrStdout(), report, time.Now())
			}
			if err == nil && slices.ContainsFunc(report.Certificates, func(s certs.Status) bool {
				return s.NotAfter == nil || !time.Now().Before(*s.NotAfter)
			}) {
				return exitError{1}
			}
			return err
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "`format`: table or json")
	return cmd
}

func newCertRenewCommand(a *app) *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:       "renew [client] [serving]",
		Short:     "Have certificates renewed now; without arguments all",
		ValidArgs: []string{"client", "serving"},
		Args:      cobra.OnlyValidArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			_, err := a.callCerts(ctx, http.MethodPost, adminCertRenew+"?"+url.Values{"name": args}.Encode())
			if errors.Is(err, context.DeadlineExceeded) {
				return a.stillWaiting(cmd.Context(), timeout)
			}
			if err != nil {
				return err
			}
			report, err := a.certReport(cmd.Context())
			if err != nil {
				return err
			}
			return printCerts(cmd.OutOrStdout(), report, time.Now())
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to wait; the daemon goes on afterwards")
	return cmd
}

// stillWaiting says what a renewal waits for.
func (a *app) stillWaiting(ctx context.Context, waited time.Duration) error {
	report, err := a.certReport(ctx)
	if err != nil {
		return err
	}
	for _, s := range report.Certificates {
		if s.Request != "" {
			return fmt.Errorf("not renewed within %s: certificate request %s waits for approval (kubectl certificate approve %s); the daemon waits on", waited, s.Request, s.Request)
		}
		if s.Waiting != "" && s.NotAfter == nil {
			return fmt.Errorf("not renewed within %s: %s: %s; the daemon goes on trying", waited, s.Name, s.Waiting)
		}
	}
	return fmt.Errorf("not renewed within %s; the daemon goes on trying: see nodeagent cert status", waited)
}

// certReport asks the daemon, or reads the files when none runs.
func (a *app) certReport(ctx context.Context) (certReport, error) {
	cfg, err := a.config()
	if err != nil {
		return certReport{}, err
	}
	if cfg.Node.Mode == "off" {
		return certReport{}, errCertsOff
	}
	body, err := a.callCerts(ctx, http.MethodGet, adminCertStatus)
	var down noAnswer
	if errors.As(err, &down) {
		name, err := nodeName(cfg.Node)
		return certReport{Node: name, Certificates: certs.Inspect(cfg.Node.CertDir, cfg.Node.Listen != "")}, err
	}
	if err != nil {
		return certReport{}, err
	}
	var report certReport
	if err := json.Unmarshal(body, &report); err != nil {
		return certReport{}, fmt.Errorf("read the daemon's answer: %w", err)
	}
	return report, nil
}

var errCertsOff = errors.New("certificates are not kept here: set node.mode: certificates in the configuration and restart the daemon")

// noAnswer: there is no daemon to ask.
type noAnswer struct{ error }

// callCerts asks the daemon's admin socket.
func (a *app) callCerts(ctx context.Context, method, path string) ([]byte, error) {
	cfg, err := a.config()
	if err != nil {
		return nil, err
	}
	socket := cfg.AdminSocket()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "http://admin"+path, nil)
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	resp, err := transport.RoundTrip(req)
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EACCES):
		return nil, noAnswer{noDaemon(socket)}
	case err != nil:
		return nil, fmt.Errorf("ask the daemon: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAdminRequest))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the daemon's answer: %w", err)
	case resp.StatusCode == http.StatusNotFound:
		return nil, errCertsOff
	case resp.StatusCode != http.StatusOK:
		return nil, errors.New(strings.TrimSpace(string(body)))
	}
	return body, nil
}

// printCerts writes a block of lines for each certificate.
func printCerts(w io.Writer, report certReport, now time.Time) error {
	if !report.Running {
		fmt.Fprintln(w, "no daemon runs; this is what the files hold")
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(key, value string) {
		if value != "" {
			fmt.Fprintf(tw, "  %s\t%s\n", key, value)
		}
	}
	for _, s := range report.Certificates {
		fmt.Fprintf(tw, "%s of node %s\n", s.Name, report.Node)
		if s.NotAfter == nil {
			line("holds", "nothing")
		} else {
			line("subject", s.Subject)
			line("names", strings.Join(s.Names, ", "))
			line("issuer", s.Issuer)
			line("from", when(s.NotBefore, now))
			line("to", when(s.NotAfter, now))
			line("next renewal", when(s.Renewal, now))
		}
		line("file", s.File)
		line("waits for", s.Waiting)
		line("request", s.Request)
		if s.LastError != "" {
			line("last error", fmt.Sprintf("%s (%s, %d in a row)", s.LastError, when(s.LastErrorAt, now), s.Failures))
			line("next attempt", when(s.NextAttempt, now))
		}
		line("files", s.FileProblem)
		line("clock", s.ClockProblem)
	}
	return tw.Flush()
}

// when is a time and how far it is.
func when(t *time.Time, now time.Time) string {
	if t == nil {
		return ""
	}
	d := t.Sub(now).Round(time.Second)
	distance := "in " + d.String()
	if d < 0 {
		distance = (-d).String() + " ago"
	}
	return t.UTC().Format(time.RFC3339) + " (" + distance + ")"
}
