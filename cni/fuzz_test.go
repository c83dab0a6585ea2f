package cni

import (
	"errors"
	"testing"

	"github.com/containerd/errdefs"
)

func FuzzDecodeAttachment(f *testing.F) {
	for _, seed := range []string{
		`{"version":1,"sandbox":"s","network":"n","conf":{"name":"n"},"netns":"/x","args":[["a","b"]],"capabilityArgs":{"dns":{}}}`,
		"", "{}", `{"version":2}`, `{"version":1,"sandbox":"s"}`, `{"version":1,"sandbox":"","conf":1}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		a, err := decodeAttachment(p)
		if err != nil {
			if !errors.Is(err, errdefs.ErrDataLoss) && !errors.Is(err, errdefs.ErrFailedPrecondition) {
				t.Errorf("class of %v", err)
			}
			return
		}
		if a.SandboxID == "" || len(a.Conf) == 0 {
			t.Errorf("accepted %+v", a)
		}
	})
}

func FuzzQuantity(f *testing.F) {
	for _, s := range []string{"10M", "1.5Ki", "2e6", "", "1e999", "-1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if _, err := quantity(s); err != nil && !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("class of %v", err)
		}
	})
}
