package metrics

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

var nativeEndian = binary.NativeEndian

// network reads the counters of pods' interfaces.
//
// Our own network's pods have one link, a veth pair, and the host's end counts
// the same packets as the pod's with the directions swapped: one RTM_GETSTATS
// for it, on one socket that stays open, is all it takes. (A datapath that
// hands packets over with bpf_redirect_peer goes past the host's end; the
// counters of such pods have to be read like those of other networks.)
//
// For other networks the namespace is entered and its links are listed. No
// socket is kept there: it would keep the namespace alive after its pod.
type network struct {
	mu     sync.Mutex // guards all below
	socket int        // rtnetlink in our namespace; 0 is none yet
	seq    uint32
	buf    []byte
}

func (n *network) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.socket > 0 {
		unix.Close(n.socket)
		n.socket = 0
	}
}

// podInterface is what a pod's first interface is called, ours included.
const podInterface = "eth0"

// hostSide reads the counters of a veth's host end as the pod's end has them.
// index caches the interface's index; 0 is not known.
func (n *network) hostSide(name string, index *int) (*sample.Network, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.socket == 0 {
		fd, err := openRoute()
		if err != nil {
			return nil, fmt.Errorf("open rtnetlink: %w", err)
		}
		n.socket, n.buf = fd, make([]byte, 16<<10)
	}
	for {
		known := *index != 0
		if !known {
			i, err := interfaceIndex(name)
			if err != nil {
				return nil, fmt.Errorf("find interface %q: %w", name, err)
			}
			*index = i
		}
		rx, tx, err := n.stats(*index)
		if err != nil {
			*index = 0
		}
		if errors.Is(err, unix.ENODEV) && known {
			continue // the name may have come back with a new index
		}
		if err != nil {
			return nil, fmt.Errorf("read counters of interface %q: %w", name, err)
		}
		return &sample.Network{
			Time:       time.Now(),
			Interfaces: []sample.Interface{{Name: podInterface, Rx: tx, Tx: rx}},
		}, nil
	}
}

func openRoute() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return -1, err
	}
	// The kernel answers at once; the limit is against a bug of ours.
	tv := unix.Timeval{Sec: 2}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func interfaceIndex(name string) (int, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	// Any socket will do for SIOCGIFINDEX but a netlink one.
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(s)
	if err := unix.IoctlIfreq(s, unix.SIOCGIFINDEX, ifr); err != nil {
		return 0, err
	}
	return int(ifr.Uint32()), nil
}

// Numbers of <linux/rtnetlink.h> and <linux/if_link.h>.
const (
	ifStatsMsgLen  = 12 // struct if_stats_msg
	iflaStatsLink  = 1  // IFLA_STATS_LINK_64
	iflaStats64    = 23 // IFLA_STATS64
	linkStatsWords = 8  // of struct rtnl_link_stats64, those that we use
)

// stats asks for one interface. Caller holds mu.
func (n *network) stats(index int) (rx, tx sample.Traffic, err error) {
	n.seq++
	var req [unix.NLMSG_HDRLEN + ifStatsMsgLen]byte
	header(req[:], unix.RTM_GETSTATS, unix.NLM_F_REQUEST, n.seq)
	nativeEndian.PutUint32(req[unix.NLMSG_HDRLEN+4:], uint32(index))
	nativeEndian.PutUint32(req[unix.NLMSG_HDRLEN+8:], 1<<(iflaStatsLink-1))
	found := false
	err = exchange(n.socket, req[:], n.seq, n.buf, func(kind uint16, b []byte) error {
		if kind != unix.RTM_NEWSTATS || len(b) < ifStatsMsgLen {
			return nil
		}
		return attributes(b[ifStatsMsgLen:], func(kind uint16, v []byte) {
			if kind == iflaStatsLink {
				rx, tx, found = linkStats(v)
			}
		})
	})
	if err == nil && !found {
		err = errors.New("the answer has no counters")
	}
	return rx, tx, err
}

// header fills a struct nlmsghdr.
func header(b []byte, kind, flags uint16, seq uint32) {
	nativeEndian.PutUint32(b[0:], uint32(len(b)))
	nativeEndian.PutUint16(b[4:], kind)
	nativeEndian.PutUint16(b[6:], flags)
	nativeEndian.PutUint32(b[8:], seq)
}

