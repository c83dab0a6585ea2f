package images

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func tool(t *testing.T) string {
	t.Helper()
	path, err := BuildTool(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestStandardIsReproducible(t *testing.T) {
	if _, err := os.Stat(DefaultBusybox); err != nil {
		t.Skip("needs the Debian package busybox-static")
	}
	bin := tool(t)
	digests := func() map[string]string {
		out := map[string]string{}
		made, err := Standard(t.Context(), DefaultBusybox, bin)
		if err != nil {
			t.Fatal(err)
		}
		for name, a := range made {
			out[name] = Top(a).Desc.Digest.String()
		}
		return out
	}
	one, two := digests(), digests()
	for name, d := range one {
		if two[name] != d {
			t.Errorf("%s is %s, then %s", name, d, two[name])
		}
	}
	if _, err := Busybox(t.Context(), "/bin/true"); err == nil {
		t.Error("/bin/true passes for busybox")
	}
}

func TestFromDir(t *testing.T) {
	dir := t.TempDir()
	err := errors.Join(os.Mkdir(filepath.Join(dir, "d"), 0o750), os.WriteFile(filepath.Join(dir, "d/f"), []byte("x"), 0o640), os.Symlink("f", filepath.Join(dir, "d/l")))
	if err != nil {
		t.Fatal(err)
	}
	img, err := BuildDir(Config{User: "5", Volumes: []string{"/v"}}, dir)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(img.Config.Data, []byte(`"User":"5"`)) || !bytes.Contains(img.Config.Data, []byte(`"/v":{}`)) {
		t.Errorf("config %s", img.Config.Data)
	}
	entries, err := FromDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, string(e.Typeflag)+e.Name+e.Link)
	}
	if want := []string{string(tar.TypeDir) + "d", "\x00d/f", string(tar.TypeSymlink) + "d/lf"}; !slices.Equal(got, want) {
		t.Errorf("entries %q, want %q", got, want)
	}
}

func TestTool(t *testing.T) {
	bin := tool(t)
	run := func(args ...string) (string, int) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		out, err := exec.CommandContext(ctx, bin, args...).Output()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return string(out), exit.ExitCode()
		}
		if err != nil {
			t.Fatal(err)
		}
		return string(out), 0
	}
	for _, c := range []struct {
		args []string
		out  string
		code int
	}{
		{[]string{"count", "-rate", "0", "-from", "2", "-to", "4"}, "2\n3\n4\n", 0},
		{[]string{"count", "-rate", "1000", "-to", "3", "-prefix", "n"}, "n1\nn2\nn3\n", 0},
		{[]string{"spew", "-line", "4", "10"}, "xxx\nxxx\nxx", 0},
		{[]string{"exit", "42"}, "", 42},
		{[]string{"mem", "1M", "0"}, "allocated 1048576\n", 0},
		{[]string{"echo", "a", "b"}, "a b\n", 0},
		{[]string{"fork", "2", "0"}, "", 0},
		{[]string{"nonsense"}, "", 2},
		{[]string{"exit"}, "", 1},
	} {
		out, code := run(c.args...)
		if code != c.code || c.out != "" && out != c.out {
			t.Errorf("%v: %q %d, want %q %d", c.args, out, code, c.out, c.code)
		}
	}
	out, _ := run("info")
	var info struct {
		ID     struct{ UID, GID int }
		Caps   map[string]string
		NS     map[string]string
		Mounts []struct{ Path, Type string }
	}
	if err := json.Unmarshal([]byte(out), &info); err != nil || info.ID.UID != os.Getuid() || info.NS["net"] == "" || len(info.Mounts) == 0 || info.Caps["effective"] == "" {
		t.Errorf("info: %v: %.300s", err, out)
	}
	if out, _ := run("stat", "/", "/nothing"); !strings.Contains(out, `"Type":"dir"`) || !strings.Contains(out, "no such file") {
		t.Errorf("stat: %s", out)
	}
}
