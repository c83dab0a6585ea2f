package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	managerapp "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	manageroptions "k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	schedulerapp "k8s.io/kubernetes/cmd/kube-scheduler/app"
	scheduleroptions "k8s.io/kubernetes/cmd/kube-scheduler/app/options"
	"k8s.io/kubernetes/pkg/controller/certificates/authority"

	"github.com/nodeagent/nodeagent/controlplane/csr"
)

const (
	clientQPS   = 200
	clientBurst = 400
)

// runControllerManager runs every controller that is on by default, and those
// for bootstrap tokens, without leader election and without a port.
func runControllerManager(ctx context.Context, cfg config) error {
	s, err := manageroptions.NewKubeControllerManagerOptions()
	if err != nil {
		return fmt.Errorf("make options: %w", err)
	}
	s.SecureServing.BindPort = 0
	s.Generic.LeaderElection.LeaderElect = false
	s.Generic.Controllers = []string{"*", "bootstrap-signer-controller", "token-cleaner-controller"}
	s.Generic.ClientConnection.Kubeconfig = kubeconfigFile("kube-controller-manager")
	s.Generic.ClientConnection.QPS = clientQPS
	s.Generic.ClientConnection.Burst = clientBurst
	s.KubeCloudShared.UseServiceAccountCredentials = true
	s.KubeCloudShared.AllocateNodeCIDRs = true
	s.KubeCloudShared.CIDRAllocatorType = "RangeAllocator"
	s.KubeCloudShared.ConfigureCloudRoutes = false
	s.KubeCloudShared.ClusterCIDR = podCIDRs
	s.NodeIPAMController.ServiceCIDR = serviceCIDRs
	s.PersistentVolumeBinderController.VolumeConfiguration.FlexVolumePluginDir = "flexvolume" // it makes the directory
	s.SAController.RootCAFile = "pki/ca.crt"
	s.SAController.ServiceAccountKeyFile = "pki/sa.key"

	signing := s.CSRSigningController
	signing.ClusterSigningDuration.Duration = cfg.signingDuration
	signing.KubeAPIServerClientSignerConfiguration.CertFile, signing.KubeAPIServerClientSignerConfiguration.KeyFile = "pki/ca.crt", "pki/ca.key"
	signing.LegacyUnknownSignerConfiguration = signing.KubeAPIServerClientSignerConfiguration
	if !cfg.signsItself() {
		signing.KubeletClientSignerConfiguration = signing.KubeAPIServerClientSignerConfiguration
		signing.KubeletServingSignerConfiguration = signing.KubeAPIServerClientSignerConfiguration
	}

	c, err := s.Config(ctx, managerapp.KnownControllers(), managerapp.ControllersDisabledByDefault(), managerapp.ControllerAliases())
	if err != nil {
		return fmt.Errorf("make configuration: %w", err)
	}
	return managerapp.Run(ctx, c.Complete())
}

// runScheduler runs the scheduler with its default profile, without leader
// election and without a port. Its options can be set before defaulting by
// flags only.
func runScheduler(ctx context.Context) error {
	s := scheduleroptions.NewOptions()
	s.SecureServing.BindPort = 0
	for _, f := range []struct{ set, name, value string }{
		{"leader election", "leader-elect", "false"},
		{"deprecated", "kubeconfig", kubeconfigFile("kube-scheduler")},
		{"deprecated", "kube-api-qps", fmt.Sprint(clientQPS)},
		{"deprecated", "kube-api-burst", fmt.Sprint(clientBurst)},
	} {
		if err := s.Flags.FlagSet(f.set).Set(f.name, f.value); err != nil {
			return fmt.Errorf("set %s: %w", f.name, err)
		}
	}
	completed, scheduler, err := schedulerapp.Setup(ctx, s)
	if err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	return schedulerapp.Run(ctx, completed, scheduler)
}

// runCSR approves and denies kubelets' serving certificates, and signs them if
// the controller manager cannot.
func runCSR(ctx context.Context, cfg config, ca authority.CertificateAuthority) error {
	rest, err := restConfig(kubeconfigFile(servingApprover))
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(rest)
	if err != nil {
		return fmt.Errorf("make client: %w", err)
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	requests := factory.Certificates().V1().CertificateSigningRequests()
	approver := csr.NewApprover(ctx, client, requests)
	signer := csr.NewSigner(ctx, client, requests, ca, cfg.signingDuration, cfg.backdate())
	factory.Start(ctx.Done())
	defer factory.Shutdown()
	var running sync.WaitGroup
	running.Go(func() { approver.Run(ctx, 1) })
	if cfg.signsItself() {
		running.Go(func() { signer.Run(ctx, 1) })
	}
	running.Wait()
	return nil
}

// stockBackdate is what kube-controller-manager's signers take off the start of
// every certificate (pkg/controller/certificates/signer, v1.37).
const stockBackdate = 5 * time.Minute

// backdate is how long before now a certificate's validity begins: a tenth of
// its life at most, so that clients who renew at 70 to 90 % of it do so in the
// future.
func (c config) backdate() time.Duration { return min(stockBackdate, c.signingDuration/10) }

func (c config) signsItself() bool { return c.backdate() < stockBackdate }
