package controlplane

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"testing"
	"time"

	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/nodeagent/nodeagent/test/cluster"
)

// stubNode registers a node and calls every pod bound to it running and ready,
// or gone when it is to go, until the test ends. It has a node's rights.
func stubNode(t *testing.T, c *cluster.Cluster, name string) {
	t.Helper()
	config := rest.CopyConfig(c.Admin)
	config.Impersonate = rest.ImpersonationConfig{UserName: "system:node:" + name, Groups: []string{"system:nodes", "system:authenticated"}}
	node := clientset(t, config)
	register(t, node, name)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	t.Cleanup(func() { cancel(); <-done })
	go func() {
		defer close(done)
		for beat := 0; ctx.Err() == nil; beat++ {
			if beat%100 == 0 { // every ten seconds: the node lifecycle controller waits fifty
				heartbeat(ctx, node, name)
			}
			settle(ctx, node, name)
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
}

// heartbeat says that the node is ready and has room. An error is tried again
// at the next.
func heartbeat(ctx context.Context, client kubernetes.Interface, name string) {
	room := core.ResourceList{
		core.ResourceCPU: resource.MustParse("8"), core.ResourceMemory: resource.MustParse("8Gi"), core.ResourcePods: resource.MustParse("110"),
	}
	now := meta.Now()
	patch, _ := json.Marshal(map[string]any{"status": core.NodeStatus{
		Capacity: room, Allocatable: room,
		Conditions: []core.NodeCondition{{Type: core.NodeReady, Status: core.ConditionTrue, Reason: "Stub", LastHeartbeatTime: now, LastTransitionTime: now}},
	}})
	client.CoreV1().Nodes().Patch(ctx, name, types.StrategicMergePatchType, patch, meta.PatchOptions{}, "status")
}

// settle brings every pod of the node where its spec wants it. An error is
// tried again in the next round.
func settle(ctx context.Context, client kubernetes.Interface, name string) {
	pods, err := client.CoreV1().Pods("").List(ctx, meta.ListOptions{FieldSelector: "spec.nodeName=" + name})
	if err != nil {
		return
	}
	now := meta.Now()
	for _, pod := range pods.Items {
		if pod.DeletionTimestamp != nil {
			client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, *meta.NewDeleteOptions(0))
			continue
		}
		if pod.Status.Phase == core.PodRunning {
			continue
		}
		ready := []core.PodCondition{
			{Type: core.PodReady, Status: core.ConditionTrue, LastTransitionTime: now},
			{Type: core.ContainersReady, Status: core.ConditionTrue, LastTransitionTime: now},
		}
		patch, _ := json.Marshal(map[string]any{"status": core.PodStatus{Phase: core.PodRunning, StartTime: &now, Conditions: ready}})
		client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, meta.PatchOptions{}, "status")
	}
}

// workload is what rolls out: a StatefulSet or a DaemonSet.
type workload interface {
	// patch changes the object as kubectl does; to undo, with what a revision
	// holds.
	patch(ctx context.Context, patch []byte) error
	// settled is nil when the controller has seen the last change and every
	// pod is new and ready.
	settled(ctx context.Context) error
}

// rollOut goes through the life of a workload: one image, another, back to the
// first, each time seen in the pods and in the history.
func rollOut(t *testing.T, client kubernetes.Interface, ns string, w workload) {
	t.Helper()
	const first, second = "example.com/image:1", "example.com/image:2"
	expect := func(what, image string, revisions ...int64) {
		t.Helper()
		eventually(t, what, w.settled)
		pods, err := client.CoreV1().Pods(ns).List(t.Context(), meta.ListOptions{})
		check(t, err)
		for _, pod := range pods.Items {
			if got := pod.Spec.Containers[0].Image; got != image {
				t.Errorf("%s: pod %s runs %s", what, pod.Name, got)
			}
		}
		if len(pods.Items) != 2 {
			t.Errorf("%s: there are %d pods", what, len(pods.Items))
		}
		if got := history(t, client, ns); !slices.Equal(got, revisions) {
			t.Errorf("%s: the history has revisions %v, expected %v", what, got, revisions)
		}
	}
	expect("roll out", first, 1)
	check(t, w.patch(t.Context(), []byte(`{"spec":{"template":{"spec":{"containers":[{"name":"c","image":"`+second+`"}]}}}}`)))
	expect("roll out a new image", second, 1, 2)
	check(t, w.patch(t.Context(), revision(t, client, ns, 1).Data.Raw))
	expect("roll back", first, 2, 3) // what was revision 1 is the newest again
}

