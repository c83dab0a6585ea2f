package certs

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ConditionType is the Node's condition that tells of certificates: True when
// one of them is about to expire, or has, and was not renewed in time.
const ConditionType corev1.NodeConditionType = "CertificateExpiring"

const (
	nodePause      = 5 * time.Second // between looks at the Node when they fail
	reportPause    = 5 * time.Second // between looks at what there is to report
	heartbeat      = 5 * time.Minute // of the condition while nothing changes
	eventsApart    = time.Hour       // between events of the same condition
	eventNamespace = "default"       // of events of things without a namespace
)

// followAddresses keeps the node's names current until ctx ends.
func (m *Manager) followAddresses(ctx context.Context) {
	follow := m.cfg.Addresses
	if follow == nil {
		follow = m.followNode
	}
	for ctx.Err() == nil {
		if err := follow(ctx, m.setNames); err != nil && ctx.Err() == nil {
			m.cfg.Log.Warn("the node's addresses are not followed; it is tried again", "err", err)
		}
		pause(ctx, nodePause)
	}
}

// followNode reads the names from the Node's status, as often as it changes.
// The calls show as well whether the API server still accepts the certificate.
func (m *Manager) followNode(ctx context.Context, set func(Names)) error {
	for ; ctx.Err() == nil; pause(ctx, nodePause) {
		for m.clientFirst() != "" && ctx.Err() == nil {
			pause(ctx, time.Second)
		}
		node, err := m.api.node(ctx, m.cfg.NodeName)
		switch {
		case err == nil, apierrors.IsNotFound(err), apierrors.IsForbidden(err):
			m.client.accepted()
		default:
			m.client.refuse(explain(err, "look at the Node", m.cfg.Kubeconfig))
			continue
		}
		if err != nil {
			continue // nobody has registered it yet
		}
		set(namesOf(node))
		m.watchNames(ctx, set)
	}
	return nil
}

// watchNames follows the Node until the watch ends.
func (m *Manager) watchNames(ctx context.Context, set func(Names)) {
	w, err := m.api.watchNode(ctx, m.cfg.NodeName)
	if err != nil {
		return
	}
	defer w.Stop()
	// A watch is not judged again while it lasts: look at times whether the
	// certificate is still accepted.
	again := time.NewTimer(time.Minute)
	defer again.Stop()
	for {
		select {
		case e, open := <-w.ResultChan():
			node, ok := e.Object.(*corev1.Node)
			if !open || !ok {
				return
			}
			set(namesOf(node))
		case <-again.C:
			return
		}
	}
}

// namesOf are the addresses of a Node as names of a certificate, as kubelet
// takes them.
func namesOf(node *corev1.Node) Names {
	var n Names
	for _, a := range node.Status.Addresses {
		ip := net.ParseIP(a.Address)
		switch {
		case a.Address == "":
		case ip != nil:
			n.IPs = append(n.IPs, ip)
		case a.Type == corev1.NodeHostName, a.Type == corev1.NodeInternalDNS, a.Type == corev1.NodeExternalDNS:
			n.DNS = append(n.DNS, a.Address)
		}
	}
	return n
}

// health is what the Node's condition says.
type health struct {
	expiring        bool
	reason, message string
}

// lateAt is when a certificate that is still not renewed is worth telling of: a
// quarter of the time between its renewal and its end has passed.
func lateAt(s Status) time.Time { return s.Renewal.Add(s.NotAfter.Sub(*s.Renewal) / 4) }

// assess looks for certificates that should have been renewed by now.
func assess(now time.Time, all []Status) health {
	h := health{reason: "CertificatesRenewed", message: "no certificate is about to expire"}
	var told []string
	for _, s := range all {
		if s.NotAfter == nil || now.Before(lateAt(s)) {
			continue
		}
		h.expiring = true
		h.reason = "NotRenewed"
		if s.LastReason != "" {
			h.reason = string(s.LastReason)
		}
		word := "expires"
		if !now.Before(*s.NotAfter) {
			word = "expired"
		}
		line := fmt.Sprintf("the %s certificate %s at %s and is not renewed", s.Name, word, s.NotAfter.UTC().Format(time.RFC3339))
		switch {
		case s.LastError != "":
			line += ": " + s.LastError
		case s.Request != "":
			line += ": certificate request " + s.Request + " waits for approval: kubectl certificate approve " + s.Request
		}
		told = append(told, line)
	}
	if h.expiring {
		h.message = strings.Join(told, "; ")
	}
	return h
}

// reported is what the API server has been told last.
type reported struct {
	health health
	at     time.Time // zero: nothing yet
	since  time.Time // of the condition's last transition
	event  time.Time // of the last one
}

