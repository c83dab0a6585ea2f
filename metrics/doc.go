// Package metrics is the node's one sampler, and its Prometheus exposition.
//
// CRI stats, the CRI's pod metrics and Prometheus all ask the Sampler, which
// reads the kernel when it is asked and not otherwise: with nobody asking it
// uses no CPU. A sample younger than Config.MaxAge is handed out again, and
// of several callers that want the same one, one reads and the others wait.
//
// CPU rates come from successive samples; see rate.go.
//
// It must not know CRI, cgroup versions or the network's configuration: it is
// handed targets (sample.PodTarget) and the few functions of Config.
//
// Goroutines: one at a time that measures writable layers, only while some
// were asked for; Close ends it and waits. Locks: Sampler.mu guards the maps
// of entries, an entry's mu its samples; mu is never taken while an entry's is
// held. Network namespaces are entered on a locked thread of their own.
//
// Kernel: rtnetlink RTM_GETSTATS, 4.7.
package metrics
