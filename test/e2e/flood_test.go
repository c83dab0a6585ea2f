package e2e

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// flood sends echo requests to addresses of a pod's link, thousands a second to
// each, and waits for nothing: neither for a neighbour to be resolved, since its
// frames go to everybody on the link, nor for its socket. The first millisecond in
// which a kernel would answer is met.
type flood struct {
	mu    sync.Mutex
	heard map[netip.Addr]bool // who answered
}

// newFlood floods from the network namespace of a container until the test ends.
func newFlood(t *testing.T, from *container, targets []netip.Addr) *flood {
	t.Helper()
	status, err := from.pod.node.Runtime().ContainerStatus(callCtx(t), &runtimeapi.ContainerStatusRequest{ContainerId: from.id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(status.Info["info"]), &info); err != nil {
		t.Fatal(err)
	}
	f := &flood{heard: map[netip.Addr]bool{}}
	stop, ready, done := make(chan struct{}), make(chan error, 1), make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // the thread ends with the goroutine
		fd, frames, err := floodSocket(info.Pid, targets)
		ready <- err
		if err != nil {
			return
		}
		defer unix.Close(fd)
		for {
			select {
			case <-stop:
				return
			default:
			}
			for _, frame := range frames {
				_, _ = unix.Write(fd, frame) // one that finds the queue full is one of many
			}
			f.listen(fd)
			time.Sleep(50 * time.Microsecond)
		}
	}()
	if err := <-ready; err != nil {
		t.Fatalf("flood: %v", err)
	}
	t.Cleanup(func() {
		close(stop)
		<-done
	})
	return f
}

// floodSocket opens a packet socket on the eth0 of a process and makes the frames.
func floodSocket(pid int, targets []netip.Addr) (int, [][]byte, error) {
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return -1, nil, err
	}
	defer ns.Close()
	if err := netns.Set(ns); err != nil {
		return -1, nil, err
	}
	eth, err := net.InterfaceByName("eth0")
	if err != nil {
		return -1, nil, err
	}
	addrs, err := eth.Addrs()
	if err != nil || len(addrs) == 0 {
		return -1, nil, errors.Join(err, fmt.Errorf("%d addresses on eth0", len(addrs)))
	}
	own, err := netip.ParsePrefix(addrs[0].String())
	if err != nil {
		return -1, nil, err
	}
	ip := binary.BigEndian.Uint16([]byte{8, 0}) // ETH_P_IP
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(ip<<8|ip>>8))
	if err != nil {
		return -1, nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: ip<<8 | ip>>8, Ifindex: eth.Index}); err != nil {
		unix.Close(fd)
		return -1, nil, err
	}
	var frames [][]byte
	for _, to := range targets {
		frames = append(frames, echoRequest(eth.HardwareAddr, own.Addr(), to))
	}
	return fd, frames, nil
}

func echoRequest(mac net.HardwareAddr, from, to netip.Addr) []byte {
	icmp := []byte{8, 0, 0, 0, 0, 1, 0, 1}
	binary.BigEndian.PutUint16(icmp[2:], checksum(icmp))
	ip := []byte{0x45, 0, 0, byte(20 + len(icmp)), 0, 0, 0, 0, 64, 1, 0, 0}
	ip = append(append(ip, from.AsSlice()...), to.AsSlice()...)
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, mac...)
	return append(append(append(frame, 8, 0), ip...), icmp...)
}

// checksum is the internet's (RFC 1071).
func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// listen notes the answers that have come.
func (f *flood) listen(fd int) {
	b := make([]byte, 128)
	for {
		n, err := unix.Read(fd, b)
		if err != nil {
			return
		}
		if n < 42 || b[23] != 1 || b[34] != 0 { // an echo reply
			continue
		}
		from, _ := netip.AddrFromSlice(b[26:30])
		f.mu.Lock()
		f.heard[from] = true
		f.mu.Unlock()
	}
}

// answered says who has answered so far.
func (f *flood) answered(ip netip.Addr) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.heard[ip]
}
