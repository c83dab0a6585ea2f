// Package store keeps what the runtime promised: one record per sandbox and
// one per container, on disk in a bbolt file, and indexes over live objects
// in memory.
//
// What it does: encodes and decodes records (a version in each; a record of an
// unknown version is refused and left where it is), commits them in groups so
// that parallel pod starts share one fsync, finds objects by ID, by unique ID
// prefix, and lists them in order of creation.
//
// What it must not do: know about processes, mounts or gRPC. It stores facts
// (created, started, exited); the state of a container is a function of them
// (Container.State) and is never stored beside them.
//
// Callers: package cri only.
//
// Goroutines and locks: none of its own. Commit elects one waiting caller as
// the writer of everything that is queued (group commit); the next waiter
// takes over when that transaction is done. Lazy writes ride on the next
// commit, or on a timer that fires after Config.LazyDelay. All methods may be
// called concurrently. Records handed to Put* must not be changed afterwards.
//
// Kernel: nothing special; the file system must honour fdatasync.
package store
