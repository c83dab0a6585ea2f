package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestWholeLife(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	pod := runPod(t, s, sharedPid(podConfig("p")))
	ps, err := s.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod[:10], Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	if ps.Status.Network.Ip != "10.0.0.7" || ps.Status.Network.AdditionalIps[0].Ip != "fd00::7" || ps.Info["info"] == "" {
		t.Errorf("sandbox status %v", ps)
	}
	if got := ps.Status.Annotations["a"]; got != "ü\x01" {
		t.Errorf("annotation came back as %q", got)
	}
	c := containerConfig("c")
	c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	id := create(t, s, pod, c)
	if st := statusOf(t, s, id); st.State != runtimeapi.ContainerState_CONTAINER_CREATED || st.ImageId != "sha256:1234" || st.ImageRef != "docker.io/library/busybox@sha256:99" || st.Image.Image != "docker.io/library/busybox:1" {
		t.Errorf("status after create: %v", st)
	}
	startContainer(t, s, id)
	if st := statusOf(t, s, id); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING || st.StartedAt == 0 {
		t.Errorf("status after start: %v", st)
	}
	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: id}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second start: %v", err)
	}
	w.exit(id, 7, 0)
	eventually(t, "exit", func() bool { return statusOf(t, s, id).State == runtimeapi.ContainerState_CONTAINER_EXITED })
	if st := statusOf(t, s, id); st.ExitCode != 7 || st.Reason != "Error" || st.FinishedAt == 0 {
		t.Errorf("status after exit: %v", st)
	}
	if _, err := s.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"x"}}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec in exited container: %v", err)
	}
	removePod(t, s, pod)
	removePod(t, s, pod)
	if got := w.holding(); len(got) > 0 {
		t.Errorf("still held: %v", got)
	}
	if got := leftovers(t, s); len(got) > 0 {
		t.Errorf("left over: %v", got)
	}
	eventually(t, "exit records forgotten", func() bool { w.mu.Lock(); defer w.mu.Unlock(); return len(w.exitDB) == 0 })
}

// Every call to the outside fails once, and the caller goes away during every
// call: nothing may stay, and the same request must succeed afterwards.
func TestRollback(t *testing.T) {
	volume := containerConfig("c")
	volume.Mounts = []*runtimeapi.Mount{{ContainerPath: "/v", Image: &runtimeapi.ImageSpec{Image: "busybox"}, Readonly: true}}
	for _, mode := range []string{"fail", "cancel"} {
		for k := 1; ; k++ {
			w := newWorld(t)
			s := w.start(t)
			ctx, cancel := context.WithCancel(t.Context())
			base := w.count()
			if mode == "fail" {
				w.failAt = base + k
			} else {
				w.onCall = func(n int, _ string) {
					if n == base+k {
						cancel()
						time.Sleep(20 * time.Millisecond) // the caller is seen to leave first
					}
				}
			}
			pod, err := s.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: sharedPid(podConfig("p"))})
			if err == nil {
				_, err = s.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod.PodSandboxId, Config: volume})
			}
			if err == nil {
				cancel()
				if k < 7 {
					t.Fatalf("%s at call %d: everything succeeded, calls were %v", mode, k, w.calls)
				}
				break
			}
			s.sandboxNames.wait()
			s.containerNames.wait()
			name := w.calls[base+k-1]
			if mode == "fail" && !errors.Is(err, errInjected) || mode == "cancel" && !errors.Is(err, context.Canceled) {
				t.Errorf("%s at %s: error is %v", mode, name, err)
			}
			if pod == nil {
				if got := append(w.holding(), leftovers(t, s)...); len(got) > 0 {
					t.Errorf("%s at %s: left over %v", mode, name, got)
				}
			} else {
				for _, h := range w.holding() {
					if strings.HasPrefix(h, "rootfs:") {
						t.Errorf("%s at %s: still holds %s", mode, name, h)
					}
				}
				if n := s.containers.Len(); n != 0 {
					t.Errorf("%s at %s: %d containers", mode, name, n)
				}
			}
			w.mu.Lock()
			w.failAt, w.onCall = 0, nil
			w.mu.Unlock()
			again := runPod(t, s, sharedPid(podConfig("p")))
			if pod != nil && again != pod.PodSandboxId {
				t.Errorf("%s at %s: the sandbox that was made is not returned again", mode, name)
			}
			create(t, s, again, volume)
			removePod(t, s, again)
			if got := append(w.holding(), leftovers(t, s)...); len(got) > 0 {
				t.Errorf("%s at %s: after removal left over %v", mode, name, got)
			}
			cancel()
		}
	}
}

