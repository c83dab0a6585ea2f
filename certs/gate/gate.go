// Package gate lets callers of the node's HTTPS endpoint in: it finds out who
// asks (a client certificate of the cluster's CA, or a bearer token that the API
// server knows) and has the API server say whether they may (SubjectAccessReview
// on the Node, with kubelet's verbs and subresources). Nobody is anonymous: who
// shows no credential gets 401, who may not gets 403; when the API server cannot
// be asked it is 503 and never yes.
//
// Answers are kept for a while (Cache times are kubelet's), so that a scrape
// every few seconds costs no call each. The package starts no goroutine; one
// mutex guards the answers. It must not serve anything itself.
// Caller: cmd/nodeagent.
//
// Source: kubernetes pkg/kubelet/server/auth.go, pkg/kubelet/apis/config/v1beta1/defaults.go v1.37.
package gate

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
)

// Cache times, kubelet's defaults.
const (
	tokenKept   = 2 * time.Minute
	allowedKept = 5 * time.Minute
	deniedKept  = 30 * time.Second
	answersKept = 4096 // of each kind
)

// Reviewer is the API server.
type Reviewer interface {
	ReviewToken(ctx context.Context, token string) (user authenticationv1.UserInfo, ok bool, err error)
	ReviewAccess(ctx context.Context, spec authorizationv1.SubjectAccessReviewSpec) (allowed bool, reason string, err error)
}

// Config of a Gate.
type Config struct {
	NodeName string
	Reviewer Reviewer
	ClientCA *CAFile          // of client certificates; nil: none is accepted
	Now      func() time.Time // nil: time.Now
	Log      *slog.Logger     // nil: nothing is logged
}

// Gate judges requests.
type Gate struct {
	cfg    Config
	tokens answers[[sha256.Size]byte, authenticationv1.UserInfo]
	access answers[string, verdict]
}

type verdict struct {
	allowed bool
	reason  string
}

// New makes a Gate.
func New(cfg Config) *Gate {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Gate{cfg: cfg}
}

// Guard answers for next unless the caller may pass.
func (g *Gate) Guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, err := g.who(r)
		switch {
		case errors.Is(err, errUnknown):
			w.Header().Set("WWW-Authenticate", `Bearer realm="node"`)
			http.Error(w, "Unauthorized", http.StatusUnauthorized)
			return
		case err != nil:
			g.unavailable(w, err)
			return
		}
		v, err := g.may(r.Context(), user, attributes(g.cfg.NodeName, r))
		switch {
		case err != nil:
			g.unavailable(w, err)
		case !v.allowed:
			why := fmt.Sprintf("Forbidden (user=%s, verb=%s, resource=nodes, subresource=%s)", user.Username, verb(r.Method), subresources(r.URL.Path)[0])
			http.Error(w, why, http.StatusForbidden)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

func (g *Gate) unavailable(w http.ResponseWriter, err error) {
	g.cfg.Log.Warn("a request to the node's endpoint cannot be judged", "err", err)
	w.Header().Set("Retry-After", "5")
	http.Error(w, "the API server cannot be asked who you are and what you may", http.StatusServiceUnavailable)
}

// errUnknown: no credential, or one that is not accepted.
var errUnknown = errors.New("unknown caller")

func (g *Gate) who(r *http.Request) (authenticationv1.UserInfo, error) {
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		if user, ok := g.certificate(r.TLS.PeerCertificates); ok {
			return user, nil
		}
	}
	scheme, token, _ := strings.Cut(strings.TrimSpace(r.Header.Get("Authorization")), " ")
	token = strings.TrimSpace(token)
	if !strings.EqualFold(scheme, "Bearer") || token == "" {
		return authenticationv1.UserInfo{}, errUnknown
	}
	return g.token(r.Context(), token)
}

