//go:build linux && cgo && seccomp

// Stand-ins, put in by the linker (--wrap), for the libseccomp functions that
// libcontainer's init builds a filter with. See doc.go.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <seccomp.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "wrap.h"

scmp_filter_ctx __real_seccomp_init(uint32_t def_action);
void __real_seccomp_release(scmp_filter_ctx ctx);
int __real_seccomp_reset(scmp_filter_ctx ctx, uint32_t def_action);
int __real_seccomp_merge(scmp_filter_ctx dst, scmp_filter_ctx src);
int __real_seccomp_arch_add(scmp_filter_ctx ctx, uint32_t arch);
int __real_seccomp_arch_remove(scmp_filter_ctx ctx, uint32_t arch);
int __real_seccomp_attr_set(scmp_filter_ctx ctx, enum scmp_filter_attr attr, uint32_t value);
int __real_seccomp_syscall_priority(scmp_filter_ctx ctx, int syscall, uint8_t priority);
int __real_seccomp_rule_add_array(scmp_filter_ctx ctx, uint32_t action, int syscall, unsigned int n, const struct scmp_arg_cmp *args);
int __real_seccomp_rule_add_exact_array(scmp_filter_ctx ctx, uint32_t action, int syscall, unsigned int n, const struct scmp_arg_cmp *args);
int __real_seccomp_export_bpf(const scmp_filter_ctx ctx, int fd);
int __real_seccomp_export_pfc(const scmp_filter_ctx ctx, int fd);
int __real_seccomp_load(const scmp_filter_ctx ctx);

// The table of programs that the shim has made known; NULL without one.
static const uint8_t *table;
static size_t table_len;

// Where a compiling process sends its one program; -1 in all others.
static int capture_fd = -1;

// The calls made on the one filter that is recorded.
static struct {
	scmp_filter_ctx ctx; // NULL: nothing is recorded
	uint8_t *buf;
	size_t len, cap;
	size_t applied; // calls before this offset have reached libseccomp
} rec;

// A call as it stands in a record. Fixed width, no padding.
struct call {
	uint32_t kind; // 'I'nit, 'A'rch, 'a'rch removed, 'T' attribute, 'R'ule
	uint32_t v[3];
	uint32_t nargs;
};

struct arg {
	uint32_t arg, op;
	uint64_t a, b;
};

static void forget(void)
{
	free(rec.buf);
	memset(&rec, 0, sizeof(rec));
}

static bool room(size_t n)
{
	if (rec.len + n <= rec.cap)
		return true;
	size_t cap = rec.cap ? rec.cap : 32 << 10;
	while (cap < rec.len + n)
		cap *= 2;
	uint8_t *p = realloc(rec.buf, cap);
	if (!p)
		return false;
	rec.buf = p;
	rec.cap = cap;
	return true;
}

// note appends a call to the record. On false the caller must fall back.
static bool note(uint32_t kind, uint32_t a, uint32_t b, uint32_t c, unsigned int n, const struct scmp_arg_cmp *args)
{
	struct call h = { kind, { a, b, c }, n };
	if (!room(sizeof(h) + n * sizeof(struct arg)))
		return false;
	memcpy(rec.buf + rec.len, &h, sizeof(h));
	rec.len += sizeof(h);
	for (unsigned int i = 0; i < n; i++) {
		struct arg x = { args[i].arg, (uint32_t)args[i].op, args[i].datum_a, args[i].datum_b };
		memcpy(rec.buf + rec.len, &x, sizeof(x));
		rec.len += sizeof(x);
	}
	return true;
}

// catch_up makes libseccomp see every rule that was only noted so far.
static int catch_up(scmp_filter_ctx ctx)
{
	if (!rec.ctx || ctx != rec.ctx)
		return 0;
	while (rec.applied < rec.len) {
		struct call h;
		struct scmp_arg_cmp args[6];
		memcpy(&h, rec.buf + rec.applied, sizeof(h));
		rec.applied += sizeof(h);
		for (uint32_t i = 0; i < h.nargs; i++) {
			struct arg x;
			memcpy(&x, rec.buf + rec.applied, sizeof(x));
			rec.applied += sizeof(x);
			args[i] = (struct scmp_arg_cmp){ x.arg, (enum scmp_compare)x.op, x.a, x.b };
		}
		if (h.kind != 'R')
			continue;
		int rc = __real_seccomp_rule_add_array(ctx, h.v[0], (int)h.v[1], h.nargs, args);
		if (rc)
			return rc;
	}
	return 0;
}

