package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// session is a client's side of an exec or attach, over either protocol.
type session struct {
	stdin  io.WriteCloser
	stdout bytes.Buffer
	stderr bytes.Buffer
	resize func(w, h uint16) error
	close  func()
	done   chan struct{} // all output has ended
	mu     sync.Mutex    // guards the fields below and the buffers
	err    error         // what the error channel said
}

func (s *session) out() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stdout.String()
}

func (s *session) write(b *bytes.Buffer, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b.Write(p)
}

// wait waits until the other side has ended the session.
func (s *session) wait(t testing.TB) error {
	t.Helper()
	select {
	case <-s.done:
	case <-time.After(patience):
		t.Fatalf("the session does not end; stdout so far %q", s.out())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// exitCode extracts the code from the status that ends an exec; 0 for success.
func exitCode(err error) (int, error) {
	if err == nil {
		return 0, nil
	}
	var st struct {
		Status, Message string
		Details         struct {
			Causes []struct{ Reason, Message string }
		}
	}
	if json.Unmarshal([]byte(err.Error()), &st) != nil {
		return 0, err
	}
	if st.Status == "Success" {
		return 0, nil
	}
	for _, c := range st.Details.Causes {
		if c.Reason == "ExitCode" {
			return strconv.Atoi(c.Message)
		}
	}
	return 0, err
}

type want struct{ stdin, stdout, stderr, tty bool }

type dialer struct {
	name string
	dial func(t testing.TB, url string, w want) *session
}

var dialers = []dialer{{"spdy", dialSPDY}, {"websocket", dialWebSocket}}

func dialSPDY(t testing.TB, target string, w want) *session {
	t.Helper()
	rt, err := spdy.NewRoundTripper(nil)
	if err != nil {
		t.Fatal(err)
	}
	conn := upgrade(t, rt, target, "v4.channel.k8s.io")
	s := &session{done: make(chan struct{}), close: func() { conn.Close() }}
	stream := func(kind string) httpstream.Stream {
		h := http.Header{}
		h.Set("streamType", kind)
		st, err := conn.CreateStream(h)
		if err != nil {
			t.Fatalf("open %s stream: %v", kind, err)
		}
		return st
	}
	errs := stream("error")
	var wg sync.WaitGroup
	wg.Go(func() {
		b, _ := io.ReadAll(errs)
		if len(b) > 0 {
			s.mu.Lock()
			s.err = errors.New(string(b))
			s.mu.Unlock()
		}
	})
	if w.stdin {
		s.stdin = stream("stdin")
	}
	read := func(kind string, b *bytes.Buffer) {
		st := stream(kind)
		wg.Go(func() {
			buf := make([]byte, 32<<10)
			for {
				n, err := st.Read(buf)
				s.write(b, buf[:n])
				if err != nil {
					return
				}
			}
		})
	}
	if w.stdout {
		read("stdout", &s.stdout)
	}
	if w.stderr && !w.tty {
		read("stderr", &s.stderr)
	}
	if w.tty {
		rs := stream("resize")
		s.resize = func(w, h uint16) error {
			return json.NewEncoder(rs).Encode(map[string]uint16{"Width": w, "Height": h})
		}
	}
	go func() { wg.Wait(); conn.Close(); close(s.done) }()
	t.Cleanup(s.close)
	return s
}

func upgrade(t testing.TB, rt *spdy.SpdyRoundTripper, target, protocol string) httpstream.Connection {
	t.Helper()
	req, err := http.NewRequest(http.MethodPost, target, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Stream-Protocol-Version", protocol)
	resp, err := rt.RoundTrip(req)
	if err != nil {
		t.Fatalf("upgrade %s: %v", target, err)
	}
	defer resp.Body.Close()
	conn, err := rt.NewConnection(resp)
	if err != nil {
		t.Fatalf("upgrade %s: %v", target, err)
	}
	return conn
}

func dialWebSocket(t testing.TB, target string, w want) *session {
	t.Helper()
	conn := dialWS(t, target, "v4.channel.k8s.io")
	s := &session{done: make(chan struct{}), close: func() { conn.Close() }}
	if w.stdin {
		s.stdin = wsWriter{conn, 0}
	}
	if w.tty {
		s.resize = func(w, h uint16) error {
			b, _ := json.Marshal(map[string]uint16{"Width": w, "Height": h})
			_, err := wsWriter{conn, 4}.Write(b)
			return err
		}
	}
	go func() {
		defer close(s.done)
		for {
			var msg []byte
			if err := websocket.Message.Receive(conn, &msg); err != nil {
				return
			}
			if len(msg) == 0 {
				continue
			}
			switch msg[0] {
			case 1:
				s.write(&s.stdout, msg[1:])
			case 2:
				s.write(&s.stderr, msg[1:])
			case 3:
				if len(msg) > 1 {
					s.mu.Lock()
					s.err = errors.New(string(msg[1:]))
					s.mu.Unlock()
				}
			}
		}
	}()
	t.Cleanup(s.close)
	return s
}

func dialWS(t testing.TB, target, protocol string) *websocket.Conn {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	u.Scheme = "ws"
	cfg, err := websocket.NewConfig(u.String(), "http://localhost/")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Protocol = []string{protocol}
	conn, err := websocket.DialConfig(cfg)
	if err != nil {
		t.Fatalf("websocket %s: %v", target, err)
	}
	conn.PayloadType = websocket.BinaryFrame
	return conn
}

// wsWriter writes to one channel of a websocket; closing it is not possible in
// version 4 of the protocol.
type wsWriter struct {
	conn    *websocket.Conn
	channel byte
}

func (w wsWriter) Write(p []byte) (int, error) {
	if err := websocket.Message.Send(w.conn, append([]byte{w.channel}, p...)); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (w wsWriter) Close() error { return nil }

func (c *container) exec(t testing.TB, d dialer, w want, cmd ...string) *session {
	t.Helper()
	r, err := c.pod.node.Runtime().Exec(callCtx(t), &runtimeapi.ExecRequest{ContainerId: c.id, Cmd: cmd, Stdin: w.stdin, Stdout: w.stdout, Stderr: w.stderr, Tty: w.tty})
	if err != nil {
		t.Fatalf("Exec: %v", err)
	}
	return d.dial(t, r.Url, w)
}

func (c *container) attach(t testing.TB, d dialer, w want) *session {
	t.Helper()
	r, err := c.pod.node.Runtime().Attach(callCtx(t), &runtimeapi.AttachRequest{ContainerId: c.id, Stdin: w.stdin, Stdout: w.stdout, Stderr: w.stderr, Tty: w.tty})
	if err != nil {
		t.Fatalf("Attach: %v", err)
	}
	return d.dial(t, r.Url, w)
}

func TestExec(t *testing.T) {
	p := runPod(t)
	c := p.run(t)
	for _, d := range dialers {
		t.Run(d.name, func(t *testing.T) {
			s := c.exec(t, d, want{stdout: true, stderr: true}, "/bin/sh", "-c", "echo out; echo err >&2; exit 7")
			code, err := exitCode(s.wait(t))
			equal(t, "stdout", s.stdout.String(), "out\n")
			equal(t, "stderr", s.stderr.String(), "err\n")
			if err != nil || code != 7 {
				t.Errorf("exit code %d, %v; want 7", code, err)
			}

			in := c.exec(t, d, want{stdin: true, stdout: true}, "/bin/head", "-n", "2")
			io.WriteString(in.stdin, "one\ntwo\n")
			if err := in.wait(t); err != nil {
				if code, _ := exitCode(err); code != 0 {
					t.Error(err)
				}
			}
			equal(t, "echoed stdin", in.stdout.String(), "one\ntwo\n")

			const size = 3 << 20
			big := c.exec(t, d, want{stdout: true}, "/bin/sh", "-c", fmt.Sprintf("head -c %d /dev/zero | tr '\\0' z", size))
			big.wait(t)
			if got := big.stdout.String(); got != strings.Repeat("z", size) {
				t.Errorf("%d bytes of output, want %d z", len(got), size)
			}

			tty := c.exec(t, d, want{stdin: true, stdout: true, tty: true}, "/bin/sh")
			if err := tty.resize(123, 45); err != nil {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
			io.WriteString(tty.stdin, "stty size; tty\n")
			eventually(t, func() error {
				if out := tty.out(); !strings.Contains(out, "45 123") || !strings.Contains(out, "/dev/pts/") {
					return fmt.Errorf("terminal says %q, want size 45 123", out)
				}
				return nil
			})
			tty.resize(80, 24)
			time.Sleep(100 * time.Millisecond)
			io.WriteString(tty.stdin, "stty size; exit 3\n")
			code, err = exitCode(tty.wait(t))
			contains(t, "after another resize", tty.out(), "24 80")
			if err != nil || code != 3 {
				t.Errorf("exit code %d, %v; want 3", code, err)
			}
		})
	}
	if r, err := shared.Runtime().Exec(callCtx(t), &runtimeapi.ExecRequest{ContainerId: c.id, Cmd: []string{"/bin/true"}}); err == nil {
		t.Errorf("exec without any stream: got %s", r.Url)
	}
	if r, err := shared.Runtime().Exec(callCtx(t), &runtimeapi.ExecRequest{ContainerId: c.id, Cmd: []string{"/bin/true"}, Tty: true, Stdout: true, Stderr: true}); err == nil {
		t.Errorf("exec with tty and stderr: got %s", r.Url)
	}
	c.stop(t, 0)
	_, err := shared.Runtime().Exec(callCtx(t), &runtimeapi.ExecRequest{ContainerId: c.id, Cmd: []string{"/bin/true"}, Stdout: true})
	wantCode(t, "exec in an exited container", err, codes.FailedPrecondition, codes.NotFound, codes.Unknown)
}

// TestExecURLOnce: a streaming URL is good for one use.
func TestExecURLOnce(t *testing.T) {
	p := runPod(t)
	c := p.run(t)
	r, err := shared.Runtime().Exec(callCtx(t), &runtimeapi.ExecRequest{ContainerId: c.id, Cmd: []string{"/bin/true"}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	dialSPDY(t, r.Url, want{stdout: true}).wait(t)
	resp, err := http.Post(r.Url, "", nil)
	if err != nil {
		return
	}
	defer resp.Body.Close()
	if resp.StatusCode < 400 {
		t.Errorf("the second use answers %s", resp.Status)
	}
}

// TestExecAbandoned: what an exec started dies when its client leaves.
func TestExecAbandoned(t *testing.T) {
	p := runPod(t)
	c := p.run(t)
	s := c.exec(t, dialers[0], want{stdin: true, stdout: true, tty: true}, "/bin/sh", "-c", "echo ready; sleep 424242")
	eventually(t, func() error {
		if !strings.Contains(s.out(), "ready") {
			return fmt.Errorf("not started: %q", s.out())
		}
		return nil
	})
	s.close()
	eventually(t, func() error {
		if left := node.ProcessesNaming("sleep 424242"); len(left) > 0 {
			return fmt.Errorf("processes %v live on", left)
		}
		return nil
	})
}

func TestAttach(t *testing.T) {
	p := runPod(t)
	for _, d := range dialers {
		t.Run(d.name, func(t *testing.T) {
			c := p.run(t, script(`while read x; do echo "got $x"; echo "err $x" >&2; done; echo end of input; sleep 1000`),
				func(c *runtimeapi.ContainerConfig) { c.Stdin = true })
			s := c.attach(t, d, want{stdin: true, stdout: true, stderr: true})
			time.Sleep(100 * time.Millisecond)
			io.WriteString(s.stdin, "hello\n")
			eventually(t, func() error {
				if s.out() != "got hello\n" {
					return fmt.Errorf("stdout %q", s.out())
				}
				return nil
			})
			// Detaching leaves the container alone; a second client goes on.
			s.close()
			time.Sleep(100 * time.Millisecond)
			two := c.attach(t, d, want{stdin: true, stdout: true, stderr: true})
			three := c.attach(t, d, want{stdout: true})
			time.Sleep(100 * time.Millisecond)
			io.WriteString(two.stdin, "again\n")
			for _, s := range []*session{two, three} {
				eventually(t, func() error {
					if !strings.Contains(s.out(), "got again\n") {
						return fmt.Errorf("stdout %q", s.out())
					}
					return nil
				})
			}
			waitLog(t, c, "got again")
			waitLog(t, c, "err again")
			c.stop(t, 0)
			two.wait(t) // ends with the container
			three.wait(t)
		})
	}
	t.Run("tty", func(t *testing.T) {
		c := p.run(t, command("/bin/sh"), func(c *runtimeapi.ContainerConfig) { c.Stdin, c.Tty = true, true })
		s := c.attach(t, dialers[0], want{stdin: true, stdout: true, tty: true})
		s.resize(99, 11)
		time.Sleep(100 * time.Millisecond)
		io.WriteString(s.stdin, "stty size\n")
		eventually(t, func() error {
			if !strings.Contains(s.out(), "11 99") {
				return fmt.Errorf("terminal says %q", s.out())
			}
			return nil
		})
	})
	t.Run("stdin once", func(t *testing.T) {
		c := p.run(t, script("cat; echo end"), func(c *runtimeapi.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })
		s := c.attach(t, dialers[0], want{stdin: true, stdout: true})
		time.Sleep(100 * time.Millisecond)
		io.WriteString(s.stdin, "text")
		s.stdin.Close()
		c.waitExit(t)
		equal(t, "log", c.text(t), "textend")
	})
}

func TestPortForward(t *testing.T) {
	p := runPod(t, func(c *runtimeapi.PodSandboxConfig) { c.Hostname = "fwd" })
	c := p.run(t, echoServer(8123))
	waitLog(t, c, "up")
	forward := func(t *testing.T, ports ...int32) string {
		r, err := shared.Runtime().PortForward(callCtx(t), &runtimeapi.PortForwardRequest{PodSandboxId: p.id, Port: ports})
		if err != nil {
			t.Fatalf("PortForward: %v", err)
		}
		return r.Url
	}
	t.Run("spdy", func(t *testing.T) {
		rt, err := spdy.NewRoundTripper(nil)
		if err != nil {
			t.Fatal(err)
		}
		conn := upgrade(t, rt, forward(t), "portforward.k8s.io")
		defer conn.Close()
		// forwardOne sends text to a port and returns what comes back from there
		// and on the stream for errors.
		forwardOne := func(port, id int, text string) (got, problem string, err error) {
			h := http.Header{}
			h.Set("port", fmt.Sprint(port))
			h.Set("requestID", fmt.Sprint(id))
			h.Set("streamType", "error")
			errs, err := conn.CreateStream(h)
			if err != nil {
				return "", "", err
			}
			errs.Close()
			h.Set("streamType", "data")
			data, err := conn.CreateStream(h)
			if err != nil {
				return "", "", err
			}
			data.Write([]byte(text))
			data.Close()
			b, _ := io.ReadAll(data)
			e, _ := io.ReadAll(errs)
			return string(b), string(e), nil
		}
		id := 0
		for range 3 {
			eventually(t, func() error {
				id++
				got, problem, err := forwardOne(8123, id, "\n")
				if err == nil && (got != "hello-fwd\n" || problem != "") {
					err = fmt.Errorf("got %q and %q", got, problem)
				}
				return err
			})
		}
		eventually(t, func() error {
			id++
			_, problem, err := forwardOne(8124, id, "")
			if err == nil && !strings.Contains(problem, "8124") {
				err = fmt.Errorf("a port where nobody listens: error %q does not name it", problem)
			}
			return err
		})
	})
	t.Run("websocket", func(t *testing.T) {
		eventually(t, func() error {
			conn := dialWS(t, forward(t, 8123)+"?port=8123", "v4.channel.k8s.io")
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(5 * time.Second))
			wsWriter{conn, 0}.Write([]byte("\n"))
			var got strings.Builder
			for {
				var msg []byte
				if err := websocket.Message.Receive(conn, &msg); err != nil {
					break
				}
				// Each channel begins with the port number in two bytes.
				if len(msg) > 1 && msg[0] == 0 && !(len(msg) == 3 && msg[1] == 0xbb) {
					got.Write(msg[1:])
				}
				if strings.Contains(got.String(), "hello-fwd\n") {
					return nil
				}
			}
			return fmt.Errorf("got %q", got.String())
		})
	})
	if got := netstat(t, c); strings.Contains(got, "socat") {
		t.Error("port-forward runs a helper program in the pod")
	}
}

func netstat(t testing.TB, c *container) string { return c.sh(t, "ps") }

func TestExecSync(t *testing.T) {
	p := runPod(t)
	c := p.run(t)
	r := c.execSync(t, "/bin/sh", "-c", "echo out; echo err >&2; exit 9")
	equal(t, "stdout", string(r.Stdout), "out\n")
	equal(t, "stderr", string(r.Stderr), "err\n")
	equal(t, "exit code", r.ExitCode, 9)

	start := time.Now()
	_, err := shared.Runtime().ExecSync(callCtx(t), &runtimeapi.ExecSyncRequest{ContainerId: c.id, Timeout: 1,
		Cmd: []string{"/bin/sh", "-c", "setsid sleep 313131 & sleep 313131"}})
	wantCode(t, "a command that outlives its timeout", err, codes.DeadlineExceeded)
	if d := time.Since(start); d < 900*time.Millisecond || d > 4*time.Second {
		t.Errorf("a timeout of 1 s took %v", d)
	}
	eventually(t, func() error {
		if left := node.ProcessesNaming("sleep 313131"); len(left) > 0 {
			return fmt.Errorf("processes %v of it live on", left)
		}
		return nil
	})
	_, err = shared.Runtime().ExecSync(callCtx(t), &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"/no/such"}})
	if err == nil {
		t.Error("a missing program: no error")
	}
	equal(t, "container after all that", c.status(t).State, runtimeapi.ContainerState_CONTAINER_RUNNING)
	// Output beyond the limit is cut, the daemon stays, the command ends.
	big := c.execSync(t, "/bin/sh", "-c", "head -c 40000000 /dev/zero; exit 4")
	equal(t, "exit code of a loud command", big.ExitCode, 4)
	if n := len(big.Stdout); n > 16<<20 || n < 1<<20 {
		t.Errorf("%d bytes of output kept", n)
	}
	// It runs as the container's user, with its limits and environment.
	user := p.run(t, security(func(s *secCtx) { s.RunAsUser, s.NoNewPrivs = int64p(33), true }),
		func(c *runtimeapi.ContainerConfig) { c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("b")}} })
	equal(t, "user and environment", user.sh(t, "echo $(id -u) $A $(grep NoNewPrivs /proc/self/status)"), "33 b NoNewPrivs: 1")
	c.stop(t, 0)
	_, err = shared.Runtime().ExecSync(callCtx(t), &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"/bin/true"}})
	if err == nil {
		t.Error("exec in an exited container: no error")
	}
}
