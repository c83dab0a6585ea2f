package spec

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"text/template"
)

// AppArmorProfile is the name of the profile behind RuntimeDefault.
const AppArmorProfile = "nodeagent-default"

// Source: containerd contrib/apparmor/template.go, which has it from moby.
const appArmorTemplate = `{{if .ABI}}abi <{{.ABI}}>,
{{end}}{{if .Tunables}}#include <tunables/global>{{else}}@{PROC}=/proc/{{end}}

profile {{.Name}} flags=(attach_disconnected,mediate_deleted) {
{{if .Base}}  #include <abstractions/base>{{end}}

  network,
  capability,
  file,
  umount,
  # Host processes, the daemon and the container's own may send signals.
  signal (receive) peer=unconfined,
  signal (receive) peer={{.Daemon}},
  signal (send,receive) peer={{.Name}},

  deny @{PROC}/* w,   # all files directly in /proc
  # files not in /proc/<number>/** or /proc/sys/**
  deny @{PROC}/{[^1-9/],[^1-9/][^0-9/],[^1-9s/][^0-9y/][^0-9s/],[^1-9/][^0-9/][^0-9/][^0-9/]*}/** w,
  deny @{PROC}/sys/[^k]** w,  # /proc/sys but /proc/sys/k*
  deny @{PROC}/sys/kernel/{?,??,[^s][^h][^m]**} w,  # all but shm* in /proc/sys/kernel/
  deny @{PROC}/sysrq-trigger rwklx,
  deny @{PROC}/kcore rwklx,

  deny mount,

  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/fs/cg[^r]*/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,

  # Processes of a container may trace each other.
  ptrace (trace,tracedby,read,readby) peer={{.Name}},
}
`

type appArmorData struct {
	Name, ABI, Daemon string
	Tunables, Base    bool
}

// LoadAppArmor loads the default profile into the kernel (replacing an older
// one) and returns its name for [HostInfo.AppArmorDefault]. It runs
// apparmor_parser; call it once at start, on hosts with HostInfo.AppArmor.
//
// Errors: apparmor_parser missing or refusing, with its text.
func LoadAppArmor(ctx context.Context) (string, error) {
	profile, err := appArmorText(localAppArmor("/etc/apparmor.d", "/proc/self/attr/current"))
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "apparmor_parser", "-Kr")
	cmd.Stdin = bytes.NewReader(profile)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("load AppArmor profile %q: %w: %s", AppArmorProfile, err, bytes.TrimSpace(out))
	}
	return AppArmorProfile, nil
}

func appArmorText(d appArmorData) ([]byte, error) {
	t, err := template.New("apparmor").Parse(appArmorTemplate)
	if err != nil {
		return nil, fmt.Errorf("parse AppArmor template: %w", err)
	}
	var b bytes.Buffer
	if err := t.Execute(&b, d); err != nil {
		return nil, fmt.Errorf("fill AppArmor template: %w", err)
	}
	return b.Bytes(), nil
}

// localAppArmor looks which macros this host has and under which profile the
// daemon runs ("name (mode)", or unconfined).
func localAppArmor(dir, current string) appArmorData {
	has := func(name string) bool { _, err := os.Stat(dir + "/" + name); return err == nil }
	d := appArmorData{Name: AppArmorProfile, Daemon: "unconfined", Tunables: has("tunables/global"), Base: has("abstractions/base")}
	if has("abi/3.0") {
		d.ABI = "abi/3.0"
	}
	data, _ := os.ReadFile(current)
	if p, _, _ := strings.Cut(strings.TrimRight(string(data), "\x00\n"), " "); p != "" {
		d.Daemon = p
	}
	return d
}
