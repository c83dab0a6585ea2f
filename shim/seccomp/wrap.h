#ifndef NODEAGENT_SECCOMP_WRAP_H
#define NODEAGENT_SECCOMP_WRAP_H

// The shim keeps the table open at this number, as the one thing that a new
// init process can find by itself.
#define NA_SECCOMP_FD 200
#define NA_SECCOMP_MAGIC "nodeagent seccomp programs v1\n\0"
#define NA_SECCOMP_MAGIC_LEN 32

void na_seccomp_capture(int fd);
void na_seccomp_open_table(const char *path);

#endif
