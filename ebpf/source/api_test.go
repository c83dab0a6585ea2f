package source

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// server is as much of an API server as lists and watches need. It forgets its
// watchers when it is down.
type server struct {
	stream   bool // lists may be streamed
	mu       sync.Mutex
	down     bool
	version  int
	objects  map[string]map[string]runtime.Object // resource, namespace/name
	watchers map[chan event]string
	lists    map[string]int
	fields   []string
}

type event struct {
	Type   string         `json:"type"`
	Object runtime.Object `json:"object"`
}

func newServer(t *testing.T) (*server, *httptest.Server) {
	s := &server{version: 1, objects: map[string]map[string]runtime.Object{}, watchers: map[chan event]string{}, lists: map[string]int{}}
	h := httptest.NewServer(s)
	t.Cleanup(func() { s.turn(true); h.Close() })
	return s, h
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	resource := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	q := r.URL.Query()
	s.mu.Lock()
	if s.down {
		s.mu.Unlock()
		http.Error(w, "down", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	streamed := q.Get("sendInitialEvents") == "true"
	if streamed && !s.stream {
		s.mu.Unlock()
		w.WriteHeader(http.StatusUnprocessableEntity)
		_ = json.NewEncoder(w).Encode(meta.Status{TypeMeta: meta.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Reason: meta.StatusReasonInvalid, Code: 422})
		return
	}
	if q.Get("watch") == "" {
		defer s.mu.Unlock()
		s.lists[resource]++
		s.fields = append(s.fields, q.Get("fieldSelector"))
		s.list(w, resource)
		return
	}
	ch := make(chan event, 10000)
	s.watchers[ch] = resource
	if streamed {
		s.fields = append(s.fields, q.Get("fieldSelector"))
		for _, o := range s.objects[resource] {
			ch <- event{"ADDED", o}
		}
		ch <- event{"BOOKMARK", s.end(resource)}
	}
	s.mu.Unlock()
	_ = http.NewResponseController(w).Flush()
	for {
		select {
		case <-r.Context().Done():
			return
		case e, ok := <-ch:
			if !ok {
				return
			}
			_ = json.NewEncoder(w).Encode(e)
			_ = http.NewResponseController(w).Flush()
		}
	}
}

// end tells that a streamed list is complete.
func (s *server) end(resource string) runtime.Object {
	m := meta.ObjectMeta{ResourceVersion: fmt.Sprint(s.version), Annotations: map[string]string{meta.InitialEventsAnnotationKey: "true"}}
	switch resource {
	case "pods":
		return &core.Pod{TypeMeta: meta.TypeMeta{Kind: "Pod", APIVersion: "v1"}, ObjectMeta: m}
	case "namespaces":
		return &core.Namespace{TypeMeta: meta.TypeMeta{Kind: "Namespace", APIVersion: "v1"}, ObjectMeta: m}
	}
	return &networking.NetworkPolicy{TypeMeta: meta.TypeMeta{Kind: "NetworkPolicy", APIVersion: "networking.k8s.io/v1"}, ObjectMeta: m}
}

func (s *server) list(w http.ResponseWriter, resource string) {
	kind, group := map[string]string{"pods": "PodList", "namespaces": "NamespaceList", "networkpolicies": "NetworkPolicyList"}[resource], "v1"
	if resource == "networkpolicies" {
		group = "networking.k8s.io/v1"
	}
	items := []runtime.Object{}
	for _, o := range s.objects[resource] {
		items = append(items, o)
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"kind": kind, "apiVersion": group, "metadata": map[string]string{"resourceVersion": fmt.Sprint(s.version)}, "items": items})
}

// turn switches the server off, which breaks its watches, or on.
func (s *server) turn(down bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = down
	for ch := range s.watchers {
		close(ch)
		delete(s.watchers, ch)
	}
}

// put stores an object, or with gone removes it, and tells watchers.
func (s *server) put(resource string, o runtime.Object, gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	m := o.(meta.Object)
	m.SetResourceVersion(fmt.Sprint(s.version))
	key := m.GetNamespace() + "/" + m.GetName()
	if s.objects[resource] == nil {
		s.objects[resource] = map[string]runtime.Object{}
	}
	e := event{"ADDED", o}
	if s.objects[resource][key] != nil {
		e.Type = "MODIFIED"
	}
	s.objects[resource][key] = o
	if gone {
		e.Type = "DELETED"
		delete(s.objects[resource], key)
	}
	for ch, of := range s.watchers {
		if of == resource {
			ch <- e
		}
	}
}

func apiPod(name, ip string, labels map[string]string) *core.Pod {
	return &core.Pod{
		TypeMeta:   meta.TypeMeta{Kind: "Pod", APIVersion: "v1"},
		ObjectMeta: meta.ObjectMeta{Namespace: "ns", Name: name, UID: "u", Labels: labels},
		Status:     core.PodStatus{PodIP: ip},
	}
}

func apiPolicy(name string) *networking.NetworkPolicy {
	return &networking.NetworkPolicy{TypeMeta: meta.TypeMeta{Kind: "NetworkPolicy", APIVersion: "networking.k8s.io/v1"}, ObjectMeta: meta.ObjectMeta{Namespace: "ns", Name: name}}
}

// follower keeps what a source said.
type follower struct {
	mu      sync.Mutex
	pods    map[objects.PodKey]*objects.Pod
	nets    map[objects.PodKey]*objects.Policy
	names   map[string]*objects.Namespace
	changes int
}

func (f *follower) set(c objects.Change) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.changes++
	f.pods = c.Pods.Into(f.pods, func(objects.PodKey) {})
	f.nets = c.Policies.Into(f.nets, func(objects.PodKey) {})
	f.names = c.Namespaces.Into(f.names, func(string) {})
}