// give_up ends the recording of ctx, with libseccomp in step.
static int give_up(scmp_filter_ctx ctx)
{
	int rc = catch_up(ctx);
	if (rec.ctx && ctx == rec.ctx)
		forget();
	return rc;
}

static int write_all(int fd, const void *p, size_t n)
{
	while (n) {
		ssize_t w = write(fd, p, n);
		if (w < 0 && errno == EINTR)
			continue;
		if (w < 0)
			return -errno;
		p = (const uint8_t *)p + w;
		n -= (size_t)w;
	}
	return 0;
}

// find looks the record up in the table, byte by byte.
static const uint8_t *find(uint32_t *len)
{
	size_t at = NA_SECCOMP_MAGIC_LEN;
	while (table && at + 8 <= table_len) {
		uint32_t rl, pl;
		memcpy(&rl, table + at, 4);
		memcpy(&pl, table + at + 4, 4);
		at += 8;
		if (rl > table_len - at || pl > table_len - at - rl)
			return NULL;
		if (rl == rec.len && !memcmp(table + at, rec.buf, rl)) {
			*len = pl;
			return table + at + rl;
		}
		at += (size_t)rl + pl;
	}
	return NULL;
}

// capture sends record and program to the shim and gives the program, as
// libcontainer has still to change it.
static int capture(scmp_filter_ctx ctx, int to)
{
	int fd = memfd_create("nodeagent-seccomp-program", MFD_CLOEXEC);
	struct stat st;
	if (fd < 0 || catch_up(ctx) || __real_seccomp_export_bpf(ctx, fd) || fstat(fd, &st) || st.st_size == 0)
		_exit(1);
	void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	uint32_t lens[2] = { (uint32_t)rec.len, (uint32_t)st.st_size };
	if (p == MAP_FAILED || write_all(capture_fd, lens, sizeof(lens)) || write_all(capture_fd, rec.buf, rec.len) ||
	    write_all(capture_fd, p, (size_t)st.st_size))
		_exit(1);
	return write_all(to, p, (size_t)st.st_size);
}

// Where libcontainer loads the filter: it is sent to the shim, and this process,
// which was started for that alone, ends.
static void loading(int sig, siginfo_t *si, void *context)
{
	const ucontext_t *u = context;
#if defined(__x86_64__)
	uint64_t flags = (uint64_t)u->uc_mcontext.gregs[REG_RSI];
	const struct sock_fprog *p = (const void *)u->uc_mcontext.gregs[REG_RDX];
#elif defined(__aarch64__)
	uint64_t flags = u->uc_mcontext.regs[1];
	const struct sock_fprog *p = (const void *)u->uc_mcontext.regs[2];
#else
#error "wrap.c does not know this processor's registers"
#endif
	(void)sig;
	if (si->si_syscall == SYS_prctl)
		flags = 0; // the argument there is the mode
	_exit(write_all(capture_fd, &flags, sizeof(flags)) || write_all(capture_fd, p->filter, p->len * sizeof(*p->filter)) ? 1 : 0);
}

// trap_loading makes the loading of a filter a signal in this thread. Calls
// without a program, by which libseccomp probes the kernel, go on.
static int trap_loading(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_seccomp, 0, 2),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SECCOMP_SET_MODE_FILTER, 3, 7),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_prctl, 0, 6),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PR_SET_SECCOMP, 0, 4),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2]) + 4),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
	};
	struct sock_fprog prog = { sizeof(code) / sizeof(*code), code };
	struct sigaction act = { .sa_sigaction = loading, .sa_flags = SA_SIGINFO | SA_ONSTACK };

	return sigaction(SIGSYS, &act, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog);
}

scmp_filter_ctx __wrap_seccomp_init(uint32_t def_action)
{
	scmp_filter_ctx ctx = __real_seccomp_init(def_action);
	if (!ctx || (!table && capture_fd < 0) || rec.ctx)
		return ctx;
	rec.ctx = ctx;
	if (!note('I', def_action, 0, 0, 0, NULL))
		forget();
	return ctx;
}

void __wrap_seccomp_release(scmp_filter_ctx ctx)
{
	if (rec.ctx && ctx == rec.ctx)
		forget();
	__real_seccomp_release(ctx);
}

int __wrap_seccomp_reset(scmp_filter_ctx ctx, uint32_t def_action)
{
	give_up(ctx);
	return __real_seccomp_reset(ctx, def_action);
}

int __wrap_seccomp_merge(scmp_filter_ctx dst, scmp_filter_ctx src)
{
	int rc = give_up(dst);
	if (!rc)
		rc = give_up(src);
	return rc ? rc : __real_seccomp_merge(dst, src);
}

