package certs

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"syscall"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// Reason is the class of a failure, for metrics and the Node's condition.
type Reason string

// The reasons, by where the remedy is.
const (
	NoBootstrap       Reason = "NoBootstrap"       // no credential to ask with
	ServerUnreachable Reason = "ServerUnreachable" // network, or it is down
	ServerNotTrusted  Reason = "ServerNotTrusted"  // its certificate has another CA
	ClockWrong        Reason = "ClockWrong"        // certificates are not valid by this clock
	CredentialRefused Reason = "CredentialRefused" // 401
	Forbidden         Reason = "Forbidden"         // 403
	RequestDenied     Reason = "RequestDenied"     // by the approver
	RequestFailed     Reason = "RequestFailed"     // by the signer
	NotApproved       Reason = "NotApproved"       // nobody has looked at it
	WrongCertificate  Reason = "WrongCertificate"  // the signer issued something else
	FilesUnusable     Reason = "FilesUnusable"     // what is there cannot be read
	FilesNotWritten   Reason = "FilesNotWritten"   // disk full, read-only
	OtherFailure      Reason = "Other"             // see the error
	requestGone       Reason = "RequestGone"       // deleted while waiting
	superseded        Reason = "Superseded"        // something else is wanted by now
)

// Problem is why there is no new certificate, and what to do about it.
type Problem struct {
	Reason Reason
	Err    error
	Advice string
}

func (p *Problem) Error() string {
	if p.Advice == "" {
		return p.Err.Error()
	}
	return p.Err.Error() + ": " + p.Advice
}

// Unwrap gives the cause.
func (p *Problem) Unwrap() error { return p.Err }

func problem(r Reason, advice, format string, args ...any) *Problem {
	return &Problem{Reason: r, Err: fmt.Errorf(format, args...), Advice: advice}
}

// explain finds the class of what a request to the API server ended with.
func explain(err error, doing, kubeconfig string) *Problem {
	var p *Problem
	if errors.As(err, &p) {
		return p
	}
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var dns *net.DNSError
	wrapped := fmt.Errorf("%s: %w", doing, err)
	as := func(r Reason, advice string) *Problem { return &Problem{r, wrapped, advice} }
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return as(ClockWrong, "either this node's clock is wrong (set it: timedatectl) or the API server's certificate has to be renewed")
	case errors.As(err, &unknown):
		return as(ServerNotTrusted, "the API server's certificate is not of the CA in "+kubeconfig+"; if the CA was rotated put the new one there, or in the bootstrap kubeconfig")
	case errors.As(err, &host):
		return as(ServerNotTrusted, "the address in "+kubeconfig+" is not one of the API server's names")
	case apierrors.IsUnauthorized(err):
		return as(CredentialRefused, "the API server does not accept the credential; a bootstrap token may have expired (kubeadm token create), or the CA of client certificates was rotated")
	case apierrors.IsForbidden(err):
		return as(Forbidden, "bind the ClusterRole system:node-bootstrapper to the bootstrap credential's group; a node may ask only for itself")
	case errors.As(err, &dns):
		return as(ServerUnreachable, "the name in "+kubeconfig+" cannot be resolved on this node")
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH),
		errors.Is(err, context.DeadlineExceeded), apierrors.IsServerTimeout(err), apierrors.IsServiceUnavailable(err):
		return as(ServerUnreachable, "it is tried again; see whether the API server runs at the address in "+kubeconfig)
	case apierrors.ReasonForError(err) == "":
		return as(ServerUnreachable, "the connection broke; it is tried again")
	}
	return as(OtherFailure, "")
}

// explainWrite adds what an operator can do about files.
func explainWrite(err error, dir string) *Problem {
	advice := "see the file system of " + dir
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		advice = "make room in the file system of " + dir + "; until then the certificate is used from memory"
	case errors.Is(err, syscall.EROFS), errors.Is(err, fs.ErrPermission):
		advice = "make " + dir + " writable; until then the certificate is used from memory"
	}
	return &Problem{FilesNotWritten, err, advice}
}

// clockProblem compares this node's clock with a certificate that came just
// now and with the API server's clock. It returns nil if nothing is wrong.
func clockProblem(now time.Time, leaf *x509.Certificate, skew time.Duration) *Problem {
	const advice = "set this node's clock (timedatectl)"
	told := ""
	if skew > time.Minute || skew < -time.Minute {
		told = fmt.Sprintf("; the API server's clock is %s ahead of this node's", skew.Round(time.Second))
	}
	switch {
	case now.Before(leaf.NotBefore):
		return problem(ClockWrong, advice, "the certificate that was issued just now is valid from %s, here it is %s%s", leaf.NotBefore.Format(time.RFC3339), now.UTC().Format(time.RFC3339), told)
	case !now.Before(leaf.NotAfter):
		return problem(ClockWrong, advice, "the certificate that was issued just now has expired at %s, here it is %s%s", leaf.NotAfter.Format(time.RFC3339), now.UTC().Format(time.RFC3339), told)
	case told != "":
		return problem(ClockWrong, advice, "the clocks differ%s", told)
	}
	return nil
}
