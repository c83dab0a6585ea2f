package probe

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"
)

func seccomp(Options) (string, error) {
	mode, err := readString("/proc/sys/kernel/seccomp/actions_avail")
	if err != nil {
		return "", fmt.Errorf("seccomp filters: %w", err)
	}
	if !slices.Contains(strings.Fields(mode), "errno") {
		return "", errMissing("seccomp cannot return errors, only %s", mode)
	}
	return mode, nil
}

func appArmor(Options) (string, error) {
	if on, _ := readString("/sys/module/apparmor/parameters/enabled"); on != "Y" {
		return "", errMissing("not enabled in this kernel")
	}
	return "enabled", nil
}

func seLinux(Options) (string, error) {
	enforcing, err := readString("/sys/fs/selinux/enforce")
	if err != nil {
		return "", errMissing("not enabled in this kernel")
	}
	if enforcing == "1" {
		return "enforcing", nil
	}
	return "permissive", nil
}

// required are those without which no container starts.
func required() []capability.Cap {
	return []capability.Cap{
		capability.CAP_SYS_ADMIN, capability.CAP_NET_ADMIN, capability.CAP_SYS_CHROOT,
		capability.CAP_SETUID, capability.CAP_SETGID, capability.CAP_SETPCAP,
		capability.CAP_DAC_OVERRIDE, capability.CAP_CHOWN, capability.CAP_FOWNER,
		capability.CAP_MKNOD, capability.CAP_KILL, capability.CAP_SYS_PTRACE,
	}
}

func requiredCapabilities(Options) (string, error) {
	return lacking(required())
}

func sysResource(Options) (string, error) {
	if _, err := lacking([]capability.Cap{capability.CAP_SYS_RESOURCE}); err != nil {
		return "", errMissing("this process does not have it")
	}
	return "held", nil
}

func otherCapabilities(Options) (string, error) {
	all, err := capability.ListSupported()
	if err != nil {
		return "", err
	}
	others := slices.DeleteFunc(all, func(c capability.Cap) bool {
		return c == capability.CAP_SYS_RESOURCE || slices.Contains(required(), c)
	})
	return lacking(others)
}

// lacking fails with the names of those caps that this process has not.
func lacking(caps []capability.Cap) (string, error) {
	held, err := effective()
	if err != nil {
		return "", err
	}
	var missing []string
	for _, c := range caps {
		if held&(1<<uint(c)) == 0 {
			missing = append(missing, "CAP_"+strings.ToUpper(c.String()))
		}
	}
	if missing != nil {
		return "", errMissing("without %s", strings.Join(missing, ", "))
	}
	return fmt.Sprintf("all %d", len(caps)), nil
}

// effective is the CapEff mask of this thread group's leader (proc(5)).
func effective() (uint64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", unix.Getpid()))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(v), 16, 64)
		}
	}
	return 0, errMissing("no CapEff in /proc/self/status")
}
