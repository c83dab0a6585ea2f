package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestEveryCallImplemented sends each RPC an empty request: only the three
// checkpoint calls may be unimplemented, and none may break the daemon.
func TestEveryCallImplemented(t *testing.T) {
	excused := map[string]bool{"CheckpointContainer": true, "CheckpointPod": true, "RestorePod": true}
	for _, d := range []grpc.ServiceDesc{runtimeapi.RuntimeService_ServiceDesc, runtimeapi.ImageService_ServiceDesc} {
		for _, m := range d.Methods {
			err := shared.Conn().Invoke(callCtx(t), "/"+d.ServiceName+"/"+m.MethodName, &emptypb.Empty{}, &emptypb.Empty{})
			if got := status.Code(err) == codes.Unimplemented; got != excused[m.MethodName] {
				t.Errorf("%s: %v", m.MethodName, err)
			}
			if c := status.Code(err); c == codes.Internal || c == codes.Unavailable {
				t.Errorf("%s with an empty request: %v", m.MethodName, err)
			}
		}
		for _, m := range d.Streams {
			ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
			s, err := shared.Conn().NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/"+d.ServiceName+"/"+m.StreamName)
			if err == nil {
				err = s.SendMsg(&emptypb.Empty{})
			}
			if err == nil {
				err = s.CloseSend()
			}
			if err == nil && m.StreamName != "GetContainerEvents" {
				for err == nil {
					err = s.RecvMsg(&emptypb.Empty{})
				}
			}
			cancel()
			if status.Code(err) == codes.Unimplemented {
				t.Errorf("%s: %v", m.StreamName, err)
			}
			if err != nil && !errors.Is(err, io.EOF) {
				t.Errorf("%s: %v", m.StreamName, err)
			}
		}
	}
}

func TestVersionAndStatus(t *testing.T) {
	v, err := shared.Runtime().Version(callCtx(t), &runtimeapi.VersionRequest{})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "runtime name", v.RuntimeName, "nodeagent")
	equal(t, "API version", v.RuntimeApiVersion, "v1")
	s, err := shared.Runtime().Status(callCtx(t), &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	ready := map[string]bool{}
	for _, c := range s.Status.Conditions {
		ready[c.Type] = c.Status
	}
	if !ready["RuntimeReady"] || !ready["NetworkReady"] {
		t.Errorf("conditions %v", s.Status.Conditions)
	}
	if !s.Features.GetSupplementalGroupsPolicy() {
		t.Error("supplemental groups policy is not announced")
	}
	if len(s.Info) == 0 {
		t.Error("verbose status has no info")
	}
	terse, err := shared.Runtime().Status(callCtx(t), &runtimeapi.StatusRequest{})
	if err != nil || len(terse.Info) != 0 {
		t.Errorf("terse status: info %v, %v", terse.GetInfo(), err)
	}
	rc, err := shared.Runtime().RuntimeConfig(callCtx(t), &runtimeapi.RuntimeConfigRequest{})
	if err != nil || rc.Linux == nil {
		t.Errorf("RuntimeConfig: %v, %v", rc, err)
	}
}

