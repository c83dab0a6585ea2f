package config

import "reflect"

// Change is a field in which two configurations differ.
type Change struct {
	Path string // as in the file: "log.level"
	Live bool   // a running daemon takes it over
}

// Reload is c with the fields of next that a running daemon takes over (those
// with the tag `reload:"live"`), and what differs between c and next, in the
// order of the file.
func (c Config) Reload(next Config) (Config, []Change) {
	var changes []Change
	reload(reflect.ValueOf(&c).Elem(), reflect.ValueOf(next), "", &changes)
	return c, changes
}

func reload(c, next reflect.Value, path string, changes *[]Change) {
	for f := range c.Type().Fields() {
		at, now, then := join(path, f.Tag.Get("yaml")), c.FieldByIndex(f.Index), next.FieldByIndex(f.Index)
		switch {
		case !isScalar(f.Type) && f.Type.Kind() == reflect.Struct:
			reload(now, then, at, changes)
		case same(now, then):
		default:
			live := isLive(f.Tag)
			if live {
				now.Set(then)
			}
			*changes = append(*changes, Change{at, live})
		}
	}
}

// same takes an absent list for an empty one.
func same(a, b reflect.Value) bool {
	if a.Kind() == reflect.Slice && a.Len() == 0 && b.Len() == 0 {
		return true
	}
	return reflect.DeepEqual(a.Interface(), b.Interface())
}

func isLive(tag reflect.StructTag) bool { return tag.Get("reload") == "live" }
