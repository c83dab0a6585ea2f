// Package certs gets and renews the TLS certificates of a node: the client
// certificate with which it talks to the API server and the serving
// certificate of its HTTPS endpoint.
//
// Signers, usages, subjects and files are kubelet's (kubelet-client-current.pem
// and kubelet-server-current.pem, links to dated pairs), so that a stock kubelet
// beside us, before us or after us uses the same files: a pair that it puts
// there is adopted, one that we put there is adopted by it. The protocol is that
// of client-go's certificate manager, spoken with client-go's REST client; the
// loop is ours, because the manager swallows why an attempt failed, asks again
// every second for a certificate that the signer issues wrongly, leaves a
// request behind with every attempt that nobody approves, replaces the link in
// two steps and cannot renew on demand.
//
// What happens next is decided by pure functions (decide.go); rotator.go does
// it, one goroutine per certificate. Manager.Run owns all goroutines. Readers
// (GetCertificate, Status, the client's transport) may be called from anywhere.
//
// The package must not decide who may call the endpoint (package gate does) and
// must not log a private key: a Pair prints as its subject and times.
// Caller: cmd/nodeagent. It needs no kernel in particular.
//
// Source: kubernetes pkg/kubelet/certificate, client-go util/certificate v0.37.2.
package certs
