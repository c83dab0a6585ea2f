package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// maxFileSize bounds what Load reads, in bytes. A real file has a few KiB.
const maxFileSize = 1 << 20

// Load reads the file at path. If path is DefaultPath and nothing is there,
// it returns Default; any other missing file is an error.
//
// Errors: Faults when the file was read and is wrong.
func Load(path string) (Config, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) && path == DefaultPath {
		return Default(), nil
	}
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	return Parse(path, data)
}

// Parse decodes data on top of the defaults and validates the outcome. name
// stands for the file in error messages.
//
// Errors: Faults, with every fault of the file.
func Parse(name string, data []byte) (Config, error) {
	if len(data) > maxFileSize {
		return Config{}, Faults{Name: name, List: []Fault{{Message: fmt.Sprintf("larger than %d bytes", maxFileSize)}}}
	}
	d := decoder{lines: map[string]int{}}
	c := defaults()
	c.APIVersion, c.Kind = "", ""
	d.document(data, reflect.ValueOf(&c).Elem())
	c.complete()
	for _, f := range c.faults() {
		d.semantic(f)
	}
	if len(d.faults) > 0 {
		slices.SortStableFunc(d.faults, func(a, b Fault) int { return a.Line - b.Line })
		return Config{}, Faults{Name: name, List: d.faults}
	}
	return c, nil
}

// decoder copies a YAML tree into a struct and collects faults on the way.
type decoder struct {
	faults []Fault
	lines  map[string]int // path of each field that the file sets -> line
}

func (d *decoder) fault(path string, line int, allowed []string, format string, args ...any) {
	d.faults = append(d.faults, Fault{Path: path, Line: line, Message: fmt.Sprintf(format, args...), Allowed: allowed})
}

// semantic adds a fault found by validation, at the line that set the field
// or its nearest parent, unless decoding already found fault with the field.
func (d *decoder) semantic(f Fault) {
	if slices.ContainsFunc(d.faults, func(o Fault) bool {
		return o.Path == f.Path || strings.HasPrefix(o.Path, f.Path+"[") || o.Path == ""
	}) {
		return
	}
	for p := f.Path; p != ""; p = parentPath(p) {
		if line, ok := d.lines[p]; ok {
			f.Line = line
			break
		}
	}
	d.faults = append(d.faults, f)
}

func parentPath(p string) string {
	if i := strings.LastIndexAny(p, ".["); i > 0 {
		return p[:i]
	}
	return ""
}

var syntaxLine = regexp.MustCompile(`^yaml: (?:unmarshal errors:\s+)?line (\d+): `)

func (d *decoder) document(data []byte, v reflect.Value) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc yaml.Node
	if err := dec.Decode(&doc); err != nil && !errors.Is(err, io.EOF) {
		d.syntax(err)
		return
	}
	var second yaml.Node
	if err := dec.Decode(&second); err == nil {
		d.fault("", second.Line, nil, "a second YAML document; the file holds one")
		return
	} else if !errors.Is(err, io.EOF) {
		d.syntax(err)
		return
	}
	if len(doc.Content) == 0 {
		return // an empty file: validation asks for apiVersion and kind
	}
	d.value(doc.Content[0], v, "", "")
}

func (d *decoder) syntax(err error) {
	msg, line := err.Error(), 0
	if m := syntaxLine.FindStringSubmatch(msg); m != nil {
		line, _ = strconv.Atoi(m[1])
		msg = msg[len(m[0]):]
	}
	d.fault("", line, nil, "not YAML: %s", strings.TrimPrefix(msg, "yaml: "))
}

// value decodes n into v. The schema has no cycle, so an alias that contains
// itself ends where the schema ends.
func (d *decoder) value(n *yaml.Node, v reflect.Value, path string, tag reflect.StructTag) {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	d.lines[path] = n.Line
	switch {
	case isScalar(v.Type()):
		d.scalar(n, v, path, tag)
	case v.Kind() == reflect.Struct:
		d.mapping(n, v, path)
	case v.Kind() == reflect.Slice:
		d.sequence(n, v, path, tag)
	default:
		panic("config: field " + path + " has a type the decoder does not know") // caught by TestSchema
	}
}

func (d *decoder) mapping(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return // "cri:" with nothing below
	}
	if n.Kind != yaml.MappingNode {
		d.fault(path, n.Line, fieldNames(v.Type()), "is %s, want fields", kindName(n))
		return
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, child := n.Content[i], n.Content[i+1]
		at := join(path, key.Value)
		if first, dup := seen[key.Value]; dup {
			d.fault(at, key.Line, nil, "given twice, first on line %d", first)
			continue
		}
		seen[key.Value] = key.Line
		f, ok := fieldByName(v.Type(), key.Value)
		if !ok {
			names := fieldNames(v.Type())
			d.fault(at, key.Line, names, "unknown field%s", didYouMean(key.Value, names))
			continue
		}
		d.value(child, v.FieldByIndex(f.Index), at, f.Tag)
	}
}

