// Package seccomp spares a starting process the compilation of its seccomp
// filter.
//
// libcontainer's init builds the filter of each container and each exec anew
// through libseccomp: with the default profile of containers (370 system
// calls, three architectures) that is 10 ms of CPU, more than the rest of a
// start. Filters hardly ever differ, so the shim keeps the compiled programs.
//
// How: the linker puts stand-ins (wrap.c, ld's --wrap) before the libseccomp
// functions. In an init process they only note the calls, and when the program
// is asked for they look the noted calls up, byte by byte, in the shim's table.
// Found: the kept program is given. Not found: the noted calls are made and
// libseccomp compiles as ever. So the table can save work but not change a
// filter. libcontainer does the rest (its ENOSYS patch, flags, loading).
//
// The table is a memfd that is sealed before anybody reads it, at descriptor
// TableFD of the shim; an init process maps it before it leaves the host's
// namespaces. Programs get into it through a sacrificial process (Compile),
// which runs libcontainer's own code up to the point of loading: nothing that
// has been near a container can write to the table.
//
// Execs that start without libcontainer (shim/join) need the program that it
// would load: the sacrificial process goes on to that system call, which a
// filter of its own turns into a signal, and sends what was to be loaded
// (Cache.Program).
//
// Called by cmd/nodeagent-shim and shim/server. Cache has one goroutine, while
// a profile is being compiled. Without the build tag seccomp all of it is
// empty.
package seccomp

// Arg is the first argument of the process that compiles a profile.
const Arg = "seccomp-compile"

// maxPrograms bounds the table; the oldest goes first. One is some 10 KiB of
// program and 10 KiB of noted calls.
const maxPrograms = 32