// keep notes a call that has just reached libseccomp with result rc. Calls that
// failed are not noted: they changed nothing.
static int keep(scmp_filter_ctx ctx, int rc, uint32_t kind, uint32_t a, uint32_t b)
{
	if (rc || !rec.ctx || ctx != rec.ctx)
		return rc;
	if (!note(kind, a, b, 0, 0, NULL))
		return give_up(ctx);
	return 0;
}

int __wrap_seccomp_arch_add(scmp_filter_ctx ctx, uint32_t arch)
{
	int rc = catch_up(ctx); // a rule goes to the architectures known when it is added
	return rc ? rc : keep(ctx, __real_seccomp_arch_add(ctx, arch), 'A', arch, 0);
}

int __wrap_seccomp_arch_remove(scmp_filter_ctx ctx, uint32_t arch)
{
	int rc = catch_up(ctx);
	return rc ? rc : keep(ctx, __real_seccomp_arch_remove(ctx, arch), 'a', arch, 0);
}

int __wrap_seccomp_attr_set(scmp_filter_ctx ctx, enum scmp_filter_attr attr, uint32_t value)
{
	return keep(ctx, __real_seccomp_attr_set(ctx, attr, value), 'T', (uint32_t)attr, value);
}

int __wrap_seccomp_rule_add_array(scmp_filter_ctx ctx, uint32_t action, int syscall, unsigned int n, const struct scmp_arg_cmp *args)
{
	if (rec.ctx && ctx == rec.ctx && n <= 6) {
		if (note('R', action, (uint32_t)syscall, 0, n, args))
			return 0;
	}
	int rc = give_up(ctx);
	return rc ? rc : __real_seccomp_rule_add_array(ctx, action, syscall, n, args);
}

int __wrap_seccomp_rule_add_exact_array(scmp_filter_ctx ctx, uint32_t action, int syscall, unsigned int n, const struct scmp_arg_cmp *args)
{
	int rc = give_up(ctx);
	return rc ? rc : __real_seccomp_rule_add_exact_array(ctx, action, syscall, n, args);
}

int __wrap_seccomp_syscall_priority(scmp_filter_ctx ctx, int syscall, uint8_t priority)
{
	int rc = give_up(ctx);
	return rc ? rc : __real_seccomp_syscall_priority(ctx, syscall, priority);
}

int __wrap_seccomp_export_bpf(const scmp_filter_ctx ctx, int fd)
{
	if (rec.ctx && ctx == rec.ctx) {
		if (capture_fd >= 0)
			return capture(ctx, fd);
		uint32_t len;
		const uint8_t *prog = find(&len);
		if (prog)
			return write_all(fd, prog, len);
	}
	int rc = give_up(ctx);
	return rc ? rc : __real_seccomp_export_bpf(ctx, fd);
}

int __wrap_seccomp_export_pfc(const scmp_filter_ctx ctx, int fd)
{
	int rc = give_up(ctx);
	return rc ? rc : __real_seccomp_export_pfc(ctx, fd);
}

int __wrap_seccomp_load(const scmp_filter_ctx ctx)
{
	int rc = give_up(ctx);
	return rc ? rc : __real_seccomp_load(ctx);
}

void na_seccomp_capture(int fd)
{
	capture_fd = fd;
	if (trap_loading())
		_exit(1);
}

void na_seccomp_open_table(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	// Only what nobody can change any more is believed.
	const int sealed = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;
	int seals = fcntl(fd, F_GET_SEALS);
	struct stat st;
	if (seals >= 0 && (seals & sealed) == sealed && !fstat(fd, &st) && st.st_size > NA_SECCOMP_MAGIC_LEN) {
		void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
		if (p != MAP_FAILED) {
			if (!memcmp(p, NA_SECCOMP_MAGIC, NA_SECCOMP_MAGIC_LEN)) {
				table = p;
				table_len = (size_t)st.st_size;
			} else {
				munmap(p, (size_t)st.st_size);
			}
		}
	}
	close(fd);
}

// Runs before libcontainer's nsexec (a constructor without priority), while
// the shim is still the parent and the host's /proc is in sight; the mapping
// passes to nsexec's children and ends with the execve of the container.
__attribute__((constructor(201))) static void find_table(int argc, char **argv)
{
	if (argc < 2 || strcmp(argv[1], "init"))
		return;
	char path[64];
	snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)getppid(), NA_SECCOMP_FD);
	na_seccomp_open_table(path);
}
