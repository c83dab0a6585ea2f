package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// policed is a daemon of a test's own that enforces what is in a directory.
type policed struct {
	*node.Node
	dir string
}

// policedNode starts one; settings are further lines of the policy section.
func policedNode(t *testing.T, settings string, change func(*node.Config)) *policed {
	t.Helper()
	dir, fs := t.TempDir(), filepath.Join(t.TempDir(), "bpf")
	t.Cleanup(func() { // pinned programs go with the mount, after the daemon
		if err := unix.Unmount(fs, 0); err != nil {
			t.Error(err)
		}
	})
	p := &policed{dir: dir}
	p.Node = ownNode(t, func(c *node.Config) {
		c.Extra = fmt.Sprintf("policy:\n  mode: enforce\n  dir: %s\n  bpffs: %s\n  uplinks: [none]\n%s", dir, fs, settings)
		if change != nil {
			change(c)
		}
	})
	return p
}

// set writes the policies that are in force, and waits until as many are.
func (p *policed) set(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, "all.yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	want := regexp.MustCompile(`(?m)^metadata: \{name: (\S+), namespace: (\S+)\}`).FindAllStringSubmatch(text, -1)
	eventually(t, func() error {
		list, _ := p.policy(t, "list")
		found := regexp.MustCompile(`(?m)^\w+/\S+`).FindAllString(list, -1)
		if len(found) != len(want) {
			return fmt.Errorf("want %d policies, have %q", len(want), found)
		}
		return nil
	})
}

func (p *policed) policy(t testing.TB, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, p.Config.Binary, append([]string{"--config", p.ConfigPath(), "policy"}, args...)...).CombinedOutput()
	return string(out), err
}

// pod starts a pod by name, which is its label app too.
func (p *policed) pod(t testing.TB, ns, name string) *pod {
	c := podConfig(t)
	c.Metadata.Namespace, c.Metadata.Name, c.Labels = ns, name, map[string]string{"app": name}
	return runPodOn(t, p.Node, c)
}

// reaches says whether a TCP and a UDP word come back from an echo server.
func (c *container) reaches(t testing.TB, network string, to netip.Addr) bool {
	t.Helper()
	r := c.execSync(t, "/bin/testtool", "dial", "-timeout", "1s", network, netip.AddrPortFrom(to, 8080).String(), "hello")
	return strings.HasPrefix(string(r.Stdout), "hello")
}

func echoBoth() containerOption {
	return command("/bin/testtool", "serve", "-tcp", ":8080", "-udp", ":8080")
}

// truth waits until exactly the pairs "from to" reach each other.
func truth(t *testing.T, what string, clients map[string]*container, to map[string]netip.Addr, allowed ...string) {
	t.Helper()
	eventually(t, func() error {
		for from, c := range clients {
			for name, ip := range to {
				pair := from + " " + name
				want := false
				for _, a := range allowed {
					want = want || a == pair
				}
				for _, network := range []string{"tcp", "udp"} {
					if got := c.reaches(t, network, ip); got != want {
						return fmt.Errorf("%s: %s by %s is %v", what, pair, network, got)
					}
				}
			}
		}
		return nil
	})
}

const webPolicy = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: %s}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: good}}}]
    ports: [{port: 8080}, {port: 8080, protocol: UDP}]
`

// TestPolicyCommands: list, why (by name and by address), flows, metrics, and a
// namespace that is only watched.
func TestPolicyCommands(t *testing.T) {
	n := policedNode(t, "  auditNamespaces: [watched]\nmetrics:\n  address: 127.0.0.1:0\n", nil)
	n.set(t, fmt.Sprintf(webPolicy, "shop")+"---\n"+fmt.Sprintf(webPolicy, "watched")+`---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: odd, namespace: shop}
