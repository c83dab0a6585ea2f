package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	authentication "k8s.io/api/authentication/v1"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	rbac "k8s.io/api/rbac/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/cluster"
)

// watcherKubeconfig is of an account that may do what the policy watcher has to, and no more.
func watcherKubeconfig(t *testing.T, c *cluster.Cluster, client kubernetes.Interface) string {
	t.Helper()
	ctx := t.Context()
	sa := &core.ServiceAccount{ObjectMeta: meta.ObjectMeta{Namespace: "default", Name: "policy-watcher"}}
	role := &rbac.ClusterRole{ObjectMeta: meta.ObjectMeta{Name: "policy-watcher"}, Rules: []rbac.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"pods", "namespaces"}, Verbs: []string{"list", "watch"}},
		{APIGroups: []string{"networking.k8s.io"}, Resources: []string{"networkpolicies"}, Verbs: []string{"list", "watch"}},
	}}
	binding := &rbac.ClusterRoleBinding{ObjectMeta: role.ObjectMeta, RoleRef: rbac.RoleRef{APIGroup: rbac.GroupName, Kind: "ClusterRole", Name: role.Name},
		Subjects: []rbac.Subject{{Kind: "ServiceAccount", Namespace: sa.Namespace, Name: sa.Name}}}
	_, err := client.CoreV1().ServiceAccounts("default").Create(ctx, sa, meta.CreateOptions{})
	must(t, err)
	_, err = client.RbacV1().ClusterRoles().Create(ctx, role, meta.CreateOptions{})
	must(t, err)
	_, err = client.RbacV1().ClusterRoleBindings().Create(ctx, binding, meta.CreateOptions{})
	must(t, err)
	token, err := client.CoreV1().ServiceAccounts("default").CreateToken(ctx, sa.Name, &authentication.TokenRequest{}, meta.CreateOptions{})
	must(t, err)
	admin, err := clientcmd.LoadFromFile(c.Kubeconfigs["admin"])
	must(t, err)
	for _, ctx := range admin.Contexts {
		ctx.AuthInfo = "watcher"
	}
	admin.AuthInfos = map[string]*clientcmdapi.AuthInfo{"watcher": {Token: token.Status.Token}}
	path := filepath.Join(t.TempDir(), "watcher.kubeconfig")
	must(t, clientcmd.WriteToFile(*admin, path))
	return path
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// apiPod makes a pod of the node n1 with a named port, as a user and a scheduler would.
func apiPod(t *testing.T, client kubernetes.Interface, ns, name string) *core.Pod {
	t.Helper()
	p := &core.Pod{ObjectMeta: meta.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{"app": name}}, Spec: core.PodSpec{
		NodeName: "n1",
		Containers: []core.Container{{Name: "c", Image: "none.example/none", Ports: []core.ContainerPort{
			{Name: "echo", ContainerPort: 8080}, {Name: "echo-udp", ContainerPort: 8080, Protocol: core.ProtocolUDP},
		}}},
	}}
	var made *core.Pod
	eventually(t, func() (err error) { // until the namespace has its service account
		made, err = client.CoreV1().Pods(ns).Create(t.Context(), p, meta.CreateOptions{})
		return err
	})
	return made
}

// runAPIPod runs it as a kubelet would, but for the labels: those are the API server's to tell.
func (p *policed) runAPIPod(t *testing.T, of *core.Pod, what ...containerOption) (*pod, *container) {
	t.Helper()
	c := podConfig(t)
	c.Metadata = &runtimeapi.PodSandboxMetadata{Namespace: of.Namespace, Name: of.Name, Uid: string(of.UID)}
	c.Labels = nil
	pod := runPodOn(t, p.Node, c)
	return pod, pod.run(t, what...)
}

