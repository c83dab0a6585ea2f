package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func open(t testing.TB, path string) *DB {
	t.Helper()
	d, err := Open(Config{Path: path, LazyDelay: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func everyByte() string {
	var b strings.Builder
	for r := rune(0); r < 0x180; r++ {
		b.WriteRune(r)
	}
	return b.String()
}

func fullSandbox() *Sandbox {
	return &Sandbox{
		ID: "sb", CreatedAt: time.Unix(0, 123456789), Boot: "b", Handler: "h", Digest: "d",
		Config: &runtimeapi.PodSandboxConfig{
			Metadata: &runtimeapi.PodSandboxMetadata{Name: everyByte(), Namespace: "n", Uid: "u", Attempt: 3},
			Labels:   map[string]string{everyByte(): everyByte()},
		},
		Namespaces:   Namespaces{ID: "x", Net: "/n", IPC: "/i", UTS: "/u", User: "/us"},
		Network:      Network{IPs: []string{"10.0.0.1"}, HostInterface: "veth", Conf: "builtin", Result: []byte(`{"a":1}`)},
		CgroupParent: "/kube", Label: "l", Dir: "/d", Pause: true,
	}
}

func fullContainer() *Container {
	return &Container{
		ID: "c", SandboxID: "sb", CreatedAt: time.Unix(7, 8), Digest: "d",
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: everyByte()},
			Envs:     []*runtimeapi.KeyValue{{Key: "K", Value: []byte{0xff, 0, 0xfe}}}, // not UTF-8
		},
		ImageID: "sha256:1", ImageRef: "r", ImageName: "n", LogPath: "/l", ImageVolumes: []string{"sha256:2"},
		User: &runtimeapi.ContainerUser{Linux: &runtimeapi.LinuxContainerUser{Uid: 5}}, Resources: &runtimeapi.LinuxContainerResources{CpuShares: 9},
		StopSignal: runtimeapi.Signal_SIGNAL_SIGUSR1, StopNumber: 10, CgroupsPath: "/kube/c", Rootfs: "/r",
		Started: &Started{Pid: 4, StartTime: 5, At: time.Unix(9, 10).UTC()}, Exit: &Exit{Code: 1, Signal: 2, Known: true, OOM: true, At: time.Unix(11, 12).UTC(), Reason: "R", Message: "M"},
	}
}

func sameSandbox(a, b *Sandbox) bool {
	if !proto.Equal(a.Config, b.Config) || !a.CreatedAt.Equal(b.CreatedAt) {
		return false
	}
	x, y := *a, *b
	x.Config, y.Config, x.CreatedAt, y.CreatedAt = nil, nil, time.Time{}, time.Time{}
	return reflect.DeepEqual(x, y)
}

func sameContainer(a, b *Container) bool {
	if !proto.Equal(a.Config, b.Config) || !proto.Equal(a.User, b.User) || !proto.Equal(a.Resources, b.Resources) || !a.CreatedAt.Equal(b.CreatedAt) {
		return false
	}
	x, y := *a, *b
	x.Config, y.Config, x.User, y.User, x.Resources, y.Resources, x.CreatedAt, y.CreatedAt = nil, nil, nil, nil, nil, nil, time.Time{}, time.Time{}
	return reflect.DeepEqual(x, y)
}

// Nothing may be lost on the way to disk: a field that is added to a record
// and not to its wire form fails here.
func TestRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	d := open(t, path)
	sb, c := fullSandbox(), fullContainer()
	for _, v := range []any{*sb, *c} {
		for i := range reflect.TypeOf(v).NumField() {
			if reflect.ValueOf(v).Field(i).IsZero() {
				t.Errorf("the test leaves %T.%s empty", v, reflect.TypeOf(v).Field(i).Name)
			}
		}
	}
	if err := errors.Join(d.PutSandbox(sb), d.PutContainer(c, []byte("spec")), d.Close()); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	sandboxes, containers, refused, err := d.Load()
	if err != nil || len(refused) > 0 || len(sandboxes) != 1 || len(containers) != 1 {
		t.Fatal(sandboxes, containers, refused, err)
	}
	if !sameSandbox(sandboxes[0], sb) {
		t.Errorf("got %+v\nwant %+v", sandboxes[0], sb)
	}
	if !sameContainer(containers[0], c) {
		t.Errorf("got %+v\nwant %+v", containers[0], c)
	}
	if spec, err := d.Spec("c"); string(spec) != "spec" || err != nil {
		t.Errorf("spec %q, %v", spec, err)
	}
	if err := errors.Join(d.DeleteContainer("c"), d.DeleteContainer("c"), d.DeleteSandbox("sb"), d.DeleteSandbox("none")); err != nil {
		t.Error(err)
	}
	if _, err := d.Spec("c"); !errdefs.IsNotFound(err) {
		t.Errorf("spec of a deleted container: %v", err)
	}
}

func TestUnknownVersionIsRefusedAndKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	d := open(t, path)
	future := []byte(`{"version":2,"id":"f","namespaces":{"id":"ns9"},"imageID":"sha256:7","imageVolumes":["sha256:8"]}`)
	err := d.bolt.Update(func(tx *bbolt.Tx) error {
		return errors.Join(tx.Bucket(bucketSandboxes).Put([]byte("f"), future), tx.Bucket(bucketContainers).Put([]byte("g"), []byte("garbage")))
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		_, _, refused, err := d.Load()
		if err != nil || len(refused) != 2 {
			t.Fatal(refused, err)
		}
		f := refused["f"]
		if !errdefs.IsNotImplemented(f.Err) || f.NamespaceID != "ns9" || !reflect.DeepEqual(f.Images, []string{"sha256:7", "sha256:8"}) {
			t.Errorf("a record of the future: %+v", f)
		}
		if !errdefs.IsInvalidArgument(refused["g"].Err) {
			t.Errorf("garbage: %v", refused["g"].Err)
		}
	}
}

