package certs

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/nodeagent/nodeagent/test/cluster"
)

// apply creates what is in a manifest of deploy/, as kubectl apply would.
func apply(t *testing.T, c *cluster.Cluster, file string) {
	t.Helper()
	data, err := os.ReadFile("../../deploy/" + file)
	if err != nil {
		t.Fatal(err)
	}
	client, err := dynamic.NewForConfig(c.Admin)
	if err != nil {
		t.Fatal(err)
	}
	plural := func(kind string) string {
		kind = strings.ToLower(kind)
		if stem, ok := strings.CutSuffix(kind, "y"); ok {
			return stem + "ies"
		}
		return kind + "s"
	}
	for dec := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(data), 4096); ; {
		o := &unstructured.Unstructured{}
		if err := dec.Decode(&o.Object); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
		gvk := o.GroupVersionKind()
		r := client.Resource(schema.GroupVersionResource{Group: gvk.Group, Version: gvk.Version, Resource: plural(gvk.Kind)})
		var to dynamic.ResourceInterface = r
		if ns := o.GetNamespace(); ns != "" {
			to = r.Namespace(ns)
		}
		if _, err := to.Apply(t.Context(), o.GetName(), o, metav1.ApplyOptions{FieldManager: "test", Force: true}); err != nil {
			t.Fatalf("%s: %s %s: %v", file, gvk.Kind, o.GetName(), err)
		}
	}
}

// as is a client with a token of a service account, bound to a Node or not.
func as(t *testing.T, c *cluster.Cluster, ns, name, node string) *kubernetes.Clientset {
	t.Helper()
	client := admin(t, c)
	tr := &authenticationv1.TokenRequest{}
	if node != "" {
		n, err := client.CoreV1().Nodes().Get(t.Context(), node, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		tr.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Node", Name: node, UID: n.UID}
	}
	tr, err := client.CoreV1().ServiceAccounts(ns).CreateToken(t.Context(), name, tr, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cfg := rest.AnonymousClientConfig(c.Admin)
	cfg.BearerToken = tr.Status.Token
	out, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// rights are all that a client may do in a namespace, as "verb group/resource".
func rights(t *testing.T, client *kubernetes.Clientset, ns string) map[string]bool {
	t.Helper()
	r, err := client.AuthorizationV1().SelfSubjectRulesReviews().Create(t.Context(),
		&authorizationv1.SelfSubjectRulesReview{Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: ns}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]bool{}
	for _, rule := range r.Status.ResourceRules {
		for _, verb := range rule.Verbs {
			for _, g := range rule.APIGroups {
				for _, res := range rule.Resources {
					all[strings.Join([]string{verb, g + "/" + res, strings.Join(rule.ResourceNames, ",")}, " ")] = true
				}
			}
		}
	}
	return all
}

// more are the rights of client that a service account has not by itself.
func more(t *testing.T, c *cluster.Cluster, client *kubernetes.Clientset, ns string) []string {
	t.Helper()
	all := rights(t, client, ns)
	for right := range rights(t, as(t, c, "default", "default", ""), ns) {
		delete(all, right)
	}
	return slices.Sorted(maps.Keys(all))
}

// each is every pair of a verb and a resource, as rights has them.
func each(verbs, resources string) (out []string) {
	for _, v := range strings.Fields(verbs) {
		for _, r := range strings.Fields(resources) {
			out = append(out, v+" "+r+" ")
		}
	}
	return out
}

func sorted(lists ...[]string) []string {
	all := slices.Concat(lists...)
	slices.Sort(all)
	return all
}

// TestPolicyIdentity may read what policy is made of, and nothing else.
func TestPolicyIdentity(t *testing.T) {
	t.Parallel()
	c := shared(t)
	apply(t, c, "bootstrap.yaml")
	apply(t, c, "policy.yaml")
	client := as(t, c, "nodeagent-system", "nodeagent-policy", "")
	want := sorted(each("get list watch", "/pods /namespaces networking.k8s.io/networkpolicies"))
	for _, ns := range []string{"default", "kube-system", "nodeagent-system"} {
		if got := more(t, c, client, ns); !slices.Equal(got, want) {
			t.Errorf("in %s it may\n%q\nwant\n%q", ns, got, want)
		}
	}
	ctx := t.Context()
	_, e1 := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	_, e2 := client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	_, e3 := client.NetworkingV1().NetworkPolicies("").List(ctx, metav1.ListOptions{})
	if err := errors.Join(e1, e2, e3); err != nil {
		t.Errorf("its work: %v", err)
	}
	for _, w := range []func() error{
		func() error { _, err := client.CoreV1().Secrets("").List(ctx, metav1.ListOptions{}); return err },
		func() error { return client.CoreV1().Pods("default").Delete(ctx, "x", metav1.DeleteOptions{}) },
		func() error {
			_, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "x"}}, metav1.CreateOptions{})
			return err
		},
	} {
		if err := w(); !apierrors.IsForbidden(err) {
			t.Errorf("not forbidden: %v", err)
		}
	}
}

