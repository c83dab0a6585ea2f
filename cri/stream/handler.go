package stream

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/websocket"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
	"k8s.io/streaming/pkg/httpstream/wsstream"
	utilexec "k8s.io/utils/exec"
)

// handler serves the URLs that were handed out.
func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	for kind, serve := range map[string]func(http.ResponseWriter, *http.Request, any){
		kindExec: s.serveExec, kindAttach: s.serveAttach, kindPortForward: s.servePortForward,
	} {
		use := func(w http.ResponseWriter, r *http.Request) {
			request, ok := s.tickets.take(kind, r.PathValue("token"), time.Now())
			if !ok {
				http.NotFound(w, r)
				return
			}
			serve(w, r, request)
		}
		mux.HandleFunc("GET /"+kind+"/{token}", use)
		mux.HandleFunc("POST /"+kind+"/{token}", use)
	}
	if base := s.cfg.BaseURL; base != nil && strings.Trim(base.Path, "/") != "" {
		return http.StripPrefix("/"+strings.Trim(base.Path, "/"), mux)
	}
	return mux
}

func (s *Server) serveExec(w http.ResponseWriter, r *http.Request, request any) {
	e := request.(*runtimeapi.ExecRequest)
	s.serveCommand(w, r, command{
		opts: remotecommand.Options{Stdin: e.GetStdin(), Stdout: e.GetStdout(), Stderr: e.GetStderr(), TTY: e.GetTty()},
		start: func(ctx context.Context, p Pipes) (Session, error) {
			return s.runtime.Exec(ctx, e.GetContainerId(), e.GetCmd(), p)
		},
	})
}

func (s *Server) serveAttach(w http.ResponseWriter, r *http.Request, request any) {
	a := request.(*runtimeapi.AttachRequest)
	s.serveCommand(w, r, command{
		attach: true,
		opts:   remotecommand.Options{Stdin: a.GetStdin(), Stdout: a.GetStdout(), Stderr: a.GetStderr(), TTY: a.GetTty()},
		start: func(ctx context.Context, p Pipes) (Session, error) {
			return s.runtime.Attach(ctx, a.GetContainerId(), p)
		},
	})
}

// command is an exec or attach that waits for its client's streams.
type command struct {
	opts   remotecommand.Options
	attach bool
	start  func(context.Context, Pipes) (Session, error)
}

func (s *Server) serveCommand(w http.ResponseWriter, r *http.Request, c command) {
	run := joined(func(ctx context.Context, cs clientStreams) error { return s.command(ctx, c, cs) })
	switch {
	case wsstream.IsWebSocketRequestWithStreamCloseProtocol(r):
		s.serveV5(w, r, c)
	case c.attach:
		remotecommand.ServeAttach(w, r, run, "", "", "", &c.opts, s.cfg.IdleTimeout, s.cfg.CreationTimeout, remotecommand.SupportedStreamingProtocols)
	default:
		remotecommand.ServeExec(w, r, run, "", "", "", nil, &c.opts, s.cfg.IdleTimeout, s.cfg.CreationTimeout, remotecommand.SupportedStreamingProtocols)
	}
}

// command runs c on the streams that the request asked for; the protocols may
// offer more.
func (s *Server) command(ctx context.Context, c command, cs clientStreams) error {
	if !c.opts.Stdin {
		cs.in = nil
	}
	if !c.opts.Stdout {
		cs.out = nil
	}
	if !c.opts.Stderr {
		cs.err = nil
	}
	cs.tty, cs.attach = c.opts.TTY, c.attach
	return s.session(ctx, cs, c.start)
}

// joined is what k8s.io/cri-streaming calls once it has a client's streams.
type joined func(context.Context, clientStreams) error

// ExecInContainer is remotecommand.Executor.
func (f joined) ExecInContainer(ctx context.Context, _, _, _ string, _ []string, in io.Reader, out, errw io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	return f(ctx, clientStreams{in: in, out: out, err: errw, resize: resize})
}

// AttachContainer is remotecommand.Attacher.
func (f joined) AttachContainer(ctx context.Context, _, _, _ string, in io.Reader, out, errw io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) error {
	return f(ctx, clientStreams{in: in, out: out, err: errw, resize: resize})
}

// serveV5 speaks v5.channel.k8s.io: v4 and a message that closes one channel,
// so that a WebSocket too has an end of stdin.
func (s *Server) serveV5(w http.ResponseWriter, r *http.Request, c command) {
	use := func(on bool, t wsstream.ChannelType) wsstream.ChannelType {
		if on {
			return t
		}
		return wsstream.IgnoreChannel
	}
	conn := wsstream.NewConn(map[string]wsstream.ChannelProtocolConfig{remotecommand.StreamProtocolV5Name: {Binary: true, Channels: []wsstream.ChannelType{
		remotecommand.StreamStdIn:  use(c.opts.Stdin, wsstream.ReadChannel),
		remotecommand.StreamStdOut: use(c.opts.Stdout, wsstream.WriteChannel),
		remotecommand.StreamStdErr: use(c.opts.Stderr, wsstream.WriteChannel),
		remotecommand.StreamErr:    wsstream.WriteChannel,
		remotecommand.StreamResize: wsstream.ReadChannel,
	}}})
	conn.SetIdleTimeout(s.cfg.IdleTimeout)
	_, ch, err := conn.Open(w, r)
	if err != nil {
		s.log.Debug("open WebSocket", "err", err)
		return
	}
	sizes := make(chan remotecommand.TerminalSize)
	go decodeSizes(ch[remotecommand.StreamResize], sizes)
	defer func() {
		conn.Close()
		for range sizes { // until the decoder has noticed
		}
	}()
	// An empty message tells the client that it is connected.
	_, _ = ch[remotecommand.StreamErr].Write(nil)
	err = s.command(r.Context(), c, clientStreams{
		in: ch[remotecommand.StreamStdIn], out: ch[remotecommand.StreamStdOut], err: ch[remotecommand.StreamStdErr], resize: sizes,
	})
	_, _ = ch[remotecommand.StreamErr].Write(statusOf(err))
}