func revisions(t *testing.T, client kubernetes.Interface, ns string) []apps.ControllerRevision {
	t.Helper()
	list, err := client.AppsV1().ControllerRevisions(ns).List(t.Context(), meta.ListOptions{})
	check(t, err)
	return list.Items
}

func history(t *testing.T, client kubernetes.Interface, ns string) []int64 {
	t.Helper()
	var numbers []int64
	for _, r := range revisions(t, client, ns) {
		numbers = append(numbers, r.Revision)
	}
	slices.Sort(numbers)
	return numbers
}

func revision(t *testing.T, client kubernetes.Interface, ns string, number int64) *apps.ControllerRevision {
	t.Helper()
	for _, r := range revisions(t, client, ns) {
		if r.Revision == number {
			return &r
		}
	}
	t.Fatalf("there is no revision %d", number)
	return nil
}

func template() core.PodTemplateSpec {
	return core.PodTemplateSpec{ObjectMeta: meta.ObjectMeta{Labels: map[string]string{"app": "x"}}, Spec: podSpec("")}
}

var selector = &meta.LabelSelector{MatchLabels: map[string]string{"app": "x"}}

type statefulSet struct {
	client kubernetes.Interface
	ns     string
}

func (s statefulSet) patch(ctx context.Context, patch []byte) error {
	_, err := s.client.AppsV1().StatefulSets(s.ns).Patch(ctx, "w", types.StrategicMergePatchType, patch, meta.PatchOptions{})
	return err
}

func (s statefulSet) settled(ctx context.Context) error {
	set, err := s.client.AppsV1().StatefulSets(s.ns).Get(ctx, "w", meta.GetOptions{})
	if err != nil {
		return err
	}
	st := set.Status
	if st.ObservedGeneration < set.Generation || st.ReadyReplicas != 2 || st.UpdatedReplicas != 2 || st.CurrentRevision != st.UpdateRevision {
		return fmt.Errorf("status is %+v", st)
	}
	return nil
}

type daemonSet struct {
	client kubernetes.Interface
	ns     string
}

func (d daemonSet) patch(ctx context.Context, patch []byte) error {
	_, err := d.client.AppsV1().DaemonSets(d.ns).Patch(ctx, "w", types.StrategicMergePatchType, patch, meta.PatchOptions{})
	return err
}

func (d daemonSet) settled(ctx context.Context) error {
	set, err := d.client.AppsV1().DaemonSets(d.ns).Get(ctx, "w", meta.GetOptions{})
	if err != nil {
		return err
	}
	st := set.Status
	if st.ObservedGeneration < set.Generation || st.DesiredNumberScheduled != 2 || st.UpdatedNumberScheduled != 2 || st.NumberReady != 2 {
		return fmt.Errorf("status is %+v", st)
	}
	return nil
}

func TestStatefulSet(t *testing.T) {
	c := cluster.Shared(t)
	client := clientset(t, c.Admin)
	stubNode(t, c, "stateful")
	ns := namespace(t, client)
	replicas := int32(2)
	set := &apps.StatefulSet{ObjectMeta: meta.ObjectMeta{Name: "w"}, Spec: apps.StatefulSetSpec{
		Replicas: &replicas, ServiceName: "w", Selector: selector, Template: template(),
	}}
	_, err := client.AppsV1().StatefulSets(ns).Create(t.Context(), set, meta.CreateOptions{})
	check(t, err)
	rollOut(t, client, ns, statefulSet{client, ns})
}

func TestDaemonSet(t *testing.T) {
	c := cluster.Shared(t)
	client := clientset(t, c.Admin)
	for _, name := range []string{"daemon-1", "daemon-2"} {
		stubNode(t, c, name)
		_, err := client.CoreV1().Nodes().Patch(t.Context(), name, types.MergePatchType, []byte(`{"metadata":{"labels":{"daemons":"yes"}}}`), meta.PatchOptions{})
		check(t, err)
	}
	ns := namespace(t, client)
	set := &apps.DaemonSet{ObjectMeta: meta.ObjectMeta{Name: "w"}, Spec: apps.DaemonSetSpec{Selector: selector, Template: template()}}
	set.Spec.Template.Spec.NodeSelector = map[string]string{"daemons": "yes"}
	_, err := client.AppsV1().DaemonSets(ns).Create(t.Context(), set, meta.CreateOptions{})
	check(t, err)
	rollOut(t, client, ns, daemonSet{client, ns})
}

// selfSigned is a server's certificate that is its own authority.
func selfSigned(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IsCA: true, BasicConstraintsValid: true,
	}
}
