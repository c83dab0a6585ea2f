package house

// module is the prefix of our own import paths.
const module = "github.com/nodeagent/nodeagent/"

// modules are the folders with a go.mod of their own, with the reason: what
// they need must not reach those who build the product.
var modules = []string{
	"controlplane", // Kubernetes itself, with its replace lines
}

// domains are the folders whose packages do not import each other: each
// declares the small interface it needs, and cmd/nodeagent joins them.
var domains = []string{"certs", "cgroups", "cni", "config", "cri", "ebpf", "localvolume", "metrics", "pods", "shim"}

// vocabulary are packages of plain data and names that any domain may import;
// they themselves import nothing of ours but each other.
var vocabulary = []string{"metrics/sample", "metrics/series"}

// shimForbidden may not be linked into the shim: it is re-executed for every
// container and every exec, and all package initialisation runs each time.
// (ttrpc brings grpc's codes and status, which are small.)
var shimForbidden = []string{
	"google.golang.org/grpc",
	"google.golang.org/grpc/internal/transport",
	"k8s.io/",
	"github.com/containerd/containerd/",
	"github.com/spf13/cobra",
	"go.etcd.io/bbolt",
	"net/http",
}

// onlyIn limits packages to the folders that have the task they stand for.
var onlyIn = []struct {
	path    string   // import path, exact
	folders []string // that may import it
	why     string
}{
	{"github.com/opencontainers/runc/libcontainer", []string{"shim/server", "shim/initmode", "cmd/nodeagent-shim"}, "only the shim runs containers"},
	{"log", []string{"test"}, "log/slog is handed to constructors"},
	{"github.com/spf13/cobra", []string{"cmd", "test"}, "commands live in cmd"},
	{"github.com/coreos/go-systemd/v22/daemon", []string{"cmd"}, "the process talks to its supervisor, a package does not"},
}

// badNames say nothing about what a package is for.
var badNames = []string{"util", "utils", "common", "helper", "helpers", "misc", "shared", "base", "lib"}

// codeFiles are the edges where error classes become codes of gRPC or ttrpc,
// or are turned back; everywhere else errors have classes of errdefs.
var codeFiles = []string{"cri/errors.go", "shim/server/service.go", "shim/calls.go", "cmd/nodeagent/client.go"}

// A function that grows beyond this asks for a new noun.
const (
	maxLines      = 100
	maxParameters = 8
)

// foreignShape are functions whose parameters an interface of others sets
// ("folder.name"), with its name.
var foreignShape = map[string]string{
	"cri/stream.ExecInContainer": "k8s.io/cri-streaming's remotecommand.Executor",
	"cri/stream.AttachContainer": "k8s.io/cri-streaming's remotecommand.Attacher",
}

// testSupport are folders outside test/ that only tests import.
var testSupport = []string{"cni/lab", "ebpf/lab"}

// initAllowed are the packages that may have func init, with the reason.
var initAllowed = map[string]string{
	"shim/initmode": "libcontainer's init has to run before any other package initialises",
}

// generatedBinaries are name endings of files that a compiler made and go:embed
// takes in; make generate makes them anew.
var generatedBinaries = []string{"_bpfel.o", "_bpfeb.o"}

// writtenVars are package variables that may be assigned after their
// declaration ("folder.name"), with the reason.
var writtenVars = map[string]string{}

// contextFields are structs that may hold a context ("folder.Type"), with the
// reason.
var contextFields = map[string]string{
	"metrics.writables":    "measuring goes on after the sample that asked for it",
	"cri/stream.Server":    "sessions outlive the request that asked for their URL",
	"cri.Server":           "what clients share outlives the call that began it",
	"cri/images.Store":     "a pull outlives the call that began it, if others wait for it",
	"cri/images.ctxReader": "io.Reader has no context argument",
}

// foreignPaths must not be in any file: they name places of one machine.
var foreignPaths = []string{
	"/wo" + "rk/main", "/wo" + "rk/shared", "/wo" + "rk/plan", ".libr" + "ary/", ".mirr" + "or/",
}
