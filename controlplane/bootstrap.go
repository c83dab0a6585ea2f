package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"time"

	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// newToken makes a bootstrap token, six and sixteen characters with a dot
// between them.
func newToken() string {
	text := strings.ToLower(rand.Text() + rand.Text()) // base32
	return text[:6] + "." + text[6:22]
}

// bootstrap makes the objects that a kubelet's first steps need: the token, and
// the roles by which it may ask for certificates and has them approved.
func bootstrap(ctx context.Context, client kubernetes.Interface, token string) error {
	id, secret, _ := strings.Cut(token, ".")
	_, err := client.CoreV1().Secrets(meta.NamespaceSystem).Create(ctx, &core.Secret{
		ObjectMeta: meta.ObjectMeta{Name: "bootstrap-token-" + id},
		Type:       core.SecretTypeBootstrapToken,
		StringData: map[string]string{
			"token-id": id, "token-secret": secret,
			"usage-bootstrap-authentication": "true", "usage-bootstrap-signing": "true",
		},
	}, meta.CreateOptions{})
	if err != nil {
		return fmt.Errorf("create bootstrap token: %w", err)
	}
	_, err = client.RbacV1().ClusterRoles().Create(ctx, &rbac.ClusterRole{
		ObjectMeta: meta.ObjectMeta{Name: servingApprover},
		Rules: []rbac.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"get"}},
			{APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"certificatesigningrequests"}, Verbs: []string{"get", "list", "watch"}},
			{
				APIGroups: []string{"certificates.k8s.io"}, Verbs: []string{"update"},
				Resources: []string{"certificatesigningrequests/approval", "certificatesigningrequests/status"},
			},
			{
				APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"signers"}, Verbs: []string{"approve", "sign"},
				ResourceNames: []string{"kubernetes.io/kubelet-serving", "kubernetes.io/kube-apiserver-client-kubelet"},
			},
		},
	}, meta.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create role %s: %w", servingApprover, err)
	}
	const requests = "system:certificates.k8s.io:certificatesigningrequests:"
	for _, b := range []struct{ kind, subject, role string }{
		{rbac.GroupKind, "system:bootstrappers", "system:node-bootstrapper"},
		{rbac.GroupKind, "system:bootstrappers", requests + "nodeclient"},
		{rbac.GroupKind, "system:nodes", requests + "selfnodeclient"},
		{rbac.UserKind, kubeletClient, "system:kubelet-api-admin"},
		{rbac.UserKind, servingApprover, servingApprover},
	} {
		name := "controlplane:" + strings.TrimPrefix(b.role, "system:")
		_, err := client.RbacV1().ClusterRoleBindings().Create(ctx, &rbac.ClusterRoleBinding{
			ObjectMeta: meta.ObjectMeta{Name: name},
			Subjects:   []rbac.Subject{{APIGroup: rbac.GroupName, Kind: b.kind, Name: b.subject}},
			RoleRef:    rbac.RoleRef{APIGroup: rbac.GroupName, Kind: "ClusterRole", Name: b.role},
		}, meta.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("bind role %s to %s: %w", b.role, b.subject, err)
		}
	}
	return nil
}

// poll asks until done says so, ctx ends or the time is over. The error names
// what was waited for and the last answer.
func poll(ctx context.Context, what string, done func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for {
		err := done(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w; last: %w", what, context.Cause(ctx), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// waitServed waits until the API server calls itself ready.
func waitServed(ctx context.Context, client kubernetes.Interface) error {
	return poll(ctx, "the API server", func(ctx context.Context) error {
		body, err := client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Raw()
		if err != nil {
			return fmt.Errorf("%w %s", err, body)
		}
		return nil
	})
}

// waitControlled waits until pods can be made in the default namespace: the
// controllers have made its service account and published the authority.
func waitControlled(ctx context.Context, client kubernetes.Interface) error {
	return poll(ctx, "the controllers", func(ctx context.Context) error {
		if _, err := client.CoreV1().ServiceAccounts(meta.NamespaceDefault).Get(ctx, "default", meta.GetOptions{}); err != nil {
			return err
		}
		_, err := client.CoreV1().ConfigMaps(meta.NamespaceDefault).Get(ctx, "kube-root-ca.crt", meta.GetOptions{})
		return err
	})
}