func TestSameRequestJoins(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	inside, release := make(chan bool, 10), make(chan bool)
	w.onCall = func(_ int, name string) {
		if name == "net.Setup" {
			inside <- true
			<-release
		}
	}
	var wg sync.WaitGroup
	ids := make([]string, 5)
	impatient, leave := context.WithCancel(t.Context())
	for i := range ids {
		wg.Go(func() {
			ctx := t.Context()
			if i == 0 {
				ctx = impatient
			}
			r, err := s.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig("p")})
			if i == 0 {
				if !errors.Is(err, context.Canceled) {
					t.Errorf("the impatient caller got %v", err)
				}
				return
			}
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = r.PodSandboxId
		})
		if i == 0 {
			<-inside
		}
	}
	eventually(t, "all wait", func() bool {
		s.sandboxNames.mu.Lock()
		defer s.sandboxNames.mu.Unlock()
		for _, f := range s.sandboxNames.flights {
			return f.waiters == len(ids)
		}
		return false
	})
	leave()
	time.Sleep(5 * time.Millisecond)
	close(release)
	wg.Wait()
	for _, id := range ids[2:] {
		if id != ids[1] || id == "" {
			t.Fatalf("callers got different sandboxes: %v", ids)
		}
	}
	if s.sandboxes.Len() != 1 {
		t.Errorf("%d sandboxes", s.sandboxes.Len())
	}
	w.mu.Lock()
	w.onCall = nil
	w.mu.Unlock()
	if again := runPod(t, s, podConfig("p")); again != ids[1] {
		t.Error("a ready sandbox is not returned to the same request")
	}
	other := podConfig("p")
	other.Labels["x"] = "y"
	if _, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: other}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a different request under the same key: %v", err)
	}
	if _, err := s.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: ids[1]}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podConfig("p")}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the same request for a stopped sandbox: %v", err)
	}
	removePod(t, s, ids[1])
	if id := runPod(t, s, other); id == ids[1] {
		t.Error("an ID was used twice")
	}
}

// A caller that leaves in the last moment does not leave a sandbox behind.
func TestAbandonedAtTheEnd(t *testing.T) {
	n := newNames("thing", newWorld(t).start(t).log)
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan bool)
	abandoned := false
	_, err := n.create(ctx, "k", "d", func(context.Context) (made, error) {
		cancel()
		<-gone
		return made{id: "x", abandon: func() { abandoned = true }}, nil
	})
	close(gone)
	n.wait()
	if !errors.Is(err, context.Canceled) || !abandoned {
		t.Errorf("err %v, abandoned %v", err, abandoned)
	}
	if id, err := n.create(t.Context(), "k", "d2", func(context.Context) (made, error) { return made{id: "y"}, nil }); id != "y" || err != nil {
		t.Errorf("afterwards: %q, %v", id, err)
	}
}

// A stop or a removal does not wait for creations in flight: it cancels them,
// also one that begins while it waits for others, and nothing of them stays.
func TestStopCancelsCreates(t *testing.T) {
	for _, remove := range []bool{false, true} {
		for _, at := range []string{"images.Get", "rootfs.Mount", "rootfs.MountImage"} {
			w := newWorld(t)
			s := w.start(t)
			id := runPod(t, s, podConfig("p"))
			w.mu.Lock()
			w.stall = at
			w.mu.Unlock()
			errs := make(chan error, 3)
			creates := func(name string) {
				config := containerConfig(name)
				config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/v", Image: &runtimeapi.ImageSpec{Image: "busybox"}, Readonly: true}}
				go func() {
					_, err := s.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: id, Config: config})
					errs <- err
				}()
			}
			creates("a")
			creates("b")
			eventually(t, "two creations stall", func() bool {
				w.mu.Lock()
				defer w.mu.Unlock()
				n := 0
				for _, call := range w.calls {
					if call == at {
						n++
					}
				}
				return n >= 2
			})
			creates("c") // before, amid or after the cancellation
			if remove {
				removePod(t, s, id)
			} else if _, err := s.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				// One that came only after a removal finds nothing.
				if err := <-errs; !errdefs.IsFailedPrecondition(err) && !(remove && errdefs.IsNotFound(err)) || errors.Is(err, context.Canceled) {
					t.Errorf("stalled in %s, remove %v: %v", at, remove, err)
				}
			}
			if n := s.containers.Len(); n != 0 {
				t.Errorf("stalled in %s: %d containers", at, n)
			}
			removePod(t, s, id)
			if got := append(w.holding(), leftovers(t, s)...); len(got) > 0 {
				t.Errorf("stalled in %s: left over %v", at, got)
			}
		}
	}
}

