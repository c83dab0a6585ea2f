package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

func serve(args []string) error {
	fs := flags()
	tcp := fs.String("tcp", "", "address")
	udp := fs.String("udp", "", "address")
	web := fs.String("http", "", "address")
	if _, err := need(fs, args, 0); err != nil {
		return err
	}
	done := make(chan error, 3)
	for _, s := range []struct {
		addr string
		run  func(string) error
	}{{*tcp, serveTCP}, {*udp, serveUDP}, {*web, serveHTTP}} {
		if s.addr != "" {
			go func() { done <- s.run(s.addr) }()
		}
	}
	stopped := make(chan error, 1)
	go func() { stopped <- wait(nil, 0) }()
	select {
	case err := <-done:
		return err
	case err := <-stopped:
		return err
	}
}

func serveTCP(addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	fmt.Println("listening tcp", ln.Addr())
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c)
		}()
	}
}

func serveUDP(addr string) error {
	c, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	fmt.Println("listening udp", c.LocalAddr())
	buf := make([]byte, 64<<10)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return err
		}
		if _, err := c.WriteTo(buf[:n], from); err != nil {
			return err
		}
	}
}

// serveHTTP answers /echo with the body, everything else with a line about the
// host and the caller.
func serveHTTP(addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	fmt.Println("listening http", ln.Addr())
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	return http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/echo" {
			_, _ = io.Copy(w, r.Body)
			return
		}
		fmt.Fprintf(w, "host=%s remote=%s path=%s\n", host, r.RemoteAddr, r.URL.Path)
	}))
}

func dial(args []string) error {
	fs := flags()
	timeout := fs.Duration("timeout", 5*time.Second, "")
	rest, err := need(fs, args, 2)
	if err != nil {
		return err
	}
	network, addr, msg := rest[0], rest[1], "hello"
	if len(rest) > 2 {
		msg = strings.Join(rest[2:], " ")
	}
	if network == "http" {
		return get(addr, *timeout)
	}
	c, err := net.DialTimeout(network, addr, *timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(*timeout)); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(c, msg); err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	fmt.Print(line)
	if errors.Is(err, io.EOF) && line != "" {
		return nil
	}
	return err
}

func get(url string, timeout time.Duration) error {
	if !strings.Contains(url, "://") {
		url = "http://" + url
	}
	client := http.Client{Timeout: timeout}
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(os.Stdout, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode >= 400 {
		return errors.New(resp.Status)
	}
	return nil
}

func resolve(args []string) error {
	rest, err := need(flags(), args, 1)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupHost(ctx, rest[0])
	if err != nil {
		return err
	}
	fmt.Println(strings.Join(addrs, "\n"))
	return nil
}
