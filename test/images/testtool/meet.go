package main

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"
)

// meet sends to all addresses without a pause, and prints each peer that gets
// through once: "heard tcp 10.0.0.7" for what comes in, "answer udp 10.0.0.7:9"
// for what comes back, be it that the port is closed.
func meet(args []string) error {
	fs := flags()
	listen := fs.Int("listen", 0, "port of TCP and UDP")
	every := fs.Duration("every", 20*time.Millisecond, "pause between two packets to one address")
	targets, err := need(fs, args, 0)
	if err != nil {
		return err
	}
	m := &meeting{seen: map[string]bool{}}
	for _, addr := range targets { // first of all
		go m.udp(addr, *every)
		go m.tcp(addr, *every)
	}
	if *listen != 0 {
		if err := m.listen(*listen); err != nil {
			return err
		}
	}
	fmt.Println("meeting")
	return wait(nil, 0)
}

type meeting struct {
	mu   sync.Mutex
	seen map[string]bool
}

func (m *meeting) say(what, network, who string) {
	line := what + " " + network + " " + who
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.seen[line] {
		m.seen[line] = true
		fmt.Println(line)
	}
}

func (m *meeting) listen(port int) error {
	ln, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		return err
	}
	pc, err := net.ListenPacket("udp", fmt.Sprintf(":%d", port))
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			m.say("heard", "tcp", host(c.RemoteAddr()))
			c.Close()
		}
	}()
	go func() {
		buf := make([]byte, 1500)
		for {
			_, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			m.say("heard", "udp", host(from))
		}
	}()
	return nil
}

func host(a net.Addr) string {
	h, _, err := net.SplitHostPort(a.String())
	if err != nil {
		return a.String()
	}
	return h
}

func (m *meeting) udp(addr string, every time.Duration) {
	for ; ; time.Sleep(every) {
		c, err := net.Dial("udp", addr)
		if err != nil {
			continue
		}
		for err == nil || !errors.Is(err, syscall.ENETUNREACH) {
			if _, err = c.Write([]byte("x")); errors.Is(err, syscall.ECONNREFUSED) {
				m.say("answer", "udp", addr)
			}
			time.Sleep(every)
		}
		c.Close()
	}
}

func (m *meeting) tcp(addr string, every time.Duration) {
	for ; ; time.Sleep(every) {
		c, err := net.DialTimeout("tcp", addr, max(10*every, 100*time.Millisecond))
		if err == nil {
			c.Close()
		}
		if err == nil || errors.Is(err, syscall.ECONNREFUSED) {
			m.say("answer", "tcp", addr)
		}
	}
}
