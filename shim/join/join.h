#ifndef NODEAGENT_JOIN_H
#define NODEAGENT_JOIN_H

#include <stdint.h>

// Descriptors of the joining process beside its standard ones.
#define JOIN_SOCKET 3 // to the shim: one message a write
#define JOIN_FILE 4   // the request
#define JOIN_PIDFD 5  // the container's first process

// The request is a file that is mapped at JOIN_AT: at its begin the kernel
// writes the number of the second process, at JOIN_REQUEST the struct stands and
// all that it points to, with addresses that are right there. The distance is
// the largest page that Linux has.
#define JOIN_AT 0x10000000
#define JOIN_REQUEST 0x10000

enum join_flag {
	JOIN_CAPS = 1,        // the capability sets hold
	JOIN_NO_NEW_PRIVS = 2,
	JOIN_UMASK = 4,
	JOIN_HOME = 8,        // HOME comes from /etc/passwd, into the last place of envp
	JOIN_SEARCH = 16,     // the candidates are of a search in $PATH
};

// Addresses are 64-bit numbers here, because Go fills this in.
struct join_request {
	uint64_t flags, namespaces;
	uint64_t tasks;             // paths of cgroup v1's tasks files, closed by 0
	uint64_t oom_path, oom_score; // 0: stays as it is
	uint64_t oom_len;
	uint64_t keyring;           // name of the session keyring, 0: stays
	uint64_t cwd;               // 0: stays
	uint64_t candidates;        // paths of the program, closed by 0
	uint64_t argv, envp, env_count;
	uint64_t groups, group_count;
	uint64_t filter, filter_count, filter_flags; // seccomp; count 0: none
	uint64_t bounding, effective, permitted, inheritable, ambient, last_cap;
	uint32_t uid, gid, umask, unused;
};

// A step is what a message is about. Up to JOIN_FORK nothing has happened that
// anybody could see.
enum join_step {
	JOIN_START = 1, // make ready to join
	JOIN_OOM,
	JOIN_CGROUP,
	JOIN_SETNS,
	JOIN_FORK,
	JOIN_READY, // no error: asks for leave to go on
	JOIN_SESSION,
	JOIN_KEYRING,
	JOIN_PRIVS,
	JOIN_SECCOMP,
	JOIN_CHDIR,
	JOIN_BOUNDING,
	JOIN_KEEP_CAPS,
	JOIN_STDIO_STAT,
	JOIN_STDIO_CHOWN,
	JOIN_SETGROUPS,
	JOIN_SETGID,
	JOIN_SETUID,
	JOIN_GETCWD,
	JOIN_CAPSET,
	JOIN_STAT,
	JOIN_ACCESS,
	JOIN_NOT_FOUND,
	JOIN_RELATIVE,
	JOIN_EXECVE,
};

struct join_message {
	uint32_t step;
	int32_t err;   // errno
	uint32_t what; // the descriptor, capability or candidate
};

#endif
