package source

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// API watches pods, namespaces and network policies of an API server. It holds
// none of them: each is slimmed as it is decoded and handed over.
//
// While the server does not answer, what was told stays in force; that is
// logged once, and so is its end. The account needs list and watch on pods,
// namespaces and networkpolicies.networking.k8s.io, of the whole cluster.
// Run's goroutines are one per kind and the caller's own.
type API struct {
	connect func() (*rest.Config, error)
	log     *slog.Logger
	inbox   *inbox
	outage  outage
}

// NewAPI takes a function that says how to reach the server. It is called
// again every few seconds while it fails: a kubeconfig may be written late.
func NewAPI(connect func() (*rest.Config, error), log *slog.Logger) *API {
	return &API{connect: connect, log: log, inbox: newInbox("pods", "namespaces", "networkpolicies"), outage: outage{log: log, down: map[string]bool{}}}
}

// Pace is the pause after changes were handed over: one change goes at once,
// many go together, forty times a second. An update's cost is mostly the
// same for one object as for ten.
const Pace = 25 * time.Millisecond

const (
	firstRetry = 200 * time.Millisecond
	lastRetry  = 5 * time.Second
)

// Run calls set with all objects as soon as each kind is complete, and then
// with what has changed.
func (a *API) Run(ctx context.Context, set func(objects.Change)) error {
	client, config := a.client(ctx)
	if client == nil {
		return nil // ctx has ended
	}
	pods, err := newKind(a, config, client, core.SchemeGroupVersion, "pods", &core.Pod{}, func(c *objects.Change) *objects.Delta[objects.PodKey, *objects.Pod] { return &c.Pods })
	if err != nil {
		return err
	}
	namespaces, err := newKind(a, config, client, core.SchemeGroupVersion, "namespaces", &core.Namespace{}, func(c *objects.Change) *objects.Delta[string, *objects.Namespace] { return &c.Namespaces })
	if err != nil {
		return err
	}
	policies, err := newKind(a, config, client, networking.SchemeGroupVersion, "networkpolicies", &networking.NetworkPolicy{}, func(c *objects.Change) *objects.Delta[objects.PodKey, *objects.Policy] { return &c.Policies })
	if err != nil {
		return err
	}
	// Finished pods are neither subjects nor peers; when one finishes the watch says that it is gone.
	pods.fields = "status.phase!=Succeeded,status.phase!=Failed"
	pods.key, namespaces.key, policies.key = podKey, nameKey, podKey
	seen := newInterner()
	pods.slim = func(o any) *objects.Pod { return seen.pod(o.(*core.Pod)) }
	namespaces.slim = func(o any) *objects.Namespace { n := Namespace(o.(*core.Namespace)); return &n }
	policies.slim = func(o any) *objects.Policy { return bare(o.(*networking.NetworkPolicy)) }

	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { pods.run(ctx) })
	wg.Go(func() { namespaces.run(ctx) })
	wg.Go(func() { policies.run(ctx) })
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.inbox.wake:
			if c, ok := a.inbox.take(); ok {
				set(c)
				sleep(ctx, Pace)
			}
		}
	}
}

