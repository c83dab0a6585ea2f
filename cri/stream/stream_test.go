package stream

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/net/websocket"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// processes is a Runtime of ordinary processes of this machine.
type processes struct {
	mu    sync.Mutex
	sizes []string
	netns string
	alive []*process
}

type process struct {
	rt  *processes
	cmd *exec.Cmd
	end chan struct{}
}

func (r *processes) Exec(_ context.Context, id string, cmd []string, p Pipes) (Session, error) {
	if id == "gone" {
		return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
	}
	c := exec.Command(cmd[0], cmd[1:]...)
	// Not through exec.Cmd's copying: a nil *os.File must stay nil.
	if p.Stdin != nil {
		c.Stdin = p.Stdin
	}
	if p.Stdout != nil {
		c.Stdout = p.Stdout
	}
	if p.Stderr != nil {
		c.Stderr = p.Stderr
	}
	if err := c.Start(); err != nil {
		return nil, err
	}
	s := &process{rt: r, cmd: c, end: make(chan struct{})}
	go func() { defer close(s.end); _ = c.Wait() }()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.alive = append(r.alive, s)
	return s, nil
}

func (r *processes) Attach(ctx context.Context, id string, p Pipes) (Session, error) {
	return r.Exec(ctx, id, []string{"sh", "-c", "echo attached; cat"}, p)
}

func (r *processes) Netns(_ context.Context, id string) (string, error) {
	if id == "gone" {
		return "", fmt.Errorf("sandbox %q: %w", id, errdefs.ErrNotFound)
	}
	return r.netns, nil
}

func (s *process) Resize(w, h uint16) error {
	s.rt.mu.Lock()
	defer s.rt.mu.Unlock()
	s.rt.sizes = append(s.rt.sizes, fmt.Sprintf("%dx%d", w, h))
	return nil
}

func (s *process) Wait(ctx context.Context) (int, error) {
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-s.end:
		return s.cmd.ProcessState.ExitCode(), nil
	}
}

func (s *process) Close() error {
	select {
	case <-s.end:
	default:
		_ = s.cmd.Process.Kill()
		<-s.end
	}
	return nil
}

// serve runs a server and checks, when the test is over, that it leaves no
// goroutine, descriptor or process behind.
func serve(t *testing.T, rt *processes) *Server {
	t.Helper()
	return serveWith(t, Config{}, rt)
}

func serveWith(t *testing.T, c Config, rt *processes) *Server {
	t.Helper()
	fds, goroutines := count(t), runtime.NumGoroutine()
	s, err := New(c, rt)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c", Stdout: true}); !errdefs.IsUnavailable(err) {
		t.Errorf("before Run: got %v, want Unavailable", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	eventually(t, "listening", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.base != nil })
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("run: %v", err)
			}
		case <-time.After(time.Minute):
			buf := make([]byte, 1<<20)
			t.Fatalf("Run does not end:\n%s", buf[:runtime.Stack(buf, true)])
		}
		for _, p := range rt.alive {
			_ = p.Close()
		}
		eventually(t, "no descriptors left", func() bool { return count(t) <= fds })
		if !within(func() bool { return runtime.NumGoroutine() <= goroutines }) {
			buf := make([]byte, 1<<20)
			t.Errorf("goroutines left (%d, before %d):\n%s", runtime.NumGoroutine(), goroutines, buf[:runtime.Stack(buf, true)])
		}
	})
	return s
}

func count(t *testing.T) int {
	t.Helper()
	e, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(e)
}

func within(cond func() bool) bool {
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if cond() {
			return true
		}
	}
	return cond()
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	if !within(cond) {
		t.Errorf("not in time: %s", what)
	}
}

// client is one connection with the streams of remotecommand v4.
type client struct {
	stdin          io.WriteCloser
	stdout, stderr io.Reader
	status         io.Reader
	resize         io.Writer
	close          func()
}

// dialSPDY speaks as kubelet's and crictl's client does.
func dialSPDY(t *testing.T, rawURL, protocol string, r *runtimeapi.ExecRequest) *client {
	t.Helper()
	conn := spdyConn(t, rawURL, protocol)
	stream := func(kind string) httpstream.Stream {
		s, err := conn.CreateStream(http.Header{"streamType": {kind}})
		if err != nil {
			t.Fatalf("create stream %s: %v", kind, err)
		}
		return s
	}
	c := &client{close: func() { conn.Close() }}
	c.status = stream("error")
	if r.Stdin {
		c.stdin = stream("stdin")
	}
	if r.Stdout {
		c.stdout = stream("stdout")
	}
	if r.Stderr {
		c.stderr = stream("stderr")
	}
	if r.Tty {
		c.resize = stream("resize")
	}
	t.Cleanup(c.close)
	return c
}

