//go:build linux

package ebpf

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	ciliumebpf "github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/nodeagent/nodeagent/ebpf/datapath"
	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// The programs as they were when conntrack's keys had another layout.
//
//go:embed testdata/layout-v1.o
var layoutV1 []byte

// earlier leaves what a daemon of layout v1 left when it died: programs on the
// pods' interfaces by pinned links, pinned conntrack, and tables by which b
// takes a only, a takes nobody, and whatever else is allowed.
func (s *site) earlier() {
	t := s.t
	spec, err := ciliumebpf.LoadCollectionSpecFromReader(bytes.NewReader(layoutV1))
	must(t, err)
	coll, err := ciliumebpf.NewCollection(spec)
	must(t, err)
	defer coll.Close()
	put := func(name string, key, value any) {
		t.Helper()
		must(t, coll.Maps[name].Put(key, value))
	}
	const active, isolatedIn = 1 << 44, 1 << 45
	allowed := map[string][]uint16{"a": {}, "b": {2}} // classes whose ingress is allowed
	for i, name := range []string{"a", "b", "c"} {
		p, id := s.pods[name], uint32(i+1)
		class, row := id+1, uint64(2*i)
		e := make([]byte, 64)
		word := row | (row+1)<<20 | active
		if classes, ok := allowed[name]; ok {
			word |= isolatedIn
			cells := make([]uint16, 64)
			for _, c := range classes {
				cells[c] = 1
			}
			put("rows", uint32(row), cells)
		}
		v4, v6 := p.v4.As4(), p.v6.As16()
		binary.NativeEndian.PutUint64(e, word)
		binary.NativeEndian.PutUint32(e[8:], class)
		binary.NativeEndian.PutUint32(e[12:], class)
		copy(e[16:], v4[:])
		binary.NativeEndian.PutUint32(e[20:], uint32(p.iface))
		copy(e[24:], v6[:])
		put("endpoints", id, e)
		put("ep_near", uint32(p.iface), id+1)
		put("ep_ip4", v4, id)
		put("ep_ip6", v6, id)
		put("cls4", v4, class)
		put("cls6", v6, class)
	}
	dir := filepath.Join(s.fs, "nodeagent", "v1")
	for _, sub := range []string{"ct", "links"} {
		must(t, os.MkdirAll(filepath.Join(dir, sub), 0o700))
	}
	for _, name := range []string{"ct4", "ct6"} {
		must(t, coll.Maps[name].Pin(filepath.Join(dir, "ct", name)))
	}
	for _, name := range []string{"a", "b", "c"} {
		for at, h := range map[ciliumebpf.AttachType][2]string{ciliumebpf.AttachTCXIngress: {"na_from_pod", "in"}, ciliumebpf.AttachTCXEgress: {"na_to_pod", "out"}} {
			l, err := link.AttachTCX(link.TCXOptions{Interface: s.pods[name].iface, Program: coll.Programs[h[0]], Attach: at})
			if errors.Is(err, ciliumebpf.ErrNotSupported) {
				t.Skip("no tcx before 6.6")
			}
			must(t, err)
			must(t, l.Pin(filepath.Join(dir, "links", fmt.Sprintf("%d-%s", s.pods[name].iface, h[1]))))
			must(t, l.Close())
		}
	}
}

// hammer speaks without a pause on a connection until ctx ends; each byte sent
// must be answered, UDP's too.
func hammer(ctx context.Context, conn net.Conn) <-chan error {
	done := make(chan error, 1)
	go func() {
		for n := 0; ; n++ {
			if ctx.Err() != nil {
				done <- nil
				return
			}
			if err := talkFor(conn, []byte("x"), 30*time.Second); err != nil {
				done <- fmt.Errorf("%s from %s: after %d answers: %w", conn.RemoteAddr().Network(), conn.LocalAddr(), n, err)
				return
			}
		}
	}()
	return done
}