// TestErrorCodes: each error has the code that tells a client what to do.
func TestErrorCodes(t *testing.T) {
	p := runPod(t)
	rs, is := shared.Runtime(), shared.Images()
	ctx := callCtx(t)
	const gone = "0000000000000000000000000000000000000000000000000000000000000000"
	err := func(_ any, e error) error { return e }
	withParent := func(parent string) *runtimeapi.PodSandboxConfig {
		cfg := podConfig(t)
		cfg.Linux.CgroupParent = parent
		return cfg
	}
	for _, c := range []struct {
		name string
		err  error
		want codes.Code
	}{
		{"PodSandboxStatus", err(rs.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: gone})), codes.NotFound},
		{"ContainerStatus", err(rs.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: gone})), codes.NotFound},
		{"StartContainer", err(rs.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: gone})), codes.NotFound},
		{"ExecSync", err(rs.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: gone, Cmd: []string{"x"}})), codes.NotFound},
		{"Exec", err(rs.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: gone, Cmd: []string{"x"}, Stdout: true})), codes.NotFound},
		{"Attach", err(rs.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: gone, Stdout: true})), codes.NotFound},
		{"PortForward", err(rs.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: gone, Port: []int32{1}})), codes.NotFound},
		{"ContainerStats", err(rs.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: gone})), codes.NotFound},
		{"PodSandboxStats", err(rs.PodSandboxStats(ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: gone})), codes.NotFound},
		{"UpdateContainerResources", err(rs.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: gone, Linux: &runtimeapi.LinuxContainerResources{CpuShares: 2}})), codes.NotFound},
		{"ReopenContainerLog", err(rs.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: gone})), codes.NotFound},
		{"CreateContainer in no sandbox", err(rs.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: gone, Config: containerConfig(), SandboxConfig: p.config})), codes.NotFound},
		{"StopContainer", err(rs.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: gone})), codes.OK},
		{"RemoveContainer", err(rs.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: gone})), codes.OK},
		{"StopPodSandbox", err(rs.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: gone})), codes.OK},
		{"RemovePodSandbox", err(rs.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: gone})), codes.OK},
		{"RemoveImage", err(is.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: "example.test/none:1"}})), codes.OK},
		{"ImageStatus", err(is.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: "example.test/none:1"}})), codes.OK},
		{"PullImage of nothing", err(is.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{}})), codes.InvalidArgument},
		{"PullImage of a bad name", err(is.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "UPPER//case"}})), codes.InvalidArgument},
		{"PullImage that is not there", err(is.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: hub.Addr + "/e2e/none:1"}})), codes.NotFound},
		{"RunPodSandbox without metadata", err(rs.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: &runtimeapi.PodSandboxConfig{}})), codes.InvalidArgument},
		{"RunPodSandbox with a cgroup parent that leads out", err(rs.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: withParent("../../x")})), codes.InvalidArgument},
		{"RunPodSandbox with an empty segment in its cgroup parent", err(rs.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: withParent("/x//y.slice")})), codes.InvalidArgument},
		{"CreateContainer without image", err(rs.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: containerConfig(image("")), SandboxConfig: p.config})), codes.InvalidArgument},
		{"CreateContainer with an absent image", err(rs.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: containerConfig(image("example.test/none:1")), SandboxConfig: p.config})), codes.NotFound},
	} {
		if got := status.Code(c.err); got != c.want {
			t.Errorf("%s: code %v (%v), want %v", c.name, got, c.err, c.want)
		}
	}
	c := p.run(t)
	wantCode(t, "starting a running container", c.tryStart(ctx), codes.FailedPrecondition)
	c.stop(t, 0)
	wantCode(t, "starting an exited container", c.tryStart(ctx), codes.FailedPrecondition)
	if _, e := rs.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id}); e != nil {
		t.Fatal(e)
	}
	_, e := p.tryCreate(ctx)
	wantCode(t, "a container in a stopped sandbox", e, codes.FailedPrecondition)
}

// TestJoin: the same request twice, at the same time and after, is one pod.
func TestJoin(t *testing.T) {
	cfg := podConfig(t)
	ids := make([]string, 6)
	errs := make([]error, len(ids))
	var wg sync.WaitGroup
	ctx := callCtx(t)
	for i := range ids {
		wg.Go(func() {
			r, err := shared.Runtime().RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
			ids[i], errs[i] = r.GetPodSandboxId(), err
		})
	}
	wg.Wait()
	p := &pod{node: shared, id: ids[0], config: cfg}
	defer p.remove(t)
	for i := range ids {
		if errs[i] != nil || ids[i] != ids[0] {
			t.Errorf("request %d: %q, %v; want %q", i, ids[i], errs[i], ids[0])
		}
	}
	cc := containerConfig(security(func(s *secCtx) { s.NamespaceOptions = cfg.Linux.SecurityContext.NamespaceOptions }))
	for i := range ids {
		wg.Go(func() {
			r, err := shared.Runtime().CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: cc, SandboxConfig: cfg})
			ids[i], errs[i] = r.GetContainerId(), err
		})
	}
	wg.Wait()
	for i := range ids {
		if errs[i] != nil || ids[i] != ids[0] {
			t.Errorf("create %d: %q, %v; want %q", i, ids[i], errs[i], ids[0])
		}
	}
	equal(t, "containers", len(p.list(t)), 1)
}

