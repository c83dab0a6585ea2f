// Package cgroups knows the control groups of the host: which hierarchies
// there are, where a pod's and a container's group lies, what it used, and
// when it ran out of memory.
//
// It makes and limits the groups of pods, and only removes groups that it
// made itself: each carries the extended attribute trusted.nodeagent, which
// lives exactly as long as the group and needs no file beside it. The groups
// of containers are made by libcontainer in the shim, at the path that
// ContainerPath gives. It must not move processes.
//
// Called by the CRI core (paths, pods, events) and the sampler (Group.Stats).
//
// Goroutines: none until Watch is called; then one, which waits in epoll for
// all watched groups and ends with the last of them. Locks: Manager.mu guards
// the users of pod groups; the watcher has its own. A Group is immutable and
// may be used from several goroutines.
//
// Kernel: v1, hybrid and v2; v2 from 5.4 on. Pressure stall information needs
// 4.20 with a v2 hierarchy; in hybrid mode it is read there.
package cgroups
