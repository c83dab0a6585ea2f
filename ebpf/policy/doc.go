// Package policy compiles NetworkPolicies to the tables that the datapath
// reads, and plans each change so that every packet is judged by the old state
// or by the new one and never by a third.
//
// Addresses that the policies in use on this node cannot tell apart share a
// class: the set of peers (selectors, ipBlocks) they match and the named ports
// they resolve. A prefix that an ipBlock or an except names has a class of its
// own, so that the longest match decides. An endpoint (a local pod) has a row
// per direction: for each class a profile, which is the set of ports allowed.
// Ports that no profile can tell apart share a port class; a profile is a
// bitmap over them. The verdict is row[class] -> profile[port class].
//
// Compiler keeps what it knows and does, per change, work in proportion to
// what the change touches. Update returns a Plan: values, in the order in
// which they must reach the kernel; it touches no kernel itself. A Compiler
// belongs to one goroutine. It must never import ebpf/reference, which judges
// it.
package policy
