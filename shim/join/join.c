//go:build linux

// The program that puts a process into a container. It is never run from here:
// the linker collects it in a section of its own, and join.go writes that out
// as a program. So it must be complete in itself: no library, no data, not even
// a string; join_test.go looks. The package comment has the list of its steps.

#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/keyctl.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "join.h"

#ifndef __NR_close_range
#define __NR_close_range 436
#endif
#ifndef __NR_faccessat2
#define __NR_faccessat2 439
#endif

#pragma GCC optimize("Os", "no-stack-protector", "no-tree-loop-distribute-patterns", "no-jump-tables", "no-tree-vectorize")
#pragma GCC target("general-regs-only")

#define SECTION __attribute__((section("joincode"), used, noinline))
#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define ENTRY __attribute__((force_align_arg_pointer))

INLINE long call(long n, long a, long b, long c, long d, long e, long f)
{
	long r;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	__asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
	return r;
}
#elif defined(__aarch64__)
#define ENTRY

INLINE long call(long n, long a, long b, long c, long d, long e, long f)
{
	register long x8 __asm__("x8") = n;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return x0;
}
#else
#error "join.c has no system calls for this processor"
#endif

// sys(n, ...) with up to six arguments, filled up with zeros.
#define SYS(n, a, b, c, d, e, f, ...) call(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define sys(name, ...) SYS(__NR_##name, __VA_ARGS__, 0, 0, 0, 0, 0, 0)

SECTION static void tell(int step, long err, unsigned what)
{
	struct join_message m;

	m.step = step;
	m.err = (int)-err;
	m.what = what;
	sys(write, JOIN_SOCKET, &m, sizeof(m));
}

SECTION __attribute__((noreturn)) static void fail(int step, long err, unsigned what)
{
	tell(step, err, what);
	for (;;)
		sys(exit_group, 255);
}

// must ends the process if the system call failed.
INLINE long must(int step, long r)
{
	if (r < 0)
		fail(step, r, 0);
	return r;
}

SECTION static void write_file(int step, uint64_t path, uint64_t text, unsigned long n)
{
	long fd = must(step, sys(openat, AT_FDCWD, path, O_WRONLY | O_CLOEXEC));

	must(step, sys(write, fd, text, n));
	sys(close, fd);
}

SECTION static void set_filter(const struct join_request *q)
{
	struct sock_fprog p;

	p.len = (unsigned short)q->filter_count;
	p.filter = (struct sock_filter *)q->filter;
	if (q->filter_flags)
		must(JOIN_SECCOMP, sys(seccomp, SECCOMP_SET_MODE_FILTER, q->filter_flags, &p));
	else
		must(JOIN_SECCOMP, sys(prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &p));
}

// A line of /etc/passwd, read byte by byte. As for libcontainer, a user number
// that is missing or no number is 0.
struct line {
	unsigned field, length, digits, sign, bad;
	long id;
	unsigned home; // bytes of it
};

INLINE int is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

INLINE int line_is(const struct line *l, long uid)
{
	long id = l->bad || !l->digits ? 0 : l->sign == 2 ? -l->id : l->id;

	return l->length && id == uid;
}

INLINE void line_take(struct line *l, char c, char *home, unsigned room)
{
	if (!l->length && is_space(c))
		return;
	l->length++;
	if (c == ':') {
		l->field++;
	} else if (l->field == 2) {
		if (c >= '0' && c <= '9') {
			l->digits++;
			l->id = l->id > (1L << 40) ? l->id : l->id * 10 + (c - '0');
		} else if (!l->digits && !l->sign && (c == '-' || c == '+')) {
			l->sign = c == '-' ? 2 : 1;
		} else {
			l->bad = 1;
		}
	} else if (l->field == 5 && l->home < room) {
		home[l->home++] = c;
	}
}

// find_home writes the home of uid to home, "/" if there is none. Returns its
// length.
SECTION static unsigned find_home(long uid, char *home, unsigned room)
{
	char buf[2048], *name;
	struct line l;
	long fd, n, i;

	// The text "/etc/passwd", without data.
	name = buf;
	for (uint64_t a = 0x7361702f6374652fUL; a; a >>= 8)
		*name++ = (char)a;
	for (uint64_t a = 0x647773UL; a; a >>= 8)
		*name++ = (char)a;
	*name = 0;
	fd = sys(openat, AT_FDCWD, buf, O_RDONLY | O_CLOEXEC);
	l.field = l.length = l.digits = l.sign = l.bad = l.home = 0;
	l.id = 0;
	while (fd >= 0) {
		n = sys(read, fd, buf, sizeof(buf));
		if (n == -EINTR)
			continue;
		for (i = 0; i < n || (n <= 0 && i == 0); i++) {
			if (n > 0 && buf[i] != '\n') {
				line_take(&l, buf[i], home, room);
				continue;
			}
			while (l.field <= 5 && l.home && is_space(home[l.home - 1]))
				l.home--;
			if (line_is(&l, uid) && l.home < room) {
				sys(close, fd);
				return l.home;
			}
			l.field = l.length = l.digits = l.sign = l.bad = l.home = 0;
			l.id = 0;
		}
		if (n <= 0) {
			sys(close, fd);
			break;
		}
	}
	home[0] = '/';
	return 1;
}

