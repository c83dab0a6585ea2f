// Package rtnl sends several route-netlink requests in one sendmsg and reports which of them failed.
//
// It exists because one pod costs about fifteen requests and a library that sends, waits and
// decodes one at a time doubles their price. It only writes; the few things that are read are
// single-link look-ups and dumps of links. It must not decide anything: callers say what to send.
// Called by cni/builtin.
//
// A Conn is one NETLINK_ROUTE socket of the namespace it was opened in (it keeps that namespace
// alive). Its mutex serialises exchanges; it has no goroutines. The socket blocks: the kernel
// handles route-netlink inside sendmsg, so the acknowledgements are there when it returns.
// Kernel 4.12 or newer (extended acknowledgements); older ones only lose the text of errors.
package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/nodeagent/nodeagent/cni/netns"
	"golang.org/x/sys/unix"
)

// Conn is a route-netlink socket.
type Conn struct {
	mu  sync.Mutex // guards everything below
	fd  int
	seq uint32
	buf []byte
}

// DialPath opens a socket in the namespace at path.
func DialPath(path string) (*Conn, error) {
	ns, err := netns.Open(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	return Dial(ns)
}

// Dial opens a socket in the namespace of ns (nil: the caller's).
func Dial(ns *netns.Handle) (*Conn, error) {
	c := &Conn{fd: -1}
	err := netns.Do(ns, func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open route-netlink socket: %w", err)
		}
		c.fd = fd
		return nil
	})
	if err == nil {
		// Both are improvements only: short acknowledgements, and errors with words.
		_ = unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
		_ = unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
		// With it a dump is checked strictly, and filters in the request are honoured.
		_ = unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
		// A reply that never comes would block for ever; none takes seconds.
		tv := unix.Timeval{Sec: 20}
		_ = unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
		return c, nil
	}
	if c.fd >= 0 {
		unix.Close(c.fd)
	}
	return nil, err
}

// Close closes the socket. A nil Conn is fine.
func (c *Conn) Close() error {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return nil
	}
	err := unix.Close(c.fd)
	c.fd = -1
	return err
}

// Error is the failure of one request of a batch.
type Error struct {
	What  string     // the label the caller gave the request
	Errno unix.Errno // the kernel's answer
	Text  string     // the kernel's words, if it had any
}

func (e *Error) Error() string {
	if e.Text != "" {
		return e.What + ": " + e.Errno.Error() + " (" + e.Text + ")"
	}
	return e.What + ": " + e.Errno.Error()
}

// Unwrap makes errors.Is(err, unix.EEXIST) and the like work.
func (e *Error) Unwrap() error { return e.Errno }

// Batch is a list of requests, built by its methods and sent by Conn.Do in order. The kernel
// carries out all of them even if one fails: they are not a transaction.
type Batch struct {
	buf  []byte
	msgs []msg
}

type msg struct {
	at   int // offset of the header in buf
	what string
	ok   []unix.Errno // answers that count as success
}

// Len is the number of requests in the batch.
func (b *Batch) Len() int { return len(b.msgs) }

// Begin starts a request of type typ. what is its label in errors; answers in ok count as success.
func (b *Batch) Begin(typ, flags uint16, what string, ok ...unix.Errno) {
	b.end()
	b.msgs = append(b.msgs, msg{at: len(b.buf), what: what, ok: ok})
	b.buf = append(b.buf, make([]byte, unix.SizeofNlMsghdr)...)
	h := b.buf[len(b.buf)-unix.SizeofNlMsghdr:]
	binary.NativeEndian.PutUint16(h[4:], typ)
	binary.NativeEndian.PutUint16(h[6:], flags|unix.NLM_F_REQUEST|unix.NLM_F_ACK)
}

// end writes the length of the last request.
func (b *Batch) end() {
	if len(b.msgs) == 0 {
		return
	}
	b.pad()
	at := b.msgs[len(b.msgs)-1].at
	binary.NativeEndian.PutUint32(b.buf[at:], uint32(len(b.buf)-at))
}

func (b *Batch) pad() {
	for len(b.buf)%4 != 0 {
		b.buf = append(b.buf, 0)
	}
}

// Raw appends the fixed header of the request.
func (b *Batch) Raw(p ...byte) { b.buf = append(b.buf, p...) }

