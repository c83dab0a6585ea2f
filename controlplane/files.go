package main

import (
	"crypto/rand"
	_ "embed" // the default audit policy
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/nodeagent/nodeagent/controlplane/pki"
)

// Files of the control plane's directory, which is the working directory.
const (
	lockFile         = "lock"
	readyFile        = "ready.json"
	portFile         = "port"
	encryptionFile   = "encryption.yaml"
	auditPolicyFile  = "audit-policy.yaml"
	auditWebhookFile = "audit-webhook.kubeconfig"
)

//go:embed audit-policy.yaml
var defaultAuditPolicy []byte

// Names in certificates.
const (
	frontProxy      = "front-proxy-client"
	kubeletClient   = "kube-apiserver-kubelet-client"
	servingApprover = "kubelet-serving-approver"
)

// roles are the clients that get a kubeconfig with a certificate: name of the
// file and whom the certificate names.
func roles() map[string]pki.Leaf {
	return map[string]pki.Leaf{
		"admin":                   {CommonName: "admin", Organizations: []string{"system:masters"}},
		"kube-controller-manager": {CommonName: "system:kube-controller-manager"},
		"kube-scheduler":          {CommonName: "system:kube-scheduler"},
		servingApprover:           {CommonName: servingApprover},
	}
}

func kubeconfigFile(role string) string { return role + ".kubeconfig" }

// enter makes dir the working directory, holds its lock until the process ends
// and removes what an earlier run left, unless its data are to be kept. It
// refuses a directory with files of others.
func enter(dir string, keep bool) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	if err := os.Chdir(dir); err != nil {
		return err
	}
	entries, err := os.ReadDir(".")
	if err != nil {
		return err
	}
	if _, err := os.Stat(lockFile); errors.Is(err, fs.ErrNotExist) && len(entries) > 0 {
		return fmt.Errorf("%s is not empty and not of an earlier run: name another directory", dir)
	}
	// Not closed: the lock is the process's.
	fd, err := unix.Open(lockFile, unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("open %s/%s: %w", dir, lockFile, err)
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("another control plane runs in %s: stop it or name another directory (%w)", dir, err)
	}
	for _, e := range entries {
		kept := keep && e.Name() != readyFile || e.Name() == lockFile
		if !kept {
			if err := os.RemoveAll(e.Name()); err != nil {
				return fmt.Errorf("remove what an earlier run left: %w", err)
			}
		}
	}
	return nil
}

// authorities are the ones that the control plane signs with.
type authorities struct{ cluster, frontProxy *pki.Authority }

// writePKI makes what is missing of keys and authorities, and every other
// certificate anew.
func writePKI(ip net.IP) (a authorities, err error) {
	if err := os.MkdirAll("pki", 0o700); err != nil {
		return a, err
	}
	if a.cluster, err = pki.LoadAuthority("pki", "ca"); err != nil {
		return a, err
	}
	if a.frontProxy, err = pki.LoadAuthority("pki", "front-proxy-ca"); err != nil {
		return a, err
	}
	if _, err = pki.LoadKey("pki/sa.key"); err != nil {
		return a, err
	}
	hosts, err := servingHosts(ip)
	if err != nil {
		return a, err
	}
	return a, errors.Join(
		a.cluster.IssueFiles("pki", "apiserver", pki.Leaf{CommonName: "kube-apiserver", Hosts: hosts}),
		a.cluster.IssueFiles("pki", "apiserver-kubelet-client", pki.Leaf{CommonName: kubeletClient}),
		a.frontProxy.IssueFiles("pki", "front-proxy-client", pki.Leaf{CommonName: frontProxy}),
	)
}

// servingHosts are the names of the API server inside and outside: loopback,
// the service's, and the address that it listens on, or all of the host's.
func servingHosts(ip net.IP) ([]string, error) {
	hosts := []string{
		"localhost", "127.0.0.1", "::1", "10.96.0.1", "fd00:10:96::1",
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
	}
	if !ip.IsUnspecified() {
		return append(hosts, ip.String()), nil
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the host's addresses: %w", err)
	}
	for _, a := range addrs {
		hosts = append(hosts, a.(*net.IPNet).IP.String())
	}
	return hosts, nil
}

// writeConfigs writes what the API server reads beside its options.
func writeConfigs(cfg config) error {
	if _, err := os.Stat(encryptionFile); errors.Is(err, fs.ErrNotExist) {
		key := make([]byte, 32)
		rand.Read(key)
		err := os.WriteFile(encryptionFile, fmt.Appendf(nil, `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
  - resources: [secrets]
    providers:
      - secretbox: {keys: [{name: key1, secret: %s}]}
`, base64.StdEncoding.EncodeToString(key)), 0o600)
		if err != nil {
			return err
		}
	}
	policy := cfg.auditPolicy
	if policy == nil {
		policy = defaultAuditPolicy
	}
	if cfg.auditWebhook != "" {
		if err := writeKubeconfig(auditWebhookFile, cfg.auditWebhook, nil, clientcmdapi.AuthInfo{}); err != nil {
			return err
		}
	}
	return os.WriteFile(auditPolicyFile, policy, 0o644)
}

// writeKubeconfigs writes one kubeconfig per role and one with the bootstrap
// token. It returns their names and absolute paths.
func writeKubeconfigs(server, token string, ca *pki.Authority) (map[string]string, error) {
	users := map[string]clientcmdapi.AuthInfo{"bootstrap": {Token: token}}
	for role, leaf := range roles() {
		cert, key, err := ca.Issue(leaf)
		if err != nil {
			return nil, err
		}
		users[role] = clientcmdapi.AuthInfo{ClientCertificateData: cert, ClientKeyData: key}
	}
	paths := map[string]string{}
	for role, user := range users {
		if err := writeKubeconfig(kubeconfigFile(role), server, ca.CertPEM, user); err != nil {
			return nil, err
		}
		path, err := filepath.Abs(kubeconfigFile(role))
		if err != nil {
			return nil, err
		}
		paths[role] = path
	}
	return paths, nil
}

func writeKubeconfig(file, server string, caPEM []byte, user clientcmdapi.AuthInfo) error {
	c := clientcmdapi.NewConfig()
	c.Clusters["controlplane"] = &clientcmdapi.Cluster{Server: server, CertificateAuthorityData: caPEM}
	c.AuthInfos["user"] = &user
	c.Contexts["default"] = &clientcmdapi.Context{Cluster: "controlplane", AuthInfo: "user"}
	c.CurrentContext = "default"
	if err := clientcmd.WriteToFile(*c, file); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return nil
}

func restConfig(kubeconfig string) (*rest.Config, error) {
	c, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", kubeconfig, err)
	}
	c.QPS, c.Burst = clientQPS, clientBurst
	return c, nil
}

// ready is the content of ready.json, which exists while the control plane can
// be used.
type ready struct {
	Server      string            `json:"server"`
	PID         int               `json:"pid"`
	Kubeconfigs map[string]string `json:"kubeconfigs"`
}

// write makes the file appear whole.
func (r ready) write() error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(readyFile+".new", append(data, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(readyFile+".new", readyFile)
}

// lastPort is the port of an earlier run in this directory, or 0.
func lastPort() int {
	data, err := os.ReadFile(portFile)
	if err != nil {
		return 0
	}
	port, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return 0
	}
	return port
}