func spdyConn(t *testing.T, rawURL, protocol string) httpstream.Connection {
	t.Helper()
	rt, err := spdy.NewRoundTripper(&tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest(http.MethodPost, rawURL, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(httpstream.HeaderProtocolVersion, protocol)
	resp, err := rt.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	conn, err := rt.NewConnection(resp)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// dialWS reads all channels into buffers that end with the connection.
func dialWS(t *testing.T, rawURL, protocol string, r *runtimeapi.ExecRequest) *client {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	u.Scheme = "ws"
	ws, err := websocket.Dial(u.String(), protocol, "http://localhost")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ws.Close() })
	var readers [8]*io.PipeReader
	var writers [8]*io.PipeWriter
	for i := range readers {
		readers[i], writers[i] = io.Pipe()
	}
	go func() {
		for {
			var frame []byte
			if err := websocket.Message.Receive(ws, &frame); err != nil {
				for _, w := range writers {
					w.Close()
				}
				return
			}
			if len(frame) > 1 {
				_, _ = writers[frame[0]].Write(frame[1:])
			}
		}
	}()
	send := func(ch byte) wsChannel { return wsChannel{ws, ch, strings.HasPrefix(protocol, "v5")} }
	return &client{stdin: send(0), stdout: readers[1], stderr: readers[2], status: readers[3], resize: send(4), close: func() { ws.Close() }}
}

type wsChannel struct {
	ws *websocket.Conn
	ch byte
	v5 bool
}

func (w wsChannel) Write(b []byte) (int, error) {
	return len(b), websocket.Message.Send(w.ws, append([]byte{w.ch}, b...))
}

func (w wsChannel) Close() error {
	if !w.v5 {
		return nil // v4 cannot close one channel
	}
	return websocket.Message.Send(w.ws, []byte{255, w.ch})
}

type dialer func(t *testing.T, rawURL, protocol string, r *runtimeapi.ExecRequest) *client

func eachProtocol(t *testing.T, fn func(t *testing.T, name string, dial dialer, protocol string)) {
	for _, p := range []struct {
		name, protocol string
		dial           dialer
	}{
		{"SPDY", "v4.channel.k8s.io", dialSPDY},
		{"WebSocket v4", "v4.channel.k8s.io", dialWS},
		{"WebSocket v5", "v5.channel.k8s.io", dialWS},
	} {
		t.Run(p.name, func(t *testing.T) { fn(t, p.name, p.dial, p.protocol) })
	}
}

// result is everything that a client saw.
type result struct {
	Stdout, Stderr string
	Code           int    // of the status
	Message        string // of a status that is neither success nor a code
}

func (c *client) wait(t *testing.T) result {
	t.Helper()
	var res result
	var wg sync.WaitGroup
	read := func(r io.Reader, into *string) {
		if r != nil {
			wg.Go(func() { b, _ := io.ReadAll(r); *into = string(b) })
		}
	}
	var status string
	read(c.stdout, &res.Stdout)
	read(c.stderr, &res.Stderr)
	read(c.status, &status)
	wg.Wait()
	var st struct {
		Status, Message, Reason string
		Details                 struct {
			Causes []struct{ Reason, Message string }
		}
	}
	if err := json.Unmarshal([]byte(status), &st); err != nil {
		t.Fatalf("status %q: %v", status, err)
	}
	switch {
	case st.Reason == "NonZeroExitCode":
		res.Code, _ = strconv.Atoi(st.Details.Causes[0].Message)
	case st.Status != "Success":
		res.Message = st.Message
	}
	return res
}

func TestExec(t *testing.T) {
	eachProtocol(t, func(t *testing.T, _ string, dial dialer, protocol string) {
		s := serve(t, &processes{})
		big := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB
		for name, tc := range map[string]struct {
			id, script string
			want       result
		}{
			"output":     {"c", "echo out; echo err >&2", result{Stdout: "out\n", Stderr: "err\n"}},
			"exit code":  {"c", "echo x; exit 42", result{Stdout: "x\n", Code: 42}},
			"no output":  {"c", "true", result{}},
			"a lot":      {"c", "i=0; while [ $i -lt 65536 ]; do printf 0123456789abcdef; i=$((i+1)); done", result{Stdout: big}},
			"no such":    {"gone", "true", result{Message: `container "gone": not found`}},
			"background": {"c", "sleep 100 & echo started; exit 3", result{Stdout: "started\n", Code: 3}},
		} {
			t.Run(name, func(t *testing.T) {
				r := &runtimeapi.ExecRequest{ContainerId: tc.id, Cmd: []string{"sh", "-c", tc.script}, Stdout: true, Stderr: true}
				resp, err := s.GetExec(r)
				if err != nil {
					t.Fatal(err)
				}
				got := dial(t, resp.Url, protocol, r).wait(t)
				got.Message = strings.TrimPrefix(got.Message, "Internal error occurred: error executing command in container: ")
				if got != tc.want {
					t.Errorf("got %.200q, want %.200q", fmt.Sprint(got), fmt.Sprint(tc.want))
				}
			})
		}
	})
}

func TestExecStdinHalfClose(t *testing.T) {
	eachProtocol(t, func(t *testing.T, name string, dial dialer, protocol string) {
		if name == "WebSocket v4" {
			t.Skip("has no half-close")
		}
		s := serve(t, &processes{})
		r := &runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"sh", "-c", "cat; echo end"}, Stdin: true, Stdout: true}
		resp, err := s.GetExec(r)
		if err != nil {
			t.Fatal(err)
		}
		c := dial(t, resp.Url, protocol, r)
		sent := bytes.Repeat([]byte("line\n"), 200_000)
		go func() {
			for rest := sent; len(rest) > 0; rest = rest[min(32<<10, len(rest)):] {
				_, _ = c.stdin.Write(rest[:min(32<<10, len(rest))])
			}
			c.stdin.Close()
		}()
		if got := c.wait(t); got.Stdout != string(sent)+"end\n" {
			t.Errorf("got %d bytes, want %d", len(got.Stdout), len(sent)+4)
		}
	})
}

