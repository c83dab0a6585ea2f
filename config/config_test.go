package config

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

const head = "apiVersion: nodeagent.dev/v1\nkind: Config\n"

func TestDefaultIsValid(t *testing.T) {
	if err := Default().Validate(); err != nil {
		t.Fatal(err)
	}
}

func TestDocumentParsesToItself(t *testing.T) {
	changed := Default()
	changed.State, changed.CRI.Socket = "/run/other", "/run/other/cri.sock"
	changed.Network.Name, changed.Network.Masquerade = "other", false
	changed.Images.Pinned = []string{"a.example/b:1", "yes", "12"}
	changed.Images.ProgressTimeout = 90 * time.Second
	changed.CRI.MaxLogLineSize = 1000
	for name, c := range map[string]Config{"default": Default(), "changed": changed} {
		got, err := Parse(name, c.Document())
		if err != nil {
			t.Fatalf("%v in\n%s", err, c.Document())
		}
		if !reflect.DeepEqual(got, c) {
			t.Errorf("%s: got %+v, want %+v", name, got, c)
		}
	}
}

func TestDerivedDefaultsFollowState(t *testing.T) {
	c, err := Parse("f", []byte(head+"state: /run/second\n"))
	if err != nil {
		t.Fatal(err)
	}
	if c.CRI.Socket != "/run/second/nodeagent.sock" || c.AdminSocket() != "/run/second/admin.sock" {
		t.Errorf("sockets %q and %q do not follow state", c.CRI.Socket, c.AdminSocket())
	}
}