// TestCancel abandons creations at many moments; each must be gone entirely or
// be there entirely.
func TestCancel(t *testing.T) {
	before := shared.Settled()
	for i := range 30 {
		cfg := podConfig(t)
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*700*time.Microsecond)
		r, err := shared.Runtime().RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
		cancel()
		if err != nil {
			if c := status.Code(err); c != codes.DeadlineExceeded && c != codes.Canceled {
				t.Errorf("after %d x 0.7 ms: %v", i, err)
			}
			continue
		}
		p := &pod{node: shared, id: r.PodSandboxId, config: cfg}
		cctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*400*time.Microsecond)
		if _, err := p.tryCreate(cctx); err != nil {
			if c := status.Code(err); c != codes.DeadlineExceeded && c != codes.Canceled {
				t.Errorf("create after %d x 0.4 ms: %v", i, err)
			}
		}
		cancel()
		p.remove(t)
	}
	// A reply may be lost although the pod was made: the kubelet asks again by
	// listing. Nothing but complete pods may be left.
	eventually(t, func() error {
		l, err := shared.Runtime().ListPodSandbox(context.Background(), &runtimeapi.ListPodSandboxRequest{})
		if err != nil {
			return err
		}
		for _, s := range l.Items {
			if s.Metadata.Namespace != "e2e" || s.State != runtimeapi.PodSandboxState_SANDBOX_READY {
				return fmt.Errorf("sandbox %s is left as %v", s.Metadata.Name, s.State)
			}
			(&pod{node: shared, id: s.Id, config: &runtimeapi.PodSandboxConfig{Metadata: s.Metadata}}).remove(t)
		}
		return nil
	})
	if l := shared.WaitNoLeaks(before); l != "" {
		t.Errorf("abandoned creations left:\n%s", l)
	}
}

