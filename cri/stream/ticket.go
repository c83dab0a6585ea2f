package stream

import (
	"crypto/rand"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	ticketLife = time.Minute
	maxTickets = 1000
)

// tickets are requests that wait for their connection, by token. A token is
// 130 random bits, good for one use within a minute.
type tickets struct {
	mu sync.Mutex
	m  map[string]ticket
}

type ticket struct {
	kind    string
	request any
	expires time.Time
}

func (t *tickets) add(kind string, request any, now time.Time) (token string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.m == nil {
		t.m = map[string]ticket{}
	}
	if len(t.m) >= maxTickets {
		t.expire(now)
	}
	if len(t.m) >= maxTickets {
		return "", fmt.Errorf("%d URLs for streams wait for their client: %w", len(t.m), errdefs.ErrResourceExhausted)
	}
	token = rand.Text()
	t.m[token] = ticket{kind: kind, request: request, expires: now.Add(ticketLife)}
	return token, nil
}

func (t *tickets) expire(now time.Time) {
	for token, tk := range t.m {
		if !now.Before(tk.expires) {
			delete(t.m, token)
		}
	}
}

// take uses a token up; false for one that is unknown, too old or for
// something else.
func (t *tickets) take(kind, token string, now time.Time) (request any, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	tk, ok := t.m[token]
	if !ok || tk.kind != kind {
		return nil, false
	}
	delete(t.m, token)
	return tk.request, now.Before(tk.expires)
}