func (f *follower) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		f.mu.Lock()
		done := ok()
		f.mu.Unlock()
		if done {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

// lines is a log that can be searched.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

func follow(t *testing.T, connect func() (*rest.Config, error)) (*follower, *lines) {
	t.Helper()
	f, log := &follower{}, &lines{}
	api := NewAPI(connect, slog.New(slog.NewTextHandler(log, nil)))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- api.Run(ctx, f.set) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return f, log
}

// TestAPI: nothing is told before all kinds are known, then every change is;
// a server that is down takes nothing away, and what changed meanwhile comes.
func TestAPI(t *testing.T) {
	for _, stream := range []bool{true, false} {
		t.Run(fmt.Sprint("streamed lists ", stream), func(t *testing.T) { testAPI(t, stream) })
	}
}

func testAPI(t *testing.T, stream bool) {
	s, h := newServer(t)
	s.stream = stream
	s.turn(true)
	s.put("pods", apiPod("a", "10.0.0.1", map[string]string{"app": "x"}), false)
	s.put("pods", apiPod("unscheduled", "", nil), false)
	s.put("pods", apiPod("strange", "no address", nil), false)
	s.put("networkpolicies", apiPolicy("p"), false)
	s.put("namespaces", &core.Namespace{TypeMeta: meta.TypeMeta{Kind: "Namespace", APIVersion: "v1"}, ObjectMeta: meta.ObjectMeta{Name: "ns", Labels: map[string]string{"team": "a"}}}, false)
	f, log := follow(t, func() (*rest.Config, error) { return &rest.Config{Host: h.URL}, nil })
	const silent, again = "does not tell of network policy", "answers again"
	f.until(t, "the outage is told", func() bool { return log.count(silent) == 1 })
	if f.changes != 0 {
		t.Error("something was told though the server is down")
	}
	s.turn(false)
	f.until(t, "all three kinds", func() bool { return len(f.pods) == 3 && len(f.nets) == 1 && len(f.names) == 1 })
	if f.changes != 1 {
		t.Errorf("the first state came in %d parts", f.changes)
	}
	key := objects.PodKey{Namespace: "ns", Name: "a"}
	if p := f.pods[key]; len(p.IPs) != 1 || p.Labels["app"] != "x" || p.UID != "u" {
		t.Errorf("%+v", p)
	}
	if l := f.names["ns"].Labels; l["team"] != "a" || l["kubernetes.io/metadata.name"] != "ns" {
		t.Errorf("%v", l)
	}
	s.put("pods", apiPod("a", "10.0.0.1", map[string]string{"app": "y"}), false)
	f.until(t, "a label", func() bool { return f.pods[key].Labels["app"] == "y" })
	s.put("networkpolicies", apiPolicy("q"), false)
	f.until(t, "a policy", func() bool { return len(f.nets) == 2 })
	s.put("networkpolicies", apiPolicy("q"), true)
	f.until(t, "a policy goes", func() bool { return len(f.nets) == 1 })
	f.until(t, "the server is back", func() bool { return log.count(again) == 1 })

	s.turn(true)
	f.until(t, "the second outage", func() bool { return log.count(silent) == 2 })
	s.put("pods", apiPod("a", "", nil), true)
	s.put("pods", apiPod("b", "10.0.0.2", nil), false)
	time.Sleep(100 * time.Millisecond)
	f.until(t, "nothing is taken away", func() bool { return f.pods[key] != nil && len(f.nets) == 1 })
	s.turn(false)
	f.until(t, "what changed meanwhile", func() bool { return f.pods[key] == nil && f.pods[objects.PodKey{Namespace: "ns", Name: "b"}] != nil })
	f.until(t, "the server is back again", func() bool { return log.count(again) == 2 })
	if log.count(silent) != 2 {
		t.Errorf("an outage is told more than once:\n%s", log.b.String())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// A reflector whose stream an outage breaks lists once without one.
	if lists := s.lists["pods"]; stream && lists > 2 || !stream && lists == 0 {
		t.Errorf("%d lists that were not streamed", lists)
	}
	if !strings.Contains(strings.Join(s.fields, " "), "status.phase!=Succeeded,status.phase!=Failed") {
		t.Errorf("finished pods are asked for: %q", s.fields)
	}
}

// TestAPILateKubeconfig: how to reach the server may become known late.
func TestAPILateKubeconfig(t *testing.T) {
	s, h := newServer(t)
	s.stream = true
	for i := range 2000 {
		s.put("pods", apiPod(fmt.Sprint("p", i), "10.0.0.1", map[string]string{"app": "x", "hash": fmt.Sprint(i % 3)}), false)
	}
	var calls int
	f, log := follow(t, func() (*rest.Config, error) {
		if calls++; calls == 1 {
			return nil, errors.New("no such file")
		}
		return &rest.Config{Host: h.URL}, nil
	})
	f.until(t, "all pods", func() bool { return len(f.pods) == 2000 })
	if log.count("it is not known how to reach") != 1 {
		t.Error("a missing kubeconfig is not told")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lists["pods"] != 0 {
		t.Errorf("%d lists that were not streamed", s.lists["pods"])
	}
}

// TestInternerSharesLabels: pods of one Deployment share their labels.
func TestInternerSharesLabels(t *testing.T) {
	n := newInterner()
	a, b := n.pod(apiPod("a", "", map[string]string{"app": "x", "tier": "y"})), n.pod(apiPod("b", "", map[string]string{"tier": "y", "app": "x"}))
	a.Labels["probe"] = "1"
	if b.Labels["probe"] != "1" {
		t.Error("equal labels are held twice")
	}
	if c := n.pod(apiPod("c", "", map[string]string{"app": "x\x00tier", "y": ""})); len(c.Labels) != 2 || c.Labels["app"] != "x\x00tier" {
		t.Errorf("%q", c.Labels)
	}
	for i := range 3 * most {
		n.set(map[string]string{"k": fmt.Sprint(i)})
	}
	if len(n.labels) > most || len(n.texts) > most {
		t.Errorf("%d sets and %d texts are held", len(n.labels), len(n.texts))
	}
}

// TestMirrorPod: a static pod's mirror has the UID that the runtime knows.
func TestMirrorPod(t *testing.T) {
	p := apiPod("a", "", nil)
	p.Annotations = map[string]string{core.MirrorPodAnnotationKey: "static"}
	if got := Pod(p); got.UID != "static" {
		t.Errorf("UID is %q", got.UID)
	}
}
