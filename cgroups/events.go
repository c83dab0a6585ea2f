package cgroups

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// EventKind says what happened in a watched group.
type EventKind int

// The kinds of events.
const (
	OOM      EventKind = iota // the group ran out of memory; see Event.Kills
	Pressure                  // a Trigger's threshold was passed
)

// Event of a watched group. Events come close together are merged.
type Event struct {
	Kind EventKind
	Time time.Time
	// Kills is how many processes the OOM killer has taken in the group's
	// life. On v1 the event comes before the kill, so that Kills may be one
	// short of it: Group.OOMKills tells later.
	Kills uint64
	// Trigger is the one that fired.
	Trigger Trigger
}

// Resource of pressure stall information.
type Resource string

// The resources.
const (
	CPUPressure    Resource = "cpu"
	MemoryPressure Resource = "memory"
	IOPressure     Resource = "io"
)

// Trigger fires when tasks of a group waited for a resource for Stall within
// Window; at most once a window. It costs a kernel thread a group while there
// is pressure. Without CAP_SYS_RESOURCE the kernel only takes whole multiples
// of two seconds as a window; it is then stretched to the next, and Stall with
// it.
type Trigger struct {
	Resource Resource
	Full     bool          // all tasks waited, rather than some
	Stall    time.Duration // at most Window
	Window   time.Duration // 500 ms to 10 s
}

// Watch reports when the group runs out of memory, and the pressure that
// triggers ask for. The channel is closed when ctx ends, the group is removed
// or the Manager closed. Events are dropped rather than waited for if nobody
// reads; Kills adds up, so that nothing but times is lost.
//
// v1 uses eventfds on memory.oom_control, v2 inotify on memory.events, both
// PSI triggers. On a v1 host without PSI a memory trigger falls back to
// memory.pressure_level, medium for some and critical for full.
//
// Errors: NotFound if the group is gone or its memory is not accounted,
// AlreadyExists if it is watched, NotImplemented for a trigger that this host cannot have, InvalidArgument for
// one that the kernel refuses.
func (m *Manager) Watch(ctx context.Context, g Group, triggers ...Trigger) (<-chan Event, error) {
	ch, err := m.watcher.add(ctx, g, triggers)
	if err != nil {
		return nil, fmt.Errorf("watch cgroup %s: %w", g.Path(), err)
	}
	return ch, nil
}

// Close ends all watches and waits for their goroutine.
func (m *Manager) Close() error {
	m.watcher.close()
	return nil
}

// watcher waits for the events of all watched groups in one epoll.
type watcher struct {
	work sync.WaitGroup

	mu      sync.Mutex // guards all below
	loop    *loop      // nil while nothing is watched
	watches map[int32]*watch
	wds     map[int32]*watch // of inotify
	sources map[int32]source // by the id that epoll hands back
	lastID  int32
}

// loop holds what the goroutine waits on.
type loop struct {
	epoll, inotify, wake int
}

// watch is one watched group.
type watch struct {
	id    int32
	group Group
	ch    chan Event
	kills uint64
	empty bool        // v2: no process is in it; it may go any time, without an event
	stop  func() bool // of the context's callback
	fds   []int
	ids   []int32 // of its sources
	wds   []int32
}

// source is a descriptor of a watch.
type source struct {
	watch   *watch
	fd      int
	counter bool // an eventfd, to be read empty
	trigger *Trigger
}

// Ids of the loop's own descriptors.
const (
	wakeID    = -1
	inotifyID = -2
)

func (w *watcher) add(ctx context.Context, g Group, triggers []Trigger) (_ <-chan Event, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	kills, err := g.OOMKills()
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.start(); err != nil {
		return nil, err
	}
	for _, x := range w.watches {
		if x.group.memory == g.memory {
			return nil, fmt.Errorf("it is watched already: %w", errdefs.ErrAlreadyExists)
		}
	}
	w.lastID++
	x := &watch{id: w.lastID, group: g, ch: make(chan Event, 16), kills: kills}
	w.watches[x.id] = x
	defer func() {
		if err != nil {
			w.drop(x)
		}
	}()
	if err := w.watchOOM(x); err != nil {
		return nil, err
	}
	if x.empty = x.group.empty(); x.empty {
		w.loop.wakeUp()
	}
	for _, t := range triggers {
		if err := w.watchPressure(x, t); err != nil {
			return nil, fmt.Errorf("%s pressure: %w", t.Resource, err)
		}
	}
	x.stop = context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.watches[x.id] == x {
			w.drop(x)
		}
	})
	return x.ch, nil
}