// TestVolumeIdentity may handle local volumes of the node that its token is
// bound to, and nothing else.
func TestVolumeIdentity(t *testing.T) {
	t.Parallel()
	c := shared(t)
	apply(t, c, "volumes.yaml")
	root := admin(t, c)
	register(t, root, "disks")
	register(t, root, "other-disks")
	mine, free := as(t, c, "nodeagent-system", "nodeagent-volumes", "disks"), as(t, c, "nodeagent-system", "nodeagent-volumes", "")
	want := sorted(
		each("get list watch create patch delete", "/persistentvolumes"),
		each("get list watch", "/persistentvolumeclaims /nodes storage.k8s.io/storageclasses"),
		each("create patch", "/events"))
	if got := more(t, c, mine, "default"); !slices.Equal(got, want) {
		t.Errorf("it may\n%q\nwant\n%q", got, want)
	}
	want = sorted(want, each("get list watch create update patch delete", "storage.k8s.io/csistoragecapacities"))
	if got := more(t, c, mine, "nodeagent-system"); !slices.Equal(got, want) {
		t.Errorf("in its namespace it may\n%q\nwant\n%q", got, want)
	}
	ctx := t.Context()
	create := func(client *kubernetes.Clientset, pv *corev1.PersistentVolume) error {
		_, err := client.CoreV1().PersistentVolumes().Create(ctx, pv, metav1.CreateOptions{})
		return err
	}
	until(t, "the admission policy in force", func() bool {
		err := create(mine, volume("probe", "other-disks"))
		if err == nil {
			root.CoreV1().PersistentVolumes().Delete(ctx, "probe", metav1.DeleteOptions{})
		}
		return err != nil
	})
	host := volume("host", "disks")
	host.Spec.Local, host.Spec.HostPath = nil, &corev1.HostPathVolumeSource{Path: "/"}
	anywhere := volume("anywhere", "disks")
	anywhere.Spec.NodeAffinity.Required.NodeSelectorTerms = append(anywhere.Spec.NodeAffinity.Required.NodeSelectorTerms,
		volume("x", "other-disks").Spec.NodeAffinity.Required.NodeSelectorTerms...)
	for name, tt := range map[string]struct {
		client *kubernetes.Clientset
		pv     *corev1.PersistentVolume
		want   string
	}{
		"another node's": {mine, volume("a", "other-disks"), "the node that the token is bound to"},
		"two nodes'":     {mine, anywhere, "the node that the token is bound to"},
		"a host path":    {mine, host, "handles local volumes only"},
		"unbound token":  {free, volume("b", "disks"), "has to be bound to a Node"},
	} {
		if err := create(tt.client, tt.pv); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
	if err := create(mine, volume("disk-1", "disks")); err != nil {
		t.Errorf("its own volume: %v", err)
	}
	if err := create(root, volume("disk-2", "other-disks")); err != nil {
		t.Fatal(err)
	}
	if err := mine.CoreV1().PersistentVolumes().Delete(ctx, "disk-2", metav1.DeleteOptions{}); err == nil {
		t.Error("it may delete another node's volume")
	}
	if err := mine.CoreV1().PersistentVolumes().Delete(ctx, "disk-1", metav1.DeleteOptions{}); err != nil {
		t.Errorf("delete its own volume: %v", err)
	}
	if _, err := mine.CoreV1().Events("default").Create(ctx, &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "e"}, InvolvedObject: corev1.ObjectReference{Kind: "PersistentVolumeClaim", Namespace: "default", Name: "x"},
	}, metav1.CreateOptions{}); err != nil {
		t.Errorf("an event: %v", err)
	}
	if _, err := mine.CoreV1().Secrets("nodeagent-system").List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("secrets: %v", err)
	}
}

// volume is a local volume of a node.
func volume(name, node string) *corev1.PersistentVolume {
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PersistentVolumeSpec{
			Capacity:               corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")},
			AccessModes:            []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			PersistentVolumeSource: corev1.PersistentVolumeSource{Local: &corev1.LocalVolumeSource{Path: "/mnt/" + name}},
			NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
				MatchExpressions: []corev1.NodeSelectorRequirement{{Key: corev1.LabelHostname, Operator: corev1.NodeSelectorOpIn, Values: []string{node}}},
			}}}},
		},
	}
}
