package certs

import (
	"hash/fnv"
	"time"
)

// view is all that the next step of one certificate depends on.
type view struct {
	now      time.Time
	held     *Pair     // in use; nil: none
	saved    bool      // held is what the files hold
	want     *identity // nil: not known yet
	waitFor  string    // what has to come first, as a phrase; "": nothing
	asked    string    // why it is to be renewed before its time; "": no reason
	notUntil time.Time // after a failure: the next attempt
}

// step is what to do next.
type step struct {
	do  deed
	why string
	at  time.Time // of the renewal, as far as it is known
}

type deed int

const (
	wait    deed = iota
	save         // write what is held to the files
	request      // ask for a new certificate
)

// decide is the whole policy of rotation. Saving and requesting wait until
// notUntil; a request comes before the repair of files, which it makes needless.
func (k kind) decide(v view) step {
	at := time.Time{}
	if v.held != nil {
		at = renewAt(v.held)
	}
	why := k.need(v, at)
	switch {
	case v.want == nil || v.waitFor != "":
		phrase := v.waitFor
		if phrase == "" {
			phrase = "the node has no address yet"
		}
		return step{wait, phrase, at}
	case why != "" && v.now.Before(v.notUntil):
		return step{wait, why, v.notUntil}
	case why != "":
		return step{request, why, v.now}
	case !v.saved && v.now.Before(v.notUntil):
		return step{wait, "the files have to be written again", at}
	case !v.saved:
		return step{save, "the files do not hold what is in use", at}
	}
	return step{wait, "", at}
}

// need says why a new certificate is needed, "" if none is.
func (k kind) need(v view, at time.Time) string {
	switch {
	case v.held == nil:
		return "there is none"
	case v.held.expired(v.now):
		return "it has expired"
	case v.asked != "":
		return v.asked
	case v.want != nil && k.check(v.held.Leaf(), *v.want) != nil:
		return k.check(v.held.Leaf(), *v.want).Error()
	case !v.now.Before(at):
		return "its time has come"
	}
	return ""
}

// renewAt lies at 70 to 90 % of the certificate's life, spread over nodes: the
// fraction is a function of the certificate, so that a restart changes nothing.
// Life begins when the certificate came here: the signer dates it back by five
// minutes, which is most of the life of a very short one.
func renewAt(p *Pair) time.Time {
	from, until := p.Leaf().NotBefore, p.Leaf().NotAfter
	if p.received.After(from) && p.received.Before(until) {
		from = p.received
	}
	h := fnv.New64a()
	h.Write(p.Leaf().Raw)
	fraction := 0.7 + 0.2*float64(h.Sum64()>>11)/(1<<53)
	return from.Add(time.Duration(float64(until.Sub(from)) * fraction))
}

// backoff is the pause after the n-th failure in a row, from 1. What a person
// has to put right is tried rarely, so that requests do not pile up.
func backoff(n int, reason Reason, base time.Duration) time.Duration {
	limit := 16 * base
	switch reason {
	case RequestDenied, RequestFailed, WrongCertificate, NotApproved:
		limit = 150 * base
	}
	d := base
	for ; n > 1 && d < limit; n-- {
		d *= 2
	}
	return min(d, limit)
}

// useBootstrap says whether the bootstrap credential has to serve for the next
// request: without a client certificate that lives, or when the API server and
// it no longer get on.
func useBootstrap(client *Pair, last Reason, now time.Time) bool {
	return client == nil || client.expired(now) || last == CredentialRefused || last == ServerNotTrusted
}
