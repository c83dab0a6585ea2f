package config

import (
	"fmt"
	"slices"
	"strings"
)

// Fault is one thing wrong with a configuration.
type Fault struct {
	Path    string   // of the field, as in "cri.streaming.port"; empty: the whole file
	Line    int      // in the file, from 1; 0: the field is not in the file
	Message string   // what is wrong
	Allowed []string // what would be right, where the choice is closed
}

func (f Fault) String() string {
	var b strings.Builder
	if f.Line > 0 {
		fmt.Fprintf(&b, "line %d: ", f.Line)
	}
	if f.Path != "" {
		fmt.Fprintf(&b, "%s: ", f.Path)
	}
	b.WriteString(f.Message)
	if len(f.Allowed) > 0 {
		fmt.Fprintf(&b, "; allowed: %s", strings.Join(f.Allowed, ", "))
	}
	return b.String()
}

// Faults is the error of a file that was read and is wrong: every fault, in
// the order of their lines.
type Faults struct {
	Name string
	List []Fault
}

func (e Faults) Error() string {
	if len(e.List) == 1 {
		return fmt.Sprintf("%s: %s", e.Name, e.List[0])
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %d faults", e.Name, len(e.List))
	for _, f := range e.List {
		fmt.Fprintf(&b, "\n  %s", f)
	}
	return b.String()
}

// didYouMean returns `; did you mean "x"?` for the one of names that is a
// slip of the finger away from s, or nothing.
func didYouMean(s string, names []string) string {
	best, at := 3, ""
	for _, n := range names {
		if d := editDistance(strings.ToLower(s), strings.ToLower(n)); d < best && d < len(n) {
			best, at = d, n
		}
	}
	if at == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", at)
}

// editDistance is Levenshtein's, in bytes; long inputs are not compared.
func editDistance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = slices.Min([]int{change, row[j] + 1, row[j+1] + 1})
		}
	}
	return row[len(b)]
}
