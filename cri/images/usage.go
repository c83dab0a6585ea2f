package images

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// measure sums the sizes that the databases hold.
func (s *Store) measure(ctx context.Context) (FsUsage, error) {
	u := FsUsage{Mountpoint: s.cfg.Root, At: time.Now()}
	if err := s.content.Walk(ctx, func(info content.Info) error {
		u.Bytes += uint64(info.Size)
		u.Inodes++
		return nil
	}); err != nil {
		return u, err
	}
	var layers []string
	if err := s.sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindCommitted {
			layers = append(layers, info.Name)
		}
		return nil
	}); err != nil {
		return u, err
	}
	for _, name := range layers {
		l, err := s.sn.Usage(ctx, name)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return u, err
		}
		u.Bytes += uint64(l.Size)
		u.Inodes += uint64(l.Inodes)
	}
	return u, nil
}

// namesToRemove are the names to delete when ref, which means image id, is
// removed: all; or the name alone; or, if no other tag would be left, its
// digest names as well. Callers hold s.mu.
func (s *Store) namesToRemove(id, ref string, all bool) []string {
	e := s.byID[id]
	name := ""
	if named, err := reference.ParseDockerRef(ref); err == nil {
		name = named.String()
	}
	if _, isName := e.refs[name]; all || !isName {
		return keys(e.refs)
	}
	for n := range e.refs {
		if n != name && !strings.Contains(n, "@") {
			return []string{name}
		}
	}
	if strings.Contains(name, "@") {
		return []string{name}
	}
	return keys(e.refs)
}

func keys(m map[string]string) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
