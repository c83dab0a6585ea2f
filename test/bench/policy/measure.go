package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// load is how much a measurement does.
type load struct {
	span  time.Duration
	trips int
}

const (
	tcpPort = 5001
	udpPort = 5002
)

// measures are made in this order. Sender and receiver of a stream have a CPU
// each; the ends of a round trip share one, since else a wake-up between CPUs
// would cost several times what is measured.
var measures = []struct {
	name, unit string
	measure    func(*site, load) (float64, error)
}{
	{"TCP throughput", "Gbit/s", throughput},
	{"TCP round trip", "µs", func(s *site, l load) (float64, error) { return roundTrip(s, "tcp", l) }},
	{"UDP round trip", "µs", func(s *site, l load) (float64, error) { return roundTrip(s, "udp", l) }},
	{"UDP, frames of 64 bytes", "kpps", packets},
}

// pair is a connection's ends, of a and b, as blocking descriptors.
type pair struct {
	client, server int
	files          []*os.File
}

func (p *pair) close() {
	for _, f := range p.files {
		f.Close()
	}
}

func (p *pair) add(c interface{ File() (*os.File, error) }) (int, error) {
	f, err := c.File()
	if err != nil {
		return -1, err
	}
	p.files = append(p.files, f)
	fd := int(f.Fd()) // blocking from here on
	return fd, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
}

func connect(s *site, network string) (*pair, error) {
	p := &pair{}
	fail := func(err error) (*pair, error) { p.close(); return nil, err }
	if network == "udp" {
		to := netip.AddrPortFrom(s.b.ip, udpPort)
		from := netip.AddrPortFrom(s.a.ip, udpPort)
		for _, end := range []struct {
			at            *place
			local, remote netip.AddrPort
			fd            *int
		}{{s.b, to, from, &p.server}, {s.a, from, to, &p.client}} {
			err := end.at.within(func() error {
				c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(end.local), net.UDPAddrFromAddrPort(end.remote))
				if err != nil {
					return err
				}
				defer c.Close()
				*end.fd, err = p.add(c)
				return err
			})
			if err != nil {
				return fail(err)
			}
		}
		return p, nil
	}
	var ln *net.TCPListener
	err := s.b.within(func() (err error) {
		ln, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(s.b.ip, tcpPort)))
		return err
	})
	if err != nil {
		return fail(err)
	}
	defer ln.Close()
	err = s.a.within(func() error {
		c, err := net.DialTimeout("tcp", ln.Addr().String(), 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		p.client, err = p.add(c.(*net.TCPConn))
		return err
	})
	if err != nil {
		return fail(err)
	}
	c, err := ln.AcceptTCP()
	if err != nil {
		return fail(err)
	}
	defer c.Close()
	if p.server, err = p.add(c); err != nil {
		return fail(err)
	}
	return p, nil
}

// onCPU runs f on a thread of its own, tied to a CPU, which ends with it.
func onCPU(cpu int, f func() error) <-chan error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		var set unix.CPUSet
		set.Set(cpu % runtime.NumCPU())
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return done
}

// call is read or write without Go's scheduler.
func call(trap uintptr, fd int, b []byte) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall(trap, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		if errno == syscall.EINTR {
			continue
		}
		if errno != 0 {
			return 0, errno
		}
		return int(n), nil
	}
}

func throughput(s *site, l load) (float64, error) {
	p, err := connect(s, "tcp")
	if err != nil {
		return 0, err
	}
	defer p.close()
	var got atomic.Int64
	receive := onCPU(1, func() error {
		b := make([]byte, 1<<20)
		for {
			n, err := call(unix.SYS_READ, p.server, b)
			if n == 0 || err != nil {
				return err
			}
			got.Add(int64(n))
		}
	})
	send := onCPU(0, func() error {
		b := make([]byte, 128<<10)
		for end := time.Now().Add(l.span); time.Now().Before(end); {
			if _, err := call(unix.SYS_WRITE, p.client, b); err != nil {
				return err
			}
		}
		return unix.Shutdown(p.client, unix.SHUT_WR)
	})
	began := time.Now()
	if err := <-send; err != nil {
		return 0, err
	}
	if err := <-receive; err != nil {
		return 0, err
	}
	return float64(got.Load()) * 8 / float64(time.Since(began).Nanoseconds()), nil
}

func roundTrip(s *site, network string, l load) (float64, error) {
	p, err := connect(s, network)
	if err != nil {
		return 0, err
	}
	defer p.close()
	if network == "tcp" {
		for _, fd := range []int{p.client, p.server} {
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
				return 0, err
			}
		}
	}
	echo := onCPU(0, func() error {
		b := make([]byte, 1)
		for range l.trips {
			if _, err := call(unix.SYS_READ, p.server, b); err != nil {
				return err
			}
			if _, err := call(unix.SYS_WRITE, p.server, b); err != nil {
				return err
			}
		}
		return nil
	})
	took := make([]int64, l.trips)
	ask := onCPU(0, func() error {
		b := make([]byte, 1)
		for i := range took {
			began := time.Now()
			if _, err := call(unix.SYS_WRITE, p.client, b); err != nil {
				return err
			}
			if _, err := call(unix.SYS_READ, p.client, b); err != nil {
				return err
			}
			took[i] = time.Since(began).Nanoseconds()
		}
		return nil
	})
	for _, done := range []<-chan error{ask, echo} {
		if err := <-done; err != nil {
			return 0, fmt.Errorf("round trip: %w", err)
		}
	}
	return float64(median(took)) / 1000, nil
}

// packets counts what arrives.
func packets(s *site, l load) (float64, error) {
	p, err := connect(s, "udp")
	if err != nil {
		return 0, err
	}
	defer p.close()
	var stop atomic.Bool
	got := 0
	if err := unix.SetsockoptTimeval(p.server, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
		return 0, err
	}
	receive := onCPU(1, func() error {
		b := make([]byte, 64)
		for !stop.Load() {
			_, _, errno := syscall.RawSyscall(unix.SYS_READ, uintptr(p.server), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
			switch errno {
			case 0:
				got++
			case syscall.EAGAIN, syscall.EINTR: // see whether to stop
			default:
				return errno
			}
		}
		return nil
	})
	send := onCPU(0, func() error {
		b := make([]byte, 64-14-20-8)
		for end := time.Now().Add(l.span); time.Now().Before(end); {
			for range 64 {
				if _, err := call(unix.SYS_WRITE, p.client, b); err != nil && err != syscall.ENOBUFS {
					return err
				}
			}
		}
		return nil
	})
	began := time.Now()
	err = <-send
	took := time.Since(began)
	stop.Store(true)
	if e := <-receive; err == nil {
		err = e
	}
	return float64(got) / took.Seconds() / 1000, err
}
