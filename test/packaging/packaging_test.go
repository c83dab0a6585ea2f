// Package packaging checks what `make install` and the Debian package put
// where. It needs the built programs, make and dpkg-deb, and skips without. How
// the package behaves on a host is tested by test/vm.
package packaging

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nodeagent/nodeagent/test/e2e/node"
)

// makeInstall installs the built programs below dir and returns the paths.
func makeInstall(t *testing.T, dir, prefix string) []string {
	t.Helper()
	if _, err := node.Binary(); err != nil {
		t.Skip(err)
	}
	for _, program := range []string{"make", "dpkg-deb"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	run(t, "make", "-C", "../..", "install", "BUILT=1", "DESTDIR="+dir, "PREFIX="+prefix)
	var files []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, strings.TrimPrefix(path, dir))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000", "MAKEFLAGS=", "LC_ALL=C.UTF-8")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestInstall: everything below PREFIX but the configuration, which an operator
// may have changed.
func TestInstall(t *testing.T) {
	dir := t.TempDir()
	files := makeInstall(t, dir, "/opt/agent")
	for _, want := range []string{
		"/opt/agent/bin/nodeagent", "/opt/agent/bin/nodeagent-shim", "/opt/agent/bin/nodeagent-cni",
		"/opt/agent/lib/systemd/system/nodeagent.service", "/opt/agent/lib/sysctl.d/60-nodeagent.conf", "/opt/agent/lib/modules-load.d/nodeagent.conf",
		"/opt/agent/share/bash-completion/completions/nodeagent", "/opt/agent/share/man/man8/nodeagent.8",
		"/opt/agent/share/man/man8/nodeagent-shim.8", "/opt/agent/share/man/man8/nodeagent-cni.8", "/etc/nodeagent/config.yaml",
	} {
		if !slices.Contains(files, want) {
			t.Errorf("no %s", want)
		}
	}
	for _, f := range files {
		if !strings.HasPrefix(f, "/opt/agent/") && f != "/etc/nodeagent/config.yaml" {
			t.Errorf("%s is outside", f)
		}
	}
	unit := read(t, filepath.Join(dir, "opt/agent/lib/systemd/system/nodeagent.service"))
	if !strings.Contains(unit, "ExecStart=/opt/agent/bin/nodeagent run\n") || strings.Contains(unit, "@") {
		t.Errorf("the unit starts something else:\n%s", unit)
	}
	config := filepath.Join(dir, "etc/nodeagent/config.yaml")
	run(t, filepath.Join(dir, "opt/agent/bin/nodeagent"), "config", "validate", config)
	if err := os.WriteFile(config, []byte("# mine\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	makeInstall(t, dir, "/opt/agent")
	if got := read(t, config); got != "# mine\n" {
		t.Errorf("installed again, the configuration is\n%s", got)
	}
}

// TestPackage: the same tree makes the same bytes, owned by root, and only the
// configuration is a conffile.
func TestPackage(t *testing.T) {
	var made [][]byte
	for range 2 {
		dir := t.TempDir()
		tree, deb := filepath.Join(dir, "tree"), filepath.Join(dir, "x.deb")
		makeInstall(t, tree, "/usr")
		run(t, "../../packaging/deb/build.sh", tree, "1.2.3+git4", deb)
		made = append(made, []byte(read(t, deb)))
		if len(made) == 2 {
			break
		}
		if got := strings.Fields(run(t, "dpkg-deb", "-f", deb, "Package", "Version")); !slices.Equal(got, []string{"Package:", "nodeagent", "Version:", "1.2.3+git4"}) {
			t.Errorf("control has %q", got)
		}
		if got := run(t, "dpkg-deb", "--ctrl-tarfile", deb); !strings.Contains(got, "\n/etc/nodeagent/config.yaml\n") && !strings.Contains(got, "\x00/etc/nodeagent/config.yaml\n\x00") {
			t.Error("the configuration is no conffile")
		}
		for line := range strings.Lines(run(t, "dpkg-deb", "-c", deb)) {
			f := strings.Fields(line)
			dirs := strings.HasPrefix(f[0], "d")
			ok := f[0] == "drwxr-xr-x" || f[0] == "-rw-r--r--" || f[0] == "-rwxr-xr-x" && strings.HasPrefix(f[5], "./usr/bin/")
			if f[1] != "root/root" || !ok || !dirs && !strings.HasPrefix(f[5], "./usr/") && f[5] != "./etc/nodeagent/config.yaml" {
				t.Errorf("%s", line)
			}
		}
		for _, script := range []string{"postinst", "prerm", "postrm"} {
			run(t, "sh", "-n", filepath.Join(tree, "DEBIAN", script))
		}
	}
	if !bytes.Equal(made[0], made[1]) {
		t.Error("two packages of the same tree differ")
	}
}
