package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// host is one of the two machines: its addresses on the wire, and what its
// pods get theirs from.
type host struct{ v4, v6, pods4, pods6 string }

var hosts = map[string]host{
	"a": {"192.0.2.11", "2001:db8::11", "10.61.0.0/24", "fd61::/64"},
	"b": {"192.0.2.12", "2001:db8::12", "10.62.0.0/24", "fd62::/64"},
}

const policyFile = "/etc/nodeagent/policy/test.yaml"

// TestNodes: pods reach each other across two hosts, and NetworkPolicy holds on
// the way over real NICs. Machine a drives, machine b does what it is told.
func TestNodes(t *testing.T) {
	machine(t)
	role := os.Getenv("NODEAGENT_ROLE")
	self, ok := hosts[role]
	if !ok {
		t.Skip("one machine only")
	}
	peer := hosts[map[string]string{"a": "b", "b": "a"}[role]]
	setUpHost(t, self, peer)
	local := &localHost{t: t, pods: map[string]*pod{}}
	if role == "b" {
		serveHost(t, local, self)
		return
	}
	driveHosts(t, local, &remoteHost{t: t, url: "http://" + peer.v4 + ":7000"})
}

// setUpHost does what an administrator does on bare metal: a range of pod
// addresses for each host, and a route to the other's.
func setUpHost(t *testing.T, self, peer host) {
	install(t, "nodeagent.deb")
	waitActive(t)
	text := command(t, "nodeagent", "config", "default")
	for _, c := range [][2]string{
		{"podCIDRs: []", fmt.Sprintf("podCIDRs: [%s, %q]", self.pods4, self.pods6)},
		{"masquerade: true", "masquerade: false"},
		{"mode: auto", "mode: enforce"},
	} {
		text = strings.Replace(text, c[0], c[1], 1)
	}
	for path, content := range map[string]string{configFile: text, policyFile: ""} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	command(t, "nodeagent", "config", "validate", configFile)
	command(t, "systemctl", "restart", "nodeagent")
	waitActive(t)
	importImage(t)
	command(t, "ip", "route", "replace", peer.pods4, "via", peer.v4)
	command(t, "ip", "-6", "route", "replace", peer.pods6, "via", peer.v6)
	command(t, "sysctl", "-w", "net.ipv6.conf.all.forwarding=1")
}

// order is what a host is told to do.
type order struct {
	Do     string // run, exec, remove, policy, shell, end
	Name   string // of a pod
	Script string // of a container, an exec or a shell; the text of the policies
}

type outcome struct {
	Output string // of an exec or a shell
	Code   int
	IPs    []string // of a pod
}

type doer interface{ do(o order) outcome }

// localHost does it here.
type localHost struct {
	t    *testing.T
	pods map[string]*pod
}

func (h *localHost) do(o order) (out outcome) {
	h.t.Helper()
	switch o.Do {
	case "run":
		p := run(h.t, o.Name, o.Script, nil, nil)
		h.pods[o.Name] = p
		r, err := p.rt.PodSandboxStatus(h.t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
		if err != nil {
			h.t.Fatal(err)
		}
		out.IPs = []string{r.Status.Network.Ip}
		for _, ip := range r.Status.Network.AdditionalIps {
			out.IPs = append(out.IPs, ip.Ip)
		}
	case "exec":
		text, code := h.pods[o.Name].exec(h.t, o.Script)
		out.Output, out.Code = text, int(code)
	case "remove":
		h.pods[o.Name].remove(h.t)
	case "policy":
		if err := os.WriteFile(policyFile, []byte(o.Script), 0o644); err != nil {
			h.t.Fatal(err)
		}
	case "shell":
		text, err := exec.Command("sh", "-c", o.Script).CombinedOutput()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			out.Code = exit.ExitCode()
		}
		out.Output = string(text)
	}
	return out
}

// remoteHost has the other machine do it.
type remoteHost struct {
	t   *testing.T
	url string
}

