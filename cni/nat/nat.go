// Package nat is the built-in network's nftables table: masquerade of what pods send out, and host ports.
//
// There is one table of family inet per instance. Each kind of decision is one rule that looks
// into a map or set; a host port is one element of a map, so adding one costs the same with
// one or a thousand of them, and a pod's elements appear and vanish in one transaction. Only the first
// packet of a connection comes here (the chains are of type nat), except for the small guard
// chain that exists once there are host ports.
//
// It must not touch tables of others, and makes its own only when it is first needed.
// Called by cni/builtin. No goroutines; one mutex in Table. Kernel 5.6 or newer (address and port
// in one map value), nf_tables with nat, masquerade and fib.
package nat

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"sort"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/nodeagent/nodeagent/cni/netns"
	"golang.org/x/sys/unix"
)

// Port is one host port of a pod.
type Port struct {
	Protocol      string // "tcp", "udp", "sctp"
	HostPort      uint16
	ContainerPort uint16
	// HostIP is the address of the host it is reached at. Zero: all addresses of both families;
	// 0.0.0.0 and ::: all of one.
	HostIP netip.Addr
}

// Config describes the table.
type Config struct {
	Table string        // its name
	Group uint32        // interface group of the host ends of the pods' veths
	Host  *netns.Handle // namespace it is in, nil: the caller's
	Lock  string        // lock file shared by all processes of the instance, "" for none
	Log   *slog.Logger
}

// Table is the table of one instance.
type Table struct {
	cfg Config
	set sets

	mu     sync.Mutex // one change at a time; guards what is below
	nft    *nftables.Conn
	forget []element        // UDP host ports whose connections are to be forgotten
	known  map[element]bool // host ports that this process added or was told of, for Repair
	inside []netip.Prefix
	pods   []netip.Prefix
	masq   bool // chains of masquerade are in place
	ports  bool // chains of host ports are in place
}

// New describes the table; the kernel is not asked yet.
func New(cfg Config) *Table {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	t := &Table{cfg: cfg, known: map[element]bool{}}
	t.set = newSets(&nftables.Table{Name: cfg.Table, Family: nftables.TableFamilyINet})
	return t
}

// conn is the socket of the table, opened at first use. It is kept: closing a netfilter socket waits until the kernel
// has freed what earlier transactions deleted, a grace period of many milliseconds. The caller holds mu.
func (t *Table) conn() (*nftables.Conn, error) {
	if t.nft != nil {
		return t.nft, nil
	}
	opts := []nftables.ConnOption{nftables.AsLasting()}
	if t.cfg.Host != nil {
		opts = append(opts, nftables.WithNetNSFd(t.cfg.Host.FD()))
	}
	c, err := nftables.New(opts...)
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", unsupported(err))
	}
	t.nft = c
	return c, nil
}

// flush carries the transaction out. After an error the socket may hold answers that nobody
// waits for, so it is given up.
func (t *Table) flush(c *nftables.Conn) error {
	err := c.Flush()
	if err != nil {
		t.hangUp()
	}
	return err
}

func (t *Table) hangUp() {
	if t.nft != nil {
		_ = t.nft.CloseLasting()
		t.nft = nil
	}
}

// Close closes the socket.
func (t *Table) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.hangUp()
}

// unsupported gives errors that mean "this kernel has no such thing" their class.
func unsupported(err error) error {
	for _, e := range []error{unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.EOPNOTSUPP} {
		if errors.Is(err, e) {
			return fmt.Errorf("this kernel lacks nftables or its NAT part: %w: %w", err, errdefs.ErrFailedPrecondition)
		}
	}
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("needs CAP_NET_ADMIN: %w: %w", err, errdefs.ErrPermissionDenied)
	}
	return err
}

