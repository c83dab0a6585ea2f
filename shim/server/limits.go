//go:build linux

package server

import (
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// limits knows what this process may not give to a container: without
// CAP_SYS_RESOURCE neither a lower oom_score_adj than its own nor a higher hard
// limit than its own. Such wishes are cut down, and that is said once.
type limits struct {
	log      *slog.Logger
	free     bool // CAP_SYS_RESOURCE is there
	oomScore int
	once     sync.Once
}

func (l *limits) read(log *slog.Logger) error {
	l.log = log
	var (
		hdr  = unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		data [2]unix.CapUserData
	)
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	l.free = data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return err
	}
	l.oomScore, err = strconv.Atoi(strings.TrimSpace(string(b)))
	return err
}

func (l *limits) warn(what string, want, got any) {
	l.once.Do(func() {
		l.log.Warn("CAP_SYS_RESOURCE is missing: what containers ask for beyond our own limits is cut down to them; said once",
			"what", what, "want", want, "got", got)
	})
}

// clamp changes p to what is possible. A container that does not say gets the
// oom_score_adj 0 and not ours, which protects us.
func (l *limits) clamp(p *specs.Process) {
	if p.OOMScoreAdj == nil {
		zero := 0
		if !l.free {
			zero = max(0, l.oomScore)
		}
		p.OOMScoreAdj = &zero
	}
	if l.free {
		return
	}
	if p.OOMScoreAdj != nil && *p.OOMScoreAdj < l.oomScore {
		l.warn("oom_score_adj", *p.OOMScoreAdj, l.oomScore)
		v := l.oomScore
		p.OOMScoreAdj = &v
	}
	for i := range p.Rlimits {
		l.clampRlimit(&p.Rlimits[i])
	}
}

func (l *limits) clampRlimit(r *specs.POSIXRlimit) {
	which, ok := rlimits[r.Type]
	var have unix.Rlimit
	if !ok || unix.Prlimit(0, which, nil, &have) != nil || r.Hard <= have.Max {
		return
	}
	l.warn(r.Type, r.Hard, have.Max)
	r.Hard = have.Max
	r.Soft = min(r.Soft, have.Max)
}

// rlimits are the names of the runtime spec.
var rlimits = map[string]int{
	"RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_STACK": unix.RLIMIT_STACK, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_RSS": unix.RLIMIT_RSS,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
}