func TestStateIsDerived(t *testing.T) {
	for _, tc := range []struct {
		c    Container
		want runtimeapi.ContainerState
	}{
		{Container{}, runtimeapi.ContainerState_CONTAINER_CREATED},
		{Container{Started: &Started{}}, runtimeapi.ContainerState_CONTAINER_RUNNING},
		{Container{Started: &Started{}, Exit: &Exit{Known: true}}, runtimeapi.ContainerState_CONTAINER_EXITED},
		{Container{Exit: &Exit{}}, runtimeapi.ContainerState_CONTAINER_EXITED},
	} {
		if got := tc.c.State(); got != tc.want {
			t.Errorf("%+v is %s, want %s", tc.c, got, tc.want)
		}
	}
}

// Many writers share transactions, all of their writes arrive, and lazy ones
// too, in order.
func TestGroupCommit(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "state.db"))
	before := txid(d)
	var wg sync.WaitGroup
	const writers = 64
	for i := range writers {
		wg.Go(func() {
			c := fullContainer()
			c.ID = fmt.Sprint("c", i)
			if err := d.PutContainer(c, []byte(c.ID)); err != nil {
				t.Error(err)
			}
			late := *c
			late.Digest = "late"
			if err := d.PutContainerLazy(&late); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := txid(d) - before; n > writers {
		t.Errorf("%d transactions for %d writers", n, writers)
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, containers, _, err := d.Load()
	if err != nil || len(containers) != writers {
		t.Fatalf("%d containers, %v", len(containers), err)
	}
	for _, c := range containers {
		if c.Digest != "late" {
			t.Errorf("%s has %q: the lazy write is lost or came first", c.ID, c.Digest)
		}
	}
}

func TestLazyWriteHappensByItself(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "state.db"))
	if err := d.PutContainerLazy(fullContainer()); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if _, containers, _, _ := d.Load(); len(containers) == 1 {
			return
		}
	}
	t.Error("not written in 5 s")
}

func TestFailedWriteReachesAllAndKeepsLazyOnes(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "state.db"))
	bad := fullContainer()
	bad.ID = strings.Repeat("k", bbolt.MaxKeySize+1)
	if err := d.PutContainerLazy(fullContainer()); err != nil {
		t.Fatal(err)
	}
	if err := d.PutContainer(bad, nil); err == nil {
		t.Error("a key that is too long was accepted")
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, containers, _, _ := d.Load(); len(containers) != 1 {
		t.Errorf("%d containers: the lazy write was lost with the bad one", len(containers))
	}
}

func TestSecondOpenIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	d := open(t, path)
	if _, err := Open(Config{Path: path}); !errdefs.IsUnavailable(err) {
		t.Errorf("error is %v", err)
	}
	d.Close()
	if err := d.PutSandbox(fullSandbox()); !errdefs.IsUnavailable(err) {
		t.Errorf("write after close: %v", err)
	}
	if err := os.WriteFile(path, []byte("not a database, and long enough to be read as one: "+strings.Repeat("x", 16384)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{Path: path}); err == nil {
		t.Error("garbage was opened")
	}
}

func TestIndex(t *testing.T) {
	x := NewIndex[int]("thing")
	x.Add("abc", 1)
	x.Add("abd", 2)
	x.Add("b", 3)
	x.Add("bb", 4)
	for id, want := range map[string]int{"abc": 1, "abd": 2, "b": 3, "bb": 4} {
		if got, err := x.Get(id); got != want || err != nil {
			t.Errorf("%s: %d, %v", id, got, err)
		}
	}
	if _, err := x.Get("ab"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("ambiguous: %v", err)
	}
	if _, err := x.Get(""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("empty: %v", err)
	}
	if _, err := x.Get("c"); !errdefs.IsNotFound(err) {
		t.Errorf("unknown: %v", err)
	}
	x.Delete("abc")
	if got, err := x.Get("a"); got != 2 || err != nil {
		t.Errorf("prefix: %d, %v", got, err)
	}
	if got := x.All(); !reflect.DeepEqual(got, []int{2, 3, 4}) || x.Len() != 3 {
		t.Errorf("all: %v", got)
	}
}

func txid(d *DB) (id int) {
	d.bolt.View(func(tx *bbolt.Tx) error { id = tx.ID(); return nil })
	return id
}

// Whatever is on disk: no panic, and what is accepted can be written again
// and reads the same.
func FuzzDecode(f *testing.F) {
	s, _ := EncodeSandbox(fullSandbox())
	c, _ := EncodeContainer(fullContainer())
	f.Add(s)
	f.Add(c)
	f.Add([]byte(`{"version":1,"id":"x","sandbox":"y","config":"CgA="}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if s, err := DecodeSandbox(data); err == nil {
			again, err := EncodeSandbox(s)
			if err != nil {
				t.Fatal(err)
			}
			if s2, err := DecodeSandbox(again); err != nil || !sameSandbox(s, s2) {
				t.Fatalf("%v: %+v became %+v", err, s, s2)
			}
		}
		if c, err := DecodeContainer(data); err == nil {
			again, err := EncodeContainer(c)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := DecodeContainer(again); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func BenchmarkPutContainer(b *testing.B) {
	d := open(b, filepath.Join(b.TempDir(), "state.db"))
	spec := make([]byte, 20<<10)
	b.SetParallelism(4)
	b.RunParallel(func(pb *testing.PB) {
		c := fullContainer()
		c.ID = fmt.Sprintf("%p", c)
		for pb.Next() {
			if err := d.PutContainer(c, spec); err != nil {
				b.Fatal(err)
			}
		}
	})
}
