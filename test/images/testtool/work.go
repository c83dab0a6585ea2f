package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func count(args []string) error {
	fs := flags()
	from := fs.Int("from", 1, "")
	to := fs.Int("to", 0, "0: no end")
	rate := fs.Float64("rate", 10, "lines per second; 0: as fast as possible")
	prefix := fs.String("prefix", "", "")
	both := fs.Bool("both", false, "odd numbers to stderr")
	if _, err := need(fs, args, 0); err != nil {
		return err
	}
	var w io.Writer = os.Stdout
	if *rate == 0 && !*both {
		buf := bufio.NewWriterSize(os.Stdout, 64<<10)
		defer buf.Flush()
		w = buf
	}
	start := time.Now()
	for i := *from; *to == 0 || i <= *to; i++ {
		out := w
		if *both && i%2 == 1 {
			out = os.Stderr
		}
		if _, err := fmt.Fprintf(out, "%s%d\n", *prefix, i); err != nil {
			return err
		}
		if *rate > 0 {
			time.Sleep(time.Until(start.Add(time.Duration(float64(i-*from+1) / *rate * float64(time.Second)))))
		}
	}
	return nil
}

func spew(args []string) error {
	fs := flags()
	line := fs.Int("line", 100, "bytes with the newline")
	stderr := fs.Bool("stderr", false, "")
	rest, err := need(fs, args, 1)
	if err != nil {
		return err
	}
	left, err := size(rest[0])
	if err != nil {
		return err
	}
	out := os.Stdout
	if *stderr {
		out = os.Stderr
	}
	one := append(bytes.Repeat([]byte("x"), max(*line-1, 0)), '\n')
	block := bytes.Repeat(one, max(1, (64<<10)/len(one)))
	for left > 0 {
		n, err := out.Write(block[:min(left, int64(len(block)))])
		left -= int64(n)
		if err != nil {
			return err
		}
	}
	return nil
}

// size reads "4096", "64k", "10M", "1G".
func size(s string) (int64, error) {
	shift := 0
	switch s[max(len(s)-1, 0):] {
	case "k", "K":
		shift = 10
	case "m", "M":
		shift = 20
	case "g", "G":
		shift = 30
	}
	if shift > 0 {
		s = s[:len(s)-1]
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n << shift, err
}

// wait blocks for a duration given as the n-th argument, or for ever, and ends
// early and well at SIGTERM or SIGINT.
func wait(args []string, n int) error {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	var end <-chan time.Time
	if len(args) > n {
		d, err := time.ParseDuration(args[n])
		if err != nil {
			secs, serr := strconv.ParseFloat(args[n], 64)
			if serr != nil {
				return err
			}
			d = time.Duration(secs * float64(time.Second))
		}
		end = time.After(d)
	}
	select {
	case <-stop:
	case <-end:
	}
	return nil
}

func sleep(args []string) error { return wait(args, 0) }

func exit(args []string) error {
	rest, err := need(flags(), args, 1)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(rest[0])
	if err != nil {
		return err
	}
	if len(rest) > 1 {
		if err := wait(rest, 1); err != nil {
			return err
		}
	}
	return exitCode(n)
}

func mem(args []string) error {
	rest, err := need(flags(), args, 1)
	if err != nil {
		return err
	}
	n, err := size(rest[0])
	if err != nil {
		return err
	}
	held := make([][]byte, 0, n>>20+1)
	for left := n; left > 0; left -= 1 << 20 {
		b := make([]byte, min(left, 1<<20))
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		held = append(held, b)
	}
	fmt.Println("allocated", n)
	err = wait(rest, 1)
	held[0][0] = 2
	return err
}

func cpu(args []string) error {
	rest, err := need(flags(), args, 1)
	if err != nil {
		return err
	}
	d, err := time.ParseDuration(rest[0])
	if err != nil {
		return err
	}
	n := uint64(0)
	for end := time.Now().Add(d); time.Now().Before(end); n++ {
	}
	fmt.Println(n)
	return nil
}

// child starts this program again.
func child(args ...string) *exec.Cmd {
	c := exec.Command("/proc/self/exe", args...)
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	return c
}

func fork(args []string) error {
	rest, err := need(flags(), args, 1)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(rest[0])
	if err != nil {
		return err
	}
	made := 0
	for range n {
		c := child(append([]string{"sleep"}, rest[1:]...)...)
		if err := c.Start(); err != nil {
			fmt.Println("fork failed after", made, err)
			break
		}
		made++
		fmt.Println("child", c.Process.Pid)
	}
	fmt.Println("children", made)
	return wait(rest, 1)
}

func orphan(args []string) error {
	c := child(append([]string{"sleep"}, args...)...)
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		return err
	}
	fmt.Println("child", c.Process.Pid)
	return nil
}

func signals(args []string) error {
	fs := flags()
	ignore := fs.Bool("ignore", false, "go on after SIGTERM")
	if _, err := need(fs, args, 0); err != nil {
		return err
	}
	ch := make(chan os.Signal, 64)
	signal.Notify(ch)
	fmt.Println("ready", os.Getpid())
	for s := range ch {
		if s == syscall.SIGURG { // the Go scheduler's own
			continue
		}
		fmt.Println(unix.SignalName(s.(syscall.Signal)))
		if s == syscall.SIGTERM && !*ignore {
			return nil
		}
	}
	return nil
}

func read(args []string) error {
	rest, err := need(flags(), args, 1)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(rest[0])
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(b)
	return err
}

func write(args []string) error {
	rest, err := need(flags(), args, 2)
	if err != nil {
		return err
	}
	return os.WriteFile(rest[0], []byte(rest[1]), 0o644)
}

func appendLine(args []string) error {
	rest, err := need(flags(), args, 2)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(rest[0], os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := fmt.Fprintln(f, rest[1]); err != nil {
		return err
	}
	return f.Sync()
}

func echo(args []string) error {
	_, err := fmt.Println(strings.Join(args, " "))
	return err
}

func cat([]string) error {
	n, err := io.Copy(os.Stdout, os.Stdin)
	fmt.Fprintln(os.Stderr, "end of input after", n, "bytes")
	return err
}

func tty([]string) error {
	show := func() bool {
		ws, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
		if err != nil {
			fmt.Println("no terminal")
			return false
		}
		fmt.Printf("terminal %dx%d\n", ws.Col, ws.Row)
		return true
	}
	ch := make(chan os.Signal, 8)
	signal.Notify(ch, syscall.SIGWINCH, syscall.SIGTERM)
	if !show() {
		return nil
	}
	for s := range ch {
		if s == syscall.SIGTERM {
			return nil
		}
		show()
	}
	return nil
}

func openMany(args []string) error {
	rest, err := need(flags(), args, 1)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(rest[0])
	if err != nil {
		return err
	}
	var held []*os.File
	for range n {
		f, err := os.Open("/")
		if err != nil {
			break
		}
		held = append(held, f)
	}
	fmt.Println("opened", len(held))
	return nil
}

func sysctl(args []string) error {
	for _, name := range args {
		b, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
		if err != nil {
			return err
		}
		fmt.Printf("%s = %s\n", name, strings.TrimSpace(string(b)))
	}
	return nil
}
