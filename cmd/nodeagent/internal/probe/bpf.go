package probe

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strings"

	ciliumebpf "github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/ebpf/datapath"
)

func bpfPrograms(Options) (string, error) {
	p, err := loadClassifier()
	if err != nil {
		return "", err
	}
	return "traffic classifier loads", p.Close()
}

// networkPolicy loads the very programs, with small tables.
func networkPolicy(Options) (string, error) {
	d, err := datapath.Open(datapath.Config{Conntrack: 64, Peers: 64, RowBlocks: 2})
	if err != nil {
		return "", err
	}
	return "its programs load", d.Close()
}

// tcx attaches to an interface that does not exist: a kernel with tcx looks
// for it, one without does not understand (Linux 6.6).
func tcx(Options) (string, error) {
	p, err := loadClassifier()
	if err != nil {
		return "", err
	}
	defer p.Close()
	l, err := link.AttachTCX(link.TCXOptions{Interface: math.MaxInt32, Program: p, Attach: ciliumebpf.AttachTCXIngress})
	switch {
	case err == nil:
		l.Close()
		return "", errMissing("attached to an interface that does not exist")
	case errors.Is(err, unix.ENODEV):
		return "ingress and egress", nil
	}
	return "", fmt.Errorf("attach a program: %w", err)
}

func loadClassifier() (*ciliumebpf.Program, error) {
	p, err := ciliumebpf.NewProgram(&ciliumebpf.ProgramSpec{
		Type:         ciliumebpf.SchedCLS,
		License:      "Apache-2.0",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		return nil, fmt.Errorf("load a program: %w", err)
	}
	return p, nil
}

func btf(Options) (string, error) {
	const path = "/sys/kernel/btf/vmlinux"
	if _, err := os.Stat(path); err != nil {
		return "", errMissing("no %s", path)
	}
	return path, nil
}

func bpffs(Options) (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/bpf", &st); err == nil && st.Type == unix.BPF_FS_MAGIC {
		return "/sys/fs/bpf", nil
	}
	known, _ := readString("/proc/filesystems")
	if strings.Contains(known, "nodev\tbpf") {
		return "not mounted yet, can be", nil
	}
	return "", errMissing("the kernel has no bpf file system")
}
