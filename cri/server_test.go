package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/cri/store"
)

func TestCodes(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{fmt.Errorf("find: %w", errdefs.ErrNotFound), codes.NotFound},
		{errors.Join(errors.New("a"), fmt.Errorf("b: %w", errdefs.ErrFailedPrecondition)), codes.FailedPrecondition},
		{fmt.Errorf("wait: %w", context.DeadlineExceeded), codes.DeadlineExceeded},
		{fmt.Errorf("wait: %w", context.Canceled), codes.Canceled},
		{fmt.Errorf("x: %w", errdefs.ErrResourceExhausted), codes.ResourceExhausted},
		{fmt.Errorf("x: %w", errdefs.ErrNotImplemented), codes.Unimplemented},
		{fmt.Errorf("x: %w", errdefs.ErrPermissionDenied), codes.PermissionDenied},
		{fmt.Errorf("x: %w", errdefs.ErrUnauthenticated), codes.Unauthenticated},
		{fmt.Errorf("x: %w", errdefs.ErrDataLoss), codes.DataLoss},
		{fmt.Errorf("x: %w", errdefs.ErrUnavailable), codes.Unavailable},
		{status.Error(codes.Aborted, "theirs"), codes.Aborted},
		{status.Error(codes.Unknown, "theirs, without a class"), codes.Internal},
		{fmt.Errorf("record sandbox: %w", syscall.ENOSPC), codes.ResourceExhausted},
		{&fs.PathError{Op: "open", Path: "/x", Err: syscall.EMFILE}, codes.ResourceExhausted},
		{&fs.PathError{Op: "open", Path: "/x", Err: syscall.EIO}, codes.Internal},
		{errors.New("anything"), codes.Internal},
	} {
		got := toGRPC(tc.err)
		if status.Code(got) != tc.want {
			t.Errorf("%v: code %s, want %s", tc.err, status.Code(got), tc.want)
		}
		if tc.err != nil && !strings.Contains(got.Error(), tc.err.Error()) && status.Code(tc.err) == codes.Unknown {
			t.Errorf("%v lost its text: %v", tc.err, got)
		}
	}
}

// The served socket: codes, panics, events and streamed lists as a client sees
// them.
func TestServe(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	ctx, cancel := context.WithCancel(t.Context())
	served, ready := make(chan error, 1), make(chan bool)
	go func() { served <- s.Serve(ctx, func() { close(ready) }) }()
	<-ready
	conn, err := grpc.NewClient("unix://"+s.cfg.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := runtimeapi.NewRuntimeServiceClient(conn)

	events, err := c.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := events.Header(); err != nil { // subscribed
		t.Fatal(err)
	}
	pod, err := c.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig("p")})
	if err != nil {
		t.Fatal(err)
	}
	if e, err := events.Recv(); err != nil || e.ContainerId != pod.PodSandboxId || e.ContainerEventType != runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT {
		t.Errorf("event %v, %v", e, err)
	}
	for range 4 {
		if _, err := c.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod.PodSandboxId, Config: containerConfig(newID())}); err != nil {
			t.Fatal(err)
		}
	}
	list, err := c.StreamContainers(ctx, &runtimeapi.StreamContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for {
		m, err := list.Recv()
		if err == io.EOF {
			break
		}
		if err != nil || len(m.Containers) == 0 {
			t.Fatal(m, err)
		}
		for _, k := range m.Containers {
			seen[k.Id] = true
		}
	}
	if len(seen) != 4 {
		t.Errorf("%d containers in the stream", len(seen))
	}
	_, err = c.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: "none"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("unknown container: %v", err)
	}
	_, err = c.CheckpointContainer(ctx, &runtimeapi.CheckpointContainerRequest{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("checkpoint: %v", err)
	}
	w.mu.Lock()
	w.onCall = func(_ int, name string) { panic("in " + name) }
	w.mu.Unlock()
	_, err = c.UpdatePodSandboxResources(ctx, &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: pod.PodSandboxId})
	if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "in cgroup.UpdatePod") {
		t.Errorf("a handler that panics: %v", err)
	}
	w.mu.Lock()
	w.onCall = nil
	w.mu.Unlock()
	if _, err := c.Version(ctx, &runtimeapi.VersionRequest{}); err != nil {
		t.Errorf("after a panic: %v", err)
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if err := (&Server{ready: make(chan struct{})}).Serve(t.Context(), nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("serve without Recover: %v", err)
	}
}

