package spec

import (
	"testing"

	"github.com/opencontainers/runc/libcontainer/configs/validate"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// acceptedByLibcontainer converts s as the shim does.
func acceptedByLibcontainer(t *testing.T, s *specs.Spec) {
	t.Helper()
	c, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: "test", Spec: s})
	if err != nil {
		t.Fatalf("convert: %v", err)
	}
	if err := validate.Validate(c); err != nil {
		t.Fatalf("validate: %v", err)
	}
}