// exchange sends a request and hands each message of the answer to visit.
func exchange(fd int, req []byte, seq uint32, buf []byte, visit func(kind uint16, b []byte) error) error {
	dump := nativeEndian.Uint16(req[6:])&unix.NLM_F_DUMP != 0
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for {
		n, _, err := unix.Recvfrom(fd, buf, unix.MSG_TRUNC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n > len(buf) {
			return fmt.Errorf("netlink message of %d bytes: %w", n, unix.EMSGSIZE)
		}
		done, err := messages(buf[:n], seq, visit)
		if done || err != nil || !dump {
			return err
		}
	}
}

// messages walks one datagram. Answers to an earlier request that was given up
// have another sequence number and are skipped.
func messages(b []byte, seq uint32, visit func(kind uint16, b []byte) error) (done bool, err error) {
	for len(b) >= unix.NLMSG_HDRLEN {
		length := int(nativeEndian.Uint32(b))
		if length < unix.NLMSG_HDRLEN || length > len(b) {
			return true, fmt.Errorf("netlink message of length %d in %d bytes: %w", length, len(b), unix.EBADMSG)
		}
		kind, body := nativeEndian.Uint16(b[4:]), b[unix.NLMSG_HDRLEN:length]
		if nativeEndian.Uint32(b[8:]) == seq {
			switch kind {
			case unix.NLMSG_DONE:
				return true, nil
			case unix.NLMSG_ERROR:
				if len(body) < 4 {
					return true, unix.EBADMSG
				}
				if errno := int32(nativeEndian.Uint32(body)); errno != 0 {
					return true, unix.Errno(-errno)
				}
				return true, nil
			}
			if err := visit(kind, body); err != nil {
				return true, err
			}
		}
		b = b[min(len(b), align4(length)):]
	}
	return false, nil
}

func align4(n int) int { return (n + 3) &^ 3 }

// attributes walks a list of struct nlattr.
func attributes(b []byte, visit func(kind uint16, v []byte)) error {
	for len(b) >= unix.SizeofNlAttr {
		length := int(nativeEndian.Uint16(b))
		if length < unix.SizeofNlAttr || length > len(b) {
			return fmt.Errorf("netlink attribute of length %d in %d bytes: %w", length, len(b), unix.EBADMSG)
		}
		const flags = unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER
		visit(nativeEndian.Uint16(b[2:])&^flags, b[unix.SizeofNlAttr:length])
		b = b[min(len(b), align4(length)):]
	}
	return nil
}

// linkStats reads struct rtnl_link_stats64.
func linkStats(v []byte) (rx, tx sample.Traffic, ok bool) {
	if len(v) < 8*linkStatsWords {
		return rx, tx, false
	}
	for i, to := range [linkStatsWords]*uint64{
		&rx.Packets, &tx.Packets, &rx.Bytes, &tx.Bytes, &rx.Errors, &tx.Errors, &rx.Dropped, &tx.Dropped,
	} {
		*to = nativeEndian.Uint64(v[8*i:])
	}
	return rx, tx, true
}

// inNamespaces reads all interfaces of each of the namespaces. The result has
// an entry a path, nil where errs has the reason.
func inNamespaces(paths []string) (nets []*sample.Network, errs []error) {
	nets, errs = make([]*sample.Network, len(paths)), make([]error, len(paths))
	var done sync.WaitGroup
	done.Go(func() {
		// Not unlocked: the thread ends with the goroutine, so that no other
		// one ever runs in a pod's namespace.
		runtime.LockOSThread()
		buf := make([]byte, 64<<10)
		for i, path := range paths {
			if nets[i], errs[i] = inNamespace(path, buf); errs[i] != nil {
				errs[i] = fmt.Errorf("read counters in network namespace %s: %w", path, errs[i])
			}
		}
	})
	done.Wait()
	return nets, errs
}

// inNamespace moves this thread for good.
func inNamespace(path string, buf []byte) (*sample.Network, error) {
	ns, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(ns)
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("enter: %w", err)
	}
	fd, err := openRoute()
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var req [unix.NLMSG_HDRLEN + unix.SizeofIfInfomsg]byte
	header(req[:], unix.RTM_GETLINK, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, 1)
	net := &sample.Network{Time: time.Now()}
	if err := exchange(fd, req[:], 1, buf, func(kind uint16, b []byte) error {
		return addLink(net, kind, b)
	}); err != nil {
		return nil, err
	}
	defaultFirst(net.Interfaces)
	return net, nil
}

// addLink adds the interface that an RTM_NEWLINK describes.
func addLink(net *sample.Network, kind uint16, b []byte) error {
	if kind != unix.RTM_NEWLINK || len(b) < unix.SizeofIfInfomsg {
		return nil
	}
	if flags := nativeEndian.Uint32(b[8:]); flags&unix.IFF_LOOPBACK != 0 {
		return nil
	}
	var i sample.Interface
	found := false
	err := attributes(b[unix.SizeofIfInfomsg:], func(kind uint16, v []byte) {
		switch kind {
		case unix.IFLA_IFNAME:
			i.Name = unix.ByteSliceToString(v)
		case iflaStats64:
			i.Rx, i.Tx, found = linkStats(v)
		}
	})
	if err == nil && found {
		net.Interfaces = append(net.Interfaces, i)
	}
	return err
}

// defaultFirst moves eth0 to the front; without one the first that there is
// counts as the default.
func defaultFirst(list []sample.Interface) {
	if i := slices.IndexFunc(list, func(i sample.Interface) bool { return i.Name == podInterface }); i > 0 {
		list[0], list[i] = list[i], list[0]
	}
}
