package probe

import (
	"fmt"
	"slices"
	"strings"

	"github.com/nodeagent/nodeagent/cgroups"
)

func cgroupMode(Options) (string, error) {
	h, err := cgroups.Detect()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s (%s)", h.Mode, strings.Join(h.Controllers, " ")), nil
}

func cgroup2(Options) (string, error) {
	h, err := cgroups.Detect()
	if err != nil {
		return "", err
	}
	if h.Mode != cgroups.V2 {
		return "", errMissing("the hierarchy is %s (systemd.unified_cgroup_hierarchy=1 changes it)", h.Mode)
	}
	return "unified", nil
}

func requiredControllers(Options) (string, error) {
	return controllers("cpu", "memory", "pids")
}

func optionalControllers(Options) (string, error) {
	return controllers("cpuset", "io", "hugetlb")
}

// controllers finds each name, by its v1 name where v2 renamed it.
func controllers(names ...string) (string, error) {
	h, err := cgroups.Detect()
	if err != nil {
		return "", err
	}
	var missing []string
	for i, n := range names {
		if n == "io" && h.Mode != cgroups.V2 {
			n, names[i] = "blkio", "blkio"
		}
		if !slices.Contains(h.Controllers, n) {
			missing = append(missing, n)
		}
	}
	if missing != nil {
		return "", errMissing("no %s controller", strings.Join(missing, ", no "))
	}
	return strings.Join(names, ", "), nil
}