func (h *remoteHost) do(o order) (out outcome) {
	h.t.Helper()
	body, err := json.Marshal(o)
	if err != nil {
		h.t.Fatal(err)
	}
	resp, err := http.Post(h.url, "application/json", bytes.NewReader(body))
	if err != nil {
		h.t.Fatalf("%+v on the other machine: %v", o, err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		h.t.Fatalf("%+v on the other machine: %s, %v", o, resp.Status, err)
	}
	return out
}

// await waits for the other machine, which may boot more slowly.
func (h *remoteHost) await() {
	h.t.Helper()
	for deadline := time.Now().Add(10 * time.Minute); ; time.Sleep(time.Second) {
		_, err := http.Post(h.url, "application/json", strings.NewReader("{}"))
		switch {
		case err == nil:
			return
		case time.Now().After(deadline):
			h.t.Fatalf("the other machine does not answer: %v", err)
		}
	}
}

// serveHost does orders, one after the other on the test's goroutine, until
// one is to end.
func serveHost(t *testing.T, local *localHost, self host) {
	type job struct {
		order
		done chan outcome
	}
	jobs := make(chan job)
	server := &http.Server{Addr: self.v4 + ":7000", Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		j := job{done: make(chan outcome, 1)}
		if err := json.NewDecoder(r.Body).Decode(&j.order); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		jobs <- j
		select {
		case out := <-j.done:
			_ = json.NewEncoder(w).Encode(out)
		case <-t.Context().Done():
			http.Error(w, "the test on this machine has failed", http.StatusInternalServerError)
		}
	})}
	go server.ListenAndServe()
	for {
		select {
		case j := <-jobs:
			t.Logf("%+v", j.order)
			j.done <- local.do(j.order)
			if j.Do == "end" {
				time.Sleep(time.Second) // the answer is on its way
				return
			}
		case <-time.After(15 * time.Minute):
			t.Fatal("the other machine says nothing any more")
		}
	}
}

