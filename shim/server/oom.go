//go:build linux

package server

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// oomBook tells how many processes of a container the OOM killer took, on
// cgroup v2, even if the container's group is gone: systemd removes a scope as
// soon as its last process has ended, often before this shim has read anything,
// a descriptor of memory.events held open answers ENODEV from then on, and its
// notifications come up to 10 ms late (kernel/cgroup/cgroup.c,
// CGROUP_FILE_NOTIFY_MIN_INTV). But the kernel counts a kill in each group above
// as well (since 5.2: mm, memcg: consider subtrees in memory.events), before it
// sends the signal. So what the pod's group has counted, and neither one of its
// containers that are there nor one that has ended, belongs to the one that is
// gone.
//
// What ended containers account for is an extended attribute of the pod's
// group, which outlives this process and dies with the group.
type oomBook struct {
	log *slog.Logger

	mu   sync.Mutex
	pods map[string]*oomPod // by the path of the pod's group
}

// oomPod is what is known of a pod's group.
type oomPod struct {
	settled uint64 // kills of containers that have ended
	groups  map[string]*oomGroup
}

// oomGroup is the group of a container whose end is not on disk yet.
type oomGroup struct {
	kills  uint64 // the highest count seen
	judged bool   // kills is its last
}

// settledAttr holds oomPod.settled as decimal digits.
const settledAttr = "trusted.nodeagent.oom"

// open begins with the group of a container about to run. Kills from before
// that, in a group that has none of our containers, are nobody's.
func (b *oomBook) open(path string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.enter(path)
	if p := b.pods[filepath.Dir(path)]; len(p.groups) == 1 {
		b.balance(filepath.Dir(path), p)
	}
}

// adopt is open for a container of an earlier shim; balanceAll comes after the
// last of them.
func (b *oomBook) adopt(path string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.enter(path)
}

func (b *oomBook) enter(path string) {
	pod := filepath.Dir(path)
	p := b.pods[pod]
	if p == nil {
		p = &oomPod{groups: map[string]*oomGroup{}, settled: settledKills(pod)}
		if b.pods == nil {
			b.pods = map[string]*oomPod{}
		}
		b.pods[pod] = p
	}
	p.groups[path] = &oomGroup{}
}

// balanceAll corrects what an earlier shim may not have written down any more.
func (b *oomBook) balanceAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for pod, p := range b.pods {
		b.balance(pod, p)
	}
}

// note looks at the count of a container that may end now.
func (b *oomBook) note(path string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.pods[filepath.Dir(path)]; p != nil && p.groups[path] != nil {
		p.groups[path].read(path)
	}
}

// judge returns the count of a container that has ended.
func (b *oomBook) judge(path string) uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	pod := filepath.Dir(path)
	p := b.pods[pod]
	if p == nil || p.groups[path] == nil {
		return 0
	}
	g := p.groups[path]
	if !g.read(path) && !p.shared(pod) {
		if rest, gone, err := p.unexplained(pod); err == nil && rest > 0 {
			// Others that are gone too and not judged yet get theirs.
			g.kills += max(1, rest-min(rest, gone-1))
		}
	}
	g.judged = true
	return g.kills
}

// settle ends with the group of a container whose end is on disk, or that never
// ran.
func (b *oomBook) settle(path string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	pod := filepath.Dir(path)
	p := b.pods[pod]
	if p == nil || p.groups[path] == nil {
		return
	}
	kills := p.groups[path].kills
	delete(p.groups, path)
	if !b.balance(pod, p) && kills > 0 {
		b.set(pod, p, p.settled+kills)
	}
	if len(p.groups) == 0 {
		delete(b.pods, pod)
	}
}

// balance sets what ended containers account for to all that the present ones
// do not. It cannot as long as one of these is gone and not judged.
func (b *oomBook) balance(pod string, p *oomPod) bool {
	rest, gone, err := p.unexplained(pod)
	if err != nil || gone > 0 {
		return false
	}
	if rest > 0 {
		b.set(pod, p, p.settled+rest)
	}
	return true
}

func (b *oomBook) set(pod string, p *oomPod, n uint64) {
	p.settled = n
	err := unix.Setxattr(pod, settledAttr, strconv.AppendUint(nil, n, 10), 0)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		b.log.Warn("note OOM kills of ended containers; the next shim may ascribe them to another one of the pod",
			"path", pod, "err", &os.PathError{Op: "setxattr " + settledAttr, Path: pod, Err: err})
	}
}

// unexplained is how many kills the pod has that are nobody's so far, and how
// many of its containers have lost their groups and are not judged.
func (p *oomPod) unexplained(pod string) (rest, gone uint64, err error) {
	total, err := oomKills(pod)
	for err == nil {
		known := p.settled
		gone = 0
		for path, g := range p.groups {
			if !g.read(path) && !g.judged {
				gone++
			}
			known += g.kills
		}
		before := total
		if total, err = oomKills(pod); total == before {
			return total - min(known, total), gone, err
		}
	}
	return 0, 0, err
}

// shared says whether others than our containers are in the pod's group: their
// kills are not to be told from ours.
func (p *oomPod) shared(pod string) bool {
	entries, err := os.ReadDir(pod)
	if err != nil {
		return true
	}
	for _, e := range entries {
		if e.IsDir() && p.groups[filepath.Join(pod, e.Name())] == nil {
			return true
		}
	}
	return false
}

// read says whether the group is there; if so, kills is its count.
func (g *oomGroup) read(path string) bool {
	n, err := oomKills(path)
	if err != nil {
		return false
	}
	g.kills = max(g.kills, n)
	return true
}

// oomKills counts the processes that the OOM killer took in the group at path
// and those below it.
func oomKills(path string) (uint64, error) {
	name := filepath.Join(path, "memory.events")
	data, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	n, err := parseEvents(data)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return n, nil
}

// parseEvents reads oom_kill of memory.events.
func parseEvents(data []byte) (uint64, error) {
	for line := range bytes.Lines(data) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "oom_kill "); ok {
			n, err := strconv.ParseUint(value, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("oom_kill: %w", err)
			}
			return n, nil
		}
	}
	return 0, errors.New("no oom_kill in it")
}

// settledKills reads what an earlier shim wrote down.
func settledKills(pod string) uint64 {
	var buf [20]byte
	n, err := unix.Getxattr(pod, settledAttr, buf[:])
	if err != nil {
		return 0
	}
	kills, _ := strconv.ParseUint(string(buf[:n]), 10, 64)
	return kills
}