// report keeps the Node's condition true, and makes an event when a certificate
// begins to run out, until ctx ends.
func (m *Manager) report(ctx context.Context) {
	var last reported
	for ctx.Err() == nil {
		now := m.cfg.Now()
		h := assess(now, m.Status())
		if m.clientFirst() == "" && due(h, last, now) {
			if next, err := m.tell(ctx, h, last, now); err == nil {
				last = next
			} else if ctx.Err() == nil {
				m.cfg.Log.Debug("the Node's condition is not written", "err", err)
			}
		}
		pause(ctx, time.Second) // changes come in swarms
		timer := time.NewTimer(nextReport(m.cfg.Now(), m.Status()))
		select {
		case <-ctx.Done():
		case <-m.changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// nextReport is when to look again while nothing happens.
func nextReport(now time.Time, all []Status) time.Duration {
	d := reportPause
	for _, s := range all {
		if s.NotAfter == nil {
			continue
		}
		if late := lateAt(s).Sub(now); late > 0 {
			d = min(d, late)
		}
	}
	return d
}

// due says whether there is something to tell.
func due(h health, last reported, now time.Time) bool {
	return h != last.health || now.Sub(last.at) >= heartbeat || h.expiring && now.Sub(last.event) >= eventsApart
}

func (m *Manager) tell(ctx context.Context, h health, last reported, now time.Time) (reported, error) {
	next := reported{health: h, at: now, since: last.since, event: last.event}
	if last.at.IsZero() || last.health.expiring != h.expiring {
		next.since = now
	}
	patch, err := conditionPatch(h, now, next.since)
	if err != nil {
		return last, err
	}
	if err := m.api.patchNodeStatus(ctx, m.cfg.NodeName, patch); err != nil {
		return last, fmt.Errorf("patch status of node %s: %w", m.cfg.NodeName, err)
	}
	if h.expiring && (!last.health.expiring || now.Sub(last.event) >= eventsApart) {
		if err := m.api.createEvent(ctx, m.event(h, now)); err != nil {
			return last, fmt.Errorf("create event: %w", err)
		}
		next.event = now
	}
	return next, nil
}

func conditionPatch(h health, now, since time.Time) ([]byte, error) {
	status := corev1.ConditionFalse
	if h.expiring {
		status = corev1.ConditionTrue
	}
	return json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{{
		Type: ConditionType, Status: status, Reason: h.reason, Message: h.message,
		LastHeartbeatTime: metav1.NewTime(now), LastTransitionTime: metav1.NewTime(since),
	}}}})
}

func (m *Manager) event(h health, now time.Time) *corev1.Event {
	at := metav1.NewTime(now)
	return &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: eventNamespace, Name: fmt.Sprintf("%s.%x", m.cfg.NodeName, now.UnixNano())},
		// The UID of a Node in events is its name by convention (kubelet).
		InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: m.cfg.NodeName, UID: types.UID(m.cfg.NodeName)},
		Type:           corev1.EventTypeWarning, Reason: string(ConditionType), Message: h.message,
		FirstTimestamp: at, LastTimestamp: at, Count: 1,
		Source: corev1.EventSource{Component: "nodeagent", Host: m.cfg.NodeName}, ReportingController: "nodeagent", ReportingInstance: m.cfg.NodeName,
	}
}

// ReviewToken asks the API server whose token that is. ok is false for a token
// that it does not accept.
func (m *Manager) ReviewToken(ctx context.Context, token string) (user authenticationv1.UserInfo, ok bool, err error) {
	r, err := m.api.reviewToken(ctx, &authenticationv1.TokenReview{
		TypeMeta: metav1.TypeMeta{APIVersion: "authentication.k8s.io/v1", Kind: "TokenReview"}, Spec: authenticationv1.TokenReviewSpec{Token: token},
	})
	if err != nil {
		return user, false, fmt.Errorf("review token: %w", err)
	}
	return r.Status.User, r.Status.Authenticated, nil
}

// ReviewAccess asks the API server whether a user may do something.
func (m *Manager) ReviewAccess(ctx context.Context, spec authorizationv1.SubjectAccessReviewSpec) (allowed bool, reason string, err error) {
	r, err := m.api.reviewAccess(ctx, &authorizationv1.SubjectAccessReview{
		TypeMeta: metav1.TypeMeta{APIVersion: "authorization.k8s.io/v1", Kind: "SubjectAccessReview"}, Spec: spec,
	})
	if err != nil {
		return false, "", fmt.Errorf("review access: %w", err)
	}
	return r.Status.Allowed && !r.Status.Denied, r.Status.Reason, nil
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
