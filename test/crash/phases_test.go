package crash

import (
	"fmt"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestPhases kills the daemon at each named phase of each call.
func TestPhases(t *testing.T) {
	r := start(t, nil)
	witness := r.newPod(counter(50, 42)...)
	must(t, "start the witness", witness.up())
	base := r.Settled()

	up := func(p *pod) error { return p.up() }
	pair := func(p *pod) error {
		p.config.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
		return nil
	}
	created := func(p *pod) error {
		if err := p.sandbox(); err != nil {
			return err
		}
		return p.create()
	}
	volume := func(p *pod) error {
		p.ctr.Mounts = []*runtimeapi.Mount{{ContainerPath: "/img", Readonly: true, Image: &runtimeapi.ImageSpec{Image: image}}}
		return p.sandbox()
	}
	stopped := func(p *pod) error {
		if err := p.up(); err != nil {
			return err
		}
		return p.stopSandbox()
	}
	for _, c := range []struct {
		call   string
		points []string
		before func(*pod) error // what has happened already
		do     func(*pod) error
		// after is what the pod must be like once the repeated call succeeded.
		after func(*pod) error
	}{
		{"RunPodSandbox", []string{"begin", "intent", "namespaces", "network", "cgroup", "files", "built", "recorded"}, nil, (*pod).sandbox, nil},
		{"RunPodSandbox", []string{"pause"}, pair, (*pod).sandbox, nil},
		{"CreateContainer", []string{"begin", "intent", "rootfs", "spec", "built", "recorded"}, (*pod).sandbox, (*pod).create, (*pod).isCreated},
		{"CreateContainer", []string{"image-volume"}, volume, (*pod).create, (*pod).isCreated},
		{"StartContainer", []string{"begin", "started", "done"}, created, (*pod).start, (*pod).isRunning},
		{"StopContainer", []string{"signal", "kill", "done"}, up, (*pod).stop, (*pod).isExited},
		{"RemoveContainer", []string{"begin", "process", "rootfs", "unrecorded", "done"}, up, (*pod).removeCtr, (*pod).hasNoContainer},
		{"StopPodSandbox", []string{"begin", "marked", "killed", "network", "done"}, up, (*pod).stopSandbox, (*pod).isNotReady},
		{"StopPodSandbox", []string{"pause"}, func(p *pod) error { pair(p); return p.up() }, (*pod).stopSandbox, (*pod).isNotReady},
		{"RemovePodSandbox", []string{"begin", "containers", "cleaned", "unrecorded", "done"}, stopped, (*pod).removeSandbox, (*pod).isGone},
		{"UpdateContainerResources", []string{"applied"}, up, (*pod).update, (*pod).isUpdated},
	} {
		for _, point := range c.points {
			phase := c.call + "/" + point
			t.Run(phase, func(t *testing.T) {
				p := r.newPod()
				deaf := phase == "StopContainer/kill" || phase == "StopContainer/done"
				if deaf { // the grace period has to pass
					p.ctr.Command = []string{"/bin/sh", "-c", "trap '' TERM; echo 1; while :; do sleep 1; done"}
				}
				if c.before != nil {
					must(t, "prepare", c.before(p))
				}
				if deaf { // it has to get so far
					for n := 0; n < 1; n, _ = p.numbers() {
						time.Sleep(10 * time.Millisecond)
					}
				}
				r.arm(phase)
				err := c.do(p)
				select {
				case <-r.Done():
				case <-time.After(30 * time.Second):
				}
				if !r.disarm() {
					t.Errorf("the phase was never logged (the call: %v)", err)
				} else {
					r.restart(t)
				}
				must(t, "the call again", c.do(p))
				if c.after != nil {
					must(t, "afterwards", c.after(p))
				}
				if c.call == "RunPodSandbox" {
					must(t, "a container in the pod", p.create())
					must(t, "its start", p.start())
					p.execWorks(t)
				}
				witness.goesOn(t)
				must(t, "removal", p.down())
				if l := r.WaitNoLeaks(base); l != "" {
					t.Errorf("left behind:\n%s", l)
				}
			})
			if r.Pid() == 0 {
				r.restart(t)
			}
		}
	}
	t.Run("Exit", func(t *testing.T) { exits(t, r) })
	witness.execWorks(t)
	witness.endsWith(t, 42)
}

// exits kills the daemon while it learns of an exit; the code must survive.
func exits(t *testing.T, r *rig) {
	for i, point := range []string{"seen", "recorded", "done"} {
		t.Run(point, func(t *testing.T) {
			p := r.newPod("/bin/sh", "-c", fmt.Sprintf("sleep 0.3; exit %d", 20+i))
			r.arm("Exit/" + point)
			must(t, "start", p.up())
			select {
			case <-r.Done():
			case <-time.After(30 * time.Second):
			}
			if !r.disarm() {
				t.Fatal("the phase was never logged")
			}
			r.restart(t)
			s, err := p.waitExit(5 * time.Second)
			must(t, "exit", err)
			if s.ExitCode != int32(20+i) {
				t.Errorf("exit code %d (%s), want %d", s.ExitCode, s.Reason, 20+i)
			}
			must(t, "removal", p.down())
		})
	}
	t.Run("while nobody listens", func(t *testing.T) {
		p := r.newPod("/bin/sh", "-c", "sleep 0.5; exit 77")
		must(t, "start", p.up())
		must(t, "kill the daemon", r.Kill())
		dead := time.Now()
		time.Sleep(time.Second)
		r.restart(t)
		s, err := p.waitExit(5 * time.Second)
		must(t, "exit", err)
		if s.ExitCode != 77 {
			t.Errorf("exit code %d (%s), want 77", s.ExitCode, s.Reason)
		}
		if f := time.Unix(0, s.FinishedAt); f.Before(dead.Add(-time.Second)) || f.After(dead.Add(900*time.Millisecond)) {
			t.Errorf("finished at %v, but it ended within 0.5 s of %v", f, dead)
		}
		must(t, "removal", p.down())
	})
}

func (p *pod) hasState(want runtimeapi.ContainerState) error {
	s, err := p.status()
	if err == nil && s.State != want {
		err = fmt.Errorf("the container is %v (%s), want %v", s.State, s.Message, want)
	}
	return err
}

func (p *pod) isCreated() error {
	if err := p.hasState(runtimeapi.ContainerState_CONTAINER_CREATED); err != nil {
		return err
	}
	return p.start()
}

func (p *pod) isRunning() error { return p.hasState(runtimeapi.ContainerState_CONTAINER_RUNNING) }
func (p *pod) isExited() error  { return p.hasState(runtimeapi.ContainerState_CONTAINER_EXITED) }

func (p *pod) hasNoContainer() error {
	a, err := call(p.r.Runtime().ListContainers, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: p.id}})
	if err == nil && len(a.Containers) > 0 {
		err = fmt.Errorf("containers left: %v", a.Containers)
	}
	return err
}

func (p *pod) isNotReady() error {
	a, err := call(p.r.Runtime().PodSandboxStatus, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err == nil && a.Status.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		err = fmt.Errorf("the sandbox is %v", a.Status.State)
	}
	if err == nil {
		err = p.isExited()
	}
	return err
}

func (p *pod) isGone() error {
	a, err := call(p.r.Runtime().ListPodSandbox, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: p.id}})
	if err == nil && len(a.Items) > 0 {
		err = fmt.Errorf("the sandbox is still listed: %v", a.Items)
	}
	return err
}

func (p *pod) isUpdated() error {
	s, err := p.status()
	if err == nil && s.GetResources().GetLinux().GetCpuQuota() != 60000 {
		err = fmt.Errorf("resources in status: %v", s.GetResources())
	}
	return err
}
