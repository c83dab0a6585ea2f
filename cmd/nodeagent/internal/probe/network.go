package probe

import (
	"fmt"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func veth(Options) (string, error) {
	return "veth", inNetns(func() error {
		link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "probe0"}, PeerName: "probe1"}
		if err := netlink.LinkAdd(link); err != nil {
			return fmt.Errorf("make a veth pair: %w", err)
		}
		return nil
	})
}

// nftablesNAT makes what host ports and masquerade are made of.
func nftablesNAT(Options) (string, error) {
	return "nat, masquerade, maps", inNetns(func() error {
		c, err := nftables.New()
		if err != nil {
			return fmt.Errorf("open nftables: %w", err)
		}
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "probe"})
		chain := c.AddChain(&nftables.Chain{
			Name: "post", Table: table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
		})
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Masq{}}})
		err = c.AddSet(&nftables.Set{
			Table: table, Name: "ports", IsMap: true,
			KeyType: nftables.TypeInetService, DataType: nftables.TypeInetService,
		}, nil)
		if err != nil {
			return fmt.Errorf("make an nftables map: %w", err)
		}
		if err := c.Flush(); err != nil {
			return fmt.Errorf("make an nftables NAT chain: %w", err)
		}
		return nil
	})
}

func families(Options) (string, error) {
	for _, f := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
		if _, err := os.Stat(f); err != nil {
			return "", errMissing("no %s", f)
		}
	}
	if off, _ := readString("/proc/sys/net/ipv6/conf/all/disable_ipv6"); off == "1" {
		return "", errMissing("IPv6 is turned off (net.ipv6.conf.all.disable_ipv6)")
	}
	return "both", nil
}

// inNetns runs f on a thread with its own network namespace.
func inNetns(f func() error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		return f()
	})
}
