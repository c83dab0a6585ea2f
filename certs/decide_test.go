package certs

import (
	"net"
	"testing"
	"time"
)

func TestDecide(t *testing.T) {
	ca := newAuthority(t, "ca")
	now := time.Now()
	id := nodeIdentity(testNode)
	named := id
	named.dnsNames, named.ips = []string{testNode}, []net.IP{net.IPv4(192, 0, 2, 1)}
	moved := named
	moved.ips = []net.IP{net.IPv4(192, 0, 2, 2)}
	fewer := id
	fewer.ips = named.ips
	fresh := ca.pair(t, servingKind, named, now.Add(-time.Minute), now.Add(time.Hour))
	old := ca.pair(t, servingKind, named, now.Add(-time.Hour), now.Add(time.Minute))
	dead := ca.pair(t, servingKind, named, now.Add(-time.Hour), now.Add(-time.Second))
	at := renewAt(fresh)
	later := now.Add(time.Second)
	for name, tt := range map[string]struct {
		in   view
		want step
	}{
		"fresh":                           {view{now: now, held: fresh, saved: true, want: &named}, step{wait, "", at}},
		"none":                            {view{now: now, want: &named}, step{request, "there is none", now}},
		"none, backing off":               {view{now: now, want: &named, notUntil: later}, step{wait, "there is none", later}},
		"no address":                      {view{now: now}, step{wait, "the node has no address yet", time.Time{}}},
		"something first":                 {view{now: now, want: &named, waitFor: "x"}, step{wait, "x", time.Time{}}},
		"old":                             {view{now: now, held: old, saved: true, want: &named}, step{request, "its time has come", now}},
		"expired":                         {view{now: now, held: dead, saved: true, want: &named}, step{request, "it has expired", now}},
		"expired by a clock ahead":        {view{now: now.Add(9999 * time.Hour), held: fresh, saved: true, want: &named}, step{request, "it has expired", now.Add(9999 * time.Hour)}},
		"fresh again, the clock is right": {view{now: now, held: fresh, saved: true, want: &named}, step{wait, "", at}},
		"asked":                           {view{now: now, held: fresh, saved: true, want: &named, asked: "me"}, step{request, "me", now}},
		"another address":                 {view{now: now, held: fresh, saved: true, want: &moved}, step{request, "it lacks the address 192.0.2.2", now}},
		"fewer names":                     {view{now: now, held: fresh, saved: true, want: &fewer}, step{wait, "", at}},
		"addresses gone":                  {view{now: now, held: fresh, saved: true}, step{wait, "the node has no address yet", at}},
		"not in the files":                {view{now: now, held: fresh, want: &named}, step{save, "the files do not hold what is in use", at}},
		"not in the files, backing off":   {view{now: now, held: fresh, want: &named, notUntil: later}, step{wait, "the files have to be written again", at}},
		"old and not in the files":        {view{now: now, held: old, want: &named}, step{request, "its time has come", now}},
	} {
		if got := servingKind.decide(tt.in); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", name, got, tt.want)
		}
	}
}

// TestRenewalIsSpread: within 70 to 90 % of life, not all at once, and the same
// after a restart.
func TestRenewalIsSpread(t *testing.T) {
	ca := newAuthority(t, "ca")
	from := time.Now().Truncate(time.Second)
	const life = 1000 * time.Hour
	low, high := life, time.Duration(0)
	for range 50 {
		p := ca.pair(t, clientKind, nodeIdentity(testNode), from, from.Add(life))
		at := renewAt(p).Sub(from)
		if at < life*7/10 || at > life*9/10 {
			t.Fatalf("renewal at %s of %s", at, life)
		}
		again, err := newPair(p.certPEM, p.keyPEM, p.received)
		if err != nil || !renewAt(again).Equal(renewAt(p)) {
			t.Fatalf("after a restart %s, before %s (%v)", renewAt(again), renewAt(p), err)
		}
		low, high = min(low, at), max(high, at)
	}
	if high-low < life/20 {
		t.Errorf("50 renewals within %s", high-low)
	}
}