func TestLists(t *testing.T) {
	tag := fmt.Sprint(serial.Add(1))
	label := func(l ...string) podOption {
		return func(c *runtimeapi.PodSandboxConfig) {
			c.Labels = map[string]string{"list": tag}
			for i := 0; i < len(l); i += 2 {
				c.Labels[l[i]] = l[i+1]
			}
		}
	}
	a, b := runPod(t, label("app", "a")), runPod(t, label("app", "b"))
	clabel := func(v string) containerOption {
		return func(c *runtimeapi.ContainerConfig) { c.Labels = map[string]string{"list": tag, "c": v} }
	}
	a1, a2, b1 := a.run(t, clabel("1")), a.create(t, clabel("2")), b.run(t, clabel("1"))
	b1.stop(t, 0)
	pods := func(f *runtimeapi.PodSandboxFilter) string {
		r, err := shared.Runtime().ListPodSandbox(callCtx(t), &runtimeapi.ListPodSandboxRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, s := range r.Items {
			ids = append(ids, s.Id)
		}
		st, err := shared.Runtime().StreamPodSandboxes(callCtx(t), &runtimeapi.StreamPodSandboxesRequest{Filter: f})
		var streamed []string
		for _, m := range received(t, st, err) {
			for _, s := range m.PodSandboxes {
				streamed = append(streamed, s.Id)
			}
		}
		equal(t, "streamed list", names(streamed, a.id, b.id), names(ids, a.id, b.id))
		return names(ids, a.id, b.id)
	}
	ctrs := func(f *runtimeapi.ContainerFilter) string {
		r, err := shared.Runtime().ListContainers(callCtx(t), &runtimeapi.ListContainersRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, c := range r.Containers {
			ids = append(ids, c.Id)
		}
		st, err := shared.Runtime().StreamContainers(callCtx(t), &runtimeapi.StreamContainersRequest{Filter: f})
		n := 0
		for _, m := range received(t, st, err) {
			n += len(m.Containers)
		}
		equal(t, "length of the streamed list", n, len(ids))
		return names(ids, a1.id, a2.id, b1.id)
	}
	all := map[string]string{"list": tag}
	ready := &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}
	state := func(s runtimeapi.ContainerState) *runtimeapi.ContainerStateValue {
		return &runtimeapi.ContainerStateValue{State: s}
	}
	for _, c := range []struct{ what, got, want string }{
		{"by label", pods(&runtimeapi.PodSandboxFilter{LabelSelector: all}), "0 1"},
		{"by two labels", pods(&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"list": tag, "app": "b"}}), "1"},
		{"by id", pods(&runtimeapi.PodSandboxFilter{Id: a.id}), "0"},
		{"by id prefix", pods(&runtimeapi.PodSandboxFilter{Id: a.id[:13]}), "0"},
		{"by state", pods(&runtimeapi.PodSandboxFilter{LabelSelector: all, State: ready}), "0 1"},
		{"by unknown id", pods(&runtimeapi.PodSandboxFilter{Id: "nothing"}), ""},
		{"containers by label", ctrs(&runtimeapi.ContainerFilter{LabelSelector: all}), "0 1 2"},
		{"containers by sandbox", ctrs(&runtimeapi.ContainerFilter{PodSandboxId: a.id}), "0 1"},
		{"containers by sandbox and label", ctrs(&runtimeapi.ContainerFilter{PodSandboxId: a.id, LabelSelector: map[string]string{"c": "2"}}), "1"},
		{"running", ctrs(&runtimeapi.ContainerFilter{LabelSelector: all, State: state(runtimeapi.ContainerState_CONTAINER_RUNNING)}), "0"},
		{"created", ctrs(&runtimeapi.ContainerFilter{LabelSelector: all, State: state(runtimeapi.ContainerState_CONTAINER_CREATED)}), "1"},
		{"exited", ctrs(&runtimeapi.ContainerFilter{LabelSelector: all, State: state(runtimeapi.ContainerState_CONTAINER_EXITED)}), "2"},
		{"by container id", ctrs(&runtimeapi.ContainerFilter{Id: b1.id}), "2"},
	} {
		equal(t, c.what, c.got, c.want)
	}
}

// names turns ids into their positions among known ones.
func names(ids []string, known ...string) string {
	var out []string
	for i, k := range known {
		for _, id := range ids {
			if id == k {
				out = append(out, fmt.Sprint(i))
			}
		}
	}
	return strings.Join(out, " ")
}

func TestEvents(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	st, err := shared.Runtime().GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	events := make(chan *runtimeapi.ContainerEventResponse, 1000)
	go func() {
		defer close(events)
		for {
			e, err := st.Recv()
			if err != nil {
				return
			}
			events <- e
		}
	}()
	time.Sleep(100 * time.Millisecond)
	p := runPod(t)
	c := p.run(t, script("sleep 0.2; exit 6"))
	c.waitExit(t)
	c.remove(t)
	var got []string
	for len(got) < 4 {
		select {
		case e, ok := <-events:
			if !ok {
				t.Fatalf("the stream ended after %v", got)
			}
			if e.ContainerId != c.id {
				continue
			}
			got = append(got, e.ContainerEventType.String())
			if e.ContainerEventType == runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT {
				equal(t, "sandbox of the event", e.PodSandboxStatus.GetId(), p.id)
				if len(e.ContainersStatuses) != 1 || e.ContainersStatuses[0].ExitCode != 6 {
					t.Errorf("statuses in the stop event: %v", e.ContainersStatuses)
				}
				if late := time.Since(time.Unix(0, e.CreatedAt)); late > 5*time.Second {
					t.Errorf("event is %v old", late)
				}
			}
		case <-time.After(patience):
			t.Fatalf("events so far: %v, want created, started, stopped, deleted", got)
		}
	}
	equal(t, "events", strings.Join(got, " "), "CONTAINER_CREATED_EVENT CONTAINER_STARTED_EVENT CONTAINER_STOPPED_EVENT CONTAINER_DELETED_EVENT")
}