// A client that reads late gets everything, also what was still in the pipe
// when the process ended.
func TestSlowClient(t *testing.T) {
	s := serve(t, &processes{})
	r := &runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"dd", "if=/dev/zero", "bs=1M", "count=16", "status=none"}, Stdout: true}
	resp, err := s.GetExec(r)
	if err != nil {
		t.Fatal(err)
	}
	c := dialWS(t, resp.Url, "v5.channel.k8s.io", r)
	time.Sleep(1500 * time.Millisecond) // nobody reads the pipes of the test's client
	if got := c.wait(t); len(got.Stdout) != 16<<20 {
		t.Errorf("got %d bytes, want %d", len(got.Stdout), 16<<20)
	}
}

// A process that does not read its stdin must not keep the session.
func TestExecEndsWithUnreadStdin(t *testing.T) {
	eachProtocol(t, func(t *testing.T, _ string, dial dialer, protocol string) {
		s := serve(t, &processes{})
		r := &runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"sh", "-c", "sleep 0.1; exit 7"}, Stdin: true, Stdout: true}
		resp, err := s.GetExec(r)
		if err != nil {
			t.Fatal(err)
		}
		c := dial(t, resp.Url, protocol, r)
		go func() {
			for range 100 {
				if _, err := c.stdin.Write(make([]byte, 32<<10)); err != nil {
					return
				}
			}
		}()
		if got := c.wait(t); got.Code != 7 {
			t.Errorf("got %+v, want code 7", got)
		}
	})
}

func TestTerminalSizes(t *testing.T) {
	eachProtocol(t, func(t *testing.T, _ string, dial dialer, protocol string) {
		rt := &processes{}
		s := serve(t, rt)
		r := &runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"cat"}, Stdin: true, Stdout: true, Tty: true}
		resp, err := s.GetExec(r)
		if err != nil {
			t.Fatal(err)
		}
		c := dial(t, resp.Url, protocol, r)
		for _, size := range []string{`{"Width":80,"Height":24}`, `{"Width":120,"Height":50}`} {
			if _, err := c.resize.Write([]byte(size)); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "both sizes", func() bool {
			rt.mu.Lock()
			defer rt.mu.Unlock()
			return fmt.Sprint(rt.sizes) == "[80x24 120x50]"
		})
		// A client that hangs up ends what it ran on a terminal.
		c.close()
		eventually(t, "process killed", func() bool {
			select {
			case <-rt.alive[0].end:
				return true
			default:
				return false
			}
		})
	})
}

