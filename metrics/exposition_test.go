package metrics

import (
	"io"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

func TestExposition(t *testing.T) {
	s := newSampler(t, Config{}, &fakeGroup{})
	targets := func() []sample.PodTarget {
		return []sample.PodTarget{{ID: "p1", Name: "web-0", Namespace: "shop", CgroupParent: "/p", Containers: []sample.ContainerTarget{
			{ID: "c1", Name: "a", Image: "i"}, {ID: "c2", Name: "quote\"\n\xff", Image: "i"}}}}
	}
	e, err := NewExposition(ExpositionConfig{Sampler: s, Targets: targets, Version: "v1"})
	if err != nil {
		t.Fatal(err)
	}
	e.ObserveRequest("RunPodSandbox", "OK", 30*time.Millisecond)
	srv := httptest.NewServer(e.Handler())
	defer srv.Close()
	var text string
	for range 2 {
		resp, err := srv.Client().Get(srv.URL)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("%d %v: %s", resp.StatusCode, err, b)
		}
		text = string(b)
	}
	for _, want := range []string{
		`container_memory_usage_bytes{container="a",id="",image="i",name="c1",namespace="shop",pod="web-0"} 0`,
		`container_memory_usage_bytes{container="quote\"\n�",`,
		`# TYPE container_cpu_usage_seconds_total counter`,
		`nodeagent_build_info{`,
		`nodeagent_cri_request_duration_seconds_count{code="OK",method="RunPodSandbox"} 1`,
		`nodeagent_sampler_groups_total{result="read"} 3`,
		`process_resident_memory_bytes`,
		`go_goroutines`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s", want)
		}
	}
	if t.Failed() {
		t.Log(text)
	}
}
