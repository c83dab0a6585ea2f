// Package config reads the one configuration file of nodeagent.
//
// The file is YAML with `apiVersion: nodeagent.dev/v1` and `kind: Config`; an
// absent file means Default. Reading is strict: an unknown field, a wrong type
// or a value outside what is allowed is refused with its path, its line and
// what would be right, and all faults are reported at once (see Faults).
//
// The Config struct is the schema. Each field carries its YAML name, its
// documentation and, where the choice is closed, its allowed values in struct
// tags; the decoder, the validator and the text of `nodeagent config default`
// all read those tags, so they cannot disagree.
//
// The package must not touch the host: it opens no file but the one it is
// asked to read and decides nothing about kernels (cmd/nodeagent does).
// Callers: cmd/nodeagent. It starts no goroutine and needs no lock.
package config

import (
	"net/netip"
	"path/filepath"
	"time"
)

const (
	// APIVersion and Kind are what every file has to begin with.
	APIVersion = "nodeagent.dev/v1"
	Kind       = "Config"

	// DefaultPath is read when no --config is given; it may be absent.
	DefaultPath = "/etc/nodeagent/config.yaml"
)

// Config is the whole file. Several daemons run side by side on one host when
// Root, State and Network.Name differ (and their pod CIDRs do not overlap).
//
// Tags: yaml = name in the file; doc = what it means; allowed = closed choice;
// unit = "bytes" (accepts 16384, 16KiB, 4MiB); derived = the default is
// computed from other fields when the value is empty; reload = "live": a
// running daemon takes it over (see Reload).
type Config struct {
	APIVersion string `yaml:"apiVersion" allowed:"nodeagent.dev/v1"`
	Kind       string `yaml:"kind" allowed:"Config"`

	Root  string `yaml:"root" doc:"Directory for what survives a reboot: records, images, writable layers, address leases."`
	State string `yaml:"state" doc:"Directory for what dies with the boot: sockets, pinned namespaces, mount points."`

	Log     Log     `yaml:"log" doc:"What the daemon writes to standard error."`
	CRI     CRI     `yaml:"cri" doc:"The container runtime interface: how pods and containers are run."`
	Images  Images  `yaml:"images" doc:"Where images come from and how they are fetched."`
	Network Network `yaml:"network" doc:"How pods get their addresses."`
	Policy  Policy  `yaml:"policy" doc:"NetworkPolicy, enforced with eBPF on pod interfaces and NICs."`
	Node    Node    `yaml:"node" doc:"The node in a cluster: its certificates and its HTTPS endpoint."`
	Metrics Metrics `yaml:"metrics" doc:"Measurements of the daemon and the pods, for Prometheus."`
}

// Log chooses how much is logged and in which shape.
type Log struct {
	Level  string `yaml:"level" allowed:"debug,info,warn,error" reload:"live" doc:"The least severe line that is written."`
	Format string `yaml:"format" allowed:"auto,text,json" doc:"auto is text, with journal priorities instead of times under systemd."`
}

// CRI holds what the CRI server and the containers it starts go by.
type CRI struct {
	Socket    string    `yaml:"socket" derived:"<state>/nodeagent.sock" doc:"Unix socket the CRI is served on."`
	Streaming Streaming `yaml:"streaming" doc:"HTTP server that carries exec, attach and port-forward sessions."`

	CgroupDriver        string   `yaml:"cgroupDriver" allowed:"auto,systemd,cgroupfs" doc:"Who makes cgroups. auto: systemd where it runs on cgroup v2, else cgroupfs."`
	UnsetSeccompProfile string   `yaml:"unsetSeccompProfile" allowed:"RuntimeDefault,Unconfined" doc:"Seccomp profile of containers that do not ask for one."`
	MaxLogLineSize      int64    `yaml:"maxLogLineSize" unit:"bytes" doc:"Longer container log lines are written as several partial lines."`
	ExecSyncMaxOutput   int64    `yaml:"execSyncMaxOutput" unit:"bytes" doc:"What ExecSync returns of each of stdout and stderr; the rest is cut."`
	RuntimeHandlers     []string `yaml:"runtimeHandlers" doc:"Names a RuntimeClass may use as its handler, besides the empty one. All run the same runtime."`
	CDISpecDirs         []string `yaml:"cdiSpecDirs" doc:"Directories with Container Device Interface specifications; a later one wins."`
}

