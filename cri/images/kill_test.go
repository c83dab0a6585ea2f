package images

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nodeagent/nodeagent/test/registry"
)

// childEnv makes the test binary pull, remove and collect in a loop, to be
// killed: root directory and references, separated by spaces.
const childEnv = "NODEAGENT_TEST_IMAGES_CHILD"

func TestMain(m *testing.M) {
	if args := os.Getenv(childEnv); args != "" {
		fmt.Println(victim(strings.Fields(args)))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func victim(args []string) error {
	s, err := New(Config{Root: args[0]})
	if err != nil {
		return err
	}
	if err := s.Restore(nil); err != nil {
		return err
	}
	go s.Run(context.Background())
	fmt.Println("ready")
	for i := 0; ; i++ {
		ref := args[1+i%(len(args)-1)]
		if _, err := s.Pull(context.Background(), PullOptions{Ref: ref}); err != nil {
			return err
		}
		if i%2 == 0 {
			if err := s.Remove(context.Background(), ref); err != nil {
				return err
			}
		}
	}
}

// Killed at any moment, the store opens again, every image it lists is whole,
// all can be pulled, and in the end nothing is left over.
func TestKilledAtAnyMoment(t *testing.T) {
	f := setup(t)
	f.close()
	var refs []string
	for i := range 3 {
		refs = append(refs, f.push(fmt.Sprintf("kill%d:v1", i), big(t, uint64(30+i), 1<<20)))
	}
	f.reg.Inject(registry.Fault{Path: anyBlob, Rate: 32 << 20})
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	for range rounds {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), childEnv+"="+filepath.Join(f.root, "images")+" "+strings.Join(refs, " "))
		out := must(cmd.StdoutPipe())(t)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		in := bufio.NewScanner(out)
		if !in.Scan() || in.Text() != "ready" {
			t.Errorf("child says %q", in.Text())
		}
		time.Sleep(time.Duration(rand.IntN(700)) * time.Millisecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if in.Scan() {
			t.Errorf("child says %q", in.Text())
		}
		_ = cmd.Wait()
		f.checkAfterKill(refs)
	}
	f.open()
	if err := f.store.Restore(nil); err != nil {
		t.Fatal(err)
	}
	f.reg.Heal()
	for _, ref := range refs {
		f.pull(ref)
		if err := f.store.Remove(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
	}
	f.wantEmpty()
}

// checkAfterKill opens the store as the next process would.
func (f *fixture) checkAfterKill(refs []string) {
	f.Helper()
	s, err := New(Config{Root: filepath.Join(f.root, "images")})
	if err != nil {
		f.Fatal(err)
	}
	defer s.Close()
	list, err := s.List(f.Context())
	if err != nil {
		f.Fatal(err)
	}
	for _, img := range list {
		l, err := s.Rootfs(f.Context(), img.ID, img.ID)
		if err != nil {
			f.Errorf("image %v: %v", img.RepoTags, err)
			continue
		}
		if st, err := os.Stat(filepath.Join(l.Lower[1], "big")); err != nil || st.Size() != 1<<20 {
			f.Errorf("image %v: %v %v", img.RepoTags, st, err)
		}
	}
	for _, m := range mountsUnder(f, f.root) {
		f.Errorf("mount left: %s", m)
	}
}

func mountsUnder(f *fixture, dir string) (out []string) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		f.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, dir) {
			out = append(out, line)
		}
	}
	return out
}
