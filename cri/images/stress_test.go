package images

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	testimages "github.com/nodeagent/nodeagent/test/images"
)

// Pulls, removals, owners, collections and cancellations all at once: whoever
// holds layers finds them whole, and in the end nothing is left.
func TestEverythingAtOnce(t *testing.T) {
	f := setup(t)
	shared := must(testimages.NewLayer(testimages.Gzip, testimages.Entry{Name: "shared", Data: noise(50, 300_000)}))(t)
	var refs []string
	for i := range 4 {
		own := must(testimages.NewLayer(testimages.Zstd, testimages.File("own", fmt.Sprint(i))))(t)
		refs = append(refs, f.push(fmt.Sprintf("s%d:v1", i), must(testimages.New(testimages.Config{}, shared, own))(t)))
	}
	end := time.Now().Add(4 * time.Second)
	if testing.Short() {
		end = time.Now().Add(time.Second)
	}
	var wg sync.WaitGroup
	for worker := range 6 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(worker)))
			for n := 0; time.Now().Before(end); n++ {
				f.anyStep(r, fmt.Sprintf("owner-%d-%d", worker, n), r.IntN(len(refs)), refs)
			}
		})
	}
	wg.Go(func() {
		for time.Now().Before(end) {
			if err := f.store.GC(context.Background()); err != nil {
				t.Errorf("collection: %v", err)
			}
			if _, err := f.store.FsInfo(context.Background()); err != nil {
				t.Errorf("fs info: %v", err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
	wg.Wait()
	for _, ref := range refs {
		if err := f.store.Remove(t.Context(), ref); err != nil {
			t.Error(err)
		}
	}
	f.wantEmpty()
}

// anyStep does one random thing with image i.
func (f *fixture) anyStep(r *rand.Rand, owner string, i int, refs []string) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	switch r.IntN(6) {
	case 0:
		if err := f.store.Remove(ctx, refs[i]); err != nil {
			f.Errorf("remove: %v", err)
		}
		return
	case 1: // somebody loses patience
		time.AfterFunc(time.Duration(r.IntN(30))*time.Millisecond, cancel)
		if _, err := f.store.Pull(ctx, PullOptions{Ref: refs[i]}); err != nil && !errors.Is(err, context.Canceled) {
			f.Errorf("pull: %v", err)
		}
		return
	}
	img, err := f.store.Pull(ctx, PullOptions{Ref: refs[i]})
	if err != nil {
		f.Errorf("pull: %v", err)
		return
	}
	l, err := f.store.Rootfs(ctx, owner, img.ID)
	if errdefs.IsNotFound(err) {
		return // removed meanwhile
	}
	if err != nil {
		f.Errorf("rootfs: %v", err)
		return
	}
	defer f.store.Release(owner)
	for range 3 {
		b, err := os.ReadFile(filepath.Join(l.Lower[0], "own"))
		st, err2 := os.Stat(filepath.Join(l.Lower[1], "shared"))
		if err := errors.Join(err, err2); err != nil || string(b) != fmt.Sprint(i) || st.Size() != 300_000 {
			f.Errorf("layers of %s: %q %v", refs[i], b, err)
			return
		}
		time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond)
	}
}