func (d *decoder) sequence(n *yaml.Node, v reflect.Value, path string, tag reflect.StructTag) {
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		v.Set(reflect.MakeSlice(v.Type(), 0, 0))
		return
	}
	if n.Kind != yaml.SequenceNode {
		d.fault(path, n.Line, nil, "is %s, want a list of %s", kindName(n), typeName(v.Type().Elem(), tag))
		return
	}
	out := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, child := range n.Content {
		d.value(child, out.Index(i), fmt.Sprintf("%s[%d]", path, i), tag)
	}
	v.Set(out)
}

func (d *decoder) scalar(n *yaml.Node, v reflect.Value, path string, tag reflect.StructTag) {
	want := typeName(v.Type(), tag)
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" {
		d.fault(path, n.Line, allowedOf(tag), "is %s, want %s", kindName(n), want)
		return
	}
	if err := setScalar(n, v, tag); err != nil {
		d.fault(path, n.Line, allowedOf(tag), "%q is not %s", n.Value, want)
		return
	}
	if allowed := allowedOf(tag); allowed != nil && !slices.Contains(allowed, n.Value) {
		d.fault(path, n.Line, allowed, "%q is not allowed%s", n.Value, didYouMean(n.Value, allowed))
	}
}

var (
	durationType = reflect.TypeFor[time.Duration]()
	prefixType   = reflect.TypeFor[netip.Prefix]()
	addrType     = reflect.TypeFor[netip.Addr]()
)

func isScalar(t reflect.Type) bool {
	switch t {
	case durationType, prefixType, addrType:
		return true
	}
	switch t.Kind() {
	case reflect.String, reflect.Bool, reflect.Int, reflect.Int64:
		return true
	}
	return false
}

var errWrongType = errors.New("wrong type")

func setScalar(n *yaml.Node, v reflect.Value, tag reflect.StructTag) error {
	switch {
	case v.Type() == durationType:
		d, err := time.ParseDuration(n.Value)
		v.SetInt(int64(d))
		return err
	case v.Type() == prefixType:
		p, err := netip.ParsePrefix(n.Value)
		v.Set(reflect.ValueOf(p))
		return err
	case v.Type() == addrType:
		a, err := netip.ParseAddr(n.Value)
		v.Set(reflect.ValueOf(a))
		return err
	case tag.Get("unit") == "bytes":
		b, err := parseBytes(n.Value)
		v.SetInt(b)
		return err
	}
	switch v.Kind() {
	case reflect.String:
		if n.Tag != "!!str" {
			return errWrongType // 8080 or yes without quotes: ask, do not guess
		}
		v.SetString(n.Value)
		return nil
	case reflect.Bool:
		if n.Tag != "!!bool" {
			return errWrongType
		}
		b, err := strconv.ParseBool(strings.ToLower(n.Value))
		v.SetBool(b)
		return err
	default:
		i, err := strconv.ParseInt(n.Value, 10, 64)
		v.SetInt(i)
		return err
	}
}

// parseBytes reads a number of bytes with an optional KiB, MiB or GiB.
func parseBytes(s string) (int64, error) {
	digits := strings.TrimRight(s, "KMGiB")
	shift, ok := map[string]int{"": 0, "B": 0, "KiB": 10, "MiB": 20, "GiB": 30}[s[len(digits):]]
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || !ok || n<<shift>>shift != n {
		return 0, errWrongType
	}
	return n << shift, nil
}

// formatBytes is the inverse of parseBytes, in the largest exact unit.
func formatBytes(n int64) string {
	for _, u := range []struct {
		name  string
		shift int
	}{{"GiB", 30}, {"MiB", 20}, {"KiB", 10}} {
		if n != 0 && n%(1<<u.shift) == 0 {
			return fmt.Sprintf("%d%s", n>>u.shift, u.name)
		}
	}
	return strconv.FormatInt(n, 10)
}

func fieldByName(t reflect.Type, name string) (reflect.StructField, bool) {
	for f := range t.Fields() {
		if f.Tag.Get("yaml") == name {
			return f, true
		}
	}
	return reflect.StructField{}, false
}

func fieldNames(t reflect.Type) []string {
	var names []string
	for f := range t.Fields() {
		names = append(names, f.Tag.Get("yaml"))
	}
	return names
}

func allowedOf(tag reflect.StructTag) []string {
	if a := tag.Get("allowed"); a != "" {
		return strings.Split(a, ",")
	}
	return nil
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

func kindName(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "a set of fields"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.Tag == "!!null":
		return "empty"
	}
	return strconv.Quote(n.Value)
}

func typeName(t reflect.Type, tag reflect.StructTag) string {
	switch {
	case t == durationType:
		return "a duration like 30s or 1m30s"
	case t == prefixType:
		return "a network like 10.1.0.0/16 or fd00:1::/64"
	case t == addrType:
		return "an IP address"
	case tag.Get("unit") == "bytes":
		return "a number of bytes like 16384 or 16KiB"
	}
	switch t.Kind() {
	case reflect.String:
		return "text (quote it if it looks like a number or a bool)"
	case reflect.Bool:
		return "true or false"
	}
	return "a whole number"
}
