// The program /pause. It is never run from here: the linker collects it in a
// section of its own, and pause.go writes that section out as a program. So it
// must be complete in itself: no library, no data, no call out of the section.

#define SECTION __attribute__((section("pausecode"), used, noinline, optimize("Os", "no-stack-protector", "no-tree-loop-distribute-patterns")))
#define INLINE static inline __attribute__((always_inline))

#define SIG_SETMASK 2
#define SIGINT 2
#define SIGTERM 15
#define SIGCHLD 17
#define WNOHANG 1

#if defined(__x86_64__)
enum { SYS_rt_sigprocmask = 14, SYS_wait4 = 61, SYS_rt_sigtimedwait = 128, SYS_exit_group = 231 };
#define ENTRY __attribute__((force_align_arg_pointer))

INLINE long call(long n, long a, long b, long c, long d)
{
	long r;
	register long r10 __asm__("r10") = d;
	__asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
	return r;
}
#elif defined(__aarch64__)
enum { SYS_rt_sigprocmask = 135, SYS_wait4 = 260, SYS_rt_sigtimedwait = 137, SYS_exit_group = 94 };
#define ENTRY

INLINE long call(long n, long a, long b, long c, long d)
{
	register long x8 __asm__("x8") = n;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
	return x0;
}
#else
#error "pause.c has no system calls for this processor"
#endif

// Signals that are blocked are kept even for the first process of a PID
// namespace, which otherwise loses all that it has no handler for.
SECTION ENTRY void nodeagent_pause_start(void)
{
	unsigned long set = 1UL << (SIGINT - 1) | 1UL << (SIGTERM - 1) | 1UL << (SIGCHLD - 1);

	call(SYS_rt_sigprocmask, SIG_SETMASK, (long)&set, 0, sizeof(set));
	for (;;) {
		long sig = call(SYS_rt_sigtimedwait, (long)&set, 0, 0, sizeof(set));
		if (sig == SIGINT || sig == SIGTERM)
			call(SYS_exit_group, 0, 0, 0, 0);
		while (call(SYS_wait4, -1, 0, WNOHANG, 0) > 0)
			;
	}
}

extern const char __start_pausecode[], __stop_pausecode[];

const void *nodeagent_pause_code(void) { return __start_pausecode; }
unsigned long nodeagent_pause_size(void) { return (unsigned long)(__stop_pausecode - __start_pausecode); }
unsigned long nodeagent_pause_entry(void) { return (unsigned long)((const char *)nodeagent_pause_start - __start_pausecode); }
