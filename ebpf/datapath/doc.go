// Package datapath loads the eBPF programs that enforce policy, attaches them
// to interfaces and writes their tables.
//
// It decides nothing: package policy says what to write and in which order. A
// new Datapath has empty tables; nothing is attached until Attach, which
// replaces the program of a link that an earlier process pinned at one stroke,
// so that there is no moment without a complete set of tables. Conntrack is
// pinned and taken over, from another layout by copy. Links are pinned: programs and tables live on while
// nothing of ours runs.
//
// Links are tcx from kernel 6.6 on, clsact filters before (5.16 and later).
// bpf/policy.bpf.c is compiled by `go generate` (clang 14); the object is
// committed. A Datapath belongs to one goroutine, but for Run and the readers
// of counters and events. No goroutines of its own.
package datapath
