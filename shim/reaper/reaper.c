// The reaper: the parent of the shim, and by PR_SET_CHILD_SUBREAPER the one
// that the kernel gives the shim's containers to when the shim dies. It runs
// in a constructor, before (and instead of) the Go runtime: about 100 kB, no
// thread, nothing that can grow. See reaper.go for what it promises.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define EXIT_OTHER 75	// the shim's: another shim holds the lock
#define SHIM_FD 3	// the shim's end of the socket
#define NAME_MAX_LEN 255

// A descriptor kept for the next shim.
struct kept {
	struct kept *next;
	int fd;
	char name[NAME_MAX_LEN + 1];
};

// A process whose exit must be recorded, should it become ours.
struct watch {
	struct watch *next;
	pid_t pid;
};

static struct kept *keeps;
static struct watch *watches;
static char *const *args;	// of the program
static int dirfd_state = -1;
static int sock = -1;		// our end
static pid_t shim;
static struct timespec started;
static long delay_ms;
static struct rlimit files;	// as we got them, for the shim

static void say(const char *what, int err)
{
	fprintf(stderr, "nodeagent-shim reaper: %s%s%s\n", what, err ? ": " : "", err ? strerror(err) : "");
}

static long long now_ns(clockid_t c)
{
	struct timespec t;
	clock_gettime(c, &t);
	return (long long)t.tv_sec * 1000000000LL + t.tv_nsec;
}

// The start time of pid in clock ticks (field 22 of /proc/PID/stat), 0 if gone.
static unsigned long long start_time(pid_t pid)
{
	char path[64], buf[1024], *p;
	unsigned long long t = 0;
	ssize_t n;
	int fd, i;

	snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	n = read(fd, buf, sizeof(buf) - 1);
	close(fd);
	if (n <= 0)
		return 0;
	buf[n] = 0;
	p = strrchr(buf, ')');	// the name before it may hold anything
	for (i = 0; p && i < 20; i++)
		p = strchr(p + 1, ' ');
	if (p)
		t = strtoull(p + 1, NULL, 10);
	return t;
}

static void record(const siginfo_t *si)
{
	char line[128];
	int fd, n;

	n = snprintf(line, sizeof(line), "%d %llu %d %d %lld\n", (int)si->si_pid,
		     start_time(si->si_pid), si->si_code, si->si_status, now_ns(CLOCK_REALTIME));
	fd = openat(dirfd_state, "orphans", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	if (fd < 0 || write(fd, line, n) != n)
		say("record exit status", errno);
	if (fd >= 0)
		close(fd);
}

static void watch_add(pid_t pid)
{
	struct watch *w = calloc(1, sizeof(*w));
	if (!w)
		return;
	w->pid = pid;
	w->next = watches;
	watches = w;
}

static int watch_remove(pid_t pid)
{
	struct watch **pp, *w;
	for (pp = &watches; (w = *pp); pp = &w->next) {
		if (w->pid != pid)
			continue;
		*pp = w->next;
		free(w);
		return 1;
	}
	return 0;
}

static void keep_remove(const char *name)
{
	struct kept **pp, *k;
	for (pp = &keeps; (k = *pp); pp = &k->next) {
		if (strcmp(k->name, name))
			continue;
		*pp = k->next;
		close(k->fd);
		free(k);
		return;
	}
}

static void keep_add(const char *name, int fd)
{
	struct kept *k;
	if (fd < 0)
		return;
	keep_remove(name);
	k = calloc(1, sizeof(*k));
	if (!k) {
		close(fd);
		return;
	}
	k->fd = fd;
	snprintf(k->name, sizeof(k->name), "%s", name);
	k->next = keeps;
	keeps = k;
}

static int send_msg(int to, const char *text, int fd)
{
	char control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = { .iov_base = (void *)text, .iov_len = strlen(text) };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (fd >= 0) {
		struct cmsghdr *c;
		memset(control, 0, sizeof(control));
		m.msg_control = control;
		m.msg_controllen = sizeof(control);
		c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(int));
	}
	return sendmsg(to, &m, MSG_NOSIGNAL) < 0 ? -1 : 0;
}

