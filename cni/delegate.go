package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/nodeagent/nodeagent/cni/netns"
	"github.com/nodeagent/nodeagent/cni/rtnl"
	"golang.org/x/sys/unix"
)

// podIfName is the name of the pod's interface.
const podIfName = "eth0"

// undoTimeout bounds the DEL after a failed ADD, which runs although the caller is gone.
const undoTimeout = 30 * time.Second

// delegate drives CNI configurations through libcni. For each sandbox there is a file that says with which
// configuration it was added, written before the first plugin runs: so DEL always gets the
// configuration of ADD, even when the file in ConfDir changed or this process was killed in between.
type delegate struct {
	cni *libcni.CNIConfig
	dir string // of the attachment files

	mu     sync.Mutex // guards the cached status
	status struct {
		list *libcni.NetworkConfigList
		at   time.Time
		err  error
	}
}

// attachment is the content of an attachment file.
type attachment struct {
	Version int `json:"version"`
	savedAttachment
}

type savedAttachment struct {
	SandboxID      string          `json:"sandbox"`
	Network        string          `json:"network"`
	Conf           json.RawMessage `json:"conf"` // of the list, as loaded
	Netns          string          `json:"netns"`
	Args           [][2]string     `json:"args"`
	CapabilityArgs map[string]any  `json:"capabilityArgs"`
}

const attachmentVersion = 1

// decodeAttachment reads an attachment file.
//
// Errors: DataLoss if it is none, FailedPrecondition for a version this program does not know.
func decodeAttachment(p []byte) (attachment, error) {
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(p, &head); err != nil {
		return attachment{}, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if head.Version != attachmentVersion {
		return attachment{}, fmt.Errorf("version %d, this program knows %d: %w", head.Version, attachmentVersion, errdefs.ErrFailedPrecondition)
	}
	var a attachment
	if err := json.Unmarshal(p, &a); err != nil {
		return attachment{}, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if a.SandboxID == "" || len(a.Conf) == 0 {
		return attachment{}, fmt.Errorf("no sandbox or no configuration: %w", errdefs.ErrDataLoss)
	}
	return a, nil
}

func (d *delegate) file(sandbox string) string {
	// Sandbox IDs are ours and plain, but a path must not come of one in any case.
	return filepath.Join(d.dir, strings.ReplaceAll(sandbox, "/", "_")+".json")
}

// save writes the attachment file whole. It is not synced: after a power loss no pod is left.
func (d *delegate) save(a attachment) error {
	p, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("encode CNI attachment of sandbox %s: %w", a.SandboxID, err)
	}
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return fmt.Errorf("make directory of CNI attachments: %w", err)
	}
	tmp := d.file(a.SandboxID) + ".tmp"
	err = os.WriteFile(tmp, p, 0o600)
	if err == nil {
		err = os.Rename(tmp, d.file(a.SandboxID))
	}
	if err != nil {
		_ = os.Remove(tmp)
		return fmt.Errorf("write CNI attachment of sandbox %s: %w", a.SandboxID, err)
	}
	return nil
}

// load reads the attachment file of a sandbox; nil if there is none.
func (d *delegate) load(sandbox string) (*attachment, error) {
	p, err := os.ReadFile(d.file(sandbox))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read CNI attachment of sandbox %s: %w", sandbox, err)
	}
	a, err := decodeAttachment(p)
	if err != nil {
		return nil, fmt.Errorf("read CNI attachment of sandbox %s: %w", sandbox, err)
	}
	return &a, nil
}

func (a *attachment) runtimeConf(netns string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: a.SandboxID, NetNS: netns, IfName: podIfName, Args: a.Args, CapabilityArgs: a.CapabilityArgs,
	}
}

// add connects the sandbox. If it fails, DEL has been called for what was done.
func (d *delegate) add(ctx context.Context, list *libcni.NetworkConfigList, req Request, ranges []netip.Prefix) (Result, error) {
	caps, err := req.capabilityArgs(ranges)
	if err != nil {
		return Result{}, err
	}
	a := attachment{attachmentVersion, savedAttachment{
		SandboxID: req.SandboxID, Network: list.Name, Conf: list.Bytes, Netns: req.Netns, CapabilityArgs: caps,
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", req.PodNamespace},
			{"K8S_POD_NAME", req.PodName},
			{"K8S_POD_INFRA_CONTAINER_ID", req.SandboxID},
			{"K8S_POD_UID", req.PodUID},
		},
	}}
	if err := loopbackUp(req.Netns); err != nil {
		return Result{}, err
	}
	if err := d.save(a); err != nil {
		return Result{}, err
	}
	res, err := d.addHolding(ctx, list, a.runtimeConf(req.Netns))
	if err == nil {
		return res, nil
	}
	err = fmt.Errorf("add sandbox %s to CNI network %q: %w", req.SandboxID, list.Name, classify(err))
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if derr := d.del(undo, req.SandboxID, req.Netns, nil); derr != nil {
		err = errors.Join(err, fmt.Errorf("undo: %w", derr))
	}
	return Result{}, err
}