// Attr appends one attribute.
func (b *Batch) Attr(typ uint16, data []byte) {
	b.pad()
	b.buf = binary.NativeEndian.AppendUint16(b.buf, uint16(4+len(data)))
	b.buf = binary.NativeEndian.AppendUint16(b.buf, typ)
	b.buf = append(b.buf, data...)
}

// U32 appends a 32-bit attribute in host order.
func (b *Batch) U32(typ uint16, v uint32) {
	b.Attr(typ, binary.NativeEndian.AppendUint32(nil, v))
}

// U8 appends an 8-bit attribute.
func (b *Batch) U8(typ uint16, v uint8) { b.Attr(typ, []byte{v}) }

// Str appends a zero-terminated string.
func (b *Batch) Str(typ uint16, s string) { b.Attr(typ, append([]byte(s), 0)) }

// Addr appends an IP address in its 4 or 16 bytes.
func (b *Batch) Addr(typ uint16, a netip.Addr) { b.Attr(typ, a.AsSlice()) }

// Nest opens a nested attribute; the returned function closes it.
func (b *Batch) Nest(typ uint16) func() {
	b.pad()
	at := len(b.buf)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, 0)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, typ|unix.NLA_F_NESTED)
	return func() {
		b.pad()
		binary.NativeEndian.PutUint16(b.buf[at:], uint16(len(b.buf)-at))
	}
}

// maxBatch keeps the acknowledgements of one sendmsg within the default receive buffer.
const maxBatch = 64

// Do sends the batch and waits for all answers. It returns the failures (each an *Error), joined;
// requests after a failed one were carried out all the same.
func (c *Conn) Do(b *Batch) error {
	if len(b.msgs) == 0 {
		return nil
	}
	b.end()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return fmt.Errorf("%s: route-netlink socket is closed", b.msgs[0].what)
	}
	var errs []error
	for from := 0; from < len(b.msgs); from += maxBatch {
		to := min(from+maxBatch, len(b.msgs))
		if err := c.exchange(b, from, to, &errs); err != nil {
			return errors.Join(append(errs, err)...)
		}
	}
	return errors.Join(errs...)
}

