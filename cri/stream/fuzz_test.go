package stream

import (
	"bytes"
	"testing"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

// FuzzSizes feeds what a client may send on the resize channel: all of it is
// read, whatever it is, and the sizes end.
func FuzzSizes(f *testing.F) {
	for _, s := range []string{`{"Width":80,"Height":24}{"Width":1,"Height":2}`, `{"Width":-1}`, `{"Width":80,"Height":24} x {}`, ``, `[`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r, sizes := bytes.NewReader(in), make(chan remotecommand.TerminalSize)
		go decodeSizes(r, sizes)
		n := 0
		for range sizes {
			n++
		}
		if r.Len() != 0 {
			t.Errorf("%q: %d bytes not read", in, r.Len())
		}
		if n > len(in)/2 {
			t.Errorf("%q: %d sizes", in, n)
		}
	})
}