SECTION static void drop_bounding(const struct join_request *q)
{
	struct __user_cap_header_struct h;
	struct __user_cap_data_struct d[2];
	unsigned i;

	h.version = _LINUX_CAPABILITY_VERSION_3;
	h.pid = 0;
	must(JOIN_BOUNDING, sys(capget, &h, d));
	if (!(d[0].effective & (1U << CAP_SETPCAP)))
		return;
	for (i = 0; i <= q->last_cap; i++) {
		if (q->bounding >> i & 1)
			continue;
		long r = sys(prctl, PR_CAPBSET_DROP, i);
		if (r < 0 && r != -EINVAL)
			fail(JOIN_BOUNDING, r, i);
	}
}

SECTION static void set_caps(const struct join_request *q)
{
	struct __user_cap_header_struct h;
	struct __user_cap_data_struct d[2];
	unsigned i;
	long r;

	h.version = _LINUX_CAPABILITY_VERSION_3;
	h.pid = 0;
	for (i = 0; i < 2; i++) {
		d[i].effective = (uint32_t)(q->effective >> 32 * i);
		d[i].permitted = (uint32_t)(q->permitted >> 32 * i);
		d[i].inheritable = (uint32_t)(q->inheritable >> 32 * i);
	}
	must(JOIN_CAPSET, sys(capset, &h, d));
	r = sys(prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL);
	if (r < 0 && r != -EINVAL)
		fail(JOIN_CAPSET, r, 0);
	for (i = 0; i <= q->last_cap; i++)
		if (q->ambient >> i & 1)
			sys(prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, i);
}

// own_stdio gives the standard descriptors to the user.
SECTION static void own_stdio(uint32_t uid)
{
	struct stat st;
	unsigned fd;
	long r;

	for (fd = 0; fd < 3; fd++) {
		r = sys(fstat, fd, &st);
		if (r < 0)
			fail(JOIN_STDIO_STAT, r, fd);
		if (st.st_uid == uid || (S_ISCHR(st.st_mode) && st.st_rdev == 0x103)) // /dev/null
			continue;
		r = sys(fchown, fd, uid, -1);
		if (r < 0 && r != -EPERM && r != -EROFS)
			fail(JOIN_STDIO_CHOWN, r, fd);
	}
}

SECTION static void set_user(const struct join_request *q)
{
	own_stdio(q->uid);
	must(JOIN_SETGROUPS, sys(setgroups, q->group_count, q->groups));
	must(JOIN_SETGID, sys(setgid, q->gid));
	must(JOIN_SETUID, sys(setuid, q->uid));
}

SECTION static void check_cwd(void)
{
	char buf[4096];

	must(JOIN_GETCWD, sys(getcwd, buf, sizeof(buf)));
	if (buf[0] != '/') // "(unreachable)": outside of the container
		fail(JOIN_GETCWD, -ENOENT, 0);
}

// find_program returns which candidate it is, as Go's exec.LookPath does.
SECTION static unsigned find_program(const struct join_request *q)
{
	const uint64_t *all = (const uint64_t *)q->candidates;
	struct stat st;
	unsigned i;

	for (i = 0; all[i]; i++) {
		int step = JOIN_STAT;
		long r = sys(newfstatat, AT_FDCWD, all[i], &st, 0);
		if (!r) {
			step = JOIN_ACCESS;
			r = S_ISDIR(st.st_mode) ? -EISDIR : sys(faccessat2, AT_FDCWD, all[i], 1, AT_EACCESS);
			// A seccomp filter that does not know the call.
			if (r == -EPERM || r == -ENOSYS)
				r = sys(faccessat, AT_FDCWD, all[i], 1);
		}
		if (!(q->flags & JOIN_SEARCH)) {
			if (r)
				fail(step, r, i);
			return i;
		}
		if (r)
			continue;
		if (*(const char *)all[i] != '/')
			fail(JOIN_RELATIVE, 0, i);
		return i;
	}
	fail(JOIN_NOT_FOUND, 0, 0);
}

