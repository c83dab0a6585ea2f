package record

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

func TestFilesKeepWhatIsWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.json")
	at := time.Unix(1700000000, 123456789).UTC()
	want := Exit{Version: Version, ID: "a.b", Pid: 3, Code: 137, Signal: 9, Known: true, OOMKilled: true, At: at, CreatedAt: at, StartedAt: at}
	for range 2 {
		if err := WriteFile(path, want, true); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := DecodeExit(b); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	if names, _ := filepath.Glob(path + "*"); len(names) != 1 {
		t.Errorf("files: %v", names)
	}
}

func TestOtherVersionsAreRefused(t *testing.T) {
	for _, text := range []string{`{"version":2,"id":"a","pid":1}`, `{"id":"a","pid":1}`} {
		if _, err := DecodeExit([]byte(text)); !errors.Is(err, ErrVersion) {
			t.Errorf("exit %s: %v", text, err)
		}
		if _, err := DecodeFacts([]byte(text)); !errors.Is(err, ErrVersion) {
			t.Errorf("facts %s: %v", text, err)
		}
	}
}

func TestValidID(t *testing.T) {
	for id, want := range map[string]bool{
		"": false, ".": false, "..": false, "a": true, "a/b": false, "../a": false, "A-b_c.d+9": true, "a b": false, "ä": false, "a\x00": false,
	} {
		if ValidID(id) != want {
			t.Errorf("%q: %v", id, !want)
		}
	}
}

func TestFindOrphan(t *testing.T) {
	path := filepath.Join(t.TempDir(), "orphans")
	if _, ok, err := FindOrphan(path, 1, 1); ok || err != nil {
		t.Errorf("no file: %v, %v", ok, err)
	}
	text := "10 100 1 7 1700000000000000001\nnonsense\n10 200 2 9 5\n11 1 1 0 1" // the last is torn
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		pid  int
		at   uint64
		want int
	}{{10, 100, 7}, {10, 200, 9}, {10, 300, -1}, {11, 1, -1}} {
		o, ok, err := FindOrphan(path, c.pid, c.at)
		if err != nil || ok != (c.want >= 0) || ok && o.Status != c.want {
			t.Errorf("%+v: %+v, %v, %v", c, o, ok, err)
		}
	}
}

func FuzzParseOrphan(f *testing.F) {
	f.Add("10 100 1 7 1700000000000000001\n")
	f.Fuzz(func(t *testing.T, line string) {
		if o, err := ParseOrphan(line); err == nil && (o.Pid <= 0 || o.Code < 1 || o.Code > 3) {
			t.Errorf("%q: %+v", line, o)
		}
	})
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"version":1,"id":"a","sandbox":"s","pid":12,"startTime":5,"createdAt":"2026-01-02T03:04:05Z","cgroupPaths":{"":"/x"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if x, err := DecodeFacts(b); err == nil && (!ValidID(x.ID) || x.Pid <= 0 || x.Version != Version) {
			t.Errorf("%q: %+v", b, x)
		}
		if x, err := DecodeExit(b); err == nil && (!ValidID(x.ID) || x.Version != Version) {
			t.Errorf("%q: %+v", b, x)
		}
	})
}

func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	if lines, err := ReadJournal(path); len(lines) != 0 || err != nil {
		t.Errorf("no file: %q, %v", lines, err)
	}
	j, err := NewJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	for i, v := range []any{"one", map[string]int{"two": 2}} {
		if err := j.Append(v); err != nil {
			t.Fatal(err)
		}
		if lines, err := ReadJournal(path); len(lines) != i+1 || err != nil {
			t.Errorf("%q, %v", lines, err)
		}
	}
	if err := os.WriteFile(path, []byte("\"one\"\n{\"tw"), 0o600); err != nil {
		t.Fatal(err)
	}
	if lines, err := ReadJournal(path); len(lines) != 1 || string(lines[0]) != `"one"` || err != nil {
		t.Errorf("%q, %v", lines, err)
	}
}
