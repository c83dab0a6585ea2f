package house

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// tracked lists the files that git knows, relative to the root.
func tracked(t *testing.T) []string {
	t.Helper()
	return strings.Split(strings.TrimRight(run(t, "git", "ls-files", "-z"), "\x00"), "\x00")
}

func TestNoPathsOfOneMachine(t *testing.T) {
	for _, name := range tracked(t) {
		data, err := os.ReadFile(filepath.Join("../..", name))
		if err != nil {
			continue // deleted, not committed yet
		}
		for _, p := range foreignPaths {
			if bytes.Contains(data, []byte(p)) {
				t.Errorf("%s names %s", name, p)
			}
		}
	}
}

func TestModuleIsPlain(t *testing.T) {
	data, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if strings.HasPrefix(strings.TrimSpace(line), "replace") || strings.Contains(line, "=>") {
			t.Errorf("go.mod has %q: the module has to build as a dependency", strings.TrimSpace(line))
		}
	}
}

// TestModulesInsideFollow: a module inside has the main one's Go and its
// version of Kubernetes, uses nothing of the main module, and its replace lines
// name Kubernetes' own parts only.
func TestModulesInsideFollow(t *testing.T) {
	own := modFile(t, ".")
	for _, dir := range modules {
		inside := modFile(t, dir)
		if inside.Go != own.Go {
			t.Errorf("%s/go.mod is for Go %s, go.mod for %s", dir, inside.Go, own.Go)
		}
		for _, r := range inside.Require {
			if strings.HasPrefix(r.Path+"/", module) {
				t.Errorf("%s/go.mod requires the main module", dir)
			}
		}
		for _, r := range inside.Replace {
			if r.New.Path != r.Old.Path || !strings.HasPrefix(r.New.Path, "k8s.io/") || r.New.Version != own.version("k8s.io/api") {
				t.Errorf("%s/go.mod replaces %s by %s %s; go.mod has Kubernetes %s", dir, r.Old.Path, r.New.Path, r.New.Version, own.version("k8s.io/api"))
			}
		}
	}
}

type modVersion struct{ Path, Version string }

// goMod is what we need of `go mod edit -json`.
type goMod struct {
	Go      string
	Require []modVersion
	Replace []struct{ Old, New modVersion }
}

func (m goMod) version(path string) string {
	for _, r := range m.Require {
		if r.Path == path {
			return r.Version
		}
	}
	return ""
}

func modFile(t *testing.T, dir string) goMod {
	t.Helper()
	var m goMod
	if err := json.Unmarshal([]byte(run(t, "go", "-C", dir, "mod", "edit", "-json")), &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestNothingBinaryIsCommitted(t *testing.T) {
	for _, name := range tracked(t) {
		generated := func(end string) bool { return strings.HasSuffix(name, end) }
		if strings.Contains(name, "testdata/") || slices.ContainsFunc(generatedBinaries, generated) {
			continue
		}
		data, err := os.ReadFile(filepath.Join("../..", name))
		if err == nil && bytes.IndexByte(data[:min(len(data), 8000)], 0) >= 0 {
			t.Errorf("%s is binary; build it", name)
		}
	}
}

// TestReadmeNamesRealTests: the README's table says which test shows what.
func TestReadmeNamesRealTests(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	cell := regexp.MustCompile("`([a-z0-9/]+)` ((?:(?:Test|Fuzz)[A-Za-z0-9]+(?:, )?)+)")
	for _, m := range cell.FindAllStringSubmatch(string(readme), -1) {
		folder := m[1]
		for _, name := range strings.Split(strings.TrimSuffix(m[2], ", "), ", ") {
			named++
			if !hasTest(t, filepath.Join("../..", folder), name) {
				t.Errorf("README.md names %s in %s, which is not there", name, folder)
			}
		}
	}
	if named < 50 {
		t.Errorf("README.md names %d tests only", named)
	}
}

func hasTest(t *testing.T, dir, name string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(data, []byte("\nfunc "+name+"(")) {
			return true
		}
	}
	return false
}
