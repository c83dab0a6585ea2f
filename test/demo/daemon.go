package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// daemon is the one that the demo has started.
type daemon struct {
	cmd     *exec.Cmd
	ended   chan struct{} // closed when it has been waited for
	logPath string
	conn    *grpc.ClientConn
	runtime runtimeapi.RuntimeServiceClient
	images  runtimeapi.ImageServiceClient
}

// start looks at the host, starts the daemon and waits for its answer.
func (d *demo) start(ctx context.Context) error {
	s := d.screen
	s.step("The daemon", d.cfg.CRI.Socket)
	if answersAt(ctx, d.cfg.CRI.Socket) {
		pid, _ := os.ReadFile(filepath.Join(d.cfg.State, "daemon.lock"))
		return fmt.Errorf("a daemon (pid %s) runs already on %s: stop it, or show the demo another configuration with ARGS='--config FILE'",
			strings.TrimSpace(string(pid)), d.cfg.CRI.Socket)
	}
	if err := d.check(ctx); err != nil {
		return err
	}
	for _, dir := range []string{d.cfg.Root, d.cfg.State} {
		if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
			d.madeDirs = append(d.madeDirs, dir)
		}
	}
	began := time.Now()
	var err error
	if d.daemon, err = startDaemon(filepath.Join(d.binaries, "nodeagent"), d.config, d.cfg.CRI.Socket, filepath.Join(d.work, "daemon.log")); err != nil {
		return err
	}
	v, err := d.daemon.wait(ctx)
	if err != nil {
		return err
	}
	s.doneIn(time.Since(began), "%s %s answers CRI %s", v.RuntimeName, v.RuntimeVersion, v.RuntimeApiVersion)
	return nil
}

// check shows what `nodeagent check` finds, in one line unless it is grave.
func (d *demo) check(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, filepath.Join(d.binaries, "nodeagent"), "check", "--output", "json", "--config", d.config).Output()
	var report struct {
		OK     bool
		Checks []struct {
			Group, Name, Detail string
			Found               bool
		}
	}
	if e := json.Unmarshal(out, &report); e != nil {
		return fmt.Errorf("check this machine with %s (make build makes it): %w", d.binaries+"/nodeagent", cmp.Or(err, e))
	}
	if !report.OK {
		table, _ := exec.CommandContext(ctx, filepath.Join(d.binaries, "nodeagent"), "check", "--config", d.config).Output()
		return fmt.Errorf("something essential is missing here:\n%s", table)
	}
	var facts []string
	found := 0
	for _, c := range report.Checks {
		if c.Found {
			found++
		}
		if c.Name == "version" && c.Group == "kernel" {
			facts = append(facts, "kernel "+c.Detail)
		}
		if c.Name == "hierarchy" {
			mode, _, _ := strings.Cut(c.Detail, " ")
			facts = append(facts, "cgroups "+mode)
		}
	}
	d.screen.done("%s: %d of %d checks pass, all that matter  %s", strings.Join(facts, ", "), found, len(report.Checks), d.screen.dim("(nodeagent check)"))
	return nil
}

// answersAt asks whoever listens on a CRI socket.
func answersAt(ctx context.Context, socket string) bool {
	if _, err := os.Stat(socket); err != nil {
		return false
	}
	conn, err := dial(socket)
	if err != nil {
		return false
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err = runtimeapi.NewRuntimeServiceClient(conn).Version(ctx, &runtimeapi.VersionRequest{})
	return err == nil
}

func dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
}

func startDaemon(binary, config, socket, logPath string) (*daemon, error) {
	log, err := os.Create(logPath)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(binary, "run", "--config", config)
	cmd.Stdout, cmd.Stderr = log, log
	// Its own process group: Ctrl-C is for the demo, which stops the daemon
	// after the pod.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the daemon: %w", err)
	}
	conn, err := dial(socket)
	if err != nil {
		return nil, errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	d := &daemon{
		cmd: cmd, ended: make(chan struct{}), logPath: logPath, conn: conn,
		runtime: runtimeapi.NewRuntimeServiceClient(conn), images: runtimeapi.NewImageServiceClient(conn),
	}
	go func() {
		defer close(d.ended)
		cmd.Wait() // how it ended is read from ProcessState
	}()
	return d, nil
}

// wait waits until the daemon answers and its network is ready.
func (d *daemon) wait(ctx context.Context) (*runtimeapi.VersionResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		v, err := d.runtime.Version(ctx, &runtimeapi.VersionRequest{}, grpc.WaitForReady(false))
		if err == nil {
			return v, nil
		}
		d.conn.ResetConnectBackoff()
		select {
		case <-d.ended:
			return nil, fmt.Errorf("the daemon ended: %s\n%s", d.cmd.ProcessState, d.logTail(5))
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return nil, ctx.Err()
			}
			return nil, fmt.Errorf("the daemon does not answer: %w", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// stop ends the daemon politely, and by force if it does not listen.
func (d *daemon) stop() error {
	d.conn.Close()
	d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.ended:
	case <-time.After(30 * time.Second):
		d.cmd.Process.Kill()
		<-d.ended
		return errors.New("the daemon did not stop within 30 s and was killed")
	}
	// It may have been too young to catch the signal.
	status, _ := d.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !d.cmd.ProcessState.Success() && status.Signal() != syscall.SIGTERM {
		return fmt.Errorf("the daemon ended badly: %s\n%s", d.cmd.ProcessState, d.logTail(10))
	}
	return nil
}

func (d *daemon) logTail(lines int) string {
	data, err := os.ReadFile(d.logPath)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