// TestRenewalOfAShortLife: the signer dates back by five minutes; what is left
// from the arrival on counts.
func TestRenewalOfAShortLife(t *testing.T) {
	ca := newAuthority(t, "ca")
	now := time.Now().Truncate(time.Second)
	p := ca.pair(t, clientKind, nodeIdentity(testNode), now.Add(-5*time.Minute), now.Add(time.Minute))
	p.received = now
	if left := renewAt(p).Sub(now); left < 42*time.Second || left > 54*time.Second {
		t.Errorf("renewal after %s of a minute", left)
	}
	p.received = now.Add(time.Hour) // a clock that was wrong, or a file that was touched
	if at := renewAt(p); at.After(p.Leaf().NotAfter) {
		t.Errorf("renewal at %s, the end is %s", at, p.Leaf().NotAfter)
	}
}

func TestBackoff(t *testing.T) {
	const base = 2 * time.Second
	for _, tt := range []struct {
		n      int
		reason Reason
		want   time.Duration
	}{
		{1, ServerUnreachable, 2 * time.Second}, {2, ServerUnreachable, 4 * time.Second}, {5, ServerUnreachable, 32 * time.Second},
		{1000, ServerUnreachable, 32 * time.Second}, {1, RequestDenied, 2 * time.Second}, {1000, RequestDenied, 5 * time.Minute},
	} {
		if got := backoff(tt.n, tt.reason, base); got != tt.want {
			t.Errorf("%d of %s: %s, want %s", tt.n, tt.reason, got, tt.want)
		}
	}
}

func TestUseBootstrap(t *testing.T) {
	now := time.Now()
	ca := newAuthority(t, "ca")
	alive := ca.pair(t, clientKind, nodeIdentity(testNode), now.Add(-time.Hour), now.Add(time.Hour))
	dead := ca.pair(t, clientKind, nodeIdentity(testNode), now.Add(-time.Hour), now.Add(-time.Minute))
	for _, tt := range []struct {
		pair    *Pair
		refused Reason
		want    bool
	}{{nil, "", true}, {dead, "", true}, {alive, "", false}, {alive, CredentialRefused, true}, {alive, ServerNotTrusted, true}, {alive, ServerUnreachable, false}} {
		if got := useBootstrap(tt.pair, tt.refused, now); got != tt.want {
			t.Errorf("%v, refused %q: %v", tt.pair, tt.refused, got)
		}
	}
}

// TestAssess: the condition comes before the end, and goes with the renewal.
func TestAssess(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	at := func(d time.Duration) *time.Time { v := now.Add(d); return &v }
	fine := Status{Name: "client", Renewal: at(time.Hour), NotAfter: at(2 * time.Hour)}
	justDue := Status{Name: "client", Renewal: at(-time.Minute), NotAfter: at(time.Hour)}
	late := Status{Name: "client", Renewal: at(-time.Hour), NotAfter: at(time.Minute), LastReason: RequestDenied, LastError: "denied"}
	dead := Status{Name: "serving", Renewal: at(-time.Hour), NotAfter: at(-time.Minute), Request: "csr-1"}
	for name, tt := range map[string]struct {
		in   []Status
		want health
	}{
		"fine":     {[]Status{fine, {Name: "serving"}}, health{false, "CertificatesRenewed", "no certificate is about to expire"}},
		"just due": {[]Status{justDue}, health{false, "CertificatesRenewed", "no certificate is about to expire"}},
		"late": {[]Status{late, fine}, health{true, "RequestDenied", "the client certificate expires at " +
			late.NotAfter.UTC().Format(time.RFC3339) + " and is not renewed: denied"}},
		"expired": {[]Status{dead}, health{true, "NotRenewed", "the serving certificate expired at " +
			dead.NotAfter.UTC().Format(time.RFC3339) + " and is not renewed: certificate request csr-1 waits for approval: kubectl certificate approve csr-1"}},
	} {
		if got := assess(now, tt.in); got != tt.want {
			t.Errorf("%s: got %+v\nwant %+v", name, got, tt.want)
		}
	}
}

func TestClockProblem(t *testing.T) {
	ca := newAuthority(t, "ca")
	now := time.Now()
	leaf := ca.pair(t, clientKind, nodeIdentity(testNode), now.Add(-5*time.Minute), now.Add(time.Hour)).Leaf()
	if p := clockProblem(now, leaf, time.Second); p != nil {
		t.Errorf("clocks agree: %v", p)
	}
	for name, at := range map[string]time.Time{"behind": now.Add(-2 * time.Hour), "ahead": now.Add(2 * time.Hour), "a little": now.Add(2 * time.Minute)} {
		p := clockProblem(at, leaf, now.Sub(at))
		if p == nil || p.Reason != ClockWrong || p.Advice == "" {
			t.Errorf("%s: %v", name, p)
		}
	}
}