// A stop that gives up while it waits for the sandbox leaves it usable.
func TestStopThatGivesUp(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	id := runPod(t, s, podConfig("p"))
	b, err := s.findSandbox(id)
	if err != nil {
		t.Fatal(err)
	}
	unlock, err := b.op.share(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); !errors.Is(err, context.Canceled) {
		t.Errorf("stop: %v", err)
	}
	unlock()
	create(t, s, id, containerConfig("c"))
	removePod(t, s, id)
}

func TestPanicIsAnError(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	w.onCall = func(_ int, name string) {
		if name == "net.Setup" {
			panic("boom")
		}
	}
	_, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podConfig("p")})
	if err == nil || !strings.Contains(err.Error(), "boom") {
		t.Errorf("error is %v", err)
	}
	if got := append(w.holding(), leftovers(t, s)...); len(got) > 0 {
		t.Errorf("left over %v", got)
	}
}

func TestRestart(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	pod := runPod(t, s, sharedPid(podConfig("p")))
	runs, ends, waits := create(t, s, pod, containerConfig("runs")), create(t, s, pod, containerConfig("ends")), create(t, s, pod, containerConfig("waits"))
	startContainer(t, s, runs)
	startContainer(t, s, ends)
	stopped := runPod(t, s, podConfig("stopped"))
	if _, err := s.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: stopped}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	w.exit(ends, 42, 0) // while nobody looks
	// What a kill in the middle leaves: intents, and things without a record.
	w.hold("rootfs:half", true)
	w.hold("net:half", true)
	w.hold("ns:half", true)
	for _, in := range []intent{{Kind: kindContainer, ID: "half", SandboxID: pod}, {Kind: kindSandbox, ID: "halfpod", Cgroup: "/fake/halfpod", Network: &intentPod{}}} {
		if err := s.writeIntent(in); err != nil {
			t.Fatal(err)
		}
	}
	w.hold("cgroup:/fake/halfpod", true)
	if err := makeSandboxFiles(s.sandboxDir("halfpod"), podConfig("x"), "x"); err != nil {
		t.Fatal(err)
	}

	s = w.start(t)
	for id, want := range map[string]runtimeapi.ContainerState{
		runs: runtimeapi.ContainerState_CONTAINER_RUNNING, ends: runtimeapi.ContainerState_CONTAINER_EXITED, waits: runtimeapi.ContainerState_CONTAINER_CREATED,
	} {
		if st := statusOf(t, s, id); st.State != want {
			t.Errorf("%s is %s, want %s", st.Metadata.Name, st.State, want)
		}
	}
	if st := statusOf(t, s, ends); st.ExitCode != 42 || st.StartedAt == 0 {
		t.Errorf("exit was not taken over: %v", st)
	}
	if got := runPod(t, s, sharedPid(podConfig("p"))); got != pod {
		t.Error("the sandbox is not known as what it was asked for")
	}
	startContainer(t, s, waits)
	for _, h := range w.holding() {
		if strings.Contains(h, "half") {
			t.Errorf("half-made things stay: %s", h)
		}
	}
	list, _ := s.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY}}})
	if len(list.Items) != 1 || list.Items[0].Id != stopped {
		t.Errorf("stopped sandboxes: %v", list.Items)
	}
	removePod(t, s, pod)
	removePod(t, s, stopped)
	if got := append(w.holding(), leftovers(t, s)...); len(got) > 0 {
		t.Errorf("left over %v", got)
	}
}

