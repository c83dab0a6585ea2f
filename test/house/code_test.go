package house

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"testing"
)

// source is one parsed file of the product, tests and generated files apart.
type source struct {
	folder string
	file   *ast.File
	set    *token.FileSet
}

func (s source) at(n ast.Node) token.Position { return s.set.Position(n.Pos()) }

func sources(t *testing.T) []source {
	t.Helper()
	var list []source
	for _, p := range packages(t) {
		if inAny(p.folder(), []string{"test"}) {
			continue
		}
		for _, name := range append(p.GoFiles, p.CgoFiles...) {
			set := token.NewFileSet()
			f, err := parser.ParseFile(set, filepath.Join(p.Dir, name), nil, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if !ast.IsGenerated(f) {
				list = append(list, source{p.folder(), f, set})
			}
		}
	}
	return list
}

func TestNothingHappensInInit(t *testing.T) {
	for _, s := range sources(t) {
		for _, d := range s.file.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if ok && fn.Recv == nil && fn.Name.Name == "init" && initAllowed[s.folder] == "" {
				t.Errorf("%s: func init; build and register in main", s.at(fn))
			}
		}
	}
}

// TestPackageVariablesAreConstant: a variable of a package is set where it is
// declared and never written again.
func TestPackageVariablesAreConstant(t *testing.T) {
	declared := map[string]map[string]bool{} // folder -> names
	all := sources(t)
	for _, s := range all {
		if declared[s.folder] == nil {
			declared[s.folder] = map[string]bool{}
		}
		for _, name := range packageVars(s.file) {
			declared[s.folder][name] = true
		}
	}
	for _, s := range all {
		for _, id := range written(s.file) {
			// The parser resolves names within the file: an object that is not
			// the package's is a local variable.
			if id.Obj != nil && id.Obj != s.file.Scope.Lookup(id.Name) {
				continue
			}
			if declared[s.folder][id.Name] && writtenVars[s.folder+"."+id.Name] == "" {
				t.Errorf("%s: package variable %s is written; give it an owner", s.at(id), id.Name)
			}
		}
	}
}

func packageVars(f *ast.File) []string {
	var names []string
	for _, d := range f.Decls {
		gen, ok := d.(*ast.GenDecl)
		if !ok || gen.Tok != token.VAR {
			continue
		}
		for _, spec := range gen.Specs {
			for _, id := range spec.(*ast.ValueSpec).Names {
				names = append(names, id.Name)
			}
		}
	}
	return names
}

// written finds the variables that statements of f assign to, wholly or in
// part.
func written(f *ast.File) []*ast.Ident {
	var ids []*ast.Ident
	add := func(e ast.Expr) {
		if id := rootOf(e); id != nil && id.Name != "_" {
			ids = append(ids, id)
		}
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			if n.Tok != token.DEFINE {
				for _, e := range n.Lhs {
					add(e)
				}
			}
		case *ast.IncDecStmt:
			add(n.X)
		case *ast.CallExpr:
			if fn, ok := n.Fun.(*ast.Ident); ok && len(n.Args) > 0 && (fn.Name == "delete" || fn.Name == "clear") {
				add(n.Args[0])
			}
		}
		return true
	})
	return ids
}

// rootOf is v in v, v.f, v[i] and *v.
func rootOf(e ast.Expr) *ast.Ident {
	for {
		switch x := e.(type) {
		case *ast.Ident:
			return x
		case *ast.SelectorExpr:
			e = x.X
		case *ast.IndexExpr:
			e = x.X
		case *ast.StarExpr:
			e = x.X
		case *ast.ParenExpr:
			e = x.X
		default:
			return nil
		}
	}
}

func TestCodesAreMadeAtTheEdges(t *testing.T) {
	for _, s := range sources(t) {
		name := filepath.Join(s.folder, filepath.Base(s.set.Position(s.file.Pos()).Filename))
		for _, imported := range s.file.Imports {
			if imported.Path.Value == `"google.golang.org/grpc/codes"` && !slices.Contains(codeFiles, name) {
				t.Errorf("%s: gRPC codes; give the error a class of errdefs", s.at(imported))
			}
		}
	}
}

func TestFunctionsAreSmall(t *testing.T) {
	for _, s := range sources(t) {
		for _, d := range s.file.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			if n := s.set.Position(fn.End()).Line - s.at(fn).Line; n > maxLines {
				t.Errorf("%s: %s has %d lines", s.at(fn), fn.Name.Name, n)
			}
			if n := fn.Type.Params.NumFields(); n > maxParameters && foreignShape[s.folder+"."+fn.Name.Name] == "" {
				t.Errorf("%s: %s has %d parameters", s.at(fn), fn.Name.Name, n)
			}
		}
	}
}

func TestContextIsAnArgument(t *testing.T) {
	for _, s := range sources(t) {
		for _, d := range s.file.Decls {
			gen, ok := d.(*ast.GenDecl)
			if !ok {
				continue
			}
			for _, spec := range gen.Specs {
				ts, ok := spec.(*ast.TypeSpec)
				if !ok {
					continue
				}
				st, ok := ts.Type.(*ast.StructType)
				if !ok || contextFields[s.folder+"."+ts.Name.Name] != "" {
					continue
				}
				for _, field := range st.Fields.List {
					if isContext(field.Type) {
						t.Errorf("%s: struct %s holds a context; pass it to its methods", s.at(field), ts.Name.Name)
					}
				}
			}
		}
	}
}

func isContext(e ast.Expr) bool {
	sel, ok := e.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	pkg, ok := sel.X.(*ast.Ident)
	return ok && pkg.Name == "context" && sel.Sel.Name == "Context"
}