func TestInPieces(t *testing.T) {
	big := strings.Repeat("x", pieceBytes/2)
	var items []*runtimeapi.Container
	for range 5 {
		items = append(items, &runtimeapi.Container{Id: big})
	}
	var sizes []int
	err := inPieces(items, func(p []*runtimeapi.Container) error { sizes = append(sizes, len(p)); return nil })
	if err != nil || fmt.Sprint(sizes) != "[2 2 1]" {
		t.Errorf("pieces of %v, %v", sizes, err)
	}
	if err := inPieces(nil, func([]*runtimeapi.Container) error { t.Error("a message without items"); return nil }); err != nil {
		t.Error(err)
	}
}

// Records of a later version are kept, and so is everything they may hold.
func TestRefusedRecordsKeepWhatTheyHold(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	pod := runPod(t, s, podConfig("p"))
	id := create(t, s, pod, containerConfig("c"))
	startContainer(t, s, id)
	held := w.holding()
	path := s.cfg.Root + "/state.db"
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("sandboxes"))
		later := strings.Replace(string(b.Get([]byte(pod))), `"version":1`, `"version":9`, 1)
		return b.Put([]byte(pod), []byte(later))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	s = w.start(t)
	if n := s.sandboxes.Len() + s.containers.Len(); n != 0 {
		t.Errorf("%d objects of a record that cannot be read", n)
	}
	if got := w.holding(); fmt.Sprint(got) != fmt.Sprint(held) {
		t.Errorf("held before %v, after %v", held, got)
	}
	_, _, refused, err := s.db.Load()
	if err != nil || len(refused) != 1 {
		t.Errorf("refused %v, %v", refused, err)
	}
	unmountShm(s.sandboxDir(pod))
}

func TestJanitorTriesAgain(t *testing.T) {
	j := newJanitor(slog.New(slog.DiscardHandler))
	tries := 0
	j.add("thing", "id", func(context.Context) error {
		if tries++; tries == 1 {
			return errInjected
		}
		return nil
	})
	j.due(t.Context())
	if tries != 0 {
		t.Fatal("tried at once")
	}
	for range 2 {
		for i := range j.jobs {
			j.jobs[i].at = time.Time{}
		}
		j.due(t.Context())
	}
	if tries != 2 || len(j.jobs) != 0 {
		t.Errorf("%d tries, %d jobs left", tries, len(j.jobs))
	}
}

func TestUndoRunsBackwardsAndKeepsWhatFailed(t *testing.T) {
	var u undo
	var order []string
	fail := true
	for _, name := range []string{"a", "b", "c"} {
		u.push(name, func(context.Context) error {
			order = append(order, name)
			if name == "b" && fail {
				return errInjected
			}
			return nil
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // a rollback must not end with the caller
	if err := u.run(ctx); err == nil || !strings.Contains(err.Error(), "b: injected") {
		t.Errorf("error is %v", err)
	}
	fail = false
	if err := u.run(ctx); err != nil {
		t.Error(err)
	}
	if got := strings.Join(order, ""); got != "cbab" {
		t.Errorf("order %s", got)
	}
}

func FuzzDecodeIntent(f *testing.F) {
	f.Add("a", []byte(`{"version":1,"kind":"sandbox","id":"a","cgroup":"/x","network":{"namespace":"n","name":"p","uid":"u"}}`))
	f.Add("a", []byte(`{"version":2,"id":"a"}`))
	f.Add("a", []byte(`{"version":1,"id":"b"}`))
	f.Add("", []byte(`[]`))
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		in, err := decodeIntent(name, data)
		if err == nil && (in.ID != name || in.Version != store.Version) || err != nil && (in != intent{}) {
			t.Errorf("%q: %+v, %v", data, in, err)
		}
	})
}