// Reads what the shim has sent: "+name" with a descriptor to keep, "-name" to
// drop it, "wPID" to record the exit of PID, "uPID" not to. Returns 0 at the
// end of the socket.
static int receive(void)
{
	for (;;) {
		char text[NAME_MAX_LEN + 2], control[CMSG_SPACE(sizeof(int) * 4)];
		struct iovec iov = { .iov_base = text, .iov_len = sizeof(text) - 1 };
		struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control) };
		struct cmsghdr *c;
		int fd = -1;
		ssize_t n = recvmsg(sock, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno == EAGAIN;
		for (c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
			int *fds = (int *)CMSG_DATA(c), i;
			int count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
			if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
				continue;
			for (i = 0; i < count; i++) {
				if (fd < 0)
					fd = fds[i];
				else
					close(fds[i]);
			}
		}
		if (n == 0) {
			if (fd >= 0)
				close(fd);
			return 0;
		}
		text[n] = 0;
		if (text[0] == '+') {
			keep_add(text + 1, fd);
			continue;
		}
		if (fd >= 0)
			close(fd);
		if (text[0] == '-')
			keep_remove(text + 1);
		else if (text[0] == 'w')
			watch_add(atoi(text + 1));
		else if (text[0] == 'u')
			watch_remove(atoi(text + 1));
	}
}

static void start_shim(void)
{
	int pair[2];
	struct kept *k;
	sigset_t none;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
		say("socketpair", errno);
		return;
	}
	clock_gettime(CLOCK_MONOTONIC, &started);
	shim = fork();
	if (shim < 0) {
		say("fork", errno);
		shim = 0;
		close(pair[0]);
		close(pair[1]);
		return;
	}
	if (shim == 0) {
		int argc = 0, i;
		char **argv;

		while (args[argc])
			argc++;
		argv = calloc(argc + 1, sizeof(char *));
		if (!argv)
			_exit(1);
		for (i = 0; i < argc; i++)
			argv[i] = args[i];
		argv[1] = "serve";
		setrlimit(RLIMIT_NOFILE, &files);
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		if (pair[1] == SHIM_FD)
			fcntl(SHIM_FD, F_SETFD, 0);
		else if (dup2(pair[1], SHIM_FD) < 0)
			_exit(1);
		setenv("NODEAGENT_REAPER_FD", "3", 1);
		// The path first: after an upgrade it is the new program.
		if (argv[0][0] == '/')
			execv(argv[0], argv);
		execv("/proc/self/exe", argv);
		_exit(127);
	}
	close(pair[1]);
	sock = pair[0];
	for (k = keeps; k; k = k->next) {
		char text[NAME_MAX_LEN + 2];
		snprintf(text, sizeof(text), "=%.*s", NAME_MAX_LEN, k->name);
		if (send_msg(sock, text, k->fd) < 0)
			say("hand descriptor to shim", errno);
	}
	if (send_msg(sock, ".", -1) < 0)
		say("hand descriptors to shim", errno);
}

// The shim has ended; its last messages count before its orphans do.
static void shim_ended(const siginfo_t *si)
{
	long long lived = now_ns(CLOCK_MONOTONIC) - ((long long)started.tv_sec * 1000000000LL + started.tv_nsec);

	if (sock >= 0) {
		receive();
		close(sock);
		sock = -1;
	}
	waitpid(shim, NULL, 0);
	shim = 0;
	if (si->si_code == CLD_EXITED && si->si_status == 0)
		_exit(0);
	if (si->si_code == CLD_EXITED && si->si_status == EXIT_OTHER)
		_exit(EXIT_OTHER);
	fprintf(stderr, "nodeagent-shim reaper: shim ended (%s %d); starting it again\n",
		si->si_code == CLD_EXITED ? "code" : "signal", si->si_status);
	if (lived > 1000000000LL)
		delay_ms = 0;
	else
		delay_ms = delay_ms ? (delay_ms * 2 > 500 ? 500 : delay_ms * 2) : 10;
}

static void reap(void)
{
	for (;;) {
		siginfo_t si;

		memset(&si, 0, sizeof(si));
		// The shim first: orphans are judged by its last messages.
		if (shim && waitid(P_PID, shim, &si, WEXITED | WNOHANG | WNOWAIT) == 0 && si.si_pid == shim) {
			shim_ended(&si);
			continue;
		}
		memset(&si, 0, sizeof(si));
		if (waitid(P_ALL, 0, &si, WEXITED | WNOHANG | WNOWAIT) < 0 || si.si_pid == 0)
			return;
		if (si.si_pid == shim)
			continue;
		if (watch_remove(si.si_pid))
			record(&si);
		waitpid(si.si_pid, NULL, 0);
	}
}

