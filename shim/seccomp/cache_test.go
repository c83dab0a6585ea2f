//go:build linux && cgo && seccomp

package seccomp

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runc/libcontainer/configs"
	libcontainerseccomp "github.com/opencontainers/runc/libcontainer/seccomp"
	"golang.org/x/sys/unix"
)

// TestMain is also the processes that the tests start: one that compiles, and
// one that stands for libcontainer's init.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case Arg:
			Compile()
		case "init":
			apply()
		}
	}
	os.Exit(m.Run())
}

// applied is what a process reports that put a profile on itself.
type applied struct {
	Took      time.Duration
	Mkdir     string // result of a system call the profile denies
	Getpid    bool   // one that it allows works
	Clone     string // one that it judges by an argument, denied
	FilterSet bool
	Err       string
}

func apply() {
	// As libcontainer's init: the filter is put on the calling thread alone.
	runtime.LockOSThread()
	var p configs.Seccomp
	var a applied
	if err := json.NewDecoder(os.Stdin).Decode(&p); err != nil {
		a.Err = err.Error()
	} else {
		t := time.Now()
		_, err := libcontainerseccomp.InitSeccomp(&p)
		a.Took = time.Since(t)
		if err != nil {
			a.Err = err.Error()
		}
	}
	if err := unix.Mkdir("/proc/nonexistent", 0o700); err != nil {
		a.Mkdir = err.(unix.Errno).Error()
	}
	a.Getpid = unix.Getpid() > 0
	if _, err := unix.FcntlInt(0, 424242, 0); err != nil {
		a.Clone = err.Error()
	}
	status, _ := os.ReadFile("/proc/thread-self/status")
	a.FilterSet = bytes.Contains(status, []byte("Seccomp:\t2"))
	json.NewEncoder(os.Stdout).Encode(a)
	os.Exit(0)
}

// profile denies mkdir and fcntl with the command 424242 and allows the rest,
// by name, as the usual profiles do.
func profile(t testing.TB, errno uint) *configs.Seccomp {
	t.Helper()
	p := &configs.Seccomp{
		DefaultAction: configs.Allow,
		Architectures: []string{"amd64", "x86", "x32"},
		Syscalls: []*configs.Syscall{
			{Name: "mkdir", Action: configs.Errno, ErrnoRet: &errno},
			{Name: "mkdirat", Action: configs.Errno, ErrnoRet: &errno},
			{Name: "fcntl", Action: configs.Errno, ErrnoRet: &errno, Args: []*configs.Arg{{Index: 1, Value: 424242, Op: configs.EqualTo}}},
		},
	}
	for _, name := range strings.Fields("chown chroot link symlink unlink rename mknod mount umount2 swapon reboot " +
		"setxattr lsetxattr fsetxattr removexattr acct quotactl add_key request_key keyctl ptrace process_vm_readv kexec_load " +
		"init_module delete_module iopl ioperm bpf perf_event_open userfaultfd move_pages mbind lookup_dcookie vmsplice name_to_handle_at") {
		p.Syscalls = append(p.Syscalls, &configs.Syscall{Name: name, Action: configs.Errno, ErrnoRet: &errno})
	}
	return p
}

func run(t testing.TB, p *configs.Seccomp) applied {
	t.Helper()
	text, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "init")
	cmd.Stdin = bytes.NewReader(text)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("process under the profile: %v", err)
	}
	var a applied
	if err := json.Unmarshal(out, &a); err != nil {
		t.Fatalf("%v: %q", err, out)
	}
	return a
}

func newCache(t testing.TB) *Cache {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("loading a filter needs root")
	}
	unix.Close(TableFD)
	c, err := NewCache("/proc/self/exe", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); c.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done; unix.Close(TableFD) })
	return c
}