spec: {podSelector: {matchLabels: {app: none}}, ingress: [{from: [{ipBlock: {cidr: nonsense}}]}]}
`)
	web, watched, good, bad := n.pod(t, "shop", "web"), n.pod(t, "watched", "web"), n.pod(t, "shop", "good"), n.pod(t, "shop", "bad")
	web.run(t, echoBoth())
	watched.run(t, echoBoth())
	clients := map[string]*container{"good": good.run(t), "bad": bad.run(t)}
	ip, six := web.ips(t)
	watchedIP, _ := watched.ips(t)
	badIP, _ := bad.ips(t)
	goodIP, _ := good.ips(t)
	// What is only watched passes, though no policy of that namespace allows it.
	truth(t, "v4", clients, map[string]netip.Addr{"web": ip, "watched": watchedIP}, "good web", "good watched", "bad watched")
	truth(t, "v6", clients, map[string]netip.Addr{"web": six}, "good web")

	why := func(from, to string, want ...string) {
		t.Helper()
		out, err := n.policy(t, "why", "--from", from, "--to", to)
		if err != nil {
			t.Errorf("why %s %s: %v\n%s", from, to, err, out)
		}
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("why %s %s: no %q in\n%s", from, to, w, out)
			}
		}
	}
	denied := []string{": denied", "ingress of shop/web: denied; the loaded program: denied (ingress-denied)", "selected by shop/web", "no peer of the rule is " + badIP.String() + " (pod shop/bad)"}
	why("shop/bad", "shop/web:8080/tcp", denied...)
	why(badIP.String(), ip.String()+":8080", denied...)
	why("shop/good", "shop/web:8080/udp", ": allowed", "the loaded program: allowed (policy)", "shop/web ingress[0]: matches: peer 0 is "+goodIP.String()+" (pod shop/good), port 1 is 8080 of protocol 17")
	why("shop/good", "shop/web:81", ": denied", "peer 0 is "+goodIP.String()+" (pod shop/good), but no port of the rule is 81 of protocol 6")
	why("192.0.2.1", "shop/web:8080", ": denied", "no peer of the rule is 192.0.2.1")
	why("shop/bad", "watched/web:8080", "denied; the loaded program: denied (ingress-denied); passes, its namespace is only watched")
	why("shop/web", "shop/bad:icmp", ": allowed", "no policy isolates shop/bad for ingress")
	if out, err := n.policy(t, "why", "--from", "shop/nobody", "--to", "shop/web:80"); err == nil || !strings.Contains(out, `pod "shop/nobody" is not known`) {
		t.Errorf("%v\n%s", err, out)
	}
	list, err := n.policy(t, "list")
	for _, w := range []string{`(?m)^shop/web +ingress +web`, `(?m)^watched/web +ingress +web`, `(?m)^shop/odd .*ipBlock`, `to-pod +ingress-denied +[1-9]`} {
		if err != nil || !regexp.MustCompile(w).MatchString(list) {
			t.Errorf("list: %v, no %s in\n%s", err, w, list)
		}
	}
	n.flows(t, clients["bad"], ip, watchedIP)
	n.metrics(t)
}

func (p *policed) flows(t *testing.T, bad *container, web, watched netip.Addr) {
	t.Helper()
	match := func(what, pattern, text string, want bool) {
		t.Helper()
		if regexp.MustCompile(pattern).MatchString(text) != want {
			t.Errorf("%s: %q is there: %v\n%s", what, pattern, !want, text)
		}
	}
	const dropped, watch, passed = `(?m)DROPPED to-pod +tcp .*:8080 \(ingress-denied\) shop/web$`, `(?m)AUDIT +to-pod +tcp .*:8080 \(ingress-denied\) watched/web$`, `(?m)passed +to-pod +udp .*:8080 \(policy\) shop/web$`
	all, err := p.policy(t, "flows")
	if err != nil {
		t.Error(err)
	}
	for _, w := range []string{dropped, watch, passed} {
		match("flows", w, all, true)
	}
	only, _ := p.policy(t, "flows", "--dropped")
	match("--dropped", dropped, only, true)
	match("--dropped", `passed`, only, false)
	of, _ := p.policy(t, "flows", "--pod", "watched/web")
	match("--pod", watch, of, true)
	match("--pod", `shop/web`, of, false)

	cmd := exec.CommandContext(t.Context(), p.Config.Binary, "--config", p.ConfigPath(), "policy", "flows", "--follow", "--dropped", "--pod", "shop/web")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 1024)
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			lines <- s.Text()
		}
		close(lines)
	}()
	before := bytes.Count([]byte(only), []byte("shop/web"))
	for limit := time.After(time.Minute); before >= 0; {
		bad.reaches(t, "tcp", web)
		for more := true; more; {
			select {
			case l, ok := <-lines:
				if !ok {
					t.Fatal("flows --follow ended by itself")
				}
				if strings.Contains(l, "shop/web") {
					before--
				}
			case <-limit:
				t.Fatal("flows --follow tells nothing new")
			case <-time.After(100 * time.Millisecond):
				more = false
			}
		}
	}
	cmd.Process.Signal(unix.SIGINT)
	for range lines {
	}
	cmd.Wait()
}

func (p *policed) metrics(t *testing.T) {
	t.Helper()
	log, err := os.ReadFile(p.LogPath())
	if err != nil {
		t.Fatal(err)
	}
	addr := regexp.MustCompile(`serving metrics.*address=(\S+)`).FindSubmatch(log)
	if addr == nil {
		t.Fatalf("no address of metrics in the log")
	}
	eventually(t, func() error {
		resp, err := http.Get(fmt.Sprintf("http://%s/metrics", addr[1]))
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		for _, w := range []string{
			`(?m)^nodeagent_policy_packets_total\{hook="to-pod",reason="ingress-denied",verdict="denied"\} [1-9]`,
			`(?m)^nodeagent_policy_packets_total\{hook="to-pod",reason="policy",verdict="passed"\} [1-9]`,
			`(?m)^nodeagent_policy_table_entries\{table="conntrack"\} [1-9]`,
			`(?m)^nodeagent_policy_table_entries\{table="classes"\} [1-9]`,
			`(?m)^nodeagent_policy_table_limit\{table="row_blocks"\} [1-9]`,
			`(?m)^nodeagent_policy_enforcement_duration_seconds_count\{cause="objects"\} [1-9]`,
			`(?m)^nodeagent_policy_enforcement_duration_seconds_count\{cause="pod"\} 4`,
			`(?m)^nodeagent_policy_checked_flows_total\{result="agree"\} [1-9]`,
			`(?m)^nodeagent_policy_checked_flows_total\{result="drift"\} 0`,
			`(?m)^nodeagent_policy_faulty_policies 1`,
			`(?m)^nodeagent_policy_ready 1`,
		} {
			if !regexp.MustCompile(w).Match(body) {
				return fmt.Errorf("no %s in\n%s", w, regexp.MustCompile(`(?m)^nodeagent_policy.*$`).FindAll(body, -1))
			}
		}
		return nil
	})
}

const lockedPolicy = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: locked, namespace: shop}
spec: {podSelector: {matchLabels: {app: locked}}, policyTypes: [Ingress, Egress]}
`

