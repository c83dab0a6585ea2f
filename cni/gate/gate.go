// Package gate keeps a network namespace from saying or hearing anything while
// a CNI plugin wires it: the plugin brings interfaces up before the pod's policy can be
// put on them, and the kernel of a namespace answers by itself (echo requests, closed ports).
//
// It is an nftables table inside the namespace, so it goes with it whatever
// happens. Packet sockets, as DHCP clients use them, and ARP are not held up. It
// knows nothing of policy. Callers: cmd/nodeagent. No goroutines, no locks.
// Kernel: nf_tables with the inet family, 4.10.
package gate

import (
	"errors"
	"fmt"
	"os"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

const table = "nodeagent-gate"

// Close drops what comes into and leaves the namespace at path, until Open.
// Loopback is dropped too: nothing runs there yet.
func Close(path string) error {
	return within(path, "close", func(c *nftables.Conn) {
		t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: table})
		drop := nftables.ChainPolicyDrop
		for name, hook := range map[string]*nftables.ChainHook{"in": nftables.ChainHookInput, "out": nftables.ChainHookOutput, "through": nftables.ChainHookForward} {
			c.AddChain(&nftables.Chain{Name: name, Table: t, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityRaw, Policy: &drop})
		}
	})
}

// Open undoes Close. It is idempotent.
func Open(path string) error {
	err := within(path, "open", func(c *nftables.Conn) {
		c.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: table})
	})
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func within(path, what string, do func(*nftables.Conn)) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("%s the gate of network namespace %s: %w", what, path, err)
	}
	defer f.Close()
	c, err := nftables.New(nftables.WithNetNSFd(int(f.Fd())))
	if err == nil {
		do(c)
		err = c.Flush()
	}
	if err != nil {
		return fmt.Errorf("%s the gate of network namespace %s (nftables): %w", what, path, err)
	}
	return nil
}