// driveHosts runs a server on b and clients on both, and policies.
func driveHosts(t *testing.T, a *localHost, b *remoteHost) {
	b.await()
	defer b.do(order{Do: "end"})
	at := map[string]doer{"good": a, "bad": a, "near": b}
	ips := map[string][]string{}
	ips["web"] = b.do(order{Do: "run", Name: "web", Script: "exec testtool serve -tcp :8080 -udp :8081 -http :8082"}).IPs
	for name, h := range at {
		ips[name] = h.do(order{Do: "run", Name: name, Script: "sleep 100000"}).IPs
	}
	pids := map[string]int{"good": containerPID(t, a.pods["good"]), "bad": containerPID(t, a.pods["bad"])}
	t.Logf("pods: %v", ips)
	if len(ips["web"]) != 2 || len(ips["good"]) != 2 {
		t.Fatal("want an IPv4 and an IPv6 address for each pod")
	}
	dial := func(from, proto, ip string) outcome {
		port := map[string]string{"tcp": "8080", "udp": "8081", "http": "8082"}[proto]
		if strings.Contains(ip, ":") {
			ip = "[" + ip + "]"
		}
		return at[from].do(order{Do: "exec", Name: from, Script: fmt.Sprintf("testtool dial -timeout 4s %s %s:%s", proto, ip, port)})
	}
	// want checks each direction and family; a change takes a moment.
	want := func(when string, allowed, denied []string) {
		t.Helper()
		for _, ip := range ips["web"] {
			for _, c := range allowed {
				from, proto, _ := strings.Cut(c, "/")
				eventually(t, when+": "+c+" reaches "+ip, func() error {
					if out := dial(from, proto, ip); out.Code != 0 {
						return errors.New(out.Output)
					}
					return nil
				})
			}
			for _, c := range denied {
				from, proto, _ := strings.Cut(c, "/")
				eventually(t, when+": "+c+" does not reach "+ip, func() error {
					if out := dial(from, proto, ip); out.Code == 0 {
						return errors.New("it does: " + out.Output)
					}
					return nil
				})
				if out := dial(from, proto, ip); out.Code == 0 {
					t.Errorf("%s: %s reached %s after it was denied", when, c, ip)
				}
			}
		}
	}
	policies := func(text string) {
		for _, h := range []doer{a, b} {
			h.do(order{Do: "policy", Script: podObjects(ips) + text})
		}
	}
	policies("")
	want("no policy", []string{"good/tcp", "good/udp", "bad/http", "near/http"}, nil)
	for i, ip := range ips["web"] {
		if out := dial("good", "http", ip).Output; !strings.Contains(out, "remote="+ips["good"][i]) && !strings.Contains(out, "remote=["+ips["good"][i]) {
			t.Errorf("the server sees %s, want the pod's own address %s", out, ips["good"][i])
		}
	}
	policies(ingress)
	want("ingress policy", []string{"good/tcp", "good/udp"}, []string{"bad/tcp", "bad/udp", "near/tcp", "good/http"})
	if out := a.do(order{Do: "shell", Script: "/payload/testtool dial -timeout 4s tcp " + ips["web"][0] + ":8080"}); out.Code == 0 {
		t.Errorf("the other host itself reaches the pod: %s", out.Output)
	}
	// With both daemons stopped the programs go on. There is no exec then: each
	// client is entered through its namespaces.
	for _, h := range []doer{a, b} {
		h.do(order{Do: "shell", Script: "systemctl stop nodeagent"})
	}
	for from, allowed := range map[string]bool{"good": true, "bad": false} {
		out := a.do(order{Do: "shell", Script: fmt.Sprintf("nsenter -t %d -n /payload/testtool dial -timeout 8s tcp %s:8080", pids[from], ips["web"][0])})
		if (out.Code == 0) != allowed {
			t.Errorf("daemons stopped: %s reaches web: %v, want %v: %s", from, out.Code == 0, allowed, out.Output)
		}
	}
	for _, h := range []doer{a, b} {
		if out := h.do(order{Do: "shell", Script: "systemctl start nodeagent"}); out.Code != 0 {
			t.Fatal(out.Output)
		}
	}
	want("daemons back", []string{"good/tcp"}, []string{"bad/tcp"})
	policies(egress)
	want("egress policy", []string{"good/udp", "bad/http"}, []string{"good/tcp", "good/http"})
	policies("")
	want("policies gone", []string{"good/http", "bad/tcp", "near/http"}, nil)
	at["web"] = b
	for name, h := range at {
		h.do(order{Do: "remove", Name: name})
	}
	for name, h := range map[string]doer{"a": a, "b": b} {
		out := h.do(order{Do: "shell", Script: "systemctl stop nodeagent; (tc filter show dev eth0 ingress; tc filter show dev eth0 egress) 2>/dev/null; ls /sys/fs/bpf"})
		if strings.TrimSpace(out.Output) != "" {
			t.Errorf("left on machine %s without pods and daemon:\n%s", name, out.Output)
		}
	}
}

// podObjects are the pods of both hosts as an API server would tell each.
func podObjects(ips map[string][]string) string {
	var b strings.Builder
	for name, addrs := range ips {
		fmt.Fprintf(&b, "apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: guest, labels: {app: %s}}\nstatus: {podIPs: [{ip: %q}, {ip: %q}]}\n---\n",
			name, name, addrs[0], addrs[1])
	}
	return b.String()
}

// ingress lets good in, by name of the pod, on two ports.
const ingress = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: guest}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: good}}}]
    ports: [{port: 8080}, {port: 8081, protocol: UDP}]
`

// egress lets good out to web's UDP port and nowhere else.
const egress = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: good, namespace: guest}
spec:
  podSelector: {matchLabels: {app: good}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchLabels: {app: web}}}]
    ports: [{port: 8081, protocol: UDP}]
`
