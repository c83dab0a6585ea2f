package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	ciliumebpf "github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/nodeagent/nodeagent/ebpf"
	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// site is the node, this process' network namespace, and two pods.
type site struct {
	a, b *place
	dir  string // of a BPF filesystem
}

type place struct {
	name  string
	ns    netns.NsHandle
	ip    netip.Addr
	iface int // the host's end
}

// within runs f on a thread of the place.
func (p *place) within(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		if err := netns.Set(p.ns); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

func newSite() (*site, error) {
	dir, err := os.MkdirTemp("", "nodeagent-policy-bench-")
	if err != nil {
		return nil, err
	}
	s := &site{dir: dir}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make mounts private: %w", err)
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
		return nil, err
	}
	for i, to := range []**place{&s.a, &s.b} {
		if *to, err = newPlace(string("ab"[i]), netip.AddrFrom4([4]byte{10, 66, 0, byte(i + 1)})); err != nil {
			return nil, fmt.Errorf("make pod: %w", err)
		}
	}
	return s, nil
}

func (s *site) close() {
	_ = syscall.Unmount(s.dir, syscall.MNT_DETACH)
	_ = os.Remove(s.dir)
}

// newPlace wires a namespace as the built-in network does: a routed veth.
func newPlace(name string, ip netip.Addr) (*place, error) {
	host := "h" + name
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: host, MTU: 1500}, PeerName: "p" + name}); err != nil {
		return nil, err
	}
	p := &place{name: name, ip: ip}
	made := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		var err error
		p.ns, err = netns.New()
		made <- err
	}()
	if err := <-made; err != nil {
		return nil, err
	}
	peer, err := netlink.LinkByName("p" + name)
	if err != nil {
		return nil, err
	}
	l, err := netlink.LinkByName(host)
	if err != nil {
		return nil, err
	}
	p.iface = l.Attrs().Index
	gateway := netip.MustParseAddr("169.254.1.1")
	err = errors.Join(
		netlink.LinkSetNsFd(peer, int(p.ns)), netlink.LinkSetUp(l), address(l, gateway), route(l, netip.PrefixFrom(ip, 32), netip.Addr{}),
		p.within(func() error {
			e, err := netlink.LinkByName("p" + name)
			if err != nil {
				return err
			}
			return errors.Join(netlink.LinkSetUp(e), address(e, ip), route(e, netip.PrefixFrom(gateway, 32), netip.Addr{}), route(e, netip.MustParsePrefix("0.0.0.0/0"), gateway))
		}))
	return p, err
}

func address(l netlink.Link, ip netip.Addr) error {
	return netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(32, 32)}})
}

func route(l netlink.Link, to netip.Prefix, via netip.Addr) error {
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), 32)}, Scope: netlink.SCOPE_LINK}
	if via.IsValid() {
		r.Gw, r.Scope, r.Flags = via.AsSlice(), netlink.SCOPE_UNIVERSE, int(netlink.FLAG_ONLINK)
	}
	return netlink.RouteAdd(r)
}

func (s *site) nothing() (func() error, error) { return func() error { return nil }, nil }