// TestFirstPacketOfManyStarts: pods that their policy forbids everything start,
// 50 at once. From its first instruction each sends to a pod that listens, while
// another sends to every address that they may get; no packet of
// theirs gets through, nor do their kernels answer. Without the policy all do.
func TestFirstPacketOfManyStarts(t *testing.T) {
	n := policedNode(t, "", nil)
	n.set(t, lockedPolicy)
	locked(t, n, 50, false, func(first netip.Addr, i int) netip.Addr {
		a := first.As4()
		return netip.AddrFrom4([4]byte{a[0], a[1], a[2], a[3] + byte(i)})
	})
}

// locked starts count pods that may not talk, in parallel, between one that
// listens and one that knocks at the addresses after its own; from it comes a flood
// as well, where they are on one link.
func locked(t *testing.T, n *policed, count int, oneLink bool, next func(first netip.Addr, i int) netip.Addr) {
	t.Helper()
	sink, knocker := n.pod(t, "shop", "sink"), n.pod(t, "shop", "knocker")
	listener := sink.run(t, command("/bin/testtool", "meet", "-listen", "9000"))
	sinkIP, _ := sink.ips(t)
	first, _ := knocker.ips(t)
	knock := []string{"/bin/testtool", "meet", "-every", "10ms"}
	var targets []netip.Addr
	for i := range count + 4 {
		targets = append(targets, next(first, i+1))
		knock = append(knock, netip.AddrPortFrom(targets[i], 9001).String())
	}
	knocks := knocker.run(t, command(knock...))
	echoes := &flood{}
	if oneLink {
		echoes = newFlood(t, knocks, targets)
	}
	eventually(t, func() error {
		if !strings.Contains(listener.text(t)+knocks.text(t), "meeting") {
			return fmt.Errorf("not yet there")
		}
		return nil
	})
	pods, started := make([]*pod, count), make([]*container, count)
	var wg sync.WaitGroup
	errs := make([]error, count)
	for i := range count {
		c := podConfig(t)
		c.Metadata.Namespace, c.Labels = "shop", map[string]string{"app": "locked"}
		wg.Go(func() { pods[i], started[i], errs[i] = startLocked(n, c, sinkIP) })
	}
	wg.Wait()
	for i, p := range pods {
		if p != nil {
			t.Cleanup(func() { p.remove(t) })
		}
		if errs[i] != nil {
			t.Fatal(errs[i])
		}
	}
	eventually(t, func() error { // all have sent for a while
		for _, c := range started {
			if !strings.Contains(c.text(t), "meeting") {
				return fmt.Errorf("a pod does not run yet: %q", c.text(t))
			}
		}
		return nil
	})
	time.Sleep(time.Second)
	own := map[string]bool{}
	for _, p := range pods {
		v4, _ := p.ips(t)
		own[v4.String()] = true
	}
	through := func() (list []string) {
		for _, line := range strings.Split(listener.text(t), "\n") {
			if f := strings.Fields(line); len(f) == 3 && own[f[2]] {
				list = append(list, "the listener: "+line)
			}
		}
		for _, line := range strings.Split(knocks.text(t), "\n") {
			if f := strings.Fields(line); len(f) == 3 && own[strings.TrimSuffix(f[2], ":9001")] {
				list = append(list, "the knocker: "+line)
			}
		}
		for ip := range own {
			if echoes.answered(netip.MustParseAddr(ip)) {
				list = append(list, "the flood: an echo of "+ip)
			}
		}
		for _, c := range started {
			if got := strings.TrimSpace(strings.Replace(c.text(t), "meeting", "", 1)); got != "" {
				list = append(list, "a locked pod: "+got)
			}
		}
		return list
	}
	if l := through(); len(l) > 0 {
		t.Errorf("%d packets came through:\n%s", len(l), strings.Join(l, "\n"))
	}
	n.set(t, "")
	eventually(t, func() error { // and this test would have seen them
		got := strings.Join(through(), "\n")
		signs := []string{"the listener: heard tcp", "the listener: heard udp", "the knocker: answer tcp", "a locked pod: heard", "heard udp " + first.String()}
		if oneLink {
			signs = append(signs, "the flood")
		}
		for _, w := range signs {
			if !strings.Contains(got, w) {
				return fmt.Errorf("without the policy: no %q in\n%s", w, got)
			}
		}
		return nil
	})
}