// Streaming is the address of the exec, attach and port-forward server.
type Streaming struct {
	Address netip.Addr `yaml:"address" doc:"IP address to listen on. Who reaches it needs a one-time token from the CRI socket."`
	Port    int        `yaml:"port" doc:"TCP port; 0 lets the kernel choose a free one."`
}

// Images configures pulls and the image store.
type Images struct {
	RegistryConfigDirs   []string      `yaml:"registryConfigDirs" reload:"live" doc:"Directories with <registry host>/hosts.toml files (containerd's format): mirrors, certificates."`
	MaxParallelDownloads int           `yaml:"maxParallelDownloads" reload:"live" doc:"Layers of one image fetched at the same time."`
	MaxParallelUnpacks   int           `yaml:"maxParallelUnpacks" doc:"Layers of one image unpacked at the same time."`
	Pinned               []string      `yaml:"pinned" reload:"live" doc:"Image references that are never garbage-collected."`
	ProgressTimeout      time.Duration `yaml:"progressTimeout" reload:"live" doc:"A pull that receives nothing for this long fails."`
}

// Network configures the built-in network and where foreign CNI plugins are.
type Network struct {
	Name           string         `yaml:"name" doc:"Name of the built-in network; marks its links, nftables table and leases as this daemon's."`
	CNIConfDir     string         `yaml:"cniConfDir" doc:"Directory with CNI configurations. The first by name is used; none: the built-in network."`
	CNIBinDirs     []string       `yaml:"cniBinDirs" doc:"Directories with CNI plugin binaries, searched in order."`
	PodCIDRs       []netip.Prefix `yaml:"podCIDRs" doc:"Ranges the built-in network takes pod addresses from. Empty: those a kubelet has set last, until then 10.213.0.0/16 and fd6e:6f64:6561:6765::/64."`
	MTU            int            `yaml:"mtu" doc:"Of pod interfaces, in bytes; 0 takes that of the default route's interface."`
	Masquerade     bool           `yaml:"masquerade" doc:"Traffic that leaves the node carries the node's address."`
	WarmNamespaces int            `yaml:"warmNamespaces" doc:"Wired network namespaces kept ready, so that a pod starts faster."`
}

// Policy configures how NetworkPolicy is enforced.
type Policy struct {
	Mode            string         `yaml:"mode" allowed:"auto,enforce,off" doc:"enforce: no pod starts before its policy is in force, and no daemon where that cannot be. auto: so if kubeconfig is given or dir exists, and the kernel can; else the log says why not. off: nothing is loaded, and what an earlier daemon left in force is removed."`
	Kubeconfig      string         `yaml:"kubeconfig" doc:"Kubeconfig of the API server whose pods, namespaces and networkpolicies are watched. Empty: what is in dir counts. It may be written after the start."`
	Dir             string         `yaml:"dir" doc:"Directory with NetworkPolicies, Namespaces and Pods (labels, named ports) as YAML; watched, unless kubeconfig is given."`
	BPFFS           string         `yaml:"bpffs" doc:"BPF filesystem for what has to survive the daemon; mounted there if it is not."`
	Uplinks         []string       `yaml:"uplinks" reload:"live" doc:"Patterns of the names of the host's NICs. Empty: those of the default routes."`
	ServiceCIDRs    []netip.Prefix `yaml:"serviceCIDRs" doc:"Ranges of service addresses. Egress to them is judged by the pod that the connection is translated to."`
	AuditNamespaces []string       `yaml:"auditNamespaces" doc:"Namespaces whose pods' packets are judged and told of, but not dropped."`
	KeepEstablished bool           `yaml:"keepEstablished" doc:"Connections go on when a policy no longer allows them. Otherwise they are cut at once."`
	XDP             string         `yaml:"xdp" allowed:"off,auto,native,generic" doc:"Where NICs drop early what policy denies to come in. auto: in the driver where it can, else generic, on no veth. native, generic: so, on each NIC."`
	Strict          bool           `yaml:"strict" doc:"A TCP answer needs an entry in conntrack; otherwise the right to open the connection is enough."`
}

