// Package guest holds the tests that run inside the virtual machine of test/vm,
// as root under systemd, on the installed package. They change the host they
// run on (packages, clock, disk, reboot), so anywhere else they are skipped:
// $NODEAGENT_GUEST says that this is such a machine.
//
// The tests of one name run in the order of the files and share the service;
// test/vm says which are run together. No goroutines, no locks.
package guest