// addHolding is addList with the sandbox locked against a DEL, here or in a later process, as long as a plugin runs.
func (d *delegate) addHolding(ctx context.Context, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) (Result, error) {
	f, err := d.hold(ctx, rt.ContainerID)
	if err != nil {
		return Result{}, err
	}
	defer f.Close()
	return d.addList(holding(ctx, f), list, rt)
}

// holdTimeout is how long plugins of the same sandbox that still run are waited for.
const holdTimeout = 20 * time.Second

// hold locks the attachment file of a sandbox. Plugins inherit the lock: while one runs that was started by a process
// since killed, or one's child does, this waits; but not for ever, since it may be a service that a plugin left behind.
func (d *delegate) hold(ctx context.Context, sandbox string) (*os.File, error) {
	f, err := os.Open(d.file(sandbox))
	if err != nil {
		return nil, fmt.Errorf("lock CNI attachment of sandbox %s: %w", sandbox, err)
	}
	for deadline := time.Now().Add(holdTimeout); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || err == unix.EWOULDBLOCK && time.Now().After(deadline) {
			return f, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, fmt.Errorf("lock CNI attachment of sandbox %s: %w", sandbox, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("wait for the CNI plugins of sandbox %s that still run: %w", sandbox, context.Cause(ctx))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (d *delegate) addList(ctx context.Context, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) (Result, error) {
	raw, err := d.cni.AddNetworkList(ctx, list, rt)
	if err != nil {
		return Result{}, err
	}
	res, err := types100.NewResultFromResult(raw)
	if err != nil {
		return Result{}, fmt.Errorf("understand the result: %w", err)
	}
	out := Result{Conf: list.Name, IPs: podIPs(res), HostInterface: hostInterface(res)}
	if len(out.IPs) == 0 {
		return Result{}, fmt.Errorf("the plugins gave no address: %w", errdefs.ErrFailedPrecondition)
	}
	if out.CNIResult, err = json.Marshal(res); err != nil {
		return Result{}, fmt.Errorf("encode the result: %w", err)
	}
	return out, nil
}

// podIPs are the addresses of the pod's own interfaces, in the plugins' order.
func podIPs(res *types100.Result) []netip.Addr {
	var ips []netip.Addr
	for _, c := range res.IPs {
		if i := c.Interface; i != nil && *i >= 0 && *i < len(res.Interfaces) && res.Interfaces[*i].Sandbox == "" {
			continue
		}
		if a, ok := netip.AddrFromSlice(c.Address.IP); ok {
			ips = append(ips, a.Unmap())
		}
	}
	return ips
}

// hostInterface is the last interface named that is not in the sandbox: behind a bridge comes the pod's own.
func hostInterface(res *types100.Result) string {
	name := ""
	for _, i := range res.Interfaces {
		if i.Sandbox == "" {
			name = i.Name
		}
	}
	return name
}

// classify gives the error codes of CNI that mean something to the caller their class.
func classify(err error) error {
	var e *cnitypes.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.Code {
	case cnitypes.ErrTryAgainLater, cnitypes.ErrPluginNotAvailable, cnitypes.ErrLimitedConnectivity:
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	case cnitypes.ErrInvalidNetworkConfig, cnitypes.ErrIncompatibleCNIVersion, cnitypes.ErrDecodingFailure, cnitypes.ErrUnsupportedField:
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return err
}

// del disconnects a sandbox with the configuration it was added with, or with fallback if that is not known.
// A sandbox never added is success.
func (d *delegate) del(ctx context.Context, sandbox, netnsPath string, fallback *libcni.NetworkConfigList) error {
	a, err := d.load(sandbox)
	if err != nil && !errors.Is(err, errdefs.ErrDataLoss) {
		return err
	}
	list := fallback
	if a != nil {
		if list, err = libcni.NetworkConfFromBytes(a.Conf); err != nil {
			return fmt.Errorf("remove sandbox %s from CNI network %q: %w", sandbox, a.Network, err)
		}
		// Plugins of a list may live in files beside it; those are as they are now.
		if fallback != nil && len(list.Plugins) == 0 && fallback.Name == list.Name {
			list = fallback
		}
	}
	if list == nil {
		return nil
	}
	if a == nil {
		a = &attachment{savedAttachment: savedAttachment{SandboxID: sandbox, Netns: netnsPath}}
	}
	if netnsPath == "" {
		netnsPath = a.Netns
	}
	if h, err := netns.Open(netnsPath); err != nil {
		netnsPath = "" // what CNI says for a namespace that is gone
	} else {
		h.Close()
	}
	f, err := d.hold(ctx, sandbox)
	switch {
	case err == nil:
		defer f.Close()
		ctx = holding(ctx, f)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := d.cni.DelNetworkList(ctx, list, a.runtimeConf(netnsPath)); err != nil {
		return fmt.Errorf("remove sandbox %s from CNI network %q: %w", sandbox, list.Name, classify(err))
	}
	if err := os.Remove(d.file(sandbox)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove CNI attachment of sandbox %s: %w", sandbox, err)
	}
	return nil
}

// check runs CHECK with the configuration of ADD.
func (d *delegate) check(ctx context.Context, sandbox string) error {
	a, err := d.load(sandbox)
	if err != nil {
		return err
	}
	if a == nil {
		return fmt.Errorf("check sandbox %s: it is on no CNI network: %w", sandbox, errdefs.ErrNotFound)
	}
	list, err := libcni.NetworkConfFromBytes(a.Conf)
	if err != nil {
		return fmt.Errorf("check sandbox %s: %w", sandbox, err)
	}
	err = d.cni.CheckNetworkList(ctx, list, a.runtimeConf(a.Netns))
	if err != nil && !errors.Is(err, libcni.ErrorCheckNotSupp) {
		return fmt.Errorf("check sandbox %s on CNI network %q: %w", sandbox, list.Name, err)
	}
	return nil
}

// reconcile removes every sandbox not in live, and tells plugins that know GC which are.
func (d *delegate) reconcile(ctx context.Context, live map[string]bool, list *libcni.NetworkConfigList) error {
	entries, err := os.ReadDir(d.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list CNI attachments: %w", err)
	}
	var errs []error
	var valid []cnitypes.GCAttachment
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		switch {
		case !ok:
			_ = os.Remove(filepath.Join(d.dir, e.Name())) // a temporary file of a killed process
		case live[id]:
			valid = append(valid, cnitypes.GCAttachment{ContainerID: id, IfName: podIfName})
		default:
			errs = append(errs, d.del(ctx, id, "", list))
		}
	}
	if list == nil {
		return errors.Join(errs...)
	}
	if ok, _ := version.GreaterThanOrEqualTo(list.CNIVersion, "1.1.0"); ok {
		if err := d.cni.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: valid}); err != nil {
			errs = append(errs, fmt.Errorf("collect garbage of CNI network %q: %w", list.Name, err))
		}
	}
	return errors.Join(errs...)
}

// statusAge is how long an answer of the plugins to STATUS serves: it costs a process for each of them.
const statusAge = 5 * time.Second

// ready is nil if the plugins are there and say that they can serve.
func (d *delegate) ready(ctx context.Context, list *libcni.NetworkConfigList, exec *executor) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.status.list == list && time.Since(d.status.at) < statusAge {
		return d.status.err
	}
	err := func() error {
		for _, p := range list.Plugins {
			if _, err := exec.FindInPath(p.Network.Type, d.cni.Path); err != nil {
				return fmt.Errorf("plugin %q of CNI network %q: %w: %w", p.Network.Type, list.Name, err, errdefs.ErrFailedPrecondition)
			}
		}
		if err := d.cni.GetStatusNetworkList(ctx, list); err != nil {
			return fmt.Errorf("status of CNI network %q: %w", list.Name, classify(err))
		}
		return nil
	}()
	if ctx.Err() == nil {
		d.status.list, d.status.at, d.status.err = list, time.Now(), err
	}
	return err
}

// loopbackUp sets lo up in the namespace at path.
func loopbackUp(path string) error {
	c, err := rtnl.DialPath(path)
	if err != nil {
		return err
	}
	defer c.Close()
	var b rtnl.Batch
	b.LinkUp(1, "set pod's loopback up")
	return c.Do(&b)
}