// lock serialises changes with other processes of the instance.
func (t *Table) lock() (unlock func(), err error) {
	t.mu.Lock()
	if t.cfg.Lock == "" {
		return t.mu.Unlock, nil
	}
	f, err := os.OpenFile(t.cfg.Lock, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		t.mu.Unlock()
		return nil, fmt.Errorf("open lock of nftables table: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		t.mu.Unlock()
		return nil, fmt.Errorf("lock nftables table: %w", err)
	}
	return func() { f.Close(); t.mu.Unlock() }, nil
}

// Masquerade makes the table say: what comes from pods and goes to none of inside is masqueraded.
// pods and inside replace those of an earlier call. The pods' ranges count as inside.
func (t *Table) Masquerade(pods, inside []netip.Prefix) error {
	unlock, err := t.lock()
	if err != nil {
		return err
	}
	defer unlock()
	t.pods, t.inside = pods, inside
	c, err := t.conn()
	if err != nil {
		return err
	}
	t.base(c)
	if err := t.ranges(c); err != nil {
		return err
	}
	t.masqueradeChain(c)
	if err := t.flush(c); err != nil {
		return fmt.Errorf("set up masquerade in nftables table %s: %w", t.cfg.Table, unsupported(err))
	}
	t.masq = true
	return nil
}

// Ranges tells the table the pods' ranges when there is no masquerade: host ports need them.
func (t *Table) Ranges(pods []netip.Prefix) {
	t.mu.Lock()
	t.pods = pods
	t.mu.Unlock()
}

// base puts the table and its sets into the transaction.
func (t *Table) base(c *nftables.Conn) {
	c.AddTable(t.set.table)
	for _, s := range t.set.all() {
		_ = c.AddSet(s, nil)
	}
}

// ranges puts the address sets into the transaction.
func (t *Table) ranges(c *nftables.Conn) error {
	for _, f := range families {
		inside := append([]netip.Prefix{f.multicast}, t.pods...)
		inside = append(inside, t.inside...)
		for _, s := range []struct {
			set *nftables.Set
			all []netip.Prefix
		}{{t.set.pods[f.i], t.pods}, {t.set.inside[f.i], inside}} {
			c.FlushSet(s.set)
			if elems := intervals(s.all, f.v4); len(elems) > 0 {
				if err := c.SetAddElements(s.set, elems); err != nil {
					return fmt.Errorf("encode address ranges: %w", err)
				}
			}
		}
	}
	return nil
}

// preparePorts puts the chains of host ports in place, once.
func (t *Table) preparePorts() error {
	if t.ports {
		return nil
	}
	c, err := t.conn()
	if err != nil {
		return err
	}
	t.base(c)
	if !t.masq {
		if err := t.ranges(c); err != nil {
			return err
		}
	}
	t.portChains(c)
	if err := t.flush(c); err != nil {
		return fmt.Errorf("set up host ports in nftables table %s: %w", t.cfg.Table, unsupported(err))
	}
	t.ports = true
	return nil
}

// Add makes the ports lead to the pod that has ips. All of them or none.
//
// Errors: InvalidArgument for an unknown protocol or a host address of a family that the pod has
// not; AlreadyExists if another pod has one of the ports; FailedPrecondition without nftables.
func (t *Table) Add(ports []Port, ips []netip.Addr) error {
	if len(ports) == 0 {
		return nil
	}
	want, err := elements(ports, ips)
	if err != nil {
		return err
	}
	unlock, err := t.lock()
	if err != nil {
		return err
	}
	defer unlock()
	err = t.add(want, ports)
	if errors.Is(err, fs.ErrNotExist) && t.ports {
		// Somebody removed our table (nft flush ruleset). Once more from the start.
		if err = t.rebuild(); err == nil {
			err = t.add(want, ports)
		}
	}
	return err
}

func (t *Table) add(want []element, ports []Port) error {
	if err := t.preparePorts(); err != nil {
		return err
	}
	c, err := t.conn()
	if err != nil {
		return err
	}
	have, err := t.dump(c)
	if err != nil {
		return err
	}
	if err := conflict(want, have); err != nil {
		return err
	}
	if err := t.change(c, nil, want); err != nil {
		if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("host ports %s: taken meanwhile: %w", text(ports), errdefs.ErrAlreadyExists)
		}
		return fmt.Errorf("add host ports %s: %w", text(ports), err)
	}
	for _, e := range want {
		t.known[e] = true
	}
	t.remember(want)
	return nil
}