// empty has programs that pass everything where policy has its own.
func (s *site) empty() (func() error, error) {
	p, err := ciliumebpf.NewProgram(&ciliumebpf.ProgramSpec{Type: ciliumebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
	if err != nil {
		return nil, err
	}
	defer p.Close()
	var links []link.Link
	stop := func() error {
		var errs []error
		for _, l := range links {
			errs = append(errs, l.Close())
		}
		return errors.Join(errs...)
	}
	for _, at := range []*place{s.a, s.b} {
		for _, way := range []ciliumebpf.AttachType{ciliumebpf.AttachTCXIngress, ciliumebpf.AttachTCXEgress} {
			l, err := link.AttachTCX(link.TCXOptions{Interface: at.iface, Program: p, Attach: way})
			if err != nil {
				return nil, errors.Join(fmt.Errorf("attach to %s: %w", at.name, err), stop())
			}
			links = append(links, l)
		}
	}
	return stop, nil
}

// policy isolates both pods both ways; a may open two ports of b. The engine
// lives in a process of its own, for its threads would take turns with ours.
func (s *site) policy() (func() error, error) {
	cmd := exec.Command("/proc/self/exe", s.dir, fmt.Sprint(s.a.iface), s.a.ip.String(), fmt.Sprint(s.b.iface), s.b.ip.String())
	cmd.Env = append(os.Environ(), inside+"="+engineOf)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop := func() error {
		err := errors.Join(in.Close(), cmd.Wait(), ebpf.Clear(filepath.Join(s.dir, "bpf"), "bench"))
		time.Sleep(300 * time.Millisecond) // the kernel lets go of links in its own time
		return err
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		return nil, errors.Join(fmt.Errorf("start the engine: %w", err), stop())
	}
	return stop, nil
}

// serve runs the engine until stdin closes. It prints a line once it enforces.
func serve(args []string) error {
	bpf := filepath.Join(args[0], "bpf")
	engine, err := ebpf.New(ebpf.Config{BPFFS: bpf, Name: "bench"})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- engine.Run(ctx) }()
	var live []ebpf.Pod
	for i, name := range []string{"a", "b"} {
		iface, err1 := strconv.Atoi(args[1+2*i])
		ip, err2 := netip.ParseAddr(args[2+2*i])
		if err := errors.Join(err1, err2); err != nil {
			cancel()
			return errors.Join(err, <-ended)
		}
		live = append(live, ebpf.Pod{SandboxID: name, PodKey: objects.PodKey{Namespace: "bench", Name: name}, Labels: map[string]string{"app": name}, Interface: iface, IPs: []netip.Addr{ip}})
	}
	lists := objects.Lists{Namespaces: []objects.Namespace{{Name: "bench"}}, Policies: []*objects.Policy{rule("a"), rule("b")}}
	err = engine.Change(ctx, lists.Whole())
	if err == nil {
		err = engine.Reconcile(ctx, live)
	}
	if err == nil {
		fmt.Println("enforced")
		_, err = io.Copy(io.Discard, os.Stdin)
	}
	cancel()
	return errors.Join(err, <-ended)
}

func rule(app string) *objects.Policy {
	tcp, udp := intstr.FromInt32(tcpPort), intstr.FromInt32(udpPort)
	protocol := core.ProtocolUDP
	ports := []networking.NetworkPolicyPort{{Port: &tcp}, {Port: &udp, Protocol: &protocol}}
	peer := func(name string) []networking.NetworkPolicyPeer {
		return []networking.NetworkPolicyPeer{{PodSelector: &meta.LabelSelector{MatchLabels: map[string]string{"app": name}}}}
	}
	p := &objects.Policy{ObjectMeta: meta.ObjectMeta{Namespace: "bench", Name: app}}
	p.Spec.PodSelector.MatchLabels = map[string]string{"app": app}
	p.Spec.PolicyTypes = []networking.PolicyType{networking.PolicyTypeIngress, networking.PolicyTypeEgress}
	if app == "a" {
		p.Spec.Egress = []networking.NetworkPolicyEgressRule{{To: peer("b"), Ports: ports}}
	} else {
		p.Spec.Ingress = []networking.NetworkPolicyIngressRule{{From: peer("a"), Ports: ports}}
	}
	return p
}

// nftables allows and denies the same.
func (s *site) nftables() (func() error, error) {
	rules := fmt.Sprintf(`table inet bench {
	set allowed { type ipv4_addr . ipv4_addr . inet_proto . inet_service; elements = { %[1]s . %[2]s . tcp . %[3]d, %[1]s . %[2]s . udp . %[4]d } }
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established,related accept
		ip saddr . ip daddr . meta l4proto . th dport @allowed accept
	}
}`, s.a.ip, s.b.ip, tcpPort, udpPort)
	if err := nft(rules); err != nil {
		return nil, err
	}
	return func() error { return nft("delete table inet bench") }, nil
}

func nft(text string) error {
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w\n%s", err, out)
	}
	return nil
}
