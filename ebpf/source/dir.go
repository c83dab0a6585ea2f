package source

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// Dir is a watched directory of ordinary Kubernetes YAML, for a node without an
// API server.
//
// Each *.yaml, *.yml or *.json file may hold several documents of the kinds
// Namespace, NetworkPolicy, Pod and List; other kinds are left to others. A
// file that cannot be read keeps the objects it had before, and does not keep
// other files from being read. Run is its only goroutine.
type Dir struct {
	path  string
	log   *slog.Logger
	files map[string]file
}

type file struct {
	content []byte
	objects objects.Lists
}

// NewDir takes a directory that need not exist yet.
func NewDir(path string, log *slog.Logger) *Dir {
	return &Dir{path: path, log: log, files: map[string]file{}}
}

// Run calls set with all objects now and whenever they have changed.
func (d *Dir) Run(ctx context.Context, set func(objects.Change)) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", d.path, err)
	}
	defer watcher.Close()
	again := time.NewTicker(10 * time.Second) // for file systems that tell nothing, and a directory that comes late
	defer again.Stop()
	for first := true; ; first = false {
		_ = watcher.Add(d.path)
		seen := time.Now()
		if d.read() || first {
			change := d.all().Whole()
			change.Seen = seen
			set(change)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-again.C:
		case <-watcher.Events:
			settle(ctx, watcher, 20*time.Millisecond)
		case err := <-watcher.Errors:
			d.log.Warn("events about policy files were lost", "path", d.path, "err", err)
		}
	}
}

// settle lets a writer finish.
func settle(ctx context.Context, w *fsnotify.Watcher, pause time.Duration) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.Events:
		case <-time.After(pause):
			return
		}
	}
}

// read looks at all files and says whether any object may have changed.
func (d *Dir) read() bool {
	entries, err := os.ReadDir(d.path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		d.log.Error("policy directory cannot be read: what it held stays in force", "path", d.path, "err", err)
		return false
	}
	changed := false
	seen := map[string]bool{}
	for _, e := range entries {
		if !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(e.Name())) || e.Name()[0] == '.' {
			continue
		}
		path := filepath.Join(d.path, e.Name())
		content, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		seen[path] = true
		old, known := d.files[path]
		if err == nil && known && bytes.Equal(old.content, content) {
			continue
		}
		var got objects.Lists
		if err == nil {
			got, err = Parse(content)
		}
		if err != nil {
			d.log.Error("policy file cannot be used: what it held before stays in force", "path", path, "err", err)
			got = old.objects
		}
		d.files[path] = file{content, got}
		changed = true
	}
	for path := range d.files {
		if !seen[path] {
			delete(d.files, path)
			changed = true
		}
	}
	return changed
}

func (d *Dir) all() objects.Lists {
	var out objects.Lists
	for _, path := range slices.Sorted(maps.Keys(d.files)) { // of two objects with one name the one in the last file counts
		o := d.files[path].objects
		out.Namespaces = append(out.Namespaces, o.Namespaces...)
		out.Pods = append(out.Pods, o.Pods...)
		out.Policies = append(out.Policies, o.Policies...)
	}
	return out
}

// Parse reads the documents of one file. All or nothing: half a file of
// policies could allow what the other half denies.
func Parse(content []byte) (objects.Lists, error) {
	var out lists
	for i, doc := range bytes.Split(append([]byte("\n"), content...), []byte("\n---")) {
		if len(bytes.TrimSpace(doc)) == 0 {
			continue
		}
		raw, err := yaml.YAMLToJSON(doc)
		if err == nil {
			err = out.add(raw)
		}
		if err != nil {
			return objects.Lists{}, fmt.Errorf("document %d: %w", i+1, err)
		}
	}
	return objects.Lists(out), nil
}

// lists are the objects of a file while it is read.
type lists objects.Lists

func (o *lists) add(raw []byte) error {
	var head struct {
		Kind  string            `json:"kind"`
		Items []json.RawMessage `json:"items"`
	}
	if string(raw) == "null" {
		return nil
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return err
	}
	switch head.Kind {
	case "List", "NetworkPolicyList", "NamespaceList", "PodList":
		for _, item := range head.Items {
			if err := o.add(item); err != nil {
				return err
			}
		}
	case "Namespace":
		var n core.Namespace
		if err := strict(raw, &n, n.Name); err != nil {
			return err
		}
		o.Namespaces = append(o.Namespaces, Namespace(&n))
	case "Pod":
		var p core.Pod
		if err := json.Unmarshal(raw, &p); err != nil {
			return fmt.Errorf("pod: %w", err)
		}
		if p.Namespace == "" {
			p.Namespace = "default"
		}
		o.Pods = append(o.Pods, Pod(&p))
	case "NetworkPolicy":
		p := &networking.NetworkPolicy{}
		if err := strict(raw, p, p.Name); err != nil {
			return err
		}
		if p.Name == "" {
			return errors.New("a NetworkPolicy has no name")
		}
		if p.Namespace == "" {
			p.Namespace = "default"
		}
		o.Policies = append(o.Policies, p)
	}
	return nil
}

// strict refuses unknown fields: a rule with a misspelt field would allow more
// than it says.
func strict(raw []byte, into any, name string) error {
	if err := yaml.UnmarshalStrict(raw, into); err != nil {
		return fmt.Errorf("%T %s: %w", into, name, err)
	}
	return nil
}