// TestPolicyFromAPIServer: a real API server's objects are enforced by a daemon
// that may only list and watch; changes follow; while the server is down the
// last state stays, also over the daemon's restart; then it is followed again.
func TestPolicyFromAPIServer(t *testing.T) {
	c := cluster.Start(t, cluster.Config{})
	client, err := kubernetes.NewForConfig(c.Admin)
	must(t, err)
	ctx := t.Context()
	_, err = client.CoreV1().Nodes().Create(ctx, &core.Node{ObjectMeta: meta.ObjectMeta{Name: "n1"}}, meta.CreateOptions{})
	must(t, err)
	for ns, team := range map[string]string{"shop": "a", "other": "b"} {
		_, err = client.CoreV1().Namespaces().Create(ctx, &core.Namespace{ObjectMeta: meta.ObjectMeta{Name: ns, Labels: map[string]string{"team": team}}}, meta.CreateOptions{})
		must(t, err)
	}
	echo, echoUDP, udp := intstr.FromString("echo"), intstr.FromString("echo-udp"), core.ProtocolUDP
	np := &networking.NetworkPolicy{ObjectMeta: meta.ObjectMeta{Namespace: "shop", Name: "web"}, Spec: networking.NetworkPolicySpec{
		PodSelector: meta.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
		Ingress: []networking.NetworkPolicyIngressRule{{
			From: []networking.NetworkPolicyPeer{{
				NamespaceSelector: &meta.LabelSelector{MatchLabels: map[string]string{"team": "a"}},
				PodSelector:       &meta.LabelSelector{MatchLabels: map[string]string{"app": "good"}},
			}},
			Ports: []networking.NetworkPolicyPort{{Port: &echo}, {Port: &echoUDP, Protocol: &udp}},
		}},
	}}
	_, err = client.NetworkingV1().NetworkPolicies("shop").Create(ctx, np, meta.CreateOptions{})
	must(t, err)

	kubeconfig := filepath.Join(t.TempDir(), "late.kubeconfig")
	n := policedNode(t, "  kubeconfig: "+kubeconfig+"\n", nil)
	raw, err := os.ReadFile(watcherKubeconfig(t, c, client))
	must(t, err)
	must(t, os.WriteFile(kubeconfig, raw, 0o600))
	eventually(t, func() error {
		out, err := n.policy(t, "list")
		if err != nil || !bytes.Contains([]byte(out), []byte("shop/web")) {
			return fmt.Errorf("%v\n%s", err, out)
		}
		return nil
	})

	web, good, bad, far := apiPod(t, client, "shop", "web"), apiPod(t, client, "shop", "good"), apiPod(t, client, "shop", "bad"), apiPod(t, client, "other", "good")
	server, _ := n.runAPIPod(t, web, echoBoth())
	clients := map[string]*container{}
	for name, p := range map[string]*core.Pod{"good": good, "bad": bad, "far": far} {
		_, clients[name] = n.runAPIPod(t, p)
	}
	v4, v6 := server.ips(t)
	to := map[string]netip.Addr{"web": v4, "web6": v6}
	truth(t, "at first", clients, to, "good web", "good web6")

	label := func(p *core.Pod, app string) {
		t.Helper()
		_, err := client.CoreV1().Pods(p.Namespace).Patch(ctx, p.Name, types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"labels":{"app":%q}}}`, app), meta.PatchOptions{})
		must(t, err)
	}
	team := func(ns, name string) {
		t.Helper()
		_, err := client.CoreV1().Namespaces().Patch(ctx, ns, types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"labels":{"team":%q}}}`, name), meta.PatchOptions{})
		must(t, err)
	}
	label(good, "bad")
	label(bad, "good")
	truth(t, "labels exchanged", clients, to, "bad web", "bad web6")
	team("other", "a")
	truth(t, "a namespace's label", clients, to, "bad web", "bad web6", "far web", "far web6")

	c.Kill()
	const silent = "does not tell of network policy any more"
	told := func(text string) int {
		log, err := os.ReadFile(n.LogPath())
		must(t, err)
		return bytes.Count(log, []byte(text))
	}
	eventually(t, func() error {
		if told(silent) == 0 {
			return fmt.Errorf("the outage is not told")
		}
		return nil
	})
	truth(t, "server gone", clients, to, "bad web", "bad web6", "far web", "far web6")
	n.pod(t, "shop", "late") // pods that the runtime alone knows still start
	n.Kill()
	must(t, n.Up(ctx))
	truth(t, "server gone, daemon anew", clients, to, "bad web", "bad web6", "far web", "far web6")
	short, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if _, err := n.Runtime().RunPodSandbox(short, &runtimeapi.RunPodSandboxRequest{Config: podConfig(t)}); err == nil {
		t.Error("a pod starts though nobody knows its policy")
	}

	c.Restart(t)
	team("other", "b")
	truth(t, "server back", clients, to, "bad web", "bad web6")
	must(t, client.NetworkingV1().NetworkPolicies("shop").Delete(ctx, "web", meta.DeleteOptions{}))
	truth(t, "policy gone", clients, to, "good web", "good web6", "bad web", "bad web6", "far web", "far web6")
	if k := told(silent); k != 1 {
		t.Errorf("the outage is told %d times", k)
	}
}
