package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const webPort = 8080

// pod is the demo's, as far as it was made.
type pod struct {
	config     *runtimeapi.PodSandboxConfig
	id         string
	ips        []string
	containers map[string]string // name -> id
}

func (p *pod) url() string {
	return "http://" + net.JoinHostPort(p.ips[0], fmt.Sprint(webPort)) + "/"
}

// containerConfigs are the two containers, in the order of their start.
func containerConfigs(image string) []*runtimeapi.ContainerConfig {
	of := func(name string, command ...string) *runtimeapi.ContainerConfig {
		return &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: name},
			Image:    &runtimeapi.ImageSpec{Image: image},
			Command:  command,
			LogPath:  name + ".log",
			Linux: &runtimeapi.LinuxContainerConfig{
				Resources:       &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuPeriod: 100000, CpuQuota: 50000},
				SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NoNewPrivs: true, NamespaceOptions: namespaces()},
			},
		}
	}
	return []*runtimeapi.ContainerConfig{
		of("web", "httpd", "-f", "-v", "-p", fmt.Sprint(webPort), "-h", "/www"),
		of("counter", "sh", "-c", fmt.Sprintf(
			`i=0; while :; do i=$((i+1)); echo "$i: $(testtool dial http 127.0.0.1:%d 2>&1)"; sleep 0.5; done`, webPort)),
	}
}

// namespaces are those of an ordinary Kubernetes pod: network and IPC for the
// pod, processes for each container.
func namespaces() *runtimeapi.NamespaceOption {
	return &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
}

// runPod makes the pod on the built-in network and calls it from the host.
func (d *demo) runPod(ctx context.Context) error {
	s, rt := d.screen, d.daemon.runtime
	s.step("The pod", "two containers, one network namespace, through CRI")
	parent, err := d.cgroupParent(ctx)
	if err != nil {
		return err
	}
	logs := filepath.Join(d.work, "logs")
	if err := os.Mkdir(logs, 0o755); err != nil {
		return err
	}
	d.pod = &pod{containers: map[string]string{}, config: &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "hello", Namespace: "demo", Uid: fmt.Sprintf("demo-%d", os.Getpid())},
		Hostname:     "hello",
		LogDirectory: logs,
		Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: parent, SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: namespaces()}},
	}}
	began := time.Now()
	made, err := rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: d.pod.config})
	if err != nil {
		return err
	}
	d.pod.id = made.PodSandboxId
	for _, c := range containerConfigs(d.registry.ref) {
		created, err := rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: d.pod.id, Config: c, SandboxConfig: d.pod.config})
		if err != nil {
			return err
		}
		d.pod.containers[c.Metadata.Name] = created.ContainerId
		if _, err := rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
			return err
		}
	}
	all := time.Since(began)
	status, err := rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: d.pod.id})
	if err != nil {
		return err
	}
	d.pod.ips = []string{status.Status.Network.Ip}
	for _, ip := range status.Status.Network.AdditionalIps {
		d.pod.ips = append(d.pod.ips, ip.Ip)
	}
	s.doneIn(all, "pod %s runs: %s", short(d.pod.id), strings.Join(d.pod.ips, ", "))

	began = time.Now()
	body, err := d.get(ctx)
	if err != nil {
		return err
	}
	s.doneIn(time.Since(began), "GET %s from the host: %s", d.pod.url(), strings.TrimSpace(body))
	return nil
}

// cgroupParent is a group of the demo's own, in the driver's notation.
func (d *demo) cgroupParent(ctx context.Context) (string, error) {
	c, err := d.daemon.runtime.RuntimeConfig(ctx, &runtimeapi.RuntimeConfigRequest{})
	if err != nil {
		return "", err
	}
	if c.Linux.GetCgroupDriver() == runtimeapi.CgroupDriver_SYSTEMD {
		// A dash makes a slice within another.
		return strings.ReplaceAll(cgroupName(), "-", "_") + ".slice", nil
	}
	return "/" + cgroupName(), nil
}

// get asks the pod's web server, which may need a moment to listen.
func (d *demo) get(ctx context.Context) (string, error) {
	client := http.Client{Timeout: time.Second}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, d.pod.url(), nil)
		if err != nil {
			return "", err
		}
		resp, err := client.Do(req)
		if err == nil {
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err == nil && string(body) != page {
				err = fmt.Errorf("the pod answers %q", body)
			}
			return string(body), err
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return "", fmt.Errorf("ask the pod from the host: %w", err)
		}
	}
}

// showLogs follows both containers' log files, which the shim writes.
func (d *demo) showLogs(ctx context.Context) error {
	s := d.screen
	s.step("Logs", "as a kubelet reads them: "+filepath.Join(d.pod.config.LogDirectory, "*.log"))
	readers := map[string]*bufio.Reader{}
	for _, name := range []string{"web", "counter"} {
		f, err := os.Open(filepath.Join(d.pod.config.LogDirectory, name+".log"))
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		defer f.Close()
		readers[name] = bufio.NewReader(f)
	}
	counted := 0
	for deadline := time.Now().Add(d.watch); time.Now().Before(deadline) && counted < 6; {
		for _, name := range []string{"web", "counter"} {
			for {
				line, err := readers[name].ReadString('\n')
				if err != nil {
					break // what is there has been read
				}
				if name == "counter" {
					counted++
				}
				s.output(name, message(line))
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	if counted == 0 {
		return fmt.Errorf("the counter has logged nothing within %s", d.watch)
	}
	return nil
}

// message is the text of a CRI log line, "time stream tag text".
func message(line string) string {
	parts := strings.SplitN(strings.TrimRight(line, "\n"), " ", 4)
	if len(parts) < 4 {
		return line
	}
	return parts[3]
}

func (d *demo) showExec(ctx context.Context) error {
	s := d.screen
	command := "hostname; id; ip addr show eth0 | grep inet; ps"
	s.step("Exec", "sh -c '"+command+"'")
	began := time.Now()
	resp, err := d.daemon.runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{
		ContainerId: d.pod.containers["counter"], Cmd: []string{"sh", "-c", command}, Timeout: 10,
	})
	if err != nil {
		return err
	}
	elapsed := time.Since(began)
	for line := range strings.Lines(string(resp.Stdout)) {
		s.output("counter", strings.TrimRight(line, "\n"))
	}
	if resp.ExitCode != 0 {
		return fmt.Errorf("exec ended with %d: %s", resp.ExitCode, resp.Stderr)
	}
	s.doneIn(elapsed, "exit code 0")
	return nil
}

// takeAwayPod stops and removes the pod and the image.
func (d *demo) takeAwayPod(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if d.pod != nil && d.pod.id == "" {
		// Interrupted while it was made: the daemon undoes that, and a list
		// says whether it was faster.
		list, err := d.daemon.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
		if err != nil {
			return err
		}
		for _, p := range list.Items {
			if p.Metadata.Uid == d.pod.config.Metadata.Uid {
				d.pod.id = p.Id
			}
		}
	}
	if d.pod != nil && d.pod.id != "" {
		if _, err := d.daemon.runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: d.pod.id}); err != nil {
			return err
		}
		if _, err := d.daemon.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: d.pod.id}); err != nil {
			return err
		}
	}
	if d.registry != nil {
		_, err := d.daemon.images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: d.registry.ref}})
		return err
	}
	return nil
}