func startLocked(n *policed, config *runtimeapi.PodSandboxConfig, sink netip.Addr) (*pod, *container, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	r, err := n.Runtime().RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
	if err != nil {
		return nil, nil, fmt.Errorf("RunPodSandbox: %w", err)
	}
	p := &pod{node: n.Node, id: r.PodSandboxId, config: config}
	c, err := p.tryCreate(ctx, command("/bin/testtool", "meet", "-listen", "9001", netip.AddrPortFrom(sink, 9000).String()))
	if err == nil {
		err = c.tryStart(ctx)
	}
	return p, c, err
}

// TestPolicyOfForeignPlugins: pods of Debian's plugins bridge and ptp are judged
// as ours are, and their first packet does not pass either.
func TestPolicyOfForeignPlugins(t *testing.T) {
	if _, err := os.Stat("/usr/lib/cni/bridge"); err != nil {
		t.Skip("install containernetworking-plugins")
	}
	for i, kind := range []string{"bridge", "ptp"} {
		t.Run(kind, func(t *testing.T) {
			conf, leases := t.TempDir(), t.TempDir()
			bridge := nodeName("b" + kind[:1])
			subnet := fmt.Sprintf("10.%d.%d.0/24", 240+i, os.Getpid()%250)
			ipam := fmt.Sprintf(`"ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":%q}]],"routes":[{"dst":"0.0.0.0/0"}]}`, leases, subnet)
			plugin := fmt.Sprintf(`{"type":"bridge","bridge":%q,"isGateway":true,%s}`, bridge, ipam)
			if kind == "ptp" {
				plugin = fmt.Sprintf(`{"type":"ptp",%s}`, ipam)
			}
			writeFile(t, filepath.Join(conf, "10-test.conflist"), fmt.Sprintf(`{"cniVersion":"1.0.0","name":%q,"plugins":[%s]}`, bridge, plugin))
			n := policedNode(t, "", func(c *node.Config) { c.CNIConfDir = conf })
			t.Cleanup(func() { deleteLink(bridge) })
			n.set(t, fmt.Sprintf(webPolicy, "shop")+"---\n"+lockedPolicy)
			web, good, bad := n.pod(t, "shop", "web"), n.pod(t, "shop", "good"), n.pod(t, "shop", "bad")
			web.run(t, echoBoth())
			clients := map[string]*container{"good": good.run(t), "bad": bad.run(t)}
			ip, _ := web.ips(t)
			goodIP, _ := good.ips(t)
			badIP, _ := bad.ips(t)
			good.run(t, echoBoth())
			to := map[string]netip.Addr{"web": ip, "good": goodIP}
			truth(t, kind, clients, to, "good web", "good good", "bad good")
			if got, err := dialEcho(netip.AddrPortFrom(ip, 8080).String()); err != nil && !strings.Contains(err.Error(), "timeout") {
				t.Errorf("the node does not reach its own pod: %q, %v", got, err)
			}
			if out, err := n.policy(t, "why", "--from", badIP.String(), "--to", "shop/web:8080"); err != nil || !strings.Contains(out, "the loaded program: denied") {
				t.Errorf("%v\n%s", err, out)
			}
			locked(t, n, 8, kind == "bridge", func(first netip.Addr, i int) netip.Addr {
				a := first.As4()
				return netip.AddrFrom4([4]byte{a[0], a[1], a[2], a[3] + byte(i)})
			})
		})
	}
}
