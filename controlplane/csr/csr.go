// Package csr decides on the certificate signing requests that stock
// Kubernetes leaves open: it approves or denies kubelets' serving
// certificates, and signs with lifetimes that kube-controller-manager's
// signers, which date every certificate back by five minutes, make no sense of.
//
// It must not issue anything that is not approved. Each function returns a
// controller of k8s.io/kubernetes, whose Run has the goroutines.
package csr

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"time"

	certificates "k8s.io/api/certificates/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	informers "k8s.io/client-go/informers/certificates/v1"
	"k8s.io/client-go/kubernetes"
	certhelper "k8s.io/kubernetes/pkg/apis/certificates"
	certcontroller "k8s.io/kubernetes/pkg/controller/certificates"
	"k8s.io/kubernetes/pkg/controller/certificates/authority"
)

// NewApprover returns a controller that approves or denies every request for
// the signer kubernetes.io/kubelet-serving, as Judge says.
func NewApprover(ctx context.Context, client kubernetes.Interface, requests informers.CertificateSigningRequestInformer) *certcontroller.CertificateController {
	handle := func(ctx context.Context, request *certificates.CertificateSigningRequest) error {
		approved, denied := certcontroller.GetCertApprovalCondition(&request.Status)
		if request.Spec.SignerName != certificates.KubeletServingSignerName || approved || denied {
			return nil
		}
		// Read past every cache: a node asks right after it reported its addresses.
		node, err := client.CoreV1().Nodes().Get(ctx, strings.TrimPrefix(request.Spec.Username, "system:node:"), meta.GetOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("get node of %s for request %s: %w", request.Spec.Username, request.Name, err)
		}
		if err != nil {
			node = nil
		}
		request = request.DeepCopy()
		request.Status.Conditions = append(request.Status.Conditions, Judge(request, node))
		_, err = client.CertificatesV1().CertificateSigningRequests().UpdateApproval(ctx, request.Name, request, meta.UpdateOptions{})
		if err != nil {
			return fmt.Errorf("update approval of request %s: %w", request.Name, err)
		}
		return nil
	}
	return certcontroller.NewCertificateController(ctx, "kubelet-serving-approver", client, requests, handle)
}

// Judge returns the condition for a request for a kubelet's serving
// certificate: Approved if the node asks for itself, and for names and
// addresses only that its Node object has; otherwise Denied, with the reason.
// node is nil if there is none of that name.
func Judge(request *certificates.CertificateSigningRequest, node *core.Node) certificates.CertificateSigningRequestCondition {
	deny := func(reason, format string, args ...any) certificates.CertificateSigningRequestCondition {
		return certificates.CertificateSigningRequestCondition{
			Type: certificates.CertificateDenied, Status: core.ConditionTrue, Reason: reason, Message: fmt.Sprintf(format, args...),
		}
	}
	asked, err := certhelper.ParseCSR(request.Spec.Request)
	if err != nil {
		return deny("Unreadable", "the request cannot be parsed: %v", err)
	}
	if err := certhelper.ValidateKubeletServingCSR(asked, usages(request)); err != nil {
		return deny("NotKubeletServing", "not a kubelet's serving certificate: %v", err)
	}
	if asked.Subject.CommonName != request.Spec.Username || !slices.Contains(request.Spec.Groups, "system:nodes") {
		return deny("NotTheNode", "%s asks for a certificate of %s; a node asks for itself only", request.Spec.Username, asked.Subject.CommonName)
	}
	if node == nil {
		return deny("NodeNotFound", "there is no Node for %s; register it, report its addresses, then ask again", request.Spec.Username)
	}
	if strange := notOf(node, asked); len(strange) > 0 {
		return deny("AddressMismatch", "node %s has no address %s in its status; it has %v",
			node.Name, strings.Join(strange, ", "), node.Status.Addresses)
	}
	return certificates.CertificateSigningRequestCondition{
		Type: certificates.CertificateApproved, Status: core.ConditionTrue, Reason: "AddressesMatch",
		Message: "every name and address is one of node " + node.Name,
	}
}

