package cri

import (
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxQueued is how many events a subscriber may be behind. One that is slower
// is cut off with an error and has to list anew: it neither holds up the
// runtime nor misses events without knowing.
const maxQueued = 4096

// broadcaster hands events to all subscribers.
type broadcaster struct {
	mu     sync.Mutex // guards what follows and the queues
	subs   map[*subscriber]bool
	closed bool
}

type subscriber struct {
	queue    []*runtimeapi.ContainerEventResponse
	overflow bool
	wake     chan struct{} // capacity 1
}

func newBroadcaster() *broadcaster { return &broadcaster{subs: map[*subscriber]bool{}} }

// heard reports whether anybody listens.
func (b *broadcaster) heard() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.subs) > 0
}

func (b *broadcaster) publish(e *runtimeapi.ContainerEventResponse) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for sub := range b.subs {
		if len(sub.queue) >= maxQueued {
			sub.overflow = true
		} else {
			sub.queue = append(sub.queue, e)
		}
		sub.poke()
	}
}

func (sub *subscriber) poke() {
	select {
	case sub.wake <- struct{}{}:
	default:
	}
}

// subscribe returns nil after close.
func (b *broadcaster) subscribe() *subscriber {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil
	}
	sub := &subscriber{wake: make(chan struct{}, 1)}
	b.subs[sub] = true
	return sub
}

func (b *broadcaster) unsubscribe(sub *subscriber) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.subs, sub)
}

func (b *broadcaster) take(sub *subscriber) (events []*runtimeapi.ContainerEventResponse, overflow, closed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	events, sub.queue = sub.queue, nil
	return events, sub.overflow, b.closed
}

// close ends all subscriptions.
func (b *broadcaster) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for sub := range b.subs {
		sub.poke()
	}
}

// emit tells subscribers about a change of a container or sandbox.
func (s *Server) emit(b *sandbox, id string, what runtimeapi.ContainerEventType) {
	if !s.events.heard() {
		return
	}
	e := &runtimeapi.ContainerEventResponse{
		ContainerId: id, ContainerEventType: what, CreatedAt: now().UnixNano(), PodSandboxStatus: b.status(),
	}
	for _, c := range b.members() {
		e.ContainersStatuses = append(e.ContainersStatuses, c.status())
	}
	s.events.publish(e)
}

// GetContainerEvents streams changes until the caller leaves.
func (s *Server) GetContainerEvents(_ *runtimeapi.GetEventsRequest, out runtimeapi.RuntimeService_GetContainerEventsServer) error {
	sub := s.events.subscribe()
	if sub == nil {
		return fmt.Errorf("get container events: the runtime is stopping: %w", errdefs.ErrUnavailable)
	}
	defer s.events.unsubscribe(sub)
	// The caller learns that from here on nothing escapes it.
	if err := out.SendHeader(nil); err != nil {
		return err
	}
	for {
		select {
		case <-out.Context().Done():
			return nil
		case <-sub.wake:
		}
		events, overflow, closed := s.events.take(sub)
		for _, e := range events {
			if err := out.Send(e); err != nil {
				return err
			}
		}
		if overflow {
			return fmt.Errorf("get container events: the reader is more than %d events behind; list pods and containers, then subscribe again: %w", maxQueued, errdefs.ErrResourceExhausted)
		}
		if closed {
			return fmt.Errorf("get container events: the runtime is stopping: %w", errdefs.ErrUnavailable)
		}
	}
}
