package certs

import (
	"context"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

// callTimeout bounds one call that is no watch.
const callTimeout = 30 * time.Second

// api is the API server as far as certificates need it: five kinds of object,
// over REST clients with a scheme of their own. (client-go's typed clients
// register every kind of every API group when the program starts, which costs
// a daemon that uses none of them memory.)
type api struct {
	certificates, authentication, authorization, core rest.Interface
}

// groups are the API groups that api speaks, in the order of its fields.
func groups() []schema.GroupVersion {
	return []schema.GroupVersion{
		certificatesv1.SchemeGroupVersion, authenticationv1.SchemeGroupVersion,
		authorizationv1.SchemeGroupVersion, corev1.SchemeGroupVersion,
	}
}

// newCodecs is made once for a Manager.
func newCodecs() (runtime.NegotiatedSerializer, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		certificatesv1.AddToScheme, authenticationv1.AddToScheme, authorizationv1.AddToScheme, corev1.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("build scheme: %w", err)
		}
	}
	for _, gv := range groups() {
		metav1.AddToGroupVersion(scheme, gv)
	}
	return serializer.NewCodecFactory(scheme).WithoutConversion(), nil
}

// newAPI speaks with the server and the credential of cfg, or with transport
// alone where that is given.
func newAPI(cfg *rest.Config, codecs runtime.NegotiatedSerializer, client *http.Client) (*api, error) {
	var clients []rest.Interface
	for _, gv := range groups() {
		c := rest.CopyConfig(cfg)
		c.GroupVersion, c.NegotiatedSerializer, c.APIPath = &gv, codecs, "/apis"
		if gv.Group == "" {
			c.APIPath = "/api"
		}
		rc, err := rest.RESTClientForConfigAndClient(c, client)
		if err != nil {
			return nil, fmt.Errorf("make client for %s: %w", gv, err)
		}
		clients = append(clients, rc)
	}
	return &api{clients[0], clients[1], clients[2], clients[3]}, nil
}

const signingRequests = "certificatesigningrequests"

func (a *api) createRequest(ctx context.Context, csr *certificatesv1.CertificateSigningRequest) (*certificatesv1.CertificateSigningRequest, error) {
	out := &certificatesv1.CertificateSigningRequest{}
	err := a.certificates.Post().Resource(signingRequests).Timeout(callTimeout).Body(csr).Do(ctx).Into(out)
	return out, err
}

func (a *api) request(ctx context.Context, name string) (*certificatesv1.CertificateSigningRequest, error) {
	out := &certificatesv1.CertificateSigningRequest{}
	err := a.certificates.Get().Resource(signingRequests).Name(name).Timeout(callTimeout).Do(ctx).Into(out)
	return out, err
}

// watchRequest sends the request as it is, then what becomes of it; the server
// ends it within some minutes.
func (a *api) watchRequest(ctx context.Context, name string) (watch.Interface, error) {
	return watchOne(ctx, a.certificates, signingRequests, name)
}

func watchOne(ctx context.Context, c rest.Interface, resource, name string) (watch.Interface, error) {
	return c.Get().Resource(resource).
		Param("watch", "1").
		Param("fieldSelector", fields.OneTermEqualSelector("metadata.name", name).String()).
		Param("timeoutSeconds", "300").
		Watch(ctx)
}

func (a *api) node(ctx context.Context, name string) (*corev1.Node, error) {
	out := &corev1.Node{}
	err := a.core.Get().Resource("nodes").Name(name).Timeout(callTimeout).Do(ctx).Into(out)
	return out, err
}

func (a *api) watchNode(ctx context.Context, name string) (watch.Interface, error) {
	return watchOne(ctx, a.core, "nodes", name)
}

func (a *api) patchNodeStatus(ctx context.Context, name string, patch []byte) error {
	return a.core.Patch(types.StrategicMergePatchType).Resource("nodes").Name(name).SubResource("status").
		Timeout(callTimeout).Body(patch).Do(ctx).Error()
}

func (a *api) createEvent(ctx context.Context, e *corev1.Event) error {
	return a.core.Post().Namespace(e.Namespace).Resource("events").Timeout(callTimeout).Body(e).Do(ctx).Error()
}

func (a *api) reviewToken(ctx context.Context, r *authenticationv1.TokenReview) (*authenticationv1.TokenReview, error) {
	out := &authenticationv1.TokenReview{}
	err := a.authentication.Post().Resource("tokenreviews").Timeout(callTimeout).Body(r).Do(ctx).Into(out)
	return out, err
}

func (a *api) reviewAccess(ctx context.Context, r *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReview, error) {
	out := &authorizationv1.SubjectAccessReview{}
	err := a.authorization.Post().Resource("subjectaccessreviews").Timeout(callTimeout).Body(r).Do(ctx).Into(out)
	return out, err
}

// dates notes how far the API server's clock is ahead of ours, as the Date of
// its answers tells (to a second).
type dates struct {
	next http.RoundTripper
	now  func() time.Time
	skew *atomic.Int64 // nanoseconds
}

func (d dates) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := d.next.RoundTrip(r)
	if err == nil {
		if at, parseErr := http.ParseTime(resp.Header.Get("Date")); parseErr == nil {
			d.skew.Store(int64(at.Sub(d.now())))
		}
	}
	return resp, err
}
