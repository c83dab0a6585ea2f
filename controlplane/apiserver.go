package main

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"time"

	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	serveroptions "k8s.io/apiserver/pkg/server/options"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
)

const (
	serviceCIDRs = "10.96.0.0/16,fd00:10:96::/112"
	podCIDRs     = "10.244.0.0/16,fd00:10:244::/48"
	issuer       = "https://kubernetes.default.svc.cluster.local"
)

// runAPIServer serves on listener until ctx ends. Paths are relative to the
// working directory.
func runAPIServer(ctx context.Context, cfg config, listener net.Listener) error {
	s := options.NewServerRunOptions()
	s.SecureServing.Listener = listener
	s.SecureServing.BindAddress = cfg.listen
	s.SecureServing.BindPort = listener.Addr().(*net.TCPAddr).Port
	s.SecureServing.ServerCert.CertKey = serveroptions.CertKey{CertFile: "pki/apiserver.crt", KeyFile: "pki/apiserver.key"}
	if !cfg.listen.IsUnspecified() {
		s.GenericServerRunOptions.AdvertiseAddress = cfg.listen
	}
	if cfg.listen.IsLoopback() || cfg.listen.To4() == nil {
		// Endpoints may not hold loopback addresses, nor others than of the
		// service's first family.
		s.EndpointReconcilerType = "none"
	}
	s.Etcd.StorageConfig.Transport.ServerList = []string{"unix://" + etcdSocket}
	s.Etcd.EncryptionProviderConfigFilepath = encryptionFile
	s.ServiceClusterIPRanges = serviceCIDRs
	s.AllowPrivileged = true
	// Otherwise a stop waits a minute for clients to end their watches.
	s.GenericServerRunOptions.ShutdownWatchTerminationGracePeriod = 2 * time.Second

	s.Authentication.ClientCert.ClientCA = "pki/ca.crt"
	s.Authentication.BootstrapToken.Enable = true
	s.Authentication.ServiceAccounts.Issuers = []string{issuer}
	s.Authentication.ServiceAccounts.KeyFiles = []string{"pki/sa.key"}
	s.ServiceAccountSigningKeyFile = "pki/sa.key"
	s.Authorization.Modes = []string{"Node", "RBAC"}
	s.Admission.GenericAdmission.EnablePlugins = []string{"NodeRestriction"}

	s.Authentication.RequestHeader.ClientCAFile = "pki/front-proxy-ca.crt"
	s.Authentication.RequestHeader.AllowedNames = []string{frontProxy}
	s.Authentication.RequestHeader.UsernameHeaders = []string{"X-Remote-User"}
	s.Authentication.RequestHeader.GroupHeaders = []string{"X-Remote-Group"}
	s.Authentication.RequestHeader.ExtraHeaderPrefixes = []string{"X-Remote-Extra-"}
	s.ProxyClientCertFile, s.ProxyClientKeyFile = "pki/front-proxy-client.crt", "pki/front-proxy-client.key"

	s.KubeletConfig.TLSClientConfig.CAFile = "pki/ca.crt"
	s.KubeletConfig.TLSClientConfig.CertFile = "pki/apiserver-kubelet-client.crt"
	s.KubeletConfig.TLSClientConfig.KeyFile = "pki/apiserver-kubelet-client.key"

	s.Audit.PolicyFile = auditPolicyFile
	s.Audit.LogOptions.Path = "audit.log"
	if cfg.auditWebhook != "" {
		s.Audit.WebhookOptions.ConfigFile = auditWebhookFile
		s.Audit.WebhookOptions.BatchOptions.BatchConfig.MaxBatchWait = time.Second
	}

	completed, err := s.Complete(ctx)
	if err != nil {
		return fmt.Errorf("complete options: %w", err)
	}
	if errs := completed.Validate(); len(errs) > 0 {
		return fmt.Errorf("validate options: %w", utilerrors.NewAggregate(errs))
	}
	return app.Run(ctx, completed)
}

// listen opens the API server's port: cfg.port, or the one of an earlier run,
// which a passing connection may hold for a moment, or a free one.
func listen(ctx context.Context, cfg config) (net.Listener, error) {
	last := lastPort()
	deadline := time.Now().Add(10 * time.Second)
	for {
		port := cfg.port
		if port == 0 {
			port = last
		}
		l, err := net.Listen("tcp", net.JoinHostPort(cfg.listen.String(), strconv.Itoa(port)))
		if err == nil || port == cfg.port || time.Now().After(deadline) || ctx.Err() != nil {
			return l, err
		}
		time.Sleep(100 * time.Millisecond)
	}
}
