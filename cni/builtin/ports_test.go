package builtin

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/cni/lab"
	"github.com/nodeagent/nodeagent/cni/nat"
)

func attachPorts(t *testing.T, l *lab.Lab, n *Network, name string, ports ...nat.Port) (pod, error) {
	t.Helper()
	path := l.Netns(name)
	a := Attachment{SandboxID: "sandbox-" + name, Netns: path, Key: path, Ports: ports}
	got, err := n.Attach(context.Background(), a)
	return pod{a, got}, err
}

// ruleset is what nft shows of the node.
func ruleset(t *testing.T, l *lab.Lab) string {
	t.Helper()
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("needs nft")
	}
	var out []byte
	l.In(l.Node, func() error {
		out, err = exec.Command(nft, "list", "ruleset").CombinedOutput()
		return err
	})
	return string(out)
}

func TestHostPorts(t *testing.T) {
	for _, masq := range []bool{true, false} {
		t.Run(map[bool]string{true: "masquerade", false: "no masquerade"}[masq], func(t *testing.T) {
			testHostPorts(t, masq)
		})
	}
}

func testHostPorts(t *testing.T, masq bool) {
	l := lab.New(t).WithOutside(1500)
	n := newNetwork(t, l, func(c *Config) { c.Masquerade = masq })
	client := newPod(t, l, n, "client")
	srv, err := attachPorts(t, l, n, "server",
		nat.Port{Protocol: "TCP", HostPort: 8080, ContainerPort: 80},
		nat.Port{Protocol: "udp", HostPort: 8080, ContainerPort: 80},
		nat.Port{Protocol: "sctp", HostPort: 8080, ContainerPort: 80},
		nat.Port{Protocol: "tcp", HostPort: 8081, ContainerPort: 80, HostIP: lab.NodeIP4},
		nat.Port{Protocol: "tcp", HostPort: 8082, ContainerPort: 80, HostIP: lab.NodeIP6},
		nat.Port{Protocol: "tcp", HostPort: 8083, ContainerPort: 80, HostIP: netip.MustParseAddr("127.0.0.1")},
	)
	if err != nil {
		t.Fatal(err)
	}
	node := []netip.Addr{lab.NodeIP4, lab.NodeIP6}
	at := func(ip, port string) string { return net.JoinHostPort(ip, port) }
	for family := range 2 {
		loop := []string{"127.0.0.1", "::1"}[family]
		hostSrc := n.node.src[family].String()
		outside := []netip.Addr{lab.OutsideIP4, lab.OutsideIP6}[family].String()
		for _, kind := range []string{"tcp", "udp"} {
			l.Echo(srv.Netns, kind, srv.at(family, 80))
			for _, c := range []struct{ what, from, to, sees string }{
				{"outside", l.Outside, at(node[family].String(), "8080"), outside},
				{"host by its address", l.Node, at(node[family].String(), "8080"), "*"},
				{"host by loopback", l.Node, at(loop, "8080"), "*"},
				{"host by its pod-side address", l.Node, at(hostSrc, "8080"), "*"},
				{"another pod", client.Netns, at(node[family].String(), "8080"), client.IPs[family].String()},
				{"the pod itself", srv.Netns, at(node[family].String(), "8080"), "*"},
			} {
				peer, err := lab.Ask(c.from, kind, c.to)
				if err != nil || c.sees != "*" && peer != c.sees {
					t.Errorf("%s, %s, IPv%d: peer sees %q, want %q, error %v", c.what, kind, 4+2*family, peer, c.sees, err)
				}
			}
		}
		own := at(node[family].String(), []string{"8081", "8082"}[family])
		other := at(node[family].String(), []string{"8082", "8081"}[family])
		if _, err := lab.Ask(l.Outside, "tcp", own); err != nil {
			t.Errorf("host IP of IPv%d: %v", 4+2*family, err)
		}
		if _, err := lab.Ask(l.Outside, "tcp", other); err == nil {
			t.Errorf("host IP of IPv%d answers at the other family", 4+2*family)
		}
	}
	if _, err := lab.Ask(l.Outside, "tcp", "192.0.2.1:8083"); err == nil {
		t.Error("a port of 127.0.0.1 answers outside")
	}
	if _, err := lab.Ask(l.Node, "tcp", "127.0.0.1:8083"); err != nil {
		t.Error("a port of 127.0.0.1:", err)
	}
	// A host service on loopback stays unreachable for pods although their veth has route_localnet.
	l.Echo(l.Node, "udp", "127.0.0.1:9999")
	lab.In(t, srv.Netns, func() error { return lab.SendLoopbackAway(gateway4) })
	if peer, err := lab.AskFrom(srv.Netns, "udp", srv.at(0, 5555), "127.0.0.1:9999"); err == nil {
		t.Errorf("a pod reached the host's 127.0.0.1 as %s", peer)
	}

	_, err = attachPorts(t, l, n, "second", nat.Port{Protocol: "tcp", HostPort: 8080, ContainerPort: 1})
	if !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("taken port: error %v", err)
	} else {
		t.Log(err)
	}
	_, err = attachPorts(t, l, n, "third", nat.Port{Protocol: "tcp", HostPort: 8081, ContainerPort: 1})
	if !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("wildcard beside a port of one address: error %v", err)
	}
	_, err = attachPorts(t, l, n, "fourth", nat.Port{Protocol: "tcp", HostPort: 8080, ContainerPort: 1, HostIP: lab.NodeIP4})
	if !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("port of one address beside a wildcard: error %v", err)
	}
	fifth, err := attachPorts(t, l, n, "fifth", nat.Port{Protocol: "tcp", HostPort: 8081, ContainerPort: 1, HostIP: netip.MustParseAddr("127.0.0.1")})
	if err != nil {
		t.Errorf("same port of another address: %v", err)
	}
	if got := len(l.Links("na")); got != 3 {
		t.Errorf("%d links, want 3: failed attachments left some", got)
	}
	rules := ruleset(t, l)
	t.Log(rules)

	for _, p := range []pod{client, srv, fifth} {
		if err := n.Detach(context.Background(), p.Attachment, p.IPs); err != nil {
			t.Error(err)
		}
	}
	if rules := ruleset(t, l); strings.Contains(rules, "8080") {
		t.Errorf("elements left:\n%s", rules)
	}
	if err := n.Remove(context.Background()); err != nil {
		t.Error(err)
	}
	if rules := ruleset(t, l); rules != "" {
		t.Errorf("rules left:\n%s", rules)
	}
}