// client waits until it is known how to reach the server; nil: ctx has ended.
func (a *API) client(ctx context.Context) (*http.Client, *rest.Config) {
	for said := false; ; said = true {
		config, err := a.connect()
		if err == nil {
			config = rest.CopyConfig(config)
			config.QPS = -1 // three lists and three watches
			var client *http.Client
			if client, err = rest.HTTPClientFor(config); err == nil {
				return client, config
			}
		}
		if !said {
			a.log.Warn("it is not known how to reach the API server for network policy: policies of before stay in force, new pods have to wait", "err", err)
		}
		if !sleep(ctx, lastRetry) {
			return nil, nil
		}
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// kind watches the objects of one kind. It is the reflector's store, and keeps
// nothing.
type kind[K comparable, V any] struct {
	api    *API
	name   string // the resource
	client *rest.RESTClient
	params runtime.ParameterCodec
	object runtime.Object
	fields string // selector
	key    func(meta.Object) K
	slim   func(any) V // of what the API server sent
	delta  func(*objects.Change) *objects.Delta[K, V]
}

func newKind[K comparable, V any](a *API, config *rest.Config, client *http.Client, version schema.GroupVersion, name string, object runtime.Object, delta func(*objects.Change) *objects.Delta[K, V]) (*kind[K, V], error) {
	known := runtime.NewScheme()
	known.AddKnownTypes(core.SchemeGroupVersion, &core.Pod{}, &core.PodList{}, &core.Namespace{}, &core.NamespaceList{})
	known.AddKnownTypes(networking.SchemeGroupVersion, &networking.NetworkPolicy{}, &networking.NetworkPolicyList{})
	meta.AddToGroupVersion(known, core.SchemeGroupVersion)
	meta.AddToGroupVersion(known, networking.SchemeGroupVersion)
	c := rest.CopyConfig(config)
	c.GroupVersion, c.APIPath = &version, "/apis"
	if version.Group == "" {
		c.APIPath = "/api"
	}
	c.NegotiatedSerializer = serializer.NewCodecFactory(known).WithoutConversion()
	c.ContentType, c.AcceptContentTypes = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON
	r, err := rest.RESTClientForConfigAndClient(c, client)
	if err != nil {
		return nil, fmt.Errorf("make client for %s: %w", name, err)
	}
	return &kind[K, V]{api: a, name: name, client: r, params: runtime.NewParameterCodec(known), object: object, delta: delta}, nil
}

func podKey(o meta.Object) objects.PodKey {
	return objects.PodKey{Namespace: o.GetNamespace(), Name: o.GetName()}
}

func nameKey(o meta.Object) string { return o.GetName() }

// run lists and watches until ctx ends.
func (k *kind[K, V]) run(ctx context.Context) {
	quiet := logr.FromSlogHandler(k.api.log.Handler()).V(4) // the outage is told by us
	ctx = klog.NewContext(ctx, quiet)
	lw := &cache.ListWatch{
		ListWithContextFunc:  func(_ context.Context, o meta.ListOptions) (runtime.Object, error) { return k.list(ctx, o) },
		WatchFuncWithContext: func(_ context.Context, o meta.ListOptions) (watch.Interface, error) { return k.watch(ctx, o) },
	}
	r := cache.NewReflectorWithOptions(lw, k.object, k, cache.ReflectorOptions{
		Name: "policy " + k.name, Logger: &quiet,
		Backoff: &wait.Backoff{Duration: firstRetry, Cap: lastRetry, Factor: 2, Jitter: 0.5, Steps: 16},
	})
	for pause := firstRetry; ctx.Err() == nil; {
		began := time.Now()
		if err := r.ListAndWatchWithContext(ctx); err != nil && !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
			k.api.outage.observe(k.name, err, k.api.inbox.complete())
		}
		if pause *= 2; time.Since(began) > time.Minute {
			pause = firstRetry
		}
		pause = min(pause, lastRetry)
		sleep(ctx, pause/2+rand.N(pause/2))
	}
}

func (k *kind[K, V]) list(ctx context.Context, o meta.ListOptions) (runtime.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	o.FieldSelector = k.fields
	out, err := k.client.Get().Resource(k.name).VersionedParams(&o, k.params).Do(ctx).Get()
	k.observe(err)
	return out, err
}

func (k *kind[K, V]) watch(ctx context.Context, o meta.ListOptions) (watch.Interface, error) {
	o.FieldSelector, o.Watch = k.fields, true
	w, err := k.client.Get().Resource(k.name).VersionedParams(&o, k.params).Watch(ctx)
	if o.SendInitialEvents == nil || !apierrors.IsInvalid(err) { // servers before 1.32 refuse to stream a list
		k.observe(err)
	}
	return w, err
}

func (k *kind[K, V]) observe(err error) {
	if errors.Is(err, context.Canceled) || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return
	}
	k.api.outage.observe(k.name, err, k.api.inbox.complete())
}

