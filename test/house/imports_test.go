package house

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

// listed is what we need of `go list -json`.
type listed struct {
	ImportPath, Name, Doc, Dir         string
	GoFiles, CgoFiles                  []string
	Imports, TestImports, XTestImports []string
}

// folder is the package's place in the repository, "" for the root.
func (p listed) folder() string { return strings.TrimPrefix(p.ImportPath, module) }

// packages lists every package of the module and of those inside it.
func packages(t *testing.T) []listed {
	t.Helper()
	var list []listed
	for _, dir := range append([]string{"."}, modules...) {
		list = append(list, packagesIn(t, dir)...)
	}
	return list
}

func packagesIn(t *testing.T, dir string) []listed {
	t.Helper()
	out := run(t, "go", "-C", dir, "list", "-tags", "seccomp", "-json=ImportPath,Name,Doc,Dir,GoFiles,CgoFiles,Imports,TestImports,XTestImports", "./...")
	var list []listed
	for dec := json.NewDecoder(strings.NewReader(out)); ; {
		var p listed
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return list
		}
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
}

// run executes a command at the root of the repository.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = "../.."
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, exit.Stderr)
	}
	if err != nil {
		t.Skipf("%s cannot be run: %v", name, err)
	}
	return string(out)
}

func TestPackagesSayWhatTheyAreFor(t *testing.T) {
	for _, p := range packages(t) {
		if len(p.GoFiles)+len(p.CgoFiles) == 0 {
			continue // tests only
		}
		if p.Doc == "" {
			t.Errorf("%s has no package comment", p.folder())
		}
		if slices.Contains(badNames, p.Name) || slices.Contains(badNames, path.Base(p.ImportPath)) {
			t.Errorf("%s: the name %q says nothing", p.folder(), p.Name)
		}
	}
}

func TestDomainsDoNotImportEachOther(t *testing.T) {
	for _, p := range packages(t) {
		own := domain(p.folder())
		if own == "" {
			continue
		}
		for _, imported := range p.Imports {
			folder, ours := strings.CutPrefix(imported, module)
			if !ours || slices.Contains(vocabulary, folder) {
				continue
			}
			if domain(folder) != own || slices.Contains(vocabulary, p.folder()) {
				t.Errorf("%s imports %s; only cmd and test join domains", p.folder(), imported)
			}
		}
	}
}

// domain is the domain that a folder belongs to, or "".
func domain(folder string) string {
	top, _, _ := strings.Cut(folder, "/")
	if slices.Contains(domains, top) {
		return top
	}
	return ""
}

func TestPackagesStayWhereTheyBelong(t *testing.T) {
	for _, p := range packages(t) {
		for _, rule := range onlyIn {
			if slices.Contains(p.Imports, rule.path) && !inAny(p.folder(), rule.folders) {
				t.Errorf("%s imports %s: %s", p.folder(), rule.path, rule.why)
			}
		}
	}
}

func inAny(folder string, parents []string) bool {
	return slices.ContainsFunc(parents, func(parent string) bool {
		return folder == parent || strings.HasPrefix(folder, parent+"/")
	})
}

func TestShimIsLean(t *testing.T) {
	deps := strings.Fields(run(t, "go", "list", "-deps", "-tags", "seccomp osusergo netgo", "./cmd/nodeagent-shim"))
	for _, dep := range deps {
		for _, bad := range shimForbidden {
			if dep == bad || strings.HasSuffix(bad, "/") && strings.HasPrefix(dep, bad) {
				t.Errorf("the shim links %s", dep)
			}
		}
	}
}

func TestProductDoesNotLinkTests(t *testing.T) {
	for _, p := range packages(t) {
		if inAny(p.folder(), []string{"test"}) || inAny(p.folder(), testSupport) {
			continue
		}
		for _, imported := range p.Imports {
			own := strings.TrimPrefix(imported, module)
			if strings.HasPrefix(own, "test/") || inAny(own, testSupport) || imported == "testing" {
				t.Errorf("%s imports %s", p.folder(), imported)
			}
		}
	}
}