// start makes the loop unless it runs. Caller holds mu.
func (w *watcher) start() (err error) {
	if w.loop != nil {
		return nil
	}
	l := &loop{epoll: -1, inotify: -1, wake: -1}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if l.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("epoll_create1: %w", err)
	}
	if l.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	if l.inotify, err = unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK); err != nil {
		return fmt.Errorf("inotify_init1: %w", err)
	}
	for id, fd := range map[int32]int{wakeID: l.wake, inotifyID: l.inotify} {
		if err := l.poll(fd, unix.EPOLLIN, id); err != nil {
			return err
		}
	}
	w.watches, w.wds, w.sources = map[int32]*watch{}, map[int32]*watch{}, map[int32]source{}
	w.loop = l
	w.work.Go(func() { w.run(l) })
	return nil
}

func (l *loop) poll(fd int, events uint32, id int32) error {
	if err := unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: id}); err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	return nil
}

func (l *loop) close() {
	for _, fd := range []int{l.epoll, l.inotify, l.wake} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// wakeUp lets the loop look whether it is to end.
func (l *loop) wakeUp() {
	_, _ = unix.Write(l.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// addSource adds a descriptor to the watch, which owns it from here on, also
// after an error. Caller holds mu.
func (w *watcher) addSource(x *watch, s source, events uint32) error {
	x.fds = append(x.fds, s.fd)
	w.lastID++
	s.watch = x
	x.ids = append(x.ids, w.lastID)
	w.sources[w.lastID] = s
	return w.loop.poll(s.fd, events, w.lastID)
}

// watchOOM asks for out-of-memory events. Caller holds mu.
func (w *watcher) watchOOM(x *watch) error {
	if !x.group.v2 {
		return w.eventControl(x, "memory.oom_control", "", nil)
	}
	// cgroup.events changes when the last process leaves. From then on it is
	// looked whether the group is still there: its removal is no event.
	for _, name := range []string{"memory.events", "cgroup.events"} {
		wd, err := unix.InotifyAddWatch(w.loop.inotify, x.group.memory+"/"+name, unix.IN_MODIFY)
		if err != nil {
			if errors.Is(err, unix.ENOENT) {
				err = errdefs.ErrNotFound
			}
			return fmt.Errorf("watch %s: %w", name, err)
		}
		w.wds[int32(wd)] = x
		x.wds = append(x.wds, int32(wd))
	}
	return nil
}

// eventControl registers an eventfd for a file of the v1 memory controller
// (Documentation/admin-guide/cgroup-v1/memory.rst, sections 9 to 11). The
// kernel signals it as well when the group is removed.
func (w *watcher) eventControl(x *watch, name, args string, t *Trigger) error {
	file, err := unix.Open(x.group.memory+"/"+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return notFound(&os.PathError{Op: "open", Path: x.group.memory + "/" + name, Err: err}, err)
	}
	defer unix.Close(file)
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	if err := w.addSource(x, source{fd: fd, counter: true, trigger: t}, unix.EPOLLIN); err != nil {
		return err
	}
	line := strconv.Itoa(fd) + " " + strconv.Itoa(file)
	if args != "" {
		line += " " + args
	}
	return notFound(writeFile(x.group.memory+"/cgroup.event_control", line), nil)
}

// notFound gives err its class if it (or cause) says that the group is gone.
func notFound(err, cause error) error {
	if err != nil && (gone(err) || gone(cause)) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

func writeFile(path, line string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Write(fd, []byte(line))
		unix.Close(fd)
	}
	if err != nil {
		return &os.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}

// watchPressure sets up one trigger. Caller holds mu.
func (w *watcher) watchPressure(x *watch, t Trigger) error {
	err := w.psiTrigger(x, t)
	if !absent(err) {
		return err
	}
	if x.group.v2 || t.Resource != MemoryPressure {
		return fmt.Errorf("this host has no pressure information: %w", errdefs.ErrNotImplemented)
	}
	level := "medium"
	if t.Full {
		level = "critical"
	}
	return w.eventControl(x, "memory.pressure_level", level, &t)
}

// psiTrigger writes a trigger to a pressure file, which has to stay open
// (Documentation/accounting/psi.rst).
func (w *watcher) psiTrigger(x *watch, t Trigger) error {
	switch t.Resource {
	case CPUPressure, MemoryPressure, IOPressure:
	default:
		return fmt.Errorf("resource %q: %w", t.Resource, errdefs.ErrInvalidArgument)
	}
	if x.group.unified == "" {
		return errAbsent
	}
	path := x.group.unified + "/" + string(t.Resource) + ".pressure"
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	if _, err = unix.Write(fd, []byte(t.line())); errors.Is(err, unix.EINVAL) {
		_, err = unix.Write(fd, []byte(t.stretched().line()))
	}
	if err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("trigger %q: %w: %w", t.line(), err, errdefs.ErrInvalidArgument)
		}
		return &os.PathError{Op: "write", Path: path, Err: err}
	}
	return w.addSource(x, source{fd: fd, trigger: &t}, unix.EPOLLPRI)
}

// line is the trigger as the kernel takes it.
func (t Trigger) line() string {
	kind := "some"
	if t.Full {
		kind = "full"
	}
	return fmt.Sprintf("%s %d %d", kind, t.Stall.Microseconds(), t.Window.Microseconds())
}

// stretched is the trigger with a window that needs no privilege (6.4: psi.c,
// "unprivileged triggers").
func (t Trigger) stretched() Trigger {
	const unit = 2 * time.Second
	if t.Window <= 0 || t.Stall > t.Window {
		return t // the kernel is right to refuse it
	}
	window := (t.Window + unit - 1) / unit * unit
	t.Stall = time.Duration(float64(t.Stall) * float64(window) / float64(t.Window))
	t.Window = window
	return t
}

// drop ends a watch. Caller holds mu.
func (w *watcher) drop(x *watch) {
	if x.stop != nil {
		x.stop()
	}
	for _, id := range x.ids {
		delete(w.sources, id)
	}
	for _, fd := range x.fds {
		unix.Close(fd) // leaves the epoll with that
	}
	for _, wd := range x.wds {
		if w.wds[wd] == x {
			delete(w.wds, wd)
			_, _ = unix.InotifyRmWatch(w.loop.inotify, uint32(wd))
		}
	}
	delete(w.watches, x.id)
	close(x.ch)
	if len(w.watches) == 0 {
		w.loop.wakeUp()
	}
}

// lookAgain is how often it is looked whether an empty group is still there.
const lookAgain = time.Second

// run waits until nothing is watched any more.
func (w *watcher) run(l *loop) {
	events := make([]unix.EpollEvent, 32)
	for limit := -1; ; {
		n, err := unix.EpollWait(l.epoll, events, limit)
		if err != nil && !errors.Is(err, unix.EINTR) {
			n = 0 // cannot be with our own descriptors; end if we may
		}
		w.mu.Lock()
		for _, ev := range events[:max(n, 0)] {
			w.handle(l, ev)
		}
		limit = -1
		for _, x := range w.watches {
			if x.empty && w.check(x, true) && x.empty {
				limit = int(lookAgain.Milliseconds())
			}
		}
		if len(w.watches) == 0 {
			w.loop = nil
			l.close()
			w.mu.Unlock()
			return
		}
		w.mu.Unlock()
	}
}

// handle takes one event. Caller holds mu.
func (w *watcher) handle(l *loop, ev unix.EpollEvent) {
	switch ev.Fd {
	case wakeID:
		var b [8]byte
		_, _ = unix.Read(l.wake, b[:])
		return
	case inotifyID:
		w.readInotify(l)
		return
	}
	s, ok := w.sources[ev.Fd]
	if !ok {
		return // of a watch that ended while this event was on its way
	}
	if s.counter {
		var b [8]byte
		_, _ = unix.Read(s.fd, b[:])
	}
	if !w.check(s.watch, !s.counter || s.trigger != nil) {
		return
	}
	if s.trigger != nil && ev.Events&unix.EPOLLERR == 0 {
		s.watch.send(Event{Kind: Pressure, Time: time.Now(), Kills: s.watch.kills, Trigger: *s.trigger})
	} else if s.trigger != nil {
		w.drop(s.watch) // its pressure file is gone, and so is the group
	}
}

// check reads the OOM count and sends an event if it grew, or on v1 for every
// signal of it (quiet false). It reports whether the group is still there.
func (w *watcher) check(x *watch, quiet bool) bool {
	kills, err := x.group.OOMKills()
	if errdefs.IsNotFound(err) {
		w.drop(x)
		return false
	}
	if err == nil && (kills > x.kills || !quiet) {
		x.kills = kills
		x.send(Event{Kind: OOM, Time: time.Now(), Kills: kills})
	}
	x.empty = x.group.empty()
	return true
}

func (x *watch) send(e Event) {
	select {
	case x.ch <- e:
	default:
	}
}

// readInotify reads what changed in v2 groups. Caller holds mu.
func (w *watcher) readInotify(l *loop) {
	var buf [4096]byte
	n, err := unix.Read(l.inotify, buf[:])
	if err != nil {
		return
	}
	overflow := false
	inotifyEvents(buf[:n], func(wd int32, mask uint32) {
		overflow = overflow || mask&unix.IN_Q_OVERFLOW != 0
		if x := w.wds[wd]; x != nil {
			w.check(x, true)
		}
	})
	if overflow {
		for _, x := range w.watches {
			if x.group.v2 {
				w.check(x, true)
			}
		}
	}
}

// inotifyEvents walks a buffer of struct inotify_event.
func inotifyEvents(b []byte, visit func(wd int32, mask uint32)) {
	for len(b) >= unix.SizeofInotifyEvent {
		length := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
		visit(int32(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:]))
		if length > len(b) {
			return
		}
		b = b[length:]
	}
}

func (w *watcher) close() {
	w.mu.Lock()
	for _, x := range w.watches {
		w.drop(x)
	}
	w.mu.Unlock()
	w.work.Wait()
}
