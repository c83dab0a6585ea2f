package controlplane

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	admission "k8s.io/api/admission/v1"
	admissionregistration "k8s.io/api/admissionregistration/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/yaml"

	"github.com/nodeagent/nodeagent/test/cluster"
)

func object(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	u := &unstructured.Unstructured{}
	check(t, yaml.Unmarshal([]byte(text), &u.Object))
	return u
}

func TestCustomResources(t *testing.T) {
	client := dynamicClient(t, cluster.Shared(t).Admin)
	definitions := client.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	_, err := definitions.Create(t.Context(), object(t, `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: gadgets.test.example.com}
spec:
  group: test.example.com
  scope: Namespaced
  names: {plural: gadgets, singular: gadget, kind: Gadget}
  versions:
    - name: v1
      served: true
      storage: true
      schema:
        openAPIV3Schema:
          type: object
          properties:
            spec:
              type: object
              required: [size]
              properties: {size: {type: integer, maximum: 9}, colour: {type: string, default: red}}
`), meta.CreateOptions{})
	check(t, err)
	t.Cleanup(func() {
		check(t, definitions.Delete(context.Background(), "gadgets.test.example.com", meta.DeleteOptions{}))
		eventually(t, "remove the definition", func(ctx context.Context) error {
			if _, err := definitions.Get(ctx, "gadgets.test.example.com", meta.GetOptions{}); !apierrors.IsNotFound(err) {
				return fmt.Errorf("still there (%v)", err)
			}
			return nil
		})
	})
	gadgets := client.Resource(schema.GroupVersionResource{Group: "test.example.com", Version: "v1", Resource: "gadgets"}).Namespace("default")
	gadget := func(name string, size int) *unstructured.Unstructured {
		return object(t, fmt.Sprintf("{apiVersion: test.example.com/v1, kind: Gadget, metadata: {name: %s}, spec: {size: %d}}", name, size))
	}
	eventually(t, "create a custom object", func(ctx context.Context) error {
		_, err := gadgets.Create(ctx, gadget("good", 3), meta.CreateOptions{})
		return err
	})
	got, err := gadgets.Get(t.Context(), "good", meta.GetOptions{})
	check(t, err)
	if colour, _, _ := unstructured.NestedString(got.Object, "spec", "colour"); colour != "red" {
		t.Errorf("the schema's default is not there: %v", got.Object)
	}
	if _, err := gadgets.Create(t.Context(), gadget("bad", 10), meta.CreateOptions{}); !apierrors.IsInvalid(err) {
		t.Errorf("the schema's maximum does not hold (%v)", err)
	}
}

// TestAggregatedAPI serves a group of its own behind the API server, which
// proves itself with the front proxy's certificate and passes on who asks.
func TestAggregatedAPI(t *testing.T) {
	c := cluster.Shared(t)
	admin := clientset(t, c.Admin)
	published, err := admin.CoreV1().ConfigMaps(meta.NamespaceSystem).Get(t.Context(), "extension-apiserver-authentication", meta.GetOptions{})
	check(t, err)
	proxies := x509.NewCertPool()
	if !proxies.AppendCertsFromPEM([]byte(published.Data["requestheader-client-ca-file"])) {
		t.Fatal("no authority of the front proxy is published")
	}

	ns := namespace(t, admin)
	host, port, authority := serveTLS(t, "clock."+ns+".svc", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		group := meta.GroupVersionForDiscovery{GroupVersion: "clock.example.com/v1", Version: "v1"}
		switch r.URL.Path {
		case "/apis":
			answer(w, meta.APIGroupList{TypeMeta: meta.TypeMeta{Kind: "APIGroupList", APIVersion: "v1"}, Groups: []meta.APIGroup{
				{Name: "clock.example.com", Versions: []meta.GroupVersionForDiscovery{group}, PreferredVersion: group},
			}})
		case "/apis/clock.example.com/v1":
			answer(w, meta.APIResourceList{
				TypeMeta: meta.TypeMeta{Kind: "APIResourceList", APIVersion: "v1"}, GroupVersion: group.GroupVersion,
				APIResources: []meta.APIResource{{Name: "hours", SingularName: "hour", Kind: "Hour", Verbs: []string{"get"}}},
			})
		case "/apis/clock.example.com/v1/hours/now":
			answer(w, map[string]any{"kind": "Hour", "apiVersion": group.GroupVersion, "metadata": map[string]any{
				"name": "now", "labels": map[string]string{"user": r.Header.Get("X-Remote-User"), "proxy": r.TLS.PeerCertificates[0].Subject.CommonName},
			}})
		default:
			http.NotFound(w, r)
		}
	}), &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: proxies})

	// A Service without pods: its external name is where we listen.
	_, err = admin.CoreV1().Services(ns).Create(t.Context(), &core.Service{
		ObjectMeta: meta.ObjectMeta{Name: "clock"},
		Spec:       core.ServiceSpec{Type: core.ServiceTypeExternalName, ExternalName: host},
	}, meta.CreateOptions{})
	check(t, err)
	services := dynamicClient(t, c.Admin).Resource(schema.GroupVersionResource{Group: "apiregistration.k8s.io", Version: "v1", Resource: "apiservices"})
	_, err = services.Create(t.Context(), object(t, fmt.Sprintf(`
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1.clock.example.com}
spec:
  group: clock.example.com
  version: v1
  groupPriorityMinimum: 100
  versionPriority: 100
  caBundle: %s
  service: {namespace: %s, name: clock, port: %s}
`, base64.StdEncoding.EncodeToString(authority), ns, port)), meta.CreateOptions{})
	check(t, err)

	t.Cleanup(func() { check(t, services.Delete(context.Background(), "v1.clock.example.com", meta.DeleteOptions{})) })

	hours := dynamicClient(t, c.Admin).Resource(schema.GroupVersionResource{Group: "clock.example.com", Version: "v1", Resource: "hours"})
	var now *unstructured.Unstructured
	eventually(t, "get an object of the aggregated API", func(ctx context.Context) (err error) {
		now, err = hours.Get(ctx, "now", meta.GetOptions{})
		return err
	})
	if l := now.GetLabels(); l["user"] != "admin" || l["proxy"] != "front-proxy-client" {
		t.Errorf("the aggregated API was asked by %v", l)
	}
	eventually(t, "discover the aggregated API", func(context.Context) error {
		list, err := admin.Discovery().ServerResourcesForGroupVersion("clock.example.com/v1")
		if err == nil && (len(list.APIResources) != 1 || list.APIResources[0].Name != "hours") {
			err = fmt.Errorf("resources are %v", list.APIResources)
		}
		return err
	})
}

