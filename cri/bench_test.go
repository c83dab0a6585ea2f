package cri

import (
	"fmt"
	"testing"
)

// What the package itself costs per pod: everything at its edges is a fake.
func BenchmarkPod(b *testing.B) {
	w := newWorld(b)
	s := w.start(b)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		pod := runPod(b, s, podConfig(fmt.Sprint("p", i)))
		startContainer(b, s, create(b, s, pod, containerConfig("c")))
		removePod(b, s, pod)
	}
}