// notOf lists the names and addresses asked for that are not the node's.
func notOf(node *core.Node, asked *x509.CertificateRequest) []string {
	has := func(address string, kinds ...core.NodeAddressType) bool {
		return slices.ContainsFunc(node.Status.Addresses, func(a core.NodeAddress) bool {
			return a.Address == address && slices.Contains(kinds, a.Type)
		})
	}
	var strange []string
	for _, name := range asked.DNSNames {
		if !has(name, core.NodeHostName, core.NodeInternalDNS, core.NodeExternalDNS) {
			strange = append(strange, name)
		}
	}
	for _, ip := range asked.IPAddresses {
		if !has(ip.String(), core.NodeInternalIP, core.NodeExternalIP) {
			strange = append(strange, ip.String())
		}
	}
	return strange
}

// NewSigner returns a controller that signs approved requests for kubelets'
// client and serving certificates. They are valid from backdate ago until life
// from now, or shorter if asked for.
func NewSigner(ctx context.Context, client kubernetes.Interface, requests informers.CertificateSigningRequestInformer,
	ca authority.CertificateAuthority, life, backdate time.Duration,
) *certcontroller.CertificateController {
	handle := func(ctx context.Context, request *certificates.CertificateSigningRequest) error {
		if !certcontroller.IsCertificateRequestApproved(request) || certcontroller.HasTrueCondition(request, certificates.CertificateFailed) {
			return nil
		}
		validate, ours := validators()[request.Spec.SignerName]
		if !ours {
			return nil
		}
		asked, err := certhelper.ParseCSR(request.Spec.Request)
		if err != nil {
			return fmt.Errorf("parse request %s: %w", request.Name, err)
		}
		request = request.DeepCopy()
		if err := validate(asked, usages(request)); err != nil {
			request.Status.Conditions = append(request.Status.Conditions, certificates.CertificateSigningRequestCondition{
				Type: certificates.CertificateFailed, Status: core.ConditionTrue, Reason: "SignerValidationFailure", Message: err.Error(),
			})
		} else {
			der, err := ca.Sign(asked.Raw, authority.PermissiveSigningPolicy{
				TTL: lifeOf(request, life), Usages: request.Spec.Usages, Backdate: backdate, Short: life + 1,
			})
			if err != nil {
				return fmt.Errorf("sign request %s: %w", request.Name, err)
			}
			request.Status.Certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
		}
		_, err = client.CertificatesV1().CertificateSigningRequests().UpdateStatus(ctx, request, meta.UpdateOptions{})
		if err != nil {
			return fmt.Errorf("update request %s: %w", request.Name, err)
		}
		return nil
	}
	return certcontroller.NewCertificateController(ctx, "kubelet-signer", client, requests, handle)
}

// lifeOf is the lifetime that the request asks for (API validation allows ten
// minutes and more), at most longest.
func lifeOf(request *certificates.CertificateSigningRequest, longest time.Duration) time.Duration {
	if asked := request.Spec.ExpirationSeconds; asked != nil {
		return min(longest, time.Duration(*asked)*time.Second)
	}
	return longest
}

// validators are the signers that NewSigner serves, with their own rules.
func validators() map[string]func(*x509.CertificateRequest, sets.String) error {
	return map[string]func(*x509.CertificateRequest, sets.String) error{
		certificates.KubeletServingSignerName:             certhelper.ValidateKubeletServingCSR,
		certificates.KubeAPIServerClientKubeletSignerName: certhelper.ValidateKubeletClientCSR,
	}
}

func usages(request *certificates.CertificateSigningRequest) sets.String {
	set := sets.NewString()
	for _, u := range request.Spec.Usages {
		set.Insert(string(u))
	}
	return set
}