func TestReboot(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	pod := runPod(t, s, podConfig("p"))
	ran, ended := create(t, s, pod, containerConfig("ran")), create(t, s, pod, containerConfig("ended"))
	startContainer(t, s, ran)
	startContainer(t, s, ended)
	w.exit(ended, 3, 0)
	eventually(t, "exit recorded", func() bool { return statusOf(t, s, ended).ExitCode == 3 })
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	unmountShm(s.sandboxDir(pod))
	os.RemoveAll(s.cfg.State)
	w.mu.Lock()
	clear(w.procs)
	w.mu.Unlock()

	s = w.startBoot(t, "boot-2")
	if st := statusOf(t, s, ran); st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.Reason != "Unknown" || st.ExitCode != 255 {
		t.Errorf("a container of the earlier boot: %v", st)
	}
	if st := statusOf(t, s, ended); st.ExitCode != 3 || st.Reason != "Error" {
		t.Errorf("one that had ended: %v", st)
	}
	if b, _ := s.findSandbox(pod); b.state() != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Error("the sandbox of an earlier boot is ready")
	}
	removePod(t, s, pod)
	w.hold("cgroup:x", false)
	for _, h := range w.holding() {
		if !strings.HasPrefix(h, "process:") { // the fake's idea of a dead process
			t.Errorf("still held: %s", h)
		}
	}
}

func TestFilters(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	a, b := runPod(t, s, podConfig("a")), runPod(t, s, podConfig("b"))
	c1, c2 := create(t, s, a, containerConfig("c1")), create(t, s, b, containerConfig("c2"))
	startContainer(t, s, c2)
	pods := func(f *runtimeapi.PodSandboxFilter) (ids []string) {
		r, _ := s.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{Filter: f})
		for _, i := range r.Items {
			ids = append(ids, i.Id)
		}
		return ids
	}
	containers := func(f *runtimeapi.ContainerFilter) (ids []string) {
		r, _ := s.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: f})
		for _, i := range r.Containers {
			ids = append(ids, i.Id)
		}
		return ids
	}
	running := &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}
	for i, tc := range []struct{ got, want []string }{
		{pods(nil), []string{a, b}},
		{pods(&runtimeapi.PodSandboxFilter{Id: a[:13]}), []string{a}},
		{pods(&runtimeapi.PodSandboxFilter{Id: "nope"}), nil},
		{pods(&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "b"}}), []string{b}},
		{pods(&runtimeapi.PodSandboxFilter{Id: a, LabelSelector: map[string]string{"app": "b"}}), nil},
		{containers(nil), []string{c1, c2}},
		{containers(&runtimeapi.ContainerFilter{State: running}), []string{c2}},
		{containers(&runtimeapi.ContainerFilter{PodSandboxId: a[:12]}), []string{c1}},
		{containers(&runtimeapi.ContainerFilter{PodSandboxId: a, Id: c2}), nil},
		{containers(&runtimeapi.ContainerFilter{LabelSelector: map[string]string{"c": "c1"}}), []string{c1}},
	} {
		if !reflect.DeepEqual(tc.got, tc.want) {
			t.Errorf("case %d: got %v, want %v", i, tc.got, tc.want)
		}
	}
}