// stream asks x once, from a, for numbered packets until ctx ends: only
// conntrack lets them in. None may be missing.
func (s *site) stream(ctx context.Context) <-chan error {
	done := make(chan error, 1)
	var from net.Conn
	var server net.PacketConn
	must(s.t, within(s.pods["x"].ns, func() (err error) {
		server, err = net.ListenPacket("udp", ":82")
		return err
	}))
	must(s.t, within(s.pods["a"].ns, func() (err error) {
		from, err = net.Dial("udp", netip.AddrPortFrom(s.pods["x"].v4, 82).String())
		return err
	}))
	must(s.t, from.(*net.UDPConn).SetReadBuffer(4<<20))
	_, err := from.Write([]byte("go"))
	must(s.t, err)
	go func() {
		defer server.Close()
		b := make([]byte, 8)
		_, client, err := server.ReadFrom(b)
		for n := uint64(0); err == nil && ctx.Err() == nil; n++ {
			_, err = server.WriteTo(binary.NativeEndian.AppendUint64(nil, n), client)
			time.Sleep(time.Millisecond)
		}
	}()
	go func() {
		defer from.Close()
		b := make([]byte, 8)
		for want := uint64(0); ; want++ {
			_ = from.SetReadDeadline(time.Now().Add(20 * time.Second))
			if ctx.Err() != nil {
				done <- nil
				return
			}
			_, err := from.Read(b)
			if got := binary.NativeEndian.Uint64(b); ctx.Err() == nil && (err != nil || got != want) {
				done <- fmt.Errorf("stream: got packet %d, want %d: %w", got, want, err)
				return
			}
		}
	}()
	return done
}

// TestUpgrade: a daemon of another version, with another layout of its maps,
// takes over from a dead one while flows go on: established ones are answered
// without a gap, UDP that only conntrack lets in as well, what is denied stays
// denied, and of the other layout nothing is left. So with a conntrack of
// another size.
func TestUpgrade(t *testing.T) {
	if !alone(t) {
		return
	}
	s := newSite(t)
	must(t, datapath.Mount(s.fs))
	s.earlier()
	s.table("the earlier version", "a b yes\nc b no\na x yes\nx a no")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	flows := []<-chan error{s.stream(ctx)}
	for _, to := range []netip.Addr{s.pods["b"].v4, s.pods["b"].v6, s.pods["x"].v4, s.pods["x"].v6} {
		for _, proto := range []string{"tcp", "udp"} {
			conn, err := s.dialFor("a", proto, to, 80, 20*time.Second)
			must(t, err)
			defer conn.Close()
			flows = append(flows, hammer(ctx, conn))
		}
	}
	knocks := make(chan error, 1)
	go func() {
		for ctx.Err() == nil {
			if c, err := s.dialFor("c", "udp", s.pods["b"].v4, 80, 20*time.Millisecond); err == nil {
				c.Close()
				knocks <- errors.New("c reached b")
				return
			}
		}
		knocks <- nil
	}()
	s.objects = objects.Lists{Namespaces: []objects.Namespace{{Name: "ns"}}, Policies: policies(t, `
podSelector: {matchLabels: {app: b}}
ingress:
- from: [{podSelector: {matchLabels: {app: a}}}]
---
podSelector: {matchLabels: {app: a}}
policyTypes: [Ingress]`)}
	for _, size := range []uint32{0, 4096} {
		s.start(Config{Datapath: datapath.Config{Conntrack: size}})
		s.ready("a", "b", "c")
		s.table("this version", "a b yes\nc b no\na x yes\nx a no")
		s.stop()
	}
	cancel()
	for _, f := range flows {
		if err := <-f; err != nil {
			t.Error(err)
		}
	}
	if err := <-knocks; err != nil {
		t.Error(err)
	}
	left, err := filepath.Glob(filepath.Join(s.fs, "nodeagent", "*"))
	must(t, err)
	if len(left) != 1 {
		t.Errorf("%v are left of the earlier version", left)
	}
	for _, name := range []string{"a", "b", "c"} {
		for _, at := range []ciliumebpf.AttachType{ciliumebpf.AttachTCXIngress, ciliumebpf.AttachTCXEgress} {
			q, err := link.QueryPrograms(link.QueryOptions{Target: s.pods[name].iface, Attach: at})
			must(t, err)
			if len(q.Programs) != 1 {
				t.Errorf("%d programs on %s of pod %s", len(q.Programs), at, name)
			}
		}
	}
}
