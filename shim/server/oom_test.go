//go:build linux

package server

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

// tree is a pod's group and its containers' on cgroup v2, as files.
type tree struct {
	t     *testing.T
	pod   string
	kills map[string]int
}

func newTree(t *testing.T) *tree {
	tr := &tree{t: t, pod: filepath.Join(t.TempDir(), "pod.slice"), kills: map[string]int{}}
	tr.add(tr.pod)
	return tr
}

func (tr *tree) path(name string) string { return filepath.Join(tr.pod, name) }

// add makes a group and returns its path.
func (tr *tree) add(path string) string {
	tr.t.Helper()
	if err := os.Mkdir(path, 0o755); err != nil {
		tr.t.Fatal(err)
	}
	tr.kills[path] = 0
	tr.write(path)
	return path
}

func (tr *tree) write(path string) {
	tr.t.Helper()
	text := fmt.Sprintf("low 0\nhigh 0\nmax 77\noom 3\noom_kill %d\noom_group_kill 0\n", tr.kills[path])
	if err := os.WriteFile(filepath.Join(path, "memory.events"), []byte(text), 0o644); err != nil {
		tr.t.Fatal(err)
	}
}

// kill counts n kills, as the kernel does: below first.
func (tr *tree) kill(path string, n int) {
	tr.t.Helper()
	for _, p := range []string{path, tr.pod} {
		tr.kills[p] += n
		tr.write(p)
	}
}

// remove is what systemd does once the last process has ended.
func (tr *tree) remove(path string) {
	tr.t.Helper()
	if err := os.RemoveAll(path); err != nil {
		tr.t.Fatal(err)
	}
}

func book() *oomBook { return &oomBook{log: slog.New(slog.DiscardHandler)} }

// judged compares what the book says of the end of a container.
func judged(t *testing.T, b *oomBook, path string, want uint64) {
	t.Helper()
	if got := b.judge(path); got != want {
		t.Errorf("%s: %d kills, want %d", filepath.Base(path), got, want)
	}
}

func TestOOMOfGroupThatIsGone(t *testing.T) {
	tr, b := newTree(t), book()
	tr.kill(tr.pod, 0)
	a, c := tr.add(tr.path("a")), tr.add(tr.path("c"))
	b.open(a)
	b.open(c)
	tr.kill(a, 1)
	tr.remove(a)
	judged(t, b, a, 1)
	b.settle(a)
	tr.remove(c)
	judged(t, b, c, 0)
	b.settle(c)
	if len(b.pods) != 0 {
		t.Errorf("left in the book: %v", b.pods)
	}
	// The next of the pod has nothing to do with that, nor after a restart.
	for _, b := range []*oomBook{b, book()} {
		d := tr.add(tr.path("d"))
		b.open(d)
		tr.remove(d)
		judged(t, b, d, 0)
		b.settle(d)
	}
}

func TestOOMOfGroupThatIsThere(t *testing.T) {
	tr, b := newTree(t), book()
	a := tr.add(tr.path("a"))
	b.open(a)
	tr.kill(a, 3)
	judged(t, b, a, 3)
}

// Kills from before the pod had a container of ours are nobody's.
func TestOOMBeforeTheFirst(t *testing.T) {
	tr, b := newTree(t), book()
	tr.kill(tr.pod, 5)
	a := tr.add(tr.path("a"))
	b.open(a)
	tr.remove(a)
	judged(t, b, a, 0)
}

// A container whose child was killed is stopped together with its sibling.
func TestOOMSeenBeforeTheStop(t *testing.T) {
	tr, b := newTree(t), book()
	a, c := tr.add(tr.path("a")), tr.add(tr.path("c"))
	b.open(a)
	b.open(c)
	tr.kill(a, 2)
	b.note(a)
	b.note(c)
	tr.remove(a)
	tr.remove(c)
	judged(t, b, c, 0)
	judged(t, b, a, 2)
}

// The pod as a whole ran out of memory, and two of its containers went at once.
func TestOOMOfTwo(t *testing.T) {
	for _, order := range [][2]string{{"a", "c"}, {"c", "a"}} {
		tr, b := newTree(t), book()
		for _, name := range order {
			b.open(tr.add(tr.path(name)))
		}
		for _, name := range order {
			tr.kill(tr.path(name), 1)
			tr.remove(tr.path(name))
		}
		for _, name := range order {
			judged(t, b, tr.path(name), 1)
		}
		for _, name := range order {
			b.settle(tr.path(name))
		}
		if settledKills(tr.pod) != 2 {
			t.Errorf("settled %d, want 2", settledKills(tr.pod))
		}
	}
}

// A shim dies at each moment; the next one judges the same.
func TestOOMAcrossRestart(t *testing.T) {
	for _, died := range []string{"before the kill", "before the end is on disk", "before it is settled", "after"} {
		t.Run(died, func(t *testing.T) {
			tr, b := newTree(t), book()
			a, c := tr.add(tr.path("a")), tr.add(tr.path("c"))
			b.open(a)
			b.open(c)
			again := func(groups ...string) {
				b = book()
				for _, g := range groups {
					b.adopt(g)
				}
				b.balanceAll()
			}
			if died == "before the kill" {
				again(a, c)
			}
			tr.kill(c, 1) // a child of the other, which lives on
			tr.kill(a, 1)
			tr.remove(a)
			if died == "before the end is on disk" {
				again(a, c)
			}
			judged(t, b, a, 1)
			if died == "before it is settled" {
				again(c)
			}
			b.settle(a)
			if died == "after" {
				again(c)
			}
			tr.remove(c)
			want := uint64(1)
			judged(t, b, c, want)
			b.settle(c)
			if got := settledKills(tr.pod); got != 2 {
				t.Errorf("settled %d, want 2", got)
			}
		})
	}
}

// Somebody else's groups beside ours: nothing is made up.
func TestOOMInSharedGroup(t *testing.T) {
	tr, b := newTree(t), book()
	a := tr.add(tr.path("a"))
	b.open(a)
	tr.kill(tr.add(tr.path("foreign.service")), 1)
	tr.remove(a)
	judged(t, b, a, 0)
	b.settle(a)
	c := tr.add(tr.path("c"))
	b.open(c)
	tr.kill(c, 1)
	judged(t, b, c, 1)
}

func FuzzParseEvents(f *testing.F) {
	for _, text := range []string{"low 0\nhigh 0\nmax 77\noom 3\noom_kill 2\noom_group_kill 0\n", "", "oom_kill x\n", "oom_kill_\n", "oom_kill -1\n", "oom_kill 1"} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		n, err := parseEvents(data)
		if err == nil && !bytes.Contains(data, []byte("oom_kill ")) || err != nil && n != 0 {
			t.Errorf("%q: %d, %v", data, n, err)
		}
	})
}