// TestFaults gives the whole message, since the message is the product here.
func TestFaults(t *testing.T) {
	tests := map[string]struct{ in, want string }{
		"empty file": {"", `f: 2 faults
  apiVersion: is missing; allowed: nodeagent.dev/v1
  kind: is missing; allowed: Config`},
		"other version": {"apiVersion: nodeagent.dev/v2\nkind: Config\n",
			`f: line 1: apiVersion: "nodeagent.dev/v2" is not allowed; did you mean "nodeagent.dev/v1"?; allowed: nodeagent.dev/v1`},
		"unknown field": {head + "cri:\n  sokcet: /x\n",
			`f: line 4: cri.sokcet: unknown field; did you mean "socket"?; allowed: socket, streaming, cgroupDriver, unsetSeccompProfile, maxLogLineSize, execSyncMaxOutput, runtimeHandlers, cdiSpecDirs`},
		"all at once, by line": {head + "root: data\nlog:\n  level: loud\ncri:\n  maxLogLineSize: 12 bytes\n  streaming: {port: 70000}\nnetwork:\n  podCIDRs: [10.0.0.0/8, 10.1.0.0/16]\n", `f: 5 faults
  line 3: root: "data" is not an absolute path
  line 5: log.level: "loud" is not allowed; allowed: debug, info, warn, error
  line 7: cri.maxLogLineSize: "12 bytes" is not a number of bytes like 16384 or 16KiB
  line 8: cri.streaming.port: 70000 is not from 0 to 65535
  line 10: network.podCIDRs[1]: 10.1.0.0/16 overlaps network.podCIDRs[0] 10.0.0.0/8`},
		"twice":             {head + "root: /a\nroot: /b\n", "f: line 4: root: given twice, first on line 3"},
		"wrong shape":       {head + "cri: 7\n", `f: line 3: cri: is "7", want fields; allowed: socket, streaming, cgroupDriver, unsetSeccompProfile, maxLogLineSize, execSyncMaxOutput, runtimeHandlers, cdiSpecDirs`},
		"list wanted":       {head + "images:\n  pinned: busybox\n", `f: line 4: images.pinned: is "busybox", want a list of text (quote it if it looks like a number or a bool)`},
		"text wanted":       {head + "network:\n  name: 12\n", `f: line 4: network.name: "12" is not text (quote it if it looks like a number or a bool)`},
		"bool wanted":       {head + "network:\n  masquerade: maybe\n", `f: line 4: network.masquerade: "maybe" is not true or false`},
		"duration wanted":   {head + "images:\n  progressTimeout: 60\n", `f: line 4: images.progressTimeout: "60" is not a duration like 30s or 1m30s`},
		"element of a list": {head + "network:\n  podCIDRs:\n  - 10.0.0.0/16\n  - 10.1\n", `f: line 6: network.podCIDRs[1]: "10.1" is not a network like 10.1.0.0/16 or fd00:1::/64`},
		"host bits":         {head + "network: {podCIDRs: [10.0.0.1/16]}\n", `f: line 3: network.podCIDRs[0]: 10.0.0.1/16 has host bits set; the range is 10.0.0.0/16`},
		"small v6 mtu":      {head + "network: {mtu: 1000}\n", `f: line 3: network.mtu: 1000 is not 0 or from 1280 (IPv6 needs it) to 65535`},
		"nested dirs":       {head + "root: /srv/n\nstate: /srv/n/run\n", `f: line 4: state: "/srv/n/run" and root "/srv/n" lie in one another; one survives a reboot, the other must not`},
		"long socket":       {head + "cri: {socket: /" + strings.Repeat("s", 120) + "}\n", `f: line 3: cri.socket: is 121 bytes long, the kernel takes 107`},
		"node": {head + "node:\n  mode: on\n  name: N1\n  addresses: [0.0.0.0]\n  listen: \"10250\"\n  certDir: pki\n", `f: 5 faults
  line 4: node.mode: "on" is not allowed; did you mean "off"?; allowed: off, certificates
  line 5: node.name: "N1" is not a name of a Node: lower-case letters, digits, '-' and '.', 253 bytes at most
  line 6: node.addresses[0]: 0.0.0.0 is no address that others reach a node at
  line 7: node.listen: "10250" is not host:port
  line 8: node.certDir: "pki" is not an absolute path`},
		"no yaml":       {head + "cri: [\n", "f: line 3: not YAML: did not find expected node content"},
		"two documents": {head + "---\n" + head, "f: line 3: a second YAML document; the file holds one"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("f", []byte(tt.in))
			if err == nil || err.Error() != tt.want {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
			if faults := (Faults{}); err != nil && !errors.As(err, &faults) {
				t.Errorf("error is a %T, want Faults", err)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	if _, err := Load(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a named file that is absent: got %v, want ErrNotExist", err)
	}
	if err := os.WriteFile(path, []byte(head), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path)
	if err != nil || !reflect.DeepEqual(c, Default()) {
		t.Errorf("got %+v, %v, want the default", c, err)
	}
}

// TestJSONIsAFileToo: what `crictl info` shows can be used as a file.
func TestJSONIsAFileToo(t *testing.T) {
	text, err := json.Marshal(Default())
	if err != nil {
		t.Fatal(err)
	}
	c, err := Parse("json", text)
	if err != nil || !reflect.DeepEqual(c, Default()) {
		t.Errorf("%v from %s", err, text)
	}
}

// TestSchema: every field has a name, a doc, and a type the decoder knows.
func TestSchema(t *testing.T) {
	var walk func(reflect.Type, string)
	walk = func(st reflect.Type, path string) {
		for f := range st.Fields() {
			at := join(path, f.Tag.Get("yaml"))
			if f.Tag.Get("yaml") == "" || path+f.Tag.Get("doc")+f.Tag.Get("allowed") == "" {
				t.Errorf("%s %s: no yaml name or doc", at, f.Name)
			}
			switch {
			case isScalar(f.Type), f.Type.Kind() == reflect.Slice && isScalar(f.Type.Elem()):
			case f.Type.Kind() == reflect.Struct:
				walk(f.Type, at)
			default:
				t.Errorf("%s: the decoder does not know %s", at, f.Type)
			}
		}
	}
	walk(reflect.TypeFor[Config](), "")
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(head))
	f.Add(Default().Document())
	f.Add([]byte("a: &a [*a]\ncri: *a\n<<: *a\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("f", data)
		if err != nil {
			return
		}
		if again, err := Parse("f", c.Document()); err != nil || !reflect.DeepEqual(c, again) {
			t.Errorf("%v: %+v and again %+v", err, c, again)
		}
	})
}

// TestReload: what is live is taken over, the rest is named and kept.
func TestReload(t *testing.T) {
	from, to := Default(), Default()
	if got, changes := from.Reload(to); len(changes) != 0 || !reflect.DeepEqual(got, from) {
		t.Errorf("nothing changed, but %v", changes)
	}
	to.Log.Level, to.Log.Format = "debug", "json"
	to.Network.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
	to.Policy.Uplinks = []string{"eth*"}
	to.Policy.AuditNamespaces = nil // as good as none
	got, changes := from.Reload(to)
	want := []Change{{"log.level", true}, {"log.format", false}, {"network.podCIDRs", false}, {"policy.uplinks", true}}
	if !reflect.DeepEqual(changes, want) {
		t.Errorf("changes %v, want %v", changes, want)
	}
	merged := from
	merged.Log.Level, merged.Policy.Uplinks = "debug", []string{"eth*"}
	if !reflect.DeepEqual(got, merged) {
		t.Errorf("in force is\n%s", got.Document())
	}
	if !reflect.DeepEqual(from, Default()) {
		t.Error("the old one was changed")
	}
}