func TestBadInputChangesNothing(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	for name, change := range map[string]func(*runtimeapi.PodSandboxConfig){
		"no metadata":    func(c *runtimeapi.PodSandboxConfig) { c.Metadata = nil },
		"log directory":  func(c *runtimeapi.PodSandboxConfig) { c.LogDirectory = "relative" },
		"hostname":       func(c *runtimeapi.PodSandboxConfig) { c.Hostname = "a\nb" },
		"dns":            func(c *runtimeapi.PodSandboxConfig) { c.DnsConfig = &runtimeapi.DNSConfig{Searches: []string{"a b"}} },
		"host port":      func(c *runtimeapi.PodSandboxConfig) { c.PortMappings = []*runtimeapi.PortMapping{{HostPort: 70000}} },
		"sysctl of host": func(c *runtimeapi.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{"vm.swappiness": "1"} },
		"sysctl, host net": func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{"net.a": "1"}
			c.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
		},
		"target pid": func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_TARGET
		},
		"user namespace": func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_CONTAINER}
		},
	} {
		c := podConfig("p")
		change(c)
		if _, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: c}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
	if _, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podConfig("p"), RuntimeHandler: "nope"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown handler: %v", err)
	}
	if w.count() != 0 {
		t.Errorf("calls were made: %v", w.calls)
	}
	pod := runPod(t, s, podConfig("p"))
	before := w.holding()
	for name, change := range map[string]func(*runtimeapi.ContainerConfig){
		"no metadata": func(c *runtimeapi.ContainerConfig) { c.Metadata = nil },
		"no image":    func(c *runtimeapi.ContainerConfig) { c.Image = nil },
		"log path":    func(c *runtimeapi.ContainerConfig) { c.LogPath = "../../etc/passwd" },
		"privileged":  func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.Privileged = true },
		"pod pid": func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
		},
	} {
		c := containerConfig("c")
		change(c)
		if _, err := s.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: c}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
	c := containerConfig("c")
	c.Image.Image = "absent"
	if _, err := s.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: c}); !errdefs.IsNotFound(err) {
		t.Errorf("image that is not there: %v", err)
	}
	if got := w.holding(); !reflect.DeepEqual(got, before) {
		t.Errorf("held before %v, after %v", before, got)
	}
}

func TestIdempotence(t *testing.T) {
	s := newWorld(t).start(t)
	ctx := t.Context()
	_, e1 := s.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: "none"})
	_, e2 := s.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: "none"})
	_, e3 := s.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: "none"})
	_, e4 := s.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: "none"})
	if err := errors.Join(e1, e2, e3, e4); err != nil {
		t.Error(err)
	}
	_, e1 = s.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: "none"})
	_, e2 = s.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: "none"})
	_, e3 = s.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: "none"})
	_, e4 = s.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: "none"})
	for _, err := range []error{e1, e2, e3, e4} {
		if !errdefs.IsNotFound(err) {
			t.Errorf("not found expected: %v", err)
		}
	}
}

func TestStopGrace(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	pod := runPod(t, s, podConfig("p"))
	c := containerConfig("c")
	c.StopSignal = runtimeapi.Signal_SIGNAL_SIGUSR1 // the fake ignores it
	id := create(t, s, pod, c)
	startContainer(t, s, id)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := s.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 1 << 40}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stop with a deadline before the grace period: %v", err)
	}
	if st := statusOf(t, s, id); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING || st.StopSignal != runtimeapi.Signal_SIGNAL_SIGUSR1 {
		t.Errorf("status %v", st)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := s.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 100}); err != nil {
			t.Error(err)
		}
	})
	time.Sleep(10 * time.Millisecond)
	if _, err := s.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: id}); err != nil { // the shorter one wins
		t.Fatal(err)
	}
	wg.Wait()
	if st := statusOf(t, s, id); st.ExitCode != 137 {
		t.Errorf("status %v", st)
	}
}

func TestUpdateResourcesIsTransactional(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	pod := runPod(t, s, podConfig("p"))
	id := create(t, s, pod, containerConfig("c"))
	startContainer(t, s, id)
	update := func(n int64) error {
		_, err := s.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: n}})
		return err
	}
	if err := update(128 << 20); err != nil {
		t.Fatal(err)
	}
	if got := statusOf(t, s, id).Resources.Linux; got.MemoryLimitInBytes != 128<<20 || got.CpuShares != 100 {
		t.Errorf("resources %v", got)
	}
	w.mu.Lock()
	w.failAt = len(w.calls) + 1
	w.mu.Unlock()
	if err := update(256 << 20); !errors.Is(err, errInjected) {
		t.Errorf("error is %v", err)
	}
	if got := statusOf(t, s, id).Resources.Linux.MemoryLimitInBytes; got != 128<<20 {
		t.Errorf("after a failed update the status says %d", got)
	}
	if got := *w.limits[id].Memory.Limit; got != 128<<20 {
		t.Errorf("after a failed update the limit is %d", got)
	}
	s.Close()
	s = w.start(t)
	if got := statusOf(t, s, id).Resources.Linux.MemoryLimitInBytes; got != 128<<20 {
		t.Errorf("after a restart the status says %d", got)
	}
}