// systemd-shutdown(8) has become process 1: all else of the host has been
// stopped, and it waits 90 s for each process that does not heed its SIGTERM.
static int host_goes_down(void)
{
	char comm[32] = "";
	int fd = open("/proc/1/comm", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return 0;
	if (read(fd, comm, sizeof(comm) - 1) < 0)
		comm[0] = 0;
	close(fd);
	return strncmp(comm, "systemd-shutdow", 15) == 0;
}

static int reaper_main(int argc, char **argv)
{
	const unsigned long plain[4] = { 0 }; // the kernel's struct sigaction: SIG_DFL, no flags
	sigset_t set;
	int sfd, lock, sig;

	if (argc < 4) {
		say("usage: nodeagent-shim reaper STATEDIR EXITDIR [flags]", 0);
		return 2;
	}
	args = argv;
	prctl(PR_SET_NAME, "shim-reaper");
	dirfd_state = open(argv[2], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (dirfd_state < 0) {
		say("open state directory", errno);
		return 1;
	}
	lock = openat(dirfd_state, "reaper.lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (lock < 0 || flock(lock, LOCK_EX | LOCK_NB) < 0) {
		if (lock >= 0 && errno == EWOULDBLOCK)
			return EXIT_OTHER;
		say("lock state directory", errno);
		return 1;
	}
	if (prctl(PR_SET_CHILD_SUBREAPER, 1) < 0) {
		say("become subreaper", errno);
		return 1;
	}
	// What our parent ignores is not for containers to ignore. libc's signal()
	// refuses 32 and 33, its own, but GNU make's children ignore those too.
	for (sig = 1; sig < NSIG; sig++)
		syscall(SYS_rt_sigaction, sig, plain, NULL, 8);
	// Three descriptors a container are kept here.
	if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
		struct rlimit all = { files.rlim_max, files.rlim_max };
		setrlimit(RLIMIT_NOFILE, &all);
	}
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	sigaddset(&set, SIGPIPE);
	sigprocmask(SIG_SETMASK, &set, NULL);
	sfd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (sfd < 0) {
		say("signalfd", errno);
		return 1;
	}
	(void)!chdir("/");
	for (;;) {
		struct pollfd p[2] = { { sfd, POLLIN, 0 }, { sock, POLLIN, 0 } };
		struct signalfd_siginfo si;
		int timeout = -1;

		if (!shim) {
			long long due = (long long)started.tv_sec * 1000 + started.tv_nsec / 1000000 + delay_ms;
			long long left = due - now_ns(CLOCK_MONOTONIC) / 1000000;
			if (left <= 0) {
				start_shim();
				if (!shim)
					delay_ms = 1000;
				continue;
			}
			timeout = left;
		}
		p[1].fd = sock;
		if (poll(p, 2, timeout) < 0 && errno != EINTR)
			say("poll", errno);
		while (read(sfd, &si, sizeof(si)) > 0)
			if (si.ssi_signo == SIGTERM && si.ssi_pid == 1 && host_goes_down())
				return 0;
		if (sock >= 0 && (p[1].revents & (POLLIN | POLLHUP)) && !receive()) {
			close(sock);
			sock = -1;
		}
		reap();
	}
}

// glibc and its static build hand main's arguments to constructors. The
// constructor runs before any thread of Go is there.
__attribute__((constructor)) static void reaper_constructor(int argc, char **argv)
{
	if (argc > 1 && argv && argv[1] && strcmp(argv[1], "reaper") == 0)
		exit(reaper_main(argc, argv));
	if (argc < 2 || !argv || !argv[1] || strcmp(argv[1], "serve") != 0)
		return;
	// The shim runs from a file in memory, whose name is a number; its
	// threads inherit this one.
	prctl(PR_SET_NAME, "nodeagent-shim");
	// While Go code runs, Go's monitor thread sleeps 20 us at a time. With
	// the usual slack of 50 us that alone was 10 % of what a start or an exec
	// computes; more slack makes it sleep longer. It is inherited:
	// shim/initmode gives containers the usual one.
	prctl(PR_SET_TIMERSLACK, 1000000);
}