// decodeSizes decodes terminal sizes until r ends, then closes sizes.
func decodeSizes(r io.Reader, sizes chan<- remotecommand.TerminalSize) {
	defer close(sizes)
	dec := json.NewDecoder(r)
	for {
		var size remotecommand.TerminalSize
		if dec.Decode(&size) != nil {
			// Nonsense must not stand in the way of the other channels.
			_, _ = io.Copy(io.Discard, r)
			return
		}
		sizes <- size
	}
}

// status is the part of metav1.Status that clients read.
type status struct {
	Status  string         `json:"status"`
	Message string         `json:"message,omitempty"`
	Reason  string         `json:"reason,omitempty"`
	Details *statusDetails `json:"details,omitempty"`
	Code    int32          `json:"code,omitempty"`
}

type statusDetails struct {
	Causes []statusCause `json:"causes"`
}

type statusCause struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// statusOf is the last message of a session, with the exit code if it has one.
func statusOf(err error) []byte {
	st := status{Status: "Success"}
	var exit utilexec.CodeExitError
	switch {
	case errors.As(err, &exit):
		st = status{
			Status: "Failure", Reason: remotecommand.NonZeroExitCodeReason,
			Message: fmt.Sprintf("command terminated with non-zero exit code: %v", exit),
			Details: &statusDetails{[]statusCause{{remotecommand.ExitCodeCauseType, strconv.Itoa(exit.Code)}}},
		}
	case err != nil:
		st = status{Status: "Failure", Reason: "InternalError", Message: err.Error(), Code: http.StatusInternalServerError}
	}
	data, _ := json.Marshal(st) // plain strings and numbers
	return data
}

func (s *Server) servePortForward(w http.ResponseWriter, r *http.Request, request any) {
	p := request.(*runtimeapi.PortForwardRequest)
	to := forwarder(func(port int32, stream io.ReadWriteCloser) error {
		// The protocol's context knows nothing of the request.
		defer settle(r.Context(), time.Now())
		return s.portForward(r.Context(), p.GetPodSandboxId(), port, stream)
	})
	serve := func(w http.ResponseWriter, r *http.Request) {
		portforward.ServePortForward(w, r, to, "", "", &portforward.V4Options{Ports: p.GetPort()}, s.cfg.IdleTimeout, s.cfg.CreationTimeout, portforward.SupportedProtocols)
	}
	if wsstream.IsWebSocketRequestWithTunnelingProtocol(r) {
		tunnel(w, r, serve)
		return
	}
	serve(w, r)
}

// forwardMin is how long a forward lasts at least. cri-streaming (v0.37.2) acknowledges
// a stream beside forwarding it, and ends it without looking whether it has: a
// stream that ended first (refused at once, say) is reset before its
// acknowledgement, or its client waits 30 s for that.
const forwardMin = 50 * time.Millisecond

// settle waits until forwardMin after begin.
func settle(ctx context.Context, begin time.Time) {
	select {
	case <-time.After(forwardMin - time.Since(begin)):
	case <-ctx.Done():
	}
}

// forwarder is portforward.PortForwarder.
type forwarder func(port int32, stream io.ReadWriteCloser) error

func (f forwarder) PortForward(_ context.Context, _, _ string, port int32, stream io.ReadWriteCloser) error {
	return f(port, stream)
}

func (s *Server) portForward(ctx context.Context, id string, port int32, stream io.ReadWriteCloser) error {
	ctx, end, ok := s.begin(ctx)
	if !ok {
		return errStopping()
	}
	defer end()
	netns, err := s.runtime.Netns(ctx, id)
	if err != nil {
		return err
	}
	return s.forward(ctx, netns, port, stream)
}

// tunnelPrefix is followed by the protocol within SPDY.
const tunnelPrefix = "SPDY/3.1+"

// tunnel opens a WebSocket whose binary messages are the bytes of a SPDY
// connection, and serves a SPDY request on it.
func tunnel(w http.ResponseWriter, r *http.Request, serve func(http.ResponseWriter, *http.Request)) {
	inner := ""
	websocket.Server{
		Handshake: func(c *websocket.Config, _ *http.Request) error {
			for _, p := range c.Protocol {
				if name, ok := strings.CutPrefix(p, tunnelPrefix); ok {
					inner, c.Protocol = name, []string{p}
					return nil
				}
			}
			return websocket.ErrBadWebSocketProtocol
		},
		Handler: func(ws *websocket.Conn) {
			ws.PayloadType = websocket.BinaryFrame
			req := r.Clone(r.Context())
			req.Header.Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
			req.Header.Set(httpstream.HeaderUpgrade, spdy.HeaderSpdy31)
			req.Header.Set(httpstream.HeaderProtocolVersion, inner)
			serve(&tunnelResponse{conn: ws, header: http.Header{}}, req)
		},
	}.ServeHTTP(w, r)
}

// tunnelResponse lets the SPDY server take over a connection whose response
// has been sent.
type tunnelResponse struct {
	conn   net.Conn
	header http.Header
}

func (t *tunnelResponse) Header() http.Header         { return t.header }
func (t *tunnelResponse) Write(b []byte) (int, error) { return len(b), nil }
func (t *tunnelResponse) WriteHeader(int)             {}

// Hijack is http.Hijacker.
func (t *tunnelResponse) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return t.conn, bufio.NewReadWriter(bufio.NewReader(t.conn), bufio.NewWriter(t.conn)), nil
}