// TestAdmissionWebhooks: one adds a label, the other refuses by a label, so
// that it sees what the first has done.
func TestAdmissionWebhooks(t *testing.T) {
	c := cluster.Shared(t)
	client := clientset(t, c.Admin)
	ns := namespace(t, client)
	host, port, authority := serveTLS(t, "localhost", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var review admission.AdmissionReview
		var pod meta.PartialObjectMetadata
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if err := json.Unmarshal(review.Request.Object.Raw, &pod); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		response := &admission.AdmissionResponse{UID: review.Request.UID, Allowed: true}
		if r.URL.Path == "/mutate" {
			kind := admission.PatchTypeJSONPatch
			response.PatchType = &kind
			response.Patch = []byte(`[{"op":"add","path":"/metadata/labels/mutated","value":"yes"}]`)
		} else if pod.Labels["mutated"] != "yes" || pod.Labels["bad"] != "" {
			response.Allowed = false
			response.Result = &meta.Status{Message: fmt.Sprintf("refused with labels %v", pod.Labels)}
		}
		review.Request, review.Response = nil, response
		answer(w, review)
	}), &tls.Config{})

	none := admissionregistration.SideEffectClassNone
	fail := admissionregistration.Fail
	selector := &meta.LabelSelector{MatchLabels: map[string]string{core.LabelMetadataName: ns}}
	rules := []admissionregistration.RuleWithOperations{{
		Operations: []admissionregistration.OperationType{admissionregistration.Create},
		Rule:       admissionregistration.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"configmaps"}},
	}}
	at := func(path string) admissionregistration.WebhookClientConfig {
		url := "https://" + net.JoinHostPort(host, port) + path
		return admissionregistration.WebhookClientConfig{URL: &url, CABundle: authority}
	}
	registrations := client.AdmissionregistrationV1()
	_, err := registrations.MutatingWebhookConfigurations().Create(t.Context(), &admissionregistration.MutatingWebhookConfiguration{
		ObjectMeta: meta.ObjectMeta{Name: ns},
		Webhooks: []admissionregistration.MutatingWebhook{{
			Name: "mutate.example.com", ClientConfig: at("/mutate"), Rules: rules, NamespaceSelector: selector,
			SideEffects: &none, FailurePolicy: &fail, AdmissionReviewVersions: []string{"v1"},
		}},
	}, meta.CreateOptions{})
	check(t, err)
	_, err = registrations.ValidatingWebhookConfigurations().Create(t.Context(), &admissionregistration.ValidatingWebhookConfiguration{
		ObjectMeta: meta.ObjectMeta{Name: ns},
		Webhooks: []admissionregistration.ValidatingWebhook{{
			Name: "validate.example.com", ClientConfig: at("/validate"), Rules: rules, NamespaceSelector: selector,
			SideEffects: &none, FailurePolicy: &fail, AdmissionReviewVersions: []string{"v1"},
		}},
	}, meta.CreateOptions{})
	check(t, err)

	// Both configurations reach the API server's admission a moment later.
	try := func(name string, labels map[string]string) (*core.ConfigMap, error) {
		return client.CoreV1().ConfigMaps(ns).Create(t.Context(), &core.ConfigMap{ObjectMeta: meta.ObjectMeta{GenerateName: name, Labels: labels}}, meta.CreateOptions{})
	}
	eventually(t, "have the webhook refuse", func(context.Context) error {
		_, err := try("bad-", map[string]string{"bad": "yes"})
		if err == nil || !strings.Contains(err.Error(), "refused with labels map[bad:yes mutated:yes]") {
			return fmt.Errorf("the answer is %v", err)
		}
		return nil
	})
	good, err := try("good-", map[string]string{"good": "yes"})
	check(t, err)
	if good.Labels["mutated"] != "yes" {
		t.Errorf("the webhook's label is not there: %v", good.Labels)
	}
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

// serveTLS serves on loopback until the test ends, with a certificate for a
// name. It returns where, and the authority to trust.
func serveTLS(t *testing.T, name string, handler http.Handler, config *tls.Config) (host, port string, authority []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	template := selfSigned(name)
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	check(t, err)
	config.Certificates = []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
	server := httptest.NewUnstartedServer(handler)
	server.TLS = config
	server.StartTLS()
	t.Cleanup(server.Close)
	_, port, err = net.SplitHostPort(server.Listener.Addr().String())
	check(t, err)
	return "localhost", port, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