// Remove takes away every element that leads to one of ips. Nothing there is success, and so is no table.
func (t *Table) Remove(ips []netip.Addr) error {
	if len(ips) == 0 {
		return nil
	}
	gone := map[netip.Addr]bool{}
	for _, ip := range ips {
		gone[ip] = true
	}
	return t.prune(func(e element) bool { return gone[e.pod] })
}

func (t *Table) prune(drop func(element) bool) error {
	unlock, err := t.lock()
	if err != nil {
		return err
	}
	defer unlock()
	c, err := t.conn()
	if err != nil {
		if errors.Is(err, errdefs.ErrFailedPrecondition) {
			return nil
		}
		return err
	}
	for e := range t.known {
		if drop(e) {
			delete(t.known, e)
		}
	}
	have, err := t.dump(c)
	if errors.Is(err, errdefs.ErrFailedPrecondition) {
		return nil
	}
	if err != nil {
		return err
	}
	var del []element
	for _, e := range have {
		if drop(e) {
			del = append(del, e)
		}
	}
	if len(del) == 0 {
		return nil
	}
	if err := t.change(c, del, nil); err != nil {
		return fmt.Errorf("remove host ports: %w", err)
	}
	t.remember(del)
	return nil
}

// Pod is what Sync is told of one pod.
type Pod struct {
	IPs   []netip.Addr
	Ports []Port
}

// ForwardDrops lists chains of others ("ip filter FORWARD") that drop forwarded packets unless a rule accepts them. No
// rule of ours can overrule one: pods reach nothing outside as long as it has no rule for them.
func (t *Table) ForwardDrops() ([]string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c, err := t.conn()
	if err != nil {
		return nil, err
	}
	chains, err := c.ListChains()
	if err != nil {
		t.hangUp()
		return nil, fmt.Errorf("list nftables chains: %w", unsupported(err))
	}
	names := map[nftables.TableFamily]string{nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyINet: "inet"}
	var drops []string
	for _, ch := range chains {
		family, ours := names[ch.Table.Family], ch.Table.Name == t.cfg.Table
		if family == "" || ours || ch.Hooknum == nil || *ch.Hooknum != *nftables.ChainHookForward || ch.Policy == nil || *ch.Policy != nftables.ChainPolicyDrop {
			continue
		}
		drops = append(drops, family+" "+ch.Table.Name+" "+ch.Name)
	}
	return drops, nil
}

