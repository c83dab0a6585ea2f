package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/images"
	"github.com/nodeagent/nodeagent/test/registry"
)

// newImage makes a small image that no other test has, with busybox in it.
func newImage(t testing.TB, c images.Compression, extra ...images.Entry) images.Image {
	t.Helper()
	base, err := images.NewLayer(c, busyboxEntries()...)
	if err != nil {
		t.Fatal(err)
	}
	top, err := images.NewLayer(c, append(extra, images.File("unique", fmt.Sprint(t.Name(), serial.Add(1))))...)
	if err != nil {
		t.Fatal(err)
	}
	img, err := images.New(images.Config{Cmd: []string{"/bin/sh"}, Env: []string{"PATH=/bin"}}, base, top)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func push(t testing.TB, ref string, a images.Artifact, login ...string) {
	t.Helper()
	if err := images.Push(context.Background(), ref, a, login...); err != nil {
		t.Fatal(err)
	}
}

func imageStatus(t testing.TB, ref string) *runtimeapi.Image {
	t.Helper()
	r, err := shared.Images().ImageStatus(callCtx(t), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatalf("ImageStatus %s: %v", ref, err)
	}
	return r.Image
}

func removeImage(t testing.TB, ref string) {
	t.Helper()
	if _, err := shared.Images().RemoveImage(callCtx(t), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}}); err != nil {
		t.Errorf("RemoveImage %s: %v", ref, err)
	}
}