func (c *Conn) exchange(b *Batch, from, to int, errs *[]error) error {
	end := len(b.buf)
	if to < len(b.msgs) {
		end = b.msgs[to].at
	}
	first := c.seq + 1
	for i := from; i < to; i++ {
		c.seq++
		binary.NativeEndian.PutUint32(b.buf[b.msgs[i].at+8:], c.seq)
	}
	if err := c.send(b.buf[b.msgs[from].at:end]); err != nil {
		return fmt.Errorf("%s: send: %w", b.msgs[from].what, err)
	}
	for waiting := to - from; waiting > 0; {
		n, err := c.recv(func(h unix.NlMsghdr, body []byte) error {
			if h.Type != unix.NLMSG_ERROR || h.Seq < first || h.Seq > c.seq {
				return nil // an answer to an exchange that was given up
			}
			waiting--
			m := b.msgs[from+int(h.Seq-first)]
			if e := decodeError(m.what, body, h.Flags); e != nil && !in(e.Errno, m.ok) {
				*errs = append(*errs, e)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("%s: receive: %w", b.msgs[from].what, err)
		}
		if n == 0 {
			return fmt.Errorf("%s: receive: no answer", b.msgs[from].what)
		}
	}
	return nil
}

func in(e unix.Errno, list []unix.Errno) bool {
	for _, o := range list {
		if e == o {
			return true
		}
	}
	return false
}

func (c *Conn) send(p []byte) error {
	for {
		err := unix.Sendto(c.fd, p, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err != unix.EINTR {
			return err
		}
	}
}

// Sizes of the receive buffer in bytes: acknowledgements and single objects fit the first, and a part of a dump
// the second (the kernel cuts dumps into datagrams of at most 32 KiB).
const (
	smallReceive = 8 << 10
	dumpReceive  = 32 << 10
)

// recv reads one datagram and hands each message in it to f.
func (c *Conn) recv(f func(h unix.NlMsghdr, body []byte) error) (int, error) {
	if c.buf == nil {
		c.buf = make([]byte, smallReceive)
	}
	var n int
	for {
		var err error
		n, _, err = unix.Recvfrom(c.fd, c.buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, err
		}
		break
	}
	return n, each(c.buf[:n], f)
}

// each walks the messages of a datagram; malformed input is an error, never a panic.
func each(p []byte, f func(h unix.NlMsghdr, body []byte) error) error {
	for len(p) >= unix.SizeofNlMsghdr {
		h := unix.NlMsghdr{
			Len:   binary.NativeEndian.Uint32(p),
			Type:  binary.NativeEndian.Uint16(p[4:]),
			Flags: binary.NativeEndian.Uint16(p[6:]),
			Seq:   binary.NativeEndian.Uint32(p[8:]),
			Pid:   binary.NativeEndian.Uint32(p[12:]),
		}
		if h.Len < unix.SizeofNlMsghdr || int64(h.Len) > int64(len(p)) {
			return fmt.Errorf("netlink message of %d bytes in %d", h.Len, len(p))
		}
		if err := f(h, p[unix.SizeofNlMsghdr:h.Len]); err != nil {
			return err
		}
		p = p[min(int(h.Len+3)&^3, len(p)):]
	}
	return nil
}

// decodeError returns nil for a plain acknowledgement.
func decodeError(what string, body []byte, flags uint16) *Error {
	if len(body) < 4 {
		return &Error{What: what, Errno: unix.EBADMSG}
	}
	code := int32(binary.NativeEndian.Uint32(body))
	if code == 0 {
		return nil
	}
	e := &Error{What: what, Errno: unix.Errno(-code)}
	if flags&unix.NLM_F_ACK_TLVS == 0 || len(body) < 20 {
		return e
	}
	skip := 4 + unix.SizeofNlMsghdr
	if flags&unix.NLM_F_CAPPED == 0 {
		skip = 4 + int(binary.NativeEndian.Uint32(body[4:])+3)&^3
	}
	if skip < 0 || skip > len(body) {
		return e
	}
	Attrs(body[skip:], func(typ uint16, data []byte) {
		if typ == unix.NLMSGERR_ATTR_MSG {
			e.Text = cstring(data)
		}
	})
	return e
}

// Attrs calls f for each attribute of p, and stops at the first malformed one.
func Attrs(p []byte, f func(typ uint16, data []byte)) {
	for len(p) >= 4 {
		l := int(binary.NativeEndian.Uint16(p))
		if l < 4 || l > len(p) {
			return
		}
		f(binary.NativeEndian.Uint16(p[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), p[4:l])
		p = p[min((l+3)&^3, len(p)):]
	}
}

func cstring(p []byte) string {
	for i, b := range p {
		if b == 0 {
			return string(p[:i])
		}
	}
	return string(p)
}

// query sends the one request of b and hands each reply message to f; dump says whether
// the answer is a list. The acknowledgement or end of the list ends it.
func (c *Conn) query(b *Batch, dump bool, f func(typ uint16, body []byte)) error {
	b.end()
	c.mu.Lock()
	defer c.mu.Unlock()
	what := b.msgs[0].what
	if c.fd < 0 {
		return fmt.Errorf("%s: route-netlink socket is closed", what)
	}
	c.seq++
	binary.NativeEndian.PutUint32(b.buf[8:], c.seq)
	if dump {
		if len(c.buf) < dumpReceive {
			c.buf = make([]byte, dumpReceive)
		}
		flags := binary.NativeEndian.Uint16(b.buf[6:])
		binary.NativeEndian.PutUint16(b.buf[6:], flags&^unix.NLM_F_ACK|unix.NLM_F_DUMP)
	}
	if err := c.send(b.buf); err != nil {
		return fmt.Errorf("%s: send: %w", what, err)
	}
	for done := false; !done; {
		_, err := c.recv(func(h unix.NlMsghdr, body []byte) error {
			if h.Seq != c.seq || done {
				return nil
			}
			switch h.Type {
			case unix.NLMSG_ERROR:
				done = true
				if e := decodeError(what, body, h.Flags); e != nil {
					return e
				}
			case unix.NLMSG_DONE:
				done = true
			default:
				f(h.Type, body)
			}
			return nil
		})
		if err != nil {
			var e *Error
			if errors.As(err, &e) {
				return e
			}
			return fmt.Errorf("%s: receive: %w", what, err)
		}
	}
	return nil
}
