package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// Document renders c as a YAML file with every field documented. Parse of the
// outcome gives c again. Fields whose value is derived from others and has its
// derived value are commented out, so that they keep following.
func (c Config) Document() []byte {
	derived := c
	derived.CRI.Socket = ""
	derived.complete()
	p := printer{derived: derived}
	p.fields(reflect.ValueOf(c), "", reflect.ValueOf(derived))
	return p.out.Bytes()
}

// MarshalJSON renders c with the names of the file, for `crictl info`.
func (c Config) MarshalJSON() ([]byte, error) {
	return json.Marshal(tree(reflect.ValueOf(c)))
}

func tree(st reflect.Value) map[string]any {
	out := map[string]any{}
	for f := range st.Type().Fields() {
		name, v := f.Tag.Get("yaml"), st.FieldByIndex(f.Index)
		switch d, isDuration := v.Interface().(time.Duration); {
		case isDuration:
			out[name] = shortDuration(d)
		case !isScalar(f.Type) && f.Type.Kind() == reflect.Struct:
			out[name] = tree(v)
		default:
			out[name] = v.Interface()
		}
	}
	return out
}

type printer struct {
	out     bytes.Buffer
	derived Config
}

func (p *printer) fields(v reflect.Value, indent string, derived reflect.Value) {
	for f := range v.Type().Fields() {
		name, value := f.Tag.Get("yaml"), v.FieldByIndex(f.Index)
		if indent == "" && f.Tag.Get("doc") != "" {
			p.out.WriteByte('\n')
		}
		p.comment(f.Tag, indent)
		if !isScalar(f.Type) && f.Type.Kind() == reflect.Struct {
			fmt.Fprintf(&p.out, "%s%s:\n", indent, name)
			p.fields(value, indent+"  ", derived.FieldByIndex(f.Index))
			continue
		}
		lead := indent
		if f.Tag.Get("derived") != "" && value.Equal(derived.FieldByIndex(f.Index)) {
			lead += "# "
		}
		fmt.Fprintf(&p.out, "%s%s: %s\n", lead, name, p.text(value, f.Tag))
	}
}

func (p *printer) comment(tag reflect.StructTag, indent string) {
	doc := tag.Get("doc")
	if doc == "" {
		return
	}
	if allowed := allowedOf(tag); allowed != nil {
		doc += " One of: " + strings.Join(allowed, ", ") + "."
	}
	if d := tag.Get("derived"); d != "" {
		doc += " Default: " + d + "."
	}
	if isLive(tag) {
		doc += " A reload applies it."
	}
	for _, line := range wrap(doc, 78-len(indent)) {
		fmt.Fprintf(&p.out, "%s# %s\n", indent, line)
	}
}

func (p *printer) text(v reflect.Value, tag reflect.StructTag) string {
	switch x := v.Interface().(type) {
	case time.Duration:
		return shortDuration(x)
	case netip.Prefix:
		return quoteIfNeeded(x.String())
	case netip.Addr:
		return quoteIfNeeded(x.String())
	case string:
		return quoteIfNeeded(x)
	case int64:
		if tag.Get("unit") == "bytes" {
			return formatBytes(x)
		}
	}
	if v.Kind() == reflect.Slice {
		items := make([]string, v.Len())
		for i := range items {
			items[i] = p.text(v.Index(i), tag)
		}
		return "[" + strings.Join(items, ", ") + "]"
	}
	return fmt.Sprint(v.Interface())
}

// shortDuration drops the zero parts that time.Duration prints: 1m, not 1m0s.
func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// quoteIfNeeded leaves plain what YAML can only read as this very text.
func quoteIfNeeded(s string) string {
	plain := s != "" && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-", r))
	}) < 0
	switch {
	case !plain, s[0] == '-', s[0] == '.':
		return strconv.Quote(s)
	case s[0] >= '0' && s[0] <= '9' && !strings.Contains(s, "/") && strings.Count(s, ".") < 2:
		return strconv.Quote(s) // could be a number
	}
	switch strings.ToLower(s) {
	case "true", "false", "yes", "no", "on", "off", "y", "n", "null":
		return strconv.Quote(s)
	}
	return s
}

func wrap(s string, width int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(s) {
		if line != "" && len(line)+1+len(word) > width {
			lines = append(lines, line)
			line = ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(lines, line)
}