func mustPull(t testing.TB, ref string) string {
	t.Helper()
	id, err := pull(context.Background(), shared, ref)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestPull(t *testing.T) {
	for name, c := range map[string]images.Compression{"gzip": images.Gzip, "zstd": images.Zstd, "plain": images.None} {
		t.Run(name, func(t *testing.T) {
			img := newImage(t, c)
			ref := hub.Addr + "/pull/" + name + ":v1"
			push(t, ref, img)
			id := mustPull(t, ref)
			equal(t, "image_ref", id, img.ID())
			s := imageStatus(t, ref)
			equal(t, "id", s.GetId(), img.ID())
			equal(t, "tags", fmt.Sprint(s.GetRepoTags()), fmt.Sprint([]string{ref}))
			digest := hub.Addr + "/pull/" + name + "@" + images.Top(img).Desc.Digest.String()
			equal(t, "digests", fmt.Sprint(s.GetRepoDigests()), fmt.Sprint([]string{digest}))
			if s.GetSize() == 0 {
				t.Error("size is 0")
			}
			for _, other := range []string{img.ID(), strings.TrimPrefix(img.ID(), "sha256:"), strings.TrimPrefix(img.ID(), "sha256:")[:16], digest} {
				equal(t, "status by "+other, imageStatus(t, other).GetId(), img.ID())
			}
			runPod(t).run(t, image(ref))
			removeImage(t, digest)
			if s := imageStatus(t, ref); s != nil {
				t.Errorf("still there after removal by digest: %v", s)
			}
			mustPull(t, digest)
			s = imageStatus(t, digest)
			equal(t, "tags of a pull by digest", len(s.GetRepoTags()), 0)
			removeImage(t, s.GetId())
			removeImage(t, s.GetId())
		})
	}
}

func TestPullIndex(t *testing.T) {
	mine := newImage(t, images.Gzip)
	l, err := images.NewLayer(images.Gzip, images.File("x", "other"))
	if err != nil {
		t.Fatal(err)
	}
	other, err := images.New(images.Config{Architecture: "riscv64"}, l)
	if err != nil {
		t.Fatal(err)
	}
	idx, err := images.NewIndex(other, mine)
	if err != nil {
		t.Fatal(err)
	}
	ref := hub.Addr + "/pull/index:v1"
	push(t, ref, idx)
	equal(t, "image of this platform", mustPull(t, ref), mine.ID())
	removeImage(t, ref)
	alone, err := images.NewIndex(other)
	if err != nil {
		t.Fatal(err)
	}
	push(t, hub.Addr+"/pull/foreign:v1", alone)
	if _, err := pull(context.Background(), shared, hub.Addr+"/pull/foreign:v1"); err == nil {
		t.Error("an index without this platform was pulled")
	}
}

func TestTags(t *testing.T) {
	img := newImage(t, images.Gzip)
	var refs []string
	for _, tag := range []string{"a", "b", "latest"} {
		ref := hub.Addr + "/pull/tags:" + tag
		push(t, ref, img)
		mustPull(t, strings.TrimSuffix(ref, ":latest"))
		refs = append(refs, ref)
	}
	s := imageStatus(t, refs[0])
	tags := slices.Sorted(slices.Values(s.GetRepoTags()))
	equal(t, "tags of one image", fmt.Sprint(tags), fmt.Sprint(refs))
	r, err := shared.Images().ListImages(callCtx(t), &runtimeapi.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, i := range r.Images {
		if i.Id == img.ID() {
			n++
		}
	}
	equal(t, "times the image is listed", n, 1)
	// A tag moves to another image.
	next := newImage(t, images.Gzip)
	push(t, refs[0], next)
	equal(t, "pull of a moved tag", mustPull(t, refs[0]), next.ID())
	equal(t, "owner of the moved tag", imageStatus(t, refs[0]).GetId(), next.ID())
	equal(t, "tags left on the old image", len(imageStatus(t, img.ID()).GetRepoTags()), 2)
	removeImage(t, refs[1]) // removes the image with all its tags
	if s := imageStatus(t, img.ID()); s != nil {
		t.Errorf("left after removal by a tag: %v", s)
	}
	removeImage(t, next.ID())
}

func TestImageUsers(t *testing.T) {
	equal(t, "uid of USER 1002", imageStatus(t, userUID).GetUid().GetValue(), 1002)
	equal(t, "name of USER web", imageStatus(t, userName).GetUsername(), "web")
}

func TestPullAuth(t *testing.T) {
	for _, bearer := range []bool{false, true} {
		t.Run(fmt.Sprintf("bearer=%v", bearer), func(t *testing.T) {
			r, err := registry.Start(registry.Config{User: "me", Password: "secret", Bearer: bearer})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			ref := r.Addr + "/private:1"
			push(t, ref, newImage(t, images.Gzip), "me", "secret")
			try := func(a *runtimeapi.AuthConfig) error {
				_, err := shared.Images().PullImage(callCtx(t), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}, Auth: a})
				return err
			}
			wantCode(t, "without credentials", try(nil), codes.Unauthenticated, codes.PermissionDenied)
			wantCode(t, "with wrong ones", try(&runtimeapi.AuthConfig{Username: "me", Password: "wrong"}), codes.Unauthenticated, codes.PermissionDenied)
			if err := try(&runtimeapi.AuthConfig{Username: "me", Password: "secret"}); err != nil {
				t.Errorf("user and password: %v", err)
			}
			removeImage(t, ref)
			if err := try(&runtimeapi.AuthConfig{Auth: registry.BasicAuth("me", "secret")}); err != nil {
				t.Errorf("auth string: %v", err)
			}
			removeImage(t, ref)
		})
	}
}

func TestPullMirror(t *testing.T) {
	dir := filepath.Join(hub.hostsDir(), "mirrored.example")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "hosts.toml"), fmt.Sprintf("server = \"https://mirrored.example\"\n[host.\"http://127.0.0.1:1\"]\n  capabilities = [\"pull\", \"resolve\"]\n[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", hub.Addr))
	img := newImage(t, images.Gzip)
	push(t, hub.Addr+"/team/app:1", img)
	ref := "mirrored.example/team/app:1"
	equal(t, "image pulled through the mirror", mustPull(t, ref), img.ID())
	equal(t, "its name", imageStatus(t, ref).GetRepoTags()[0], ref)
	removeImage(t, ref)
}