// become turns the second process, which is in the container, into the program.
SECTION __attribute__((noreturn)) static void become(const struct join_request *q)
{
	char home[4096], go;
	unsigned program;
	int later = 0;
	long r;

	must(JOIN_SESSION, sys(setsid, 0));
	must(JOIN_SETUID, sys(setuid, 0));
	must(JOIN_SETGID, sys(setgid, 0));
	if (q->keyring) {
		r = sys(keyctl, KEYCTL_JOIN_SESSION_KEYRING, q->keyring);
		if (r < 0 && r != -ENOSYS)
			fail(JOIN_KEYRING, r, 0);
	}
	if (q->flags & JOIN_NO_NEW_PRIVS)
		must(JOIN_PRIVS, sys(prctl, PR_SET_NO_NEW_PRIVS, 1));
	if (q->flags & JOIN_UMASK)
		sys(umask, q->umask);
	tell(JOIN_READY, 0, 0);
	if (sys(read, JOIN_SOCKET, &go, 1) != 1) // the shim has died
		for (;;)
			sys(exit_group, 255);
	// Without no_new_privs the filter needs the privileges that go now.
	if (q->filter_count && !(q->flags & JOIN_NO_NEW_PRIVS))
		set_filter(q);
	if (q->cwd) {
		// As root first, then as the user: either may be the one who can.
		r = sys(chdir, q->cwd);
		later = r == -EPERM || r == -EACCES;
		if (r < 0 && !later)
			fail(JOIN_CHDIR, r, 0);
	}
	if (q->flags & JOIN_HOME) {
		home[0] = 'H', home[1] = 'O', home[2] = 'M', home[3] = 'E', home[4] = '=';
		home[5 + find_home(q->uid, home + 5, sizeof(home) - 6)] = 0;
		((uint64_t *)q->envp)[q->env_count] = (uint64_t)home;
	}
	if (q->flags & JOIN_CAPS)
		drop_bounding(q);
	must(JOIN_KEEP_CAPS, sys(prctl, PR_SET_KEEPCAPS, 1));
	set_user(q);
	if (later)
		must(JOIN_CHDIR, sys(chdir, q->cwd));
	check_cwd();
	must(JOIN_KEEP_CAPS, sys(prctl, PR_SET_KEEPCAPS, 0));
	if (q->flags & JOIN_CAPS)
		set_caps(q);
	program = find_program(q);
	if (q->filter_count && q->flags & JOIN_NO_NEW_PRIVS)
		set_filter(q);
	do
		r = sys(execve, ((const uint64_t *)q->candidates)[program], q->argv, q->envp);
	while (r == -EINTR);
	fail(JOIN_EXECVE, r, program);
}

// The first process joins everything; its child is in the PID namespace too.
SECTION ENTRY void nodeagent_join_start(void)
{
	const struct join_request *q = (const struct join_request *)(JOIN_AT + JOIN_REQUEST);
	uint64_t all[128], none = 0;
	const uint64_t *path;
	char zero = '0';
	long size, r;
	unsigned i;

	must(JOIN_START, sys(close_range, JOIN_PIDFD + 1, ~0U, 0));
	must(JOIN_START, sys(fcntl, JOIN_SOCKET, F_SETFD, FD_CLOEXEC));
	must(JOIN_START, sys(rt_sigprocmask, SIG_SETMASK, &none, 0, sizeof(none)));
	must(JOIN_START, sys(prctl, PR_SET_TIMERSLACK, 50000)); // the kernel's default; the shim has another
	size = must(JOIN_START, sys(lseek, JOIN_FILE, 0, SEEK_END));
	r = sys(mmap, JOIN_AT + JOIN_REQUEST, size - JOIN_REQUEST, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_FIXED | MAP_POPULATE, JOIN_FILE, JOIN_REQUEST);
	if (r < 0 && r > -4096)
		fail(JOIN_START, r, 0);
	// Where the kernel writes who the child is: the child never has it.
	r = sys(mmap, JOIN_AT, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, JOIN_FILE, 0);
	if (r < 0 && r > -4096)
		fail(JOIN_START, r, 0);
	must(JOIN_START, sys(madvise, JOIN_AT, 4096, MADV_DONTFORK));
	if (q->oom_path)
		write_file(JOIN_OOM, q->oom_path, q->oom_score, q->oom_len);
	for (path = (const uint64_t *)q->tasks; *path; path++)
		write_file(JOIN_CGROUP, *path, (uint64_t)&zero, 1);
	for (i = 0; i < 128; i++)
		all[i] = ~0UL;
	sys(sched_setaffinity, 0, sizeof(all), all); // what the cpuset allows; 8192 CPUs are the most
	must(JOIN_START, sys(prctl, PR_SET_DUMPABLE, 0));
	must(JOIN_SETNS, sys(setns, JOIN_PIDFD, q->namespaces));
	if (q->namespaces & CLONE_NEWUSER)
		must(JOIN_SETNS, sys(setresuid, 0, 0, 0));
	must(JOIN_START, sys(close_range, JOIN_FILE, ~0U, 0));
	r = must(JOIN_FORK, sys(clone, CLONE_PARENT | CLONE_PARENT_SETTID | SIGCHLD, 0, JOIN_AT));
	if (!r)
		become(q);
	for (;;)
		sys(exit_group, 0);
}

extern const char __start_joincode[], __stop_joincode[];

const void *nodeagent_join_code(void) { return __start_joincode; }
unsigned long nodeagent_join_size(void) { return (unsigned long)(__stop_joincode - __start_joincode); }
unsigned long nodeagent_join_entry(void) { return (unsigned long)((const char *)nodeagent_join_start - __start_joincode); }
