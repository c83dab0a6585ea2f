// Package cri answers the Container Runtime Interface: runtime.v1
// RuntimeService and ImageService of k8s.io/cri-api, on a unix socket.
//
// What it does: owns the lifecycle of sandboxes and containers. It decides
// what has to exist, asks the shim (processes), the network, the cgroup
// manager, the image store and the namespace pool to make it, records it, and
// undoes all of it when any step fails or the caller goes away.
//
// What it must not do: start processes, set up links, write cgroup files or
// read layers itself; invent exit codes; delete anything at start before
// records, shim and boot id have been read.
//
// Callers: cmd/nodeagent builds a Server with New, calls Recover once and then
// Serve (Run does both). Other packages reach it through gRPC only.
//
// # State
//
// A record in cri/store exists exactly as long as its sandbox or container.
// Before the first kernel object of a sandbox or container is made, an intent
// file is written to State/intents (not synced: it dies with the boot, as the
// kernel objects do). At start every intent without a record is a half-made
// object and is removed; a "removing" mark on an intent means that a removal
// has to be finished. A pod start costs two synced writes: one record each for
// sandbox and container.
//
// # Goroutines and locks
//
// Server.Run owns the gRPC server, the exit loop (facts from the shim) and the
// janitor (removals that failed and are tried again). Every create runs in a
// goroutine of its own, shared by all callers that asked for the same thing; it
// is cancelled, and rolled back, when the last of them has gone away.
//
// A sandbox has a read/write operation lock: creating and starting containers
// share it, stop and remove of the sandbox take it alone, and cancel creations
// in flight rather than wait for them. A container has an
// operation lock for start, update and removal; it is not held while a stop
// waits for the grace period. Order: sandbox before container. There is no
// global lock on the start path. Facts of an object are guarded by its own
// mutex, held only for reading and writing memory.
//
// Kernel: 5.15 or newer is assumed; what more a feature needs is probed by the
// package that uses it.
package cri