func TestAttachEndsWithClient(t *testing.T) {
	eachProtocol(t, func(t *testing.T, _ string, dial dialer, protocol string) {
		rt := &processes{}
		s := serve(t, rt)
		resp, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c", Stdin: true, Stdout: true, Stderr: true})
		if err != nil {
			t.Fatal(err)
		}
		c := dial(t, resp.Url, protocol, &runtimeapi.ExecRequest{Stdin: true, Stdout: true, Stderr: true})
		go func() { _, _ = io.Copy(io.Discard, c.stderr) }()
		line := make([]byte, len("attached\nhello\n"))
		go func() { _, _ = c.stdin.Write([]byte("hello\n")) }()
		if _, err := io.ReadFull(c.stdout, line); err != nil || string(line) != "attached\nhello\n" {
			t.Fatalf("got %q, %v", line, err)
		}
		c.close()
		eventually(t, "detached", func() bool {
			select {
			case <-rt.alive[0].end:
				return true
			default:
				return false
			}
		})
	})
}

// A client that vanishes from an exec without a terminal leaves no descriptor
// of ours; the process itself goes on.
func TestExecSurvivesClient(t *testing.T) {
	rt := &processes{}
	s := serve(t, rt)
	before := count(t)
	r := &runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"sleep", "60"}, Stdin: true, Stdout: true, Stderr: true}
	resp, err := s.GetExec(r)
	if err != nil {
		t.Fatal(err)
	}
	c := dialSPDY(t, resp.Url, "v4.channel.k8s.io", r)
	eventually(t, "started", func() bool { rt.mu.Lock(); defer rt.mu.Unlock(); return len(rt.alive) == 1 })
	c.close()
	eventually(t, "pipes closed", func() bool { return count(t) <= before+1 }) // a pidfd
	if err := rt.alive[0].cmd.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("the process is gone: %v", err)
	}
}

func TestTLS(t *testing.T) {
	pair := httptest.NewUnstartedServer(nil)
	pair.StartTLS()
	certs := pair.TLS.Certificates
	pair.Close()
	rt := &processes{}
	s := serveWith(t, Config{TLS: &tls.Config{Certificates: certs}}, rt)
	r := &runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"cat"}, Stdin: true, Stdout: true, Tty: true}
	resp, err := s.GetExec(r)
	if err != nil || !strings.HasPrefix(resp.Url, "https://") {
		t.Fatal(resp, err)
	}
	c := dialSPDY(t, resp.Url, "v4.channel.k8s.io", r)
	if _, err := c.stdin.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(c.stdout, got); err != nil || string(got) != "hello" {
		t.Errorf("got %q, %v", got, err)
	}
	c.close()
	eventually(t, "process killed", func() bool {
		select {
		case <-rt.alive[0].end:
			return true
		default:
			return false
		}
	})
}

func TestTokensAreForOneUse(t *testing.T) {
	s := serve(t, &processes{})
	r := &runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"true"}, Stdout: true}
	resp, err := s.GetExec(r)
	if err != nil {
		t.Fatal(err)
	}
	dialSPDY(t, resp.Url, "v4.channel.k8s.io", r).wait(t)
	fresh, err := s.GetExec(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range []string{resp.Url, resp.Url + "x", strings.Replace(fresh.Url, "exec", "attach", 1), strings.TrimSuffix(fresh.Url, fresh.Url[len(fresh.Url)-1:])} {
		again, err := http.Post(u, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		again.Body.Close()
		if again.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s, want 404", u, again.Status)
		}
	}
}

// listenIn listens on addr inside the namespace, echoes with a prefix and
// half-closes behind the client.
func listenIn(t *testing.T, netns, addr string) int {
	t.Helper()
	var l net.Listener
	var err error
	listen := func() (keep bool) {
		if netns != "" {
			f, oerr := os.Open(netns)
			if oerr != nil {
				err = oerr
				return true
			}
			defer f.Close()
			if err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
				return true
			}
		}
		l, err = net.Listen("tcp", addr)
		return netns == ""
	}
	onThread(listen)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				data, _ := io.ReadAll(c) // up to the client's half-close
				_, _ = c.Write(append([]byte("got "), data...))
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

