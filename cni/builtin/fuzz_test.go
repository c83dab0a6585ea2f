package builtin

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/containerd/errdefs"
)

func FuzzDecodeCIDRs(f *testing.F) {
	good, _ := json.Marshal(cidrs{Version: cidrsVersion, Current: DefaultPodCIDRs()})
	for _, seed := range []string{string(good), "", "{}", `{"version":2}`, `{"version":1,"current":["10.0.0.1/8"]}`, `{"version":1,"former":["::/0"]}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		c, err := decodeCIDRs(p)
		if err != nil {
			if !errors.Is(err, errdefs.ErrDataLoss) && !errors.Is(err, errdefs.ErrFailedPrecondition) {
				t.Errorf("class of %v", err)
			}
			return
		}
		for _, p := range c.all() {
			if p != p.Masked() {
				t.Errorf("accepted %s", p)
			}
		}
	})
}