// received reads a streamed list to its end.
func received[T any](t testing.TB, s grpc.ServerStreamingClient[T], err error) (all []*T) {
	t.Helper()
	for err == nil {
		var m *T
		if m, err = s.Recv(); err == nil {
			all = append(all, m)
		}
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return all
}

// TestStreamedLists: images, pod stats and metrics in pieces are those of the
// lists in one.
func TestStreamedLists(t *testing.T) {
	p := runPod(t)
	p.run(t)
	ctx, rs := callCtx(t), shared.Runtime()

	list, err := shared.Images().ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var want, got []string
	for _, i := range list.Images {
		want = append(want, i.Id)
	}
	is, err := shared.Images().StreamImages(ctx, &runtimeapi.StreamImagesRequest{})
	for _, m := range received(t, is, err) {
		for _, i := range m.Images {
			got = append(got, i.Id)
		}
	}
	equal(t, "images", strings.Join(got, " "), strings.Join(want, " "))

	got = nil
	ss, err := rs.StreamPodSandboxStats(ctx, &runtimeapi.StreamPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{Id: p.id}})
	for _, m := range received(t, ss, err) {
		for _, s := range m.PodSandboxStats {
			got = append(got, s.Attributes.Id)
		}
	}
	equal(t, "pod stats", strings.Join(got, " "), p.id)

	metrics := 0
	ms, err := rs.StreamPodSandboxMetrics(ctx, &runtimeapi.StreamPodSandboxMetricsRequest{})
	for _, m := range received(t, ms, err) {
		for _, pm := range m.PodSandboxMetrics {
			if pm.PodSandboxId == p.id {
				metrics += len(pm.Metrics) + len(pm.ContainerMetrics)
			}
		}
	}
	if metrics == 0 {
		t.Error("no metrics of the pod in the stream")
	}
}

// TestVerboseStatus: the verbose statuses say what crictl inspect shows.
func TestVerboseStatus(t *testing.T) {
	p := runPod(t)
	c := p.run(t)
	info := func(m map[string]string) (v map[string]any) {
		t.Helper()
		if err := json.Unmarshal([]byte(m["info"]), &v); err != nil {
			t.Fatalf("info %q: %v", m["info"], err)
		}
		return v
	}
	cs, err := shared.Runtime().ContainerStatus(callCtx(t), &runtimeapi.ContainerStatusRequest{ContainerId: c.id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	ci := info(cs.Info)
	equal(t, "sandbox", ci["sandboxID"], any(p.id))
	pid := fmt.Sprint(ci["pid"])
	if cg, err := os.ReadFile("/proc/" + pid + "/cgroup"); err != nil || !strings.Contains(string(cg), c.id) {
		t.Errorf("pid %s is not the container's: %q, %v", pid, cg, err)
	}
	if s, ok := ci["runtimeSpec"].(map[string]any); !ok || s["process"] == nil || s["linux"] == nil {
		t.Errorf("runtimeSpec %v", ci["runtimeSpec"])
	}
	ps, err := shared.Runtime().PodSandboxStatus(callCtx(t), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	pi := info(ps.Info)
	equal(t, "namespace is closed", pi["netNsClosed"], any(false))
	if ns, _ := pi["netNs"].(string); ns == "" {
		t.Errorf("netNs %v", pi["netNs"])
	}
	equal(t, "container in the pod's status", len(ps.ContainersStatuses), 1)
}