// newNetns makes a network namespace with lo up and returns its path.
func newNetns(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	var f *os.File
	var err error
	onThread(func() bool {
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return false
		}
		if f, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return false
		}
		err = loUp()
		return false
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return fmt.Sprintf("/proc/self/fd/%d", f.Fd())
}

func loUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

func TestPortForward(t *testing.T) {
	for _, where := range []string{"host", "namespace"} {
		for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
			for how, dial := range map[string]func(*testing.T, string) httpstream.Connection{"SPDY": forwardSPDY, "WebSocket": forwardTunnel} {
				t.Run(where+" "+addr+" "+how, func(t *testing.T) {
					netns := ""
					if where == "namespace" {
						netns = newNetns(t)
					}
					port := listenIn(t, netns, addr)
					s := serve(t, &processes{netns: netns})
					resp, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "s"})
					if err != nil {
						t.Fatal(err)
					}
					conn := dial(t, resp.Url)
					defer conn.Close()
					sent := bytes.Repeat([]byte("ping "), 50_000)
					for id := range 3 { // several connections on one
						data, fail := forwardStreams(t, conn, id, port)
						go func() {
							_, _ = data.Write(sent)
							data.Close()
						}()
						got, err := io.ReadAll(data)
						if err != nil || string(got) != "got "+string(sent) {
							t.Errorf("got %d bytes, %v; want %d", len(got), err, len(sent)+4)
						}
						if msg, _ := io.ReadAll(fail); len(msg) > 0 {
							t.Errorf("error stream: %s", msg)
						}
					}
				})
			}
		}
	}
}

func forwardSPDY(t *testing.T, rawURL string) httpstream.Connection {
	return spdyConn(t, rawURL, "portforward.k8s.io")
}

// forwardTunnel does what kubectl and crictl do for --transport websocket.
func forwardTunnel(t *testing.T, rawURL string) httpstream.Connection {
	t.Helper()
	ws, err := websocket.Dial(strings.Replace(rawURL, "http", "ws", 1), "SPDY/3.1+portforward.k8s.io", "http://localhost")
	if err != nil {
		t.Fatal(err)
	}
	ws.PayloadType = websocket.BinaryFrame
	conn, err := spdy.NewClientConnection(ws)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// A silent pod and a client that is gone: nothing may stay.
func TestPortForwardClientGone(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := serve(t, &processes{})
	resp, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "s"})
	if err != nil {
		t.Fatal(err)
	}
	conn := forwardSPDY(t, resp.Url)
	forwardStreams(t, conn, 1, l.Addr().(*net.TCPAddr).Port)
	pod, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer pod.Close()
	conn.Close()
	_ = pod.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := io.ReadAll(pod); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection into the pod stays open")
	}
}

func forwardStreams(t *testing.T, conn httpstream.Connection, id, port int) (data, fail httpstream.Stream) {
	t.Helper()
	h := http.Header{"port": {strconv.Itoa(port)}, "requestID": {strconv.Itoa(id)}}
	stream := func(kind string) httpstream.Stream {
		h.Set("streamType", kind)
		s, err := conn.CreateStream(h)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	fail = stream("error")
	fail.Close()
	return stream("data"), fail
}

func TestPortForwardWebSocket(t *testing.T) {
	netns := newNetns(t)
	port := listenIn(t, netns, "127.0.0.1:0")
	s := serve(t, &processes{netns: netns})
	resp, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "s", Port: []int32{int32(port)}})
	if err != nil {
		t.Fatal(err)
	}
	ws, err := websocket.Dial(strings.Replace(resp.Url, "http", "ws", 1), "v4.channel.k8s.io", "http://localhost")
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	for ch := range 2 {
		var frame []byte
		if err := websocket.Message.Receive(ws, &frame); err != nil || len(frame) != 3 || int(frame[0]) != ch || int(binary.LittleEndian.Uint16(frame[1:])) != port {
			t.Fatalf("first frame of channel %d: %v, %v", ch, frame, err)
		}
	}
	if err := websocket.Message.Send(ws, append([]byte{0}, "x"...)); err != nil {
		t.Fatal(err)
	}
	// A WebSocket has no half-close: the echo comes when the connection goes.
}

