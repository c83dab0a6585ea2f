package builtin

import (
	"net"

	cnitypes "github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// Result is the outcome in CNI's words.
func (got Attached) Result(a Attachment) *types100.Result {
	pod := 1
	r := &types100.Result{
		CNIVersion: types100.ImplementedSpecVersion,
		Interfaces: []*types100.Interface{
			{Name: got.HostInterface, Mac: got.HostMAC.String(), Mtu: got.MTU},
			{Name: a.ifName(), Mac: got.MAC.String(), Mtu: got.MTU, Sandbox: a.Netns},
		},
	}
	for _, ip := range got.IPs {
		gw, all := gateway4, &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
		if ip.Is6() {
			gw, all = gateway6, &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
		}
		r.IPs = append(r.IPs, &types100.IPConfig{
			Interface: &pod,
			Address:   net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())},
			Gateway:   gw.AsSlice(),
		})
		r.Routes = append(r.Routes, &cnitypes.Route{Dst: *all, GW: gw.AsSlice()})
	}
	return r
}
