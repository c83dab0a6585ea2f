package certs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// userAgent is how the API server's log names us.
const userAgent = "nodeagent"

// loadKubeconfig reads the file at path with its current context. CA data that
// the file points to is read as well, so that two configurations are the same
// server if they are equal.
//
// Errors: fs.ErrNotExist if the file is not there.
func loadKubeconfig(path string) (*rest.Config, error) {
	if path == "" {
		return nil, fmt.Errorf("no kubeconfig is configured: %w", fs.ErrNotExist)
	}
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("read kubeconfig: %w", err)
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig %s: %w", path, err)
	}
	if file := cfg.CAFile; file != "" {
		if cfg.CAData, err = os.ReadFile(file); err != nil {
			return nil, fmt.Errorf("read the CA that kubeconfig %s names: %w", path, err)
		}
		cfg.CAFile = ""
	}
	cfg.UserAgent = userAgent
	return cfg, nil
}

// embeddedPair is the client certificate that a kubeconfig carries in itself
// or names, nil if it has none.
func embeddedPair(cfg *rest.Config) (*Pair, error) {
	t := cfg.TLSClientConfig
	if t.CertFile == "" && len(t.CertData) == 0 {
		return nil, nil
	}
	c := rest.CopyConfig(cfg)
	if err := rest.LoadTLSFiles(c); err != nil {
		return nil, err
	}
	return newPair(c.CertData, c.KeyData, time.Time{})
}

// writeKubeconfig makes the file at path speak with cluster's server and the
// pair at pairPath, as kubelet's bootstrap does.
func writeKubeconfig(path string, cluster *rest.Config, pairPath string) error {
	const name = "default"
	cfg := clientcmdapi.Config{
		Clusters: map[string]*clientcmdapi.Cluster{name: {
			Server: cluster.Host, TLSServerName: cluster.ServerName, InsecureSkipTLSVerify: cluster.Insecure,
			CertificateAuthorityData: cluster.CAData,
		}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{name: {ClientCertificate: pairPath, ClientKey: pairPath}},
		Contexts:       map[string]*clientcmdapi.Context{name: {Cluster: name, AuthInfo: name, Namespace: "default"}},
		CurrentContext: name,
	}
	data, err := clientcmd.Write(cfg)
	if err != nil {
		return fmt.Errorf("encode kubeconfig: %w", err)
	}
	if old, err := os.ReadFile(path); err == nil && string(old) == string(data) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make directory for the kubeconfig: %w", err)
	}
	return writeFile(path, data)
}

// missing says that a file is just not there.
func missing(err error) bool { return errors.Is(err, fs.ErrNotExist) }