// certificate verifies a chain against the CA as it is now, with each request:
// a connection does not outlive its credential.
func (g *Gate) certificate(chain []*x509.Certificate) (authenticationv1.UserInfo, bool) {
	if g.cfg.ClientCA == nil {
		return authenticationv1.UserInfo{}, false
	}
	roots, err := g.cfg.ClientCA.Pool()
	if err != nil {
		g.cfg.Log.Warn("client certificates cannot be verified", "err", err)
	}
	if roots == nil {
		return authenticationv1.UserInfo{}, false
	}
	o := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool(), CurrentTime: g.cfg.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for _, c := range chain[1:] {
		o.Intermediates.AddCert(c)
	}
	leaf := chain[0]
	if _, err := leaf.Verify(o); err != nil || leaf.Subject.CommonName == "" {
		g.cfg.Log.Debug("client certificate refused", "subject", leaf.Subject.String(), "err", err)
		return authenticationv1.UserInfo{}, false
	}
	return authenticationv1.UserInfo{Username: leaf.Subject.CommonName, Groups: append([]string{"system:authenticated"}, leaf.Subject.Organization...)}, true
}

func (g *Gate) token(ctx context.Context, token string) (authenticationv1.UserInfo, error) {
	key := sha256.Sum256([]byte(token)) // the token itself is not kept
	now := g.cfg.Now()
	if user, ok := g.tokens.get(key, now); ok {
		return user, nil
	}
	user, ok, err := g.cfg.Reviewer.ReviewToken(ctx, token)
	if err != nil {
		return user, err
	}
	if !ok {
		return user, errUnknown
	}
	g.tokens.put(key, user, now.Add(tokenKept), now)
	return user, nil
}

// may asks for each of the attributes until one is allowed.
func (g *Gate) may(ctx context.Context, user authenticationv1.UserInfo, any []authorizationv1.ResourceAttributes) (v verdict, err error) {
	for _, a := range any {
		if v, err = g.mayOne(ctx, user, a); err != nil || v.allowed {
			return v, err
		}
	}
	return v, nil
}

func (g *Gate) mayOne(ctx context.Context, user authenticationv1.UserInfo, a authorizationv1.ResourceAttributes) (verdict, error) {
	spec := authorizationv1.SubjectAccessReviewSpec{User: user.Username, UID: user.UID, Groups: user.Groups, Extra: extra(user), ResourceAttributes: &a}
	id, err := json.Marshal(spec)
	if err != nil {
		return verdict{}, fmt.Errorf("encode access review: %w", err)
	}
	now := g.cfg.Now()
	if v, ok := g.access.get(string(id), now); ok {
		return v, nil
	}
	var v verdict
	if v.allowed, v.reason, err = g.cfg.Reviewer.ReviewAccess(ctx, spec); err != nil {
		return verdict{}, err
	}
	kept := deniedKept
	if v.allowed {
		kept = allowedKept
	}
	g.access.put(string(id), v, now.Add(kept), now)
	return v, nil
}

func extra(user authenticationv1.UserInfo) map[string]authorizationv1.ExtraValue {
	if len(user.Extra) == 0 {
		return nil
	}
	out := map[string]authorizationv1.ExtraValue{}
	for k, v := range user.Extra {
		out[k] = authorizationv1.ExtraValue(v)
	}
	return out
}

// attributes are what has to be allowed for r, one of them.
func attributes(node string, r *http.Request) (any []authorizationv1.ResourceAttributes) {
	for _, sub := range subresources(r.URL.Path) {
		any = append(any, authorizationv1.ResourceAttributes{Verb: verb(r.Method), Version: "v1", Resource: "nodes", Subresource: sub, Name: node})
	}
	return any
}

// subresources of the Node that a path stands for, the narrow one first.
func subresources(path string) []string {
	head, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	switch head {
	case "metrics":
		return []string{"metrics"}
	case "stats":
		return []string{"stats"}
	case "healthz":
		return []string{"healthz", "proxy"}
	}
	return []string{"proxy"}
}

func verb(method string) string {
	switch method {
	case http.MethodPost:
		return "create"
	case http.MethodPut:
		return "update"
	case http.MethodPatch:
		return "patch"
	case http.MethodDelete:
		return "delete"
	}
	return "get"
}