// Node configures what the daemon is to a cluster, besides running pods.
type Node struct {
	Mode                string       `yaml:"mode" allowed:"off,certificates" doc:"certificates: the node's TLS certificates are got and renewed, and the HTTPS endpoint is served. off: no API server is spoken with."`
	Name                string       `yaml:"name" doc:"Of the Node; empty: the host's name in lower case."`
	Kubeconfig          string       `yaml:"kubeconfig" doc:"File that names the API server; written after bootstrap. May be a kubelet's."`
	BootstrapKubeconfig string       `yaml:"bootstrapKubeconfig" doc:"File with the credential that gets the first certificate, and a new one when the last has expired."`
	CertDir             string       `yaml:"certDir" doc:"Directory for keys and certificates, in kubelet's layout. May be a kubelet's."`
	Addresses           []netip.Addr `yaml:"addresses" doc:"The serving certificate is for these, besides the node's name. Empty: those in the Node's status."`
	Listen              string       `yaml:"listen" doc:"host:port of the HTTPS endpoint (/healthz, /metrics); empty: not served, and no serving certificate is kept."`
	ClientCAFile        string       `yaml:"clientCAFile" doc:"CA of the client certificates that the endpoint accepts; read again when it changes. Empty: bearer tokens only."`
}

// Metrics configures the Prometheus endpoint.
type Metrics struct {
	Address string `yaml:"address" doc:"host:port to serve /metrics on; empty: not served."`
}

// Default is the configuration of a node that has no file: complete, valid.
func Default() Config {
	c := defaults()
	c.complete()
	return c
}

// defaults leaves derived fields empty, so that they follow Root and State.
func defaults() Config {
	return Config{
		APIVersion: APIVersion,
		Kind:       Kind,
		Root:       "/var/lib/nodeagent",
		State:      "/run/nodeagent",
		Log:        Log{Level: "info", Format: "auto"},
		CRI: CRI{
			Streaming:           Streaming{Address: netip.MustParseAddr("127.0.0.1")},
			CgroupDriver:        "auto",
			UnsetSeccompProfile: "Unconfined", // what the CRI says
			MaxLogLineSize:      16 << 10,
			ExecSyncMaxOutput:   16 << 20,
			RuntimeHandlers:     []string{"nodeagent"},
			CDISpecDirs:         []string{"/etc/cdi", "/var/run/cdi"},
		},
		Images: Images{
			RegistryConfigDirs:   []string{"/etc/nodeagent/certs.d", "/etc/containerd/certs.d"},
			MaxParallelDownloads: 4,
			MaxParallelUnpacks:   2,
			Pinned:               []string{},
			ProgressTimeout:      time.Minute,
		},
		Network: Network{
			Name:           "nodeagent",
			CNIConfDir:     "/etc/cni/net.d",
			CNIBinDirs:     []string{"/opt/cni/bin", "/usr/lib/cni"},
			PodCIDRs:       []netip.Prefix{},
			Masquerade:     true,
			WarmNamespaces: 4,
		},
		Policy: Policy{
			Mode:            "auto",
			Dir:             "/etc/nodeagent/policy",
			BPFFS:           "/sys/fs/bpf",
			Uplinks:         []string{},
			ServiceCIDRs:    []netip.Prefix{},
			AuditNamespaces: []string{},
			XDP:             "off",
		},
		Node: Node{
			Mode:                "off",
			Kubeconfig:          "/etc/kubernetes/kubelet.conf",
			BootstrapKubeconfig: "/etc/kubernetes/bootstrap-kubelet.conf",
			CertDir:             "/var/lib/kubelet/pki",
			Addresses:           []netip.Addr{},
			Listen:              ":10250",
			ClientCAFile:        "/etc/kubernetes/pki/ca.crt",
		},
	}
}

// complete fills in the derived fields.
func (c *Config) complete() {
	if c.CRI.Socket == "" {
		c.CRI.Socket = filepath.Join(c.State, "nodeagent.sock")
	}
}

// AdminSocket is the unix socket on which the daemon serves what the CRI has
// no call for (image import, pull progress). Only root may open it.
func (c Config) AdminSocket() string { return filepath.Join(c.State, "admin.sock") }
