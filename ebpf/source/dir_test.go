package source

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

const sample = `apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: a}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  containers: [{name: c, ports: [{name: http, containerPort: 8080}, {containerPort: 1}]}]
status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: other}
`

func TestParse(t *testing.T) {
	o, err := Parse([]byte(sample))
	if err != nil {
		t.Fatal(err)
	}
	if len(o.Namespaces) != 1 || o.Namespaces[0].Labels["kubernetes.io/metadata.name"] != "shop" || len(o.Policies) != 1 || len(o.Pods) != 1 {
		t.Fatalf("%+v", o)
	}
	if p := o.Pods[0]; len(p.IPs) != 2 || len(p.Ports) != 1 || p.Ports[0].Port != 8080 {
		t.Errorf("%+v", p)
	}
	for _, bad := range []string{
		"kind: NetworkPolicy\nmetadata: {name: x}\nspec: {podSelektor: {}}",
		"kind: NetworkPolicy\nmetadata: {name: x}\nspec: {podSelector: {}, ingress: [{form: []}]}",
		"kind: NetworkPolicy\nspec: {podSelector: {}}",
		"kind: [",
	} {
		if _, err := Parse([]byte(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func TestDirFollows(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "late")
	d := NewDir(dir, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	states := make(chan objects.Change, 16)
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx, func(c objects.Change) { states <- c }) }()
	if o := <-states; len(o.Policies.Put) != 0 {
		t.Fatalf("%+v", o)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	go func() { done <- d.Run(ctx, func(c objects.Change) { states <- c }) }()
	<-states
	want := func(what string, n int) {
		t.Helper()
		for {
			select {
			case o := <-states:
				if len(o.Policies.Put) == n {
					return
				}
			case <-time.After(time.Minute):
				t.Fatalf("%s: never %d policies", what, n)
			}
		}
	}
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("a.yaml", sample)
	want("written", 1)
	write("b.yaml", "kind: NetworkPolicy\nmetadata: {name: two}\nspec: {podSelector: {}}")
	want("another", 2)
	write("a.yaml", "kind: [")
	want("broken: keeps what it was", 2)
	os.Remove(filepath.Join(dir, "a.yaml"))
	want("removed", 1)
}
