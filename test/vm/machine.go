package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// machine is one run of qemu. What it writes to its root disk is forgotten
// when it ends, not when it reboots.
type machine struct {
	image        image
	payload, dir string // dir: sockets, console and the disk's changes
	accel        string
	memory, cpus int
	role         string    // "": the only one
	wire         [2]string // sockets of its end and the other one; none: no NIC
}

// kernelLine: hugepages for their test; the console is for us only.
const kernelLine = "console=ttyS0 root=/dev/vda rw loglevel=4 systemd.show_status=1 net.ifnames=0 hugepages=16 mitigations=off panic=-1 modprobe.blacklist=ahci,iTCO_wdt,i2c_i801,lpc_ich,pcspkr"

// run boots the machine, copies its results to out and waits for its end.
func (m machine) run(ctx context.Context, out io.Writer) (*results, error) {
	res := &results{}
	if err := os.MkdirAll(m.dir, 0o755); err != nil {
		return res, err
	}
	socket := filepath.Join(m.dir, "results.sock")
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return res, err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return res, fmt.Errorf("listen for results: %w", err)
	}
	defer l.Close()
	console := filepath.Join(m.dir, "console.log")
	boot := filepath.Join(m.dir, "initramfs")
	if err := writeBoot(m.image.initramfs, boot); err != nil {
		return res, err
	}
	cmd := exec.Command("qemu-system-x86_64",
		"-machine", "q35,accel="+m.accel, "-cpu", "Nehalem", "-smp", strconv.Itoa(m.cpus), "-m", strconv.Itoa(m.memory),
		"-nodefaults", "-no-user-config", "-display", "none",
		"-kernel", m.image.kernel, "-initrd", boot, "-append", kernelLine+" vm.role="+m.role,
		"-drive", "if=virtio,format=raw,snapshot=on,cache=unsafe,file="+m.image.disk,
		"-drive", "if=virtio,format=raw,readonly=on,file="+m.payload,
		"-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
		"-chardev", "socket,id=results,path="+socket, "-device", "virtserialport,chardev=results,name=results",
		"-serial", "file:"+console)
	cmd.Args = append(cmd.Args, m.nic()...)
	cmd.Env = append(os.Environ(), "TMPDIR="+m.dir)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return res, fmt.Errorf("start qemu: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stop()
	copied := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			copied <- nil // qemu ended before
			return
		}
		defer conn.Close()
		copied <- res.read(conn, out)
	}()
	err = cmd.Wait()
	l.Close()
	err = errors.Join(err, <-copied)
	res.took = time.Since(start)
	res.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	if ctx.Err() != nil {
		return res, fmt.Errorf("%w; its console is in %s", context.Cause(ctx), console)
	}
	if err != nil {
		return res, fmt.Errorf("qemu: %w\n%s", err, said.Bytes())
	}
	return res, nil
}

// nic is the machine's end of a wire between two: each frame is a datagram
// from one socket to the other.
func (m machine) nic() []string {
	if m.role == "" {
		return []string{"-nic", "none"}
	}
	os.Remove(m.wire[0])
	return []string{
		"-netdev", fmt.Sprintf("dgram,id=wire,local.type=unix,local.path=%s,remote.type=unix,remote.path=%s", m.wire[0], m.wire[1]),
		"-device", "virtio-net-pci,netdev=wire,mac=52:54:00:00:00:0" + m.role,
	}
}