// TestPullFaults: a clear error in bounded time, nothing half-kept, and the
// next pull works.
func TestPullFaults(t *testing.T) {
	blobs := regexp.MustCompile(`/blobs/`)
	manifests := regexp.MustCompile(`/manifests/`)
	for _, c := range []struct {
		name  string
		fault registry.Fault
		works bool // the pull succeeds in spite of it
	}{
		{"corrupt layer", registry.Fault{Path: blobs, Corrupt: true}, false},
		{"truncated layer", registry.Fault{Path: blobs, Truncate: true}, false},
		{"garbage for a layer", registry.Fault{Path: blobs, Garbage: true}, false},
		{"garbage for a manifest", registry.Fault{Path: manifests, Garbage: true}, false},
		{"connection dropped always", registry.Fault{Path: blobs, Drop: true}, false},
		{"connection dropped every 100 KB", registry.Fault{Path: blobs, DropAfter: 100000}, true},
		{"connection dropped once", registry.Fault{Path: blobs, DropAfter: 100000, Times: 1}, true},
		{"server error always", registry.Fault{Path: blobs, Status: 500}, false},
		{"server error once", registry.Fault{Path: blobs, Status: 503, Times: 1}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := registry.Start(registry.Config{})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			img := newImage(t, images.Gzip)
			ref := r.Addr + "/faulty:1"
			push(t, ref, img)
			r.Inject(c.fault)
			_, err = pull(context.Background(), shared, ref)
			if c.works {
				if err != nil {
					t.Fatal(err)
				}
				runPod(t).run(t, image(ref))
				removeImage(t, ref)
				return
			}
			if err == nil {
				t.Fatal("the pull succeeded")
			}
			if s := status.Convert(err); len(s.Message()) < 10 {
				t.Errorf("message %q", s.Message())
			}
			if s := imageStatus(t, ref); s != nil {
				t.Errorf("half an image is kept: %v", s)
			}
			r.Heal()
			mustPull(t, ref)
			p := runPod(t)
			p.run(t, image(ref)).sh(t, "true")
			p.remove(t)
			removeImage(t, ref)
		})
	}
}

func TestPullCancel(t *testing.T) {
	r, err := registry.Start(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	img := newImage(t, images.Gzip)
	ref := r.Addr + "/slow:1"
	push(t, ref, img)
	r.Inject(registry.Fault{Path: regexp.MustCompile(`/blobs/`), Hang: true})
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err = shared.Images().PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	wantCode(t, "pull from a registry that hangs", err, codes.DeadlineExceeded)
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("took %v", d)
	}
	r.Heal()
	mustPull(t, ref)
	removeImage(t, ref)
}