func TestPortForwardRefused(t *testing.T) {
	netns := newNetns(t)
	s := serve(t, &processes{netns: netns})
	resp, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "s"})
	if err != nil {
		t.Fatal(err)
	}
	conn := spdyConn(t, resp.Url, "portforward.k8s.io")
	defer conn.Close()
	data, fail := forwardStreams(t, conn, 1, 9)
	msg, _ := io.ReadAll(fail)
	for _, want := range []string{"connect to port 9 of the pod", "127.0.0.1:9", "[::1]:9", "connection refused"} {
		if !strings.Contains(string(msg), want) {
			t.Errorf("message %q lacks %q", msg, want)
		}
	}
	if _, err := io.ReadAll(data); err != nil && !errors.Is(err, io.EOF) {
		t.Logf("data stream: %v", err)
	}
}

func TestTickets(t *testing.T) {
	var ts tickets
	now := time.Now()
	first, err := ts.add("exec", 1, now)
	if err != nil || len(first) < 26 {
		t.Fatalf("%q, %v", first, err)
	}
	for range maxTickets - 1 {
		if _, err := ts.add("exec", 1, now.Add(time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := ts.add("exec", 1, now.Add(2*time.Second)); !errdefs.IsResourceExhausted(err) {
		t.Errorf("one too many: %v", err)
	}
	if _, err := ts.add("exec", 1, now.Add(ticketLife)); err != nil {
		t.Errorf("the first has expired: %v", err)
	}
	if _, ok := ts.take("exec", first, now); ok {
		t.Error("an expired ticket was taken")
	}
	last, err := ts.add("attach", 2, now.Add(2*ticketLife))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := ts.take("exec", last, now); ok {
		t.Error("taken for another kind")
	}
	if r, ok := ts.take("attach", last, now); !ok || r != 2 {
		t.Errorf("got %v, %v", r, ok)
	}
	if _, ok := ts.take("attach", last, now); ok {
		t.Error("taken twice")
	}
}

func TestGetRefuses(t *testing.T) {
	s := serve(t, &processes{})
	for name, get := range map[string]func() error{
		"no container": func() error { _, err := s.GetExec(&runtimeapi.ExecRequest{Stdout: true}); return err },
		"no stream":    func() error { _, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c"}); return err },
		"tty, stderr": func() error {
			_, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c", Tty: true, Stderr: true})
			return err
		},
		"attach stream": func() error { _, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c"}); return err },
		"no sandbox":    func() error { _, err := s.GetPortForward(&runtimeapi.PortForwardRequest{}); return err },
		"port": func() error {
			_, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "s", Port: []int32{1 << 16}})
			return err
		},
	} {
		if err := get(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got %v, want InvalidArgument", name, err)
		}
	}
}

func TestBaseURL(t *testing.T) {
	base, err := url.Parse("https://node.example:1234/streams/")
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{BaseURL: base}, &processes{})
	if err != nil {
		t.Fatal(err)
	}
	s.base = base
	resp, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c", Stdin: true})
	if err != nil || !strings.HasPrefix(resp.Url, "https://node.example:1234/streams/attach/") {
		t.Fatalf("got %v, %v", resp, err)
	}
	u, _ := url.Parse(resp.Url)
	token := u.Path[strings.LastIndex(u.Path, "/")+1:]
	rec := httptest.NewRecorder()
	s.handler().ServeHTTP(rec, httptest.NewRequest(http.MethodPost, "http://x/streams/exec/"+token, nil))
	if rec.Code != http.StatusNotFound {
		t.Errorf("code %d for another kind", rec.Code)
	}
	s.handler().ServeHTTP(rec, httptest.NewRequest(http.MethodPost, "http://x"+u.Path, nil))
	if _, ok := s.tickets.take(kindAttach, token, time.Now()); ok {
		t.Error("the path below the base URL was not found")
	}
}

func TestNewRefuses(t *testing.T) {
	if _, err := New(Config{Addr: "nowhere"}, &processes{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v, want InvalidArgument", err)
	}
	if _, err := New(Config{}, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v, want InvalidArgument", err)
	}
}

func BenchmarkDialInNetns(b *testing.B) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	for b.Loop() {
		c, err := dialLocalhost(b.Context(), "/proc/self/ns/net", uint16(l.Addr().(*net.TCPAddr).Port))
		if err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}
