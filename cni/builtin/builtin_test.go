package builtin

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/nodeagent/nodeagent/cni/lab"
)

// newNetwork is a network on the lab's node.
func newNetwork(t testing.TB, l *lab.Lab, change func(*Config)) *Network {
	t.Helper()
	cfg := Config{
		Name: "test", StateDir: filepath.Join(l.Dir, "state"), RootDir: filepath.Join(l.Dir, "root"),
		Masquerade: true, HostNetns: l.Node, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	if change != nil {
		change(&cfg)
	}
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

type pod struct {
	Attachment
	Attached
}

func (p pod) at(family, port int) string {
	return net.JoinHostPort(p.IPs[family].String(), fmt.Sprint(port))
}

func newPod(t testing.TB, l *lab.Lab, n *Network, name string) pod {
	t.Helper()
	path := l.Netns(name)
	a := Attachment{SandboxID: "sandbox-" + name, Netns: path, Key: path}
	got, err := n.Attach(context.Background(), a)
	if err != nil {
		t.Fatal(err)
	}
	return pod{a, got}
}

func TestPodsTalk(t *testing.T) {
	l := lab.New(t).WithOutside(1400)
	n := newNetwork(t, l, nil)
	a, b := newPod(t, l, n, "a"), newPod(t, l, n, "b")
	if len(a.IPs) != 2 || !a.IPs[0].Is4() || !a.IPs[1].Is6() {
		t.Fatalf("addresses %v", a.IPs)
	}
	outside := []netip.Addr{lab.OutsideIP4, lab.OutsideIP6}
	nodeIP := []netip.Addr{lab.NodeIP4, lab.NodeIP6}
	for family := range 2 {
		for _, kind := range []string{"tcp", "udp"} {
			l.Echo(b.Netns, kind, b.at(family, 7))
			l.Echo(l.Outside, kind, net.JoinHostPort(outside[family].String(), "7"))
			l.Echo(l.Node, kind, net.JoinHostPort(nodeIP[family].String(), "7"))
			for _, c := range []struct{ what, from, to, sees string }{
				{"pod to pod", a.Netns, b.at(family, 7), a.IPs[family].String()},
				{"pod to itself", b.Netns, b.at(family, 7), b.IPs[family].String()},
				{"host to pod", l.Node, b.at(family, 7), n.node.src[family].String()},
				{"pod to host", a.Netns, net.JoinHostPort(nodeIP[family].String(), "7"), a.IPs[family].String()},
				{"pod to outside", a.Netns, net.JoinHostPort(outside[family].String(), "7"), nodeIP[family].String()},
			} {
				peer, err := lab.Ask(c.from, kind, c.to)
				if err != nil || peer != c.sees {
					t.Errorf("%s by %s, IPv%d: peer sees %q, want %q, error %v", c.what, kind, 4+2*family, peer, c.sees, err)
				}
			}
		}
		for _, c := range []struct {
			from string
			to   netip.Addr
		}{{a.Netns, b.IPs[family]}, {l.Node, a.IPs[family]}, {a.Netns, outside[family]}, {b.Netns, nodeIP[family]}} {
			if err := lab.Ping(c.from, c.to); err != nil {
				t.Error(err)
			}
		}
	}
	for _, p := range []pod{a, b} {
		if err := n.Detach(context.Background(), p.Attachment, p.IPs); err != nil {
			t.Error(err)
		}
	}
	if got := l.Links("na"); len(got) > 0 {
		t.Errorf("links left: %v", got)
	}
}