func TestStartFailureIsTheEnd(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	pod := runPod(t, s, podConfig("p"))
	id := create(t, s, pod, containerConfig("c"))
	w.mu.Lock()
	w.failAt = len(w.calls) + 1
	w.mu.Unlock()
	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: id}); !errors.Is(err, errInjected) {
		t.Errorf("error is %v", err)
	}
	if st := statusOf(t, s, id); st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode != 128 || st.Reason != "StartError" || !strings.Contains(st.Message, "injected") {
		t.Errorf("status %v", st)
	}
	if _, err := s.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: id}); err != nil {
		t.Error(err)
	}
}

func TestEvents(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	sub, slow := s.events.subscribe(), s.events.subscribe()
	pod := runPod(t, s, podConfig("p"))
	id := create(t, s, pod, containerConfig("c"))
	startContainer(t, s, id)
	w.exit(id, 0, 0)
	eventually(t, "exit", func() bool { return statusOf(t, s, id).Reason == "Completed" })
	removePod(t, s, pod)
	events, _, _ := s.events.take(sub)
	var got []string
	for _, e := range events {
		who := map[string]string{pod: "pod", id: "container"}[e.ContainerId]
		got = append(got, who+" "+strings.TrimSuffix(strings.TrimPrefix(e.ContainerEventType.String(), "CONTAINER_"), "_EVENT"))
		if e.PodSandboxStatus.GetId() != pod {
			t.Errorf("event without the sandbox's status: %v", e)
		}
	}
	want := []string{"pod CREATED", "pod STARTED", "container CREATED", "container STARTED", "container STOPPED", "pod STOPPED", "container DELETED", "pod DELETED"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("events %q, want %q", got, want)
	}
	if c := events[4].ContainersStatuses; len(c) != 1 || c[0].Reason != "Completed" {
		t.Errorf("the stop event carries %v", c)
	}
	for range maxQueued + 1 {
		s.events.publish(&runtimeapi.ContainerEventResponse{})
	}
	if events, overflow, _ := s.events.take(slow); len(events) != maxQueued || !overflow {
		t.Errorf("a slow reader has %d events, overflow %v", len(events), overflow)
	}
}

func TestManyLabelsAndParallelPods(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	big := podConfig("big")
	for i := range 10000 {
		big.Labels[fmt.Sprintf("label-%05d\x00\x7f", i)] = strings.Repeat("v", 60)
	}
	pod := runPod(t, s, big)
	st, err := s.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil || !proto.Equal(&runtimeapi.PodSandbox{Labels: st.Status.Labels}, &runtimeapi.PodSandbox{Labels: big.Labels}) {
		t.Errorf("labels came back different, err %v", err)
	}
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			r, err := s.RunPodSandbox(context.Background(), &runtimeapi.RunPodSandboxRequest{Config: podConfig(fmt.Sprint("p", i))})
			if err != nil {
				t.Error(err)
				return
			}
			c, err := s.CreateContainer(context.Background(), &runtimeapi.CreateContainerRequest{PodSandboxId: r.PodSandboxId, Config: containerConfig("c")})
			if err == nil {
				_, err = s.StartContainer(context.Background(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
			}
			if err == nil {
				_, err = s.RemovePodSandbox(context.Background(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: r.PodSandboxId})
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	removePod(t, s, pod)
	if got := append(w.holding(), leftovers(t, s)...); len(got) > 0 {
		t.Errorf("left over %v", got)
	}
}

func TestFitMessage(t *testing.T) {
	big := make([]byte, MaxMessage)
	for _, tc := range []struct{ out, err int }{{MaxMessage, 0}, {0, MaxMessage}, {MaxMessage, MaxMessage}, {MaxMessage, 10}, {5, 6}} {
		o, e := fitMessage(big[:tc.out], big[:tc.err])
		n := proto.Size(&runtimeapi.ExecSyncResponse{Stdout: o, Stderr: e, ExitCode: -1})
		if n > MaxMessage {
			t.Errorf("%v: message of %d bytes", tc, n)
		}
		if tc.out+tc.err < 100 && (len(o) != tc.out || len(e) != tc.err) {
			t.Errorf("%v: cut without need", tc)
		}
	}
}
