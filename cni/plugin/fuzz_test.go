package plugin

import "testing"

// FuzzDecode feeds what a runtime may send on standard input.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		`{"cniVersion":"1.1.0","name":"n","type":"nodeagent-cni","runtimeConfig":{"ipRanges":[[{"subnet":"10.1.0.0/24"}]]}}`,
		`{"cniVersion":"1.0.0","name":"n","prevResult":{"ips":[{"address":"10.1.0.2/24"}]}}`,
		`{"name":"","runtimeConfig":{"ipRanges":[[]]}}`, `{"name":"n","prevResult":3}`, `null`, ``,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		c, err := decode(in)
		if err == nil && c.Name == "" || err != nil && c != nil {
			t.Errorf("%q: %+v, %v", in, c, err)
		}
	})
}