// wait returns when n programs are in the table.
func (c *Cache) wait(t testing.TB, n int) {
	t.Helper()
	for range 12000 {
		c.mu.Lock()
		have := len(c.programs)
		c.mu.Unlock()
		if have == n {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("no %d programs after 60 s", n)
}

const tableHead = 32 // NA_SECCOMP_MAGIC_LEN

// table is the content of the table: records and programs, in order.
func table(t testing.TB) (entries [][2][]byte) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", TableFD))
	if err != nil {
		t.Fatal(err)
	}
	for b = b[tableHead:]; len(b) > 0; {
		rl, pl := binary.NativeEndian.Uint32(b), binary.NativeEndian.Uint32(b[4:])
		b = b[8:]
		entries = append(entries, [2][]byte{b[:rl], b[rl : rl+pl]})
		b = b[rl+pl:]
	}
	return entries
}

// magic is what the table begins with.
func magic(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", TableFD))
	if err != nil || len(b) < tableHead {
		t.Fatalf("table of %d bytes: %v", len(b), err)
	}
	return b[:tableHead]
}

// setTable puts another table in the place of the cache's.
func setTable(t testing.TB, sealed bool, entries [][2][]byte) {
	t.Helper()
	b := bytes.Clone(magic(t))
	for _, e := range entries {
		b = binary.NativeEndian.AppendUint32(b, uint32(len(e[0])))
		b = binary.NativeEndian.AppendUint32(b, uint32(len(e[1])))
		b = append(append(b, e[0]...), e[1]...)
	}
	fd, err := unix.MemfdCreate("table", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, b); err != nil {
		t.Fatal(err)
	}
	if sealed {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Dup3(fd, TableFD, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
}

// mark is the error of a program that the marked table has for each profile:
// what shows that a process took its program from there.
const mark = unix.EXFULL

// marker is that program.
func marker(t testing.TB) []byte {
	t.Helper()
	c := newCache(t)
	c.Want(profile(t, uint(mark)))
	c.wait(t, 1)
	return table(t)[0][1]
}

// markTable gives all records of the table the program.
func markTable(t testing.TB, sealed bool, program []byte) {
	t.Helper()
	entries := table(t)
	for i := range entries {
		entries[i][1] = program
	}
	setTable(t, sealed, entries)
}

// A filter from the table judges as the one that libseccomp compiles.
func TestSameFilter(t *testing.T) {
	program := marker(t)
	c := newCache(t)
	p := profile(t, uint(unix.EBADMSG))
	slow := run(t, p)
	if slow.Err != "" || !slow.FilterSet || slow.Mkdir != unix.EBADMSG.Error() || slow.Clone != unix.EBADMSG.Error() || !slow.Getpid {
		t.Fatalf("without a table: %+v", slow)
	}
	c.Want(p)
	c.wait(t, 1)
	fast := run(t, p)
	t.Logf("compiled in %v, from the table in %v", slow.Took, fast.Took)
	fast.Took, slow.Took = 0, 0
	if fast != slow {
		t.Errorf("from the table %+v, compiled %+v", fast, slow)
	}
	markTable(t, true, program)
	if a := run(t, p); a.Err != "" || !a.FilterSet || a.Mkdir != mark.Error() {
		t.Errorf("not taken from the table: %+v", a)
	}
}

// A profile that differs in one number is another profile.
func TestOtherProfile(t *testing.T) {
	program := marker(t)
	c := newCache(t)
	c.Want(profile(t, uint(unix.EBADMSG)))
	c.wait(t, 1)
	markTable(t, true, program)
	a := run(t, profile(t, uint(unix.ENOTUNIQ)))
	if a.Err != "" || a.Mkdir != unix.ENOTUNIQ.Error() {
		t.Errorf("%+v", a)
	}
}

func TestBounded(t *testing.T) {
	program := marker(t)
	c := newCache(t)
	const last = maxPrograms + 3
	for i := range last {
		p := profile(t, uint(i+1))
		c.Want(p)
		c.Want(p)
		c.wait(t, min(i+1, maxPrograms))
	}
	taken := func(errno int) bool {
		a := run(t, profile(t, uint(errno)))
		if a.Err != "" || a.Mkdir != mark.Error() && a.Mkdir != unix.Errno(errno).Error() {
			t.Fatalf("profile %d: %+v", errno, a)
		}
		return a.Mkdir == mark.Error()
	}
	// The last one may still be on its way: the count does not change any more.
	found := false
	for range 6000 {
		markTable(t, true, program)
		if found = taken(last); found {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if !found {
		t.Error("the last profile is not in the table")
	}
	if taken(1) {
		t.Error("the first profile is still in the table")
	}
}

// A profile that cannot be compiled is not kept, and nobody is kept from
// hearing why at the start.
func TestBadProfile(t *testing.T) {
	c := newCache(t)
	bad := profile(t, 1)
	bad.Architectures = []string{"pdp11"}
	if err := c.add(context.Background(), bad); err == nil {
		t.Error("compiled")
	}
	if a := run(t, bad); a.Err == "" {
		t.Errorf("applied: %+v", a)
	}
}

// What is not sealed is not believed.
func TestUnsealedTable(t *testing.T) {
	program := marker(t)
	c := newCache(t)
	p := profile(t, uint(unix.EBADMSG))
	c.Want(p)
	c.wait(t, 1)
	markTable(t, false, program)
	if a := run(t, p); a.Err != "" || a.Mkdir != unix.EBADMSG.Error() {
		t.Errorf("%+v", a)
	}
}