// Sync makes the host ports those of pods, and beside them only those that are there and lead to a pod address
// that keep names. Ports that two pods want stay with the first of them; the error names the rest.
func (t *Table) Sync(pods []Pod, keep func(pod netip.Addr) bool) error {
	var want []element
	var errs []error
	for _, p := range pods {
		e, err := elements(p.Ports, p.IPs)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if err := conflict(e, want); err != nil {
			errs = append(errs, err)
			continue
		}
		want = append(want, e...)
	}
	wanted := map[element]bool{}
	for _, e := range want {
		wanted[e] = true
	}
	if err := t.prune(func(e element) bool { return !wanted[e] && !keep(e.pod) }); err != nil {
		return errors.Join(append(errs, err)...)
	}
	if len(want) > 0 {
		if err := t.restore(want); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (t *Table) restore(want []element) error {
	unlock, err := t.lock()
	if err != nil {
		return err
	}
	defer unlock()
	for _, e := range want {
		t.known[e] = true
	}
	// After a restart the chains may be those of an older program: lay them anew.
	return t.rebuild()
}

// rebuild lays the table's chains anew and adds the host ports that this process knows.
func (t *Table) rebuild() error {
	c, err := t.conn()
	if err != nil {
		return err
	}
	if t.masq || len(t.known) > 0 {
		t.base(c)
		if err := t.ranges(c); err != nil {
			return err
		}
	}
	if t.masq {
		t.masqueradeChain(c)
	}
	if len(t.known) > 0 {
		t.portChains(c)
	}
	var want []element
	for e := range t.known {
		want = append(want, e)
	}
	t.ports = false
	if err := t.change(c, nil, want); err != nil {
		return fmt.Errorf("lay nftables table %s: %w", t.cfg.Table, unsupported(err))
	}
	t.ports = len(t.known) > 0
	return nil
}

// Repair lays the table again if somebody else removed it, as "nft flush ruleset" does (and with it the reload of
// many a firewall). It says whether it had to.
func (t *Table) Repair() (bool, error) {
	unlock, err := t.lock()
	if err != nil {
		return false, err
	}
	defer unlock()
	if !t.masq && len(t.known) == 0 {
		return false, nil
	}
	c, err := t.conn()
	if err != nil {
		return false, err
	}
	if _, err := c.ListTableOfFamily(t.cfg.Table, nftables.TableFamilyINet); err == nil {
		return false, nil
	}
	t.hangUp()
	return true, t.rebuild()
}

// Has says whether this process knows of host ports that lead to one of ips.
func (t *Table) Has(ips []netip.Addr) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, ip := range ips {
		if t.known[element{pod: ip}] {
			return true
		}
	}
	return false
}

// Destroy removes the table. None is success.
func (t *Table) Destroy() error {
	unlock, err := t.lock()
	if err != nil {
		return err
	}
	defer unlock()
	t.masq, t.ports = false, false
	clear(t.known)
	c, err := t.conn()
	if err != nil {
		if errors.Is(err, errdefs.ErrFailedPrecondition) {
			return nil
		}
		return err
	}
	c.DelTable(t.set.table)
	if err := t.flush(c); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(unsupported(err), errdefs.ErrFailedPrecondition) {
		return fmt.Errorf("remove nftables table %s: %w", t.cfg.Table, err)
	}
	return nil
}

// change deletes and adds elements in one transaction.
func (t *Table) change(c *nftables.Conn, del, add []element) error {
	for _, e := range del {
		s, el := t.set.encode(e)
		if err := c.SetDeleteElements(s, []nftables.SetElement{el}); err != nil {
			return err
		}
	}
	// One message per set.
	bySet := map[*nftables.Set][]nftables.SetElement{}
	for _, e := range add {
		s, el := t.set.encode(e)
		bySet[s] = append(bySet[s], el)
	}
	for _, s := range t.set.all() {
		if len(bySet[s]) > 0 {
			if err := c.SetAddElements(s, bySet[s]); err != nil {
				return err
			}
		}
	}
	return t.flush(c)
}

// remember notes the UDP host ports among elems for ForgetConnections.
func (t *Table) remember(elems []element) {
	for _, e := range elems {
		if e.proto == unix.IPPROTO_UDP {
			t.forget = append(t.forget, e)
		}
	}
}

// Stale says whether ForgetConnections has something to do.
func (t *Table) Stale() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.forget) > 0
}

// ForgetConnections deletes the tracked connections of UDP host ports added or removed since the last call: a
// client that keeps sending would else stay with the old decision for as long as it sends. It reads the
// whole connection table, so it does not belong on the way of a pod's start.
func (t *Table) ForgetConnections() error {
	t.mu.Lock()
	elems := t.forget
	t.forget = nil
	t.mu.Unlock()
	return t.forgetUDP(elems)
}

// dump lists the elements in the kernel; no table is an empty list.
func (t *Table) dump(c *nftables.Conn) ([]element, error) {
	var all []element
	for _, s := range t.set.ports() {
		elems, err := c.GetSetElements(s)
		if err != nil && strings.Contains(err.Error(), unix.ENOENT.Error()) { // the library does not wrap it
			return nil, nil
		}
		if errors.Is(err, unix.EINVAL) {
			err = errors.Join(err, unix.EOPNOTSUPP) // netfilter's answer where it has no nf_tables
		}
		if err != nil {
			return nil, fmt.Errorf("list nftables set %s: %w", s.Name, unsupported(err))
		}
		for _, el := range elems {
			if e, ok := t.set.decode(s, el); ok {
				all = append(all, e)
			}
		}
	}
	sort.Slice(all, func(i, j int) bool { return all[i].less(all[j]) })
	return all, nil
}