// TestPullTogether: many pulls of one image are one download.
func TestPullTogether(t *testing.T) {
	r, err := registry.Start(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	img := newImage(t, images.Gzip)
	ref := r.Addr + "/popular:1"
	push(t, ref, img)
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			if _, err := pull(context.Background(), shared, ref); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, l := range img.Layers {
		if n := r.Requests("GET", l.Desc.Digest.String()); n > 1 {
			t.Errorf("a layer was fetched %d times", n)
		}
	}
	removeImage(t, ref)
}

// TestLayerContents unpacks what is awkward in layers.
func TestLayerContents(t *testing.T) {
	lower, err := images.NewLayer(images.Gzip, append(busyboxEntries(),
		images.Dir("d"), images.File("d/gone", "x"), images.File("d/stays", "lower"),
		images.Dir("o"), images.File("o/hidden", "x"),
		images.File("orig", "linked"), images.Hardlink("hard", "orig"))...)
	if err != nil {
		t.Fatal(err)
	}
	upper, err := images.NewLayer(images.Zstd,
		images.Whiteout("d/gone"), images.Opaque("o"), images.File("o/new", "upper"),
		images.Entry{Name: "xattr", Data: []byte("x"), Xattrs: map[string]string{"user.colour": "green"}},
		images.Entry{Name: "null", Typeflag: '3', DevMajor: 1, DevMinor: 3, Mode: 0o666},
		images.Entry{Name: "owned", Data: []byte("x"), UID: 12, GID: 34, Mode: 0o4711})
	if err != nil {
		t.Fatal(err)
	}
	img, err := images.New(images.Config{Cmd: []string{"/bin/sh"}, Env: []string{"PATH=/bin"}}, lower, upper)
	if err != nil {
		t.Fatal(err)
	}
	ref := hub.Addr + "/pull/awkward:1"
	push(t, ref, img)
	mustPull(t, ref)
	p := runPod(t)
	c := p.run(t, image(ref))
	equal(t, "whiteout", c.sh(t, "ls /d"), "stays")
	equal(t, "opaque directory", c.sh(t, "ls /o"), "new")
	equal(t, "hard link", c.sh(t, "cat /hard; stat -c %h /hard"), "linked2")
	equal(t, "owner and mode", c.sh(t, "stat -c %u:%g:%a /owned"), "12:34:4711")
	equal(t, "device", c.sh(t, "stat -c %F:%t:%T /null"), "character special file:1:3")
	p.remove(t)
	removeImage(t, ref)
}

// TestHostileLayers: names that leave the root never reach the host.
func TestHostileLayers(t *testing.T) {
	canary := filepath.Join(workDir, "canary")
	rel := strings.Repeat("../", 30) + strings.TrimPrefix(canary, "/")
	for name, entries := range map[string][]images.Entry{
		"dots":          {images.File(rel, "x")},
		"absolute":      {images.File(canary, "x")},
		"symlink":       {images.Symlink("out", "/"), images.File("out"+canary, "x")},
		"hard link":     {images.Hardlink("passwd", rel)},
		"whiteout dots": {images.File(strings.Repeat("../", 30)+"tmp/.wh.x", "")},
		"bad whiteout":  {images.File(".wh..", ""), images.File(".wh...", "")},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := images.NewLayer(images.Gzip, entries...)
			if err != nil {
				t.Fatal(err)
			}
			img, err := images.New(images.Config{}, l)
			if err != nil {
				t.Fatal(err)
			}
			ref := hub.Addr + "/pull/hostile:" + strings.ReplaceAll(name, " ", "-")
			push(t, ref, img)
			_, err = pull(context.Background(), shared, ref)
			if _, serr := os.Lstat(canary); serr == nil {
				os.Remove(canary)
				t.Error("it wrote a file outside of its root")
			}
			if err == nil {
				removeImage(t, ref)
			}
		})
	}
}

func TestImageFsInfo(t *testing.T) {
	r, err := shared.Images().ImageFsInfo(callCtx(t), &runtimeapi.ImageFsInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.ImageFilesystems) == 0 || r.ImageFilesystems[0].GetUsedBytes().GetValue() == 0 || r.ImageFilesystems[0].GetFsId().GetMountpoint() == "" {
		t.Errorf("image file systems: %v", r.ImageFilesystems)
	}
	if len(r.ContainerFilesystems) == 0 {
		t.Error("no container file systems")
	}
}

func TestImageStatusVerbose(t *testing.T) {
	r, err := shared.Images().ImageStatus(callCtx(t), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: busybox}, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var all bytes.Buffer
	for _, v := range r.Info {
		all.WriteString(v)
	}
	contains(t, "verbose info", all.String(), "FROM_IMAGE=yes")
}

// TestImageIDsAgree: one image has one id in every answer.
func TestImageIDsAgree(t *testing.T) {
	id := mustPull(t, busybox)
	equal(t, "ImageStatus", imageStatus(t, busybox).GetId(), id)
	p := runPod(t)
	c := p.run(t)
	equal(t, "ContainerStatus", c.status(t).ImageId, id)
	equal(t, "ListContainers", p.list(t)[0].ImageId, id)
}

// TestImageInUse: removing the image under a container leaves it running, and
// other containers of the image's layers too.
func TestImageInUse(t *testing.T) {
	ref := hub.Addr + "/pull/inuse:1"
	push(t, ref, newImage(t, images.Gzip, images.File("big", strings.Repeat("z", 100000))))
	mustPull(t, ref)
	p := runPod(t)
	c := p.run(t, image(ref))
	removeImage(t, ref)
	time.Sleep(300 * time.Millisecond)
	equal(t, "file of the removed image", c.sh(t, "wc -c < /big"), "100000")
	c.sh(t, "ls /bin/busybox")
}
