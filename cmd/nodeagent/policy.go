package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/nodeagent/nodeagent/ebpf"
	"github.com/spf13/cobra"
)

// policyStatus answers `nodeagent policy list`.
type policyStatus struct {
	Ready    bool              `json:"ready"`
	Pods     int               `json:"pods"`
	Uplinks  []string          `json:"uplinks"`
	Problems []string          `json:"problems,omitempty"`
	Checked  uint64            `json:"checked"` // flows judged again by the self-check
	Drift    uint64            `json:"drift"`   // of these, wrongly judged
	Policies []ebpf.PolicyInfo `json:"policies"`
	Counters []policyCounter   `json:"counters"`
}

type policyCounter struct {
	Hook    string `json:"hook"`
	Reason  string `json:"reason"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

type policyFlow struct {
	Time     time.Time      `json:"time"`
	Pod      string         `json:"pod"`
	Hook     string         `json:"hook"`
	Dropped  bool           `json:"dropped"`
	Audit    bool           `json:"audit,omitempty"`
	Reason   string         `json:"reason"`
	Protocol uint8          `json:"protocol"`
	Src      netip.AddrPort `json:"src"`
	Dst      netip.AddrPort `json:"dst"`
}

// servePolicy answers on the socket at path until ctx ends.
func servePolicy(ctx context.Context, path string, engine *ebpf.Engine, log *slog.Logger) error {
	ln, err := listenPrivate(path)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/policy/list", func(w http.ResponseWriter, r *http.Request) {
		out, err := policyList(r.Context(), engine)
		reply(w, out, err)
	})
	mux.HandleFunc("GET /v1/policy/why", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		port, _ := strconv.ParseUint(q.Get("port"), 10, 16)
		proto, _ := strconv.ParseUint(q.Get("protocol"), 10, 8)
		out, err := engine.Why(r.Context(), ebpf.Question{From: q.Get("from"), To: q.Get("to"), Port: uint16(port), Protocol: uint8(proto)})
		reply(w, out, err)
	})
	mux.HandleFunc("GET /v1/policy/flows", func(w http.ResponseWriter, r *http.Request) {
		enc, flush := json.NewEncoder(w), http.NewResponseController(w)
		if r.URL.Query().Get("follow") == "" {
			for _, f := range engine.Recent() {
				_ = enc.Encode(policyFlowOf(f)) // the client has gone
			}
			return
		}
		_ = flush.Flush()
		for f := range engine.Subscribe(r.Context()) {
			if enc.Encode(policyFlowOf(f)) != nil || flush.Flush() != nil {
				return
			}
		}
	})
	if err := serveSocket(ctx, ln, mux, log); err != nil {
		return fmt.Errorf("serve policy socket %s: %w", path, err)
	}
	return nil
}

func policyFlowOf(f ebpf.Flow) policyFlow {
	return policyFlow{
		Time: f.When, Pod: f.Pod.String(), Hook: f.Hook.String(), Dropped: f.Dropped, Audit: f.Audit, Reason: f.Reason.String(), Protocol: f.Protocol,
		Src: netip.AddrPortFrom(f.Src, f.SrcPort), Dst: netip.AddrPortFrom(f.Dst, f.DstPort),
	}
}

func reply(w http.ResponseWriter, out any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(out) // the client has gone
}

func policyList(ctx context.Context, engine *ebpf.Engine) (policyStatus, error) {
	st, err := engine.Status(ctx)
	if err != nil {
		return policyStatus{}, err
	}
	out := policyStatus{Ready: st.Ready, Pods: st.Pods, Uplinks: st.Uplinks, Problems: st.Problems, Checked: st.Checked, Drift: st.Drift}
	for _, c := range st.Counters {
		out.Counters = append(out.Counters, policyCounter{c.Hook.String(), c.Reason.String(), c.Packets, c.Bytes})
	}
	out.Policies, err = engine.Policies(ctx)
	return out, err
}

func newPolicyCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "See which policies are in force, why a flow passes, and what is dropped",
		Long:  "Asks the running daemon, which has to enforce policy: policy.mode is not off, and the kernel can (nodeagent check).",
	}
	cmd.AddCommand(newPolicyListCommand(a), newPolicyWhyCommand(a), newPolicyFlowsCommand(a))
	return cmd
}

func newPolicyListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List policies, the pods they select and what was dropped", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var st policyStatus
			if err := a.askPolicy(cmd.Context(), "list", nil, func(r io.Reader) error { return json.NewDecoder(r).Decode(&st) }); err != nil {
				return err
			}
			return printPolicies(cmd.OutOrStdout(), st)
		},
	}
}

func printPolicies(w io.Writer, st policyStatus) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "POLICY\tISOLATES\tPODS HERE\tFAULTS")
	for _, p := range st.Policies {
		var dirs []string
		if p.Ingress {
			dirs = append(dirs, "ingress")
		}
		if p.Egress {
			dirs = append(dirs, "egress")
		}
		names := make([]string, len(p.Pods))
		for i, k := range p.Pods {
			names[i] = k.Name
		}
		fmt.Fprintf(tw, "%s/%s\t%s\t%s\t%s\n", p.Namespace, p.Name, strings.Join(dirs, ","), strings.Join(names, ","), strings.Join(p.Faults, "; "))
	}
	fmt.Fprintln(tw, "\nHOOK\tREASON\tPACKETS\tBYTES")
	for _, c := range st.Counters {
		fmt.Fprintf(tw, "%s\t%s\t%d\t%d\n", c.Hook, c.Reason, c.Packets, c.Bytes)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, p := range st.Problems {
		fmt.Fprintln(w, "PROBLEM:", p)
	}
	if !st.Ready {
		fmt.Fprintln(w, "not enforced yet: the daemon does not know all pods and objects")
	}
	if st.Drift > 0 {
		return fmt.Errorf("%d of %d flows that were checked are judged wrongly", st.Drift, st.Checked)
	}
	return nil
}

func newPolicyWhyCommand(a *app) *cobra.Command {
	var from, to string
	cmd := &cobra.Command{
		Use: "why --from <namespace/pod or address> --to <namespace/pod or address>[:port[/protocol]]", Short: "Explain whether a flow is allowed, and have the loaded program judge it",
		Example: "  nodeagent policy why --from shop/web --to shop/db:5432/tcp\n  nodeagent policy why --from 192.0.2.7 --to shop/web:80", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			q, err := whyQuery(from, to)
			if err != nil {
				return err
			}
			var ans ebpf.Answer
			if err := a.askPolicy(cmd.Context(), "why", q, func(r io.Reader) error { return json.NewDecoder(r).Decode(&ans) }); err != nil {
				return err
			}
			return printAnswer(cmd.OutOrStdout(), ans)
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "`source`: namespace/pod or address")
	cmd.Flags().StringVar(&to, "to", "", "`destination`: namespace/pod or address, port and protocol (default tcp)")
	_ = cmd.MarkFlagRequired("from")
	_ = cmd.MarkFlagRequired("to")
	return cmd
}

// whyQuery reads "shop/db:5432/tcp", "shop/db:icmp" and "[2001:db8::1]:80".
func whyQuery(from, to string) (url.Values, error) {
	q := url.Values{"from": {from}, "to": {to}, "port": {"0"}, "protocol": {"6"}}
	host, tail := to, ""
	if _, err := netip.ParseAddr(to); err != nil {
		if i := strings.LastIndexByte(to, ':'); i >= 0 {
			host, tail = strings.Trim(to[:i], "[]"), to[i+1:]
		}
	}
	q.Set("to", host)
	if tail == "" {
		return q, nil
	}
	port, proto, _ := strings.Cut(tail, "/")
	if port == "icmp" || port == "icmp6" {
		port, proto = "0", port
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return nil, fmt.Errorf("--to %q: %q is no port", to, port)
	}
	number, ok := protocolNumbers()[strings.ToLower(proto)]
	if !ok {
		return nil, fmt.Errorf("--to %q: unknown protocol %q", to, proto)
	}
	q.Set("port", port)
	q.Set("protocol", number)
	return q, nil
}

func printAnswer(w io.Writer, ans ebpf.Answer) error {
	word := map[bool]string{true: "allowed", false: "denied"}
	fmt.Fprintf(w, "%s to %s: %s\n", ans.Src, ans.Dst, word[ans.Allowed])
	if len(ans.Verdicts) == 0 {
		fmt.Fprintln(w, "  neither is a pod of this node")
	}
	wrong := false
	for _, v := range ans.Verdicts {
		fmt.Fprintf(w, "  %s of %s: %s", v.Direction, v.Subject, word[v.Allowed])
		if v.Deferred {
			fmt.Fprint(w, " (judged again when the service is translated)")
		}
		fmt.Fprintf(w, "; the loaded program: %s (%s)", word[v.Loaded], v.Reason)
		if v.Audit {
			fmt.Fprint(w, "; passes, its namespace is only watched")
		}
		fmt.Fprintln(w)
		for _, p := range v.Selecting {
			fmt.Fprintf(w, "    selected by %s\n", p)
		}
		for _, line := range v.Why {
			fmt.Fprintf(w, "    %s\n", line)
		}
		wrong = wrong || v.Disagreement
	}
	if wrong {
		return errors.New("the loaded program does not do what the policies say: please report this")
	}
	return nil
}

func newPolicyFlowsCommand(a *app) *cobra.Command {
	var follow, dropped bool
	var pod string
	cmd := &cobra.Command{
		Use: "flows", Short: "Show the latest new flows and dropped packets, and why", Args: cobra.NoArgs,
		Example: "  nodeagent policy flows --follow --dropped\n  nodeagent policy flows --pod shop/web",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if pod != "" && strings.Count(pod, "/") != 1 {
				return fmt.Errorf("--pod %q: want namespace/pod", pod)
			}
			q := url.Values{}
			if follow {
				q.Set("follow", "true")
			}
			w := cmd.OutOrStdout()
			return a.askPolicy(cmd.Context(), "flows", q, func(r io.Reader) error {
				dec := json.NewDecoder(r)
				for {
					var f policyFlow
					if err := dec.Decode(&f); err != nil {
						if errors.Is(err, io.EOF) || cmd.Context().Err() != nil {
							return nil
						}
						return fmt.Errorf("the daemon's answer broke off: %w", err)
					}
					if dropped && !f.Dropped && !f.Audit || pod != "" && f.Pod != pod {
						continue
					}
					if _, err := fmt.Fprintln(w, f); err != nil {
						return err
					}
				}
			})
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what happens from now on")
	cmd.Flags().BoolVar(&dropped, "dropped", false, "only what is dropped, or would be if its namespace were not only watched")
	cmd.Flags().StringVar(&pod, "pod", "", "only of this `namespace/pod`")
	return cmd
}

// String is a line of the command's output.
func (f policyFlow) String() string {
	verdict := "passed"
	if f.Dropped {
		verdict = "DROPPED"
	} else if f.Audit {
		verdict = "AUDIT"
	}
	proto := fmt.Sprintf("protocol %d", f.Protocol)
	for name, n := range protocolNumbers() {
		if n == strconv.Itoa(int(f.Protocol)) && name != "" {
			proto = name
		}
	}
	return fmt.Sprintf("%s %-7s %-9s %-5s %s -> %s (%s) %s", f.Time.Local().Format("15:04:05.000"), verdict, f.Hook, proto, f.Src, f.Dst, f.Reason, f.Pod)
}

// protocolNumbers are IP protocols as a user may name them; none: TCP.
func protocolNumbers() map[string]string {
	return map[string]string{"": "6", "tcp": "6", "udp": "17", "sctp": "132", "icmp": "1", "icmp6": "58"}
}

// askPolicy sends a request to the daemon's policy socket and has read take the answer.
func (a *app) askPolicy(ctx context.Context, what string, q url.Values, read func(io.Reader) error) error {
	cfg, err := a.config()
	if err != nil {
		return err
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", policySocket(cfg))
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://policy/v1/policy/"+what+"?"+q.Encode(), nil)
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("ask the daemon about policy (does it enforce? policy.mode, nodeagent check): %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		why, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return errors.New(strings.TrimSpace(string(why)))
	}
	return read(resp.Body)
}