// slimmed is an object on its way from a streamed list to Replace: what the
// reflector's own store asks for, and nothing else of its metadata.
type slimmed[V any] struct {
	meta.Object       // one without content, shared by all
	ns, name, version string
	v                 V
}

func (s *slimmed[V]) GetNamespace() string       { return s.ns }
func (s *slimmed[V]) GetName() string            { return s.name }
func (s *slimmed[V]) GetResourceVersion() string { return s.version }

// Transformer makes the reflector hold slim objects while a list is streamed.
func (k *kind[K, V]) Transformer() cache.TransformFunc {
	none := &meta.ObjectMeta{}
	return func(o any) (any, error) {
		if _, done := o.(*slimmed[V]); done {
			return o, nil
		}
		if m, ok := o.(meta.Object); ok {
			return &slimmed[V]{none, strings.Clone(m.GetNamespace()), strings.Clone(m.GetName()), m.GetResourceVersion(), k.slim(o)}, nil
		}
		return o, nil
	}
}

// Add implements cache.ReflectorStore, as do the methods that follow.
func (k *kind[K, V]) Add(o any) error {
	if m, ok := o.(meta.Object); ok {
		v := k.slim(o)
		k.api.inbox.put(func(c *objects.Change) { k.delta(c).Set(k.key(m), v) })
	}
	return nil
}

func (k *kind[K, V]) Update(o any) error { return k.Add(o) }

func (k *kind[K, V]) Delete(o any) error {
	if m, ok := o.(meta.Object); ok {
		k.api.inbox.put(func(c *objects.Change) { k.delta(c).Delete(k.key(m)) })
	}
	return nil
}

func (k *kind[K, V]) Replace(list []any, _ string) error {
	all := make(map[K]V, len(list))
	for i, o := range list {
		if s, ok := o.(*slimmed[V]); ok {
			all[k.key(s)] = s.v
		} else if m, ok := o.(meta.Object); ok {
			all[k.key(m)] = k.slim(o)
		}
		list[i] = nil
	}
	k.api.inbox.put(func(c *objects.Change) { k.delta(c).Replace(all) })
	k.api.inbox.has(k.name)
	return nil
}

func (k *kind[K, V]) Resync() error { return nil }

// inbox gathers what was heard until it is taken.
type inbox struct {
	wake chan struct{} // capacity 1

	mu      sync.Mutex // guards what follows
	change  objects.Change
	missing map[string]bool // kinds that are not complete yet
}

func newInbox(kinds ...string) *inbox {
	b := &inbox{wake: make(chan struct{}, 1), missing: map[string]bool{}}
	for _, k := range kinds {
		b.missing[k] = true
	}
	return b
}

func (b *inbox) put(f func(*objects.Change)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.change.Seen.IsZero() {
		b.change.Seen = time.Now()
	}
	f(&b.change)
	b.ring()
}

func (b *inbox) has(kind string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.missing, kind)
	b.ring()
}

func (b *inbox) ring() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

func (b *inbox) complete() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.missing) == 0
}

// take empties the inbox; false while a kind is missing, or nothing is in it.
func (b *inbox) take() (objects.Change, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.missing) > 0 || b.change.Empty() {
		return objects.Change{}, false
	}
	c := b.change
	b.change = objects.Change{}
	return c, true
}

// outage says once that the server does not answer, and once that it does again.
type outage struct {
	log *slog.Logger

	mu   sync.Mutex
	down map[string]bool // kinds
}

func (o *outage) observe(kind string, err error, complete bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	before := len(o.down)
	if err == nil {
		delete(o.down, kind)
		if before == 1 && len(o.down) == 0 {
			o.log.Info("the API server answers again: network policy follows it")
		}
		return
	}
	o.down[kind] = true
	switch {
	case before > 0:
	case complete:
		o.log.Warn("the API server does not tell of network policy any more: what it said last stays in force", "objects", kind, "err", err)
	default:
		o.log.Warn("the API server does not tell of network policy: policies of before stay in force, new pods have to wait", "objects", kind, "err", err)
	}
}
