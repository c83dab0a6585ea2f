package cri

import (
	"fmt"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What the package itself costs per pod: everything at its edges is a fake.
func BenchmarkPod(b *testing.B) {
	w := newWorld(b)
	s := w.start(b)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		pod := runPod(b, s, podConfig(fmt.Sprint("p", i)))
		startContainer(b, s, create(b, s, pod, containerConfig("c")))
		removePod(b, s, pod)
	}
}

// What a list of 50 pods costs, in its parts: the handler, the message on both
// sides, and a whole call beside one that does nothing. The difference between
// the last two is all that a faster list could save.
func BenchmarkList(b *testing.B) {
	w := newWorld(b)
	s := w.start(b)
	for i := range 50 {
		runPod(b, s, podConfig(fmt.Sprint("p", i)))
	}
	ready := make(chan bool)
	go s.Serve(b.Context(), func() { close(ready) })
	<-ready
	conn, err := grpc.NewClient("unix://"+s.cfg.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	c := runtimeapi.NewRuntimeServiceClient(conn)
	list, err := c.ListPodSandbox(b.Context(), &runtimeapi.ListPodSandboxRequest{})
	if err != nil || len(list.Items) != 50 {
		b.Fatal(list, err)
	}
	data, err := proto.Marshal(list)
	if err != nil {
		b.Fatal(err)
	}
	for _, part := range []struct {
		name string
		do   func() error
	}{
		{"handler", func() error {
			_, err := s.ListPodSandbox(b.Context(), &runtimeapi.ListPodSandboxRequest{})
			return err
		}},
		{"marshal", func() error { _, err := proto.Marshal(list); return err }},
		{"unmarshal", func() error { return proto.Unmarshal(data, &runtimeapi.ListPodSandboxResponse{}) }},
		{"call", func() error {
			_, err := c.ListPodSandbox(b.Context(), &runtimeapi.ListPodSandboxRequest{})
			return err
		}},
		{"Version", func() error { _, err := c.Version(b.Context(), &runtimeapi.VersionRequest{}); return err }},
	} {
		b.Run(part.name, func(b *testing.B) {
			for b.Loop() {
				if err := part.do(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
