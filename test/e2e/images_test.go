package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/nodeagent/nodeagent/test/e2e/node"
	"github.com/nodeagent/nodeagent/test/images"
	"github.com/nodeagent/nodeagent/test/registry"
)

// Image references; registry host and port are filled in by startRegistry.
var (
	busybox  string // every applet, /etc/passwd with root, web (33) and named (1000)
	setuid   string // with /bin/suid, the test tool setuid root
	userUID  string // USER 1002
	userName string // USER web
	grouped  string // USER 1000, who is in group 50000 of /etc/group
	pictures string // files to mount as an image volume
	stopper  string // STOPSIGNAL SIGUSR1
	volumes  string // VOLUME /data
)

type testRegistry struct {
	*registry.Server
}

// hostsDir is a directory of hosts.toml files, filled by tests of mirrors.
func (r *testRegistry) hostsDir() string { return filepath.Join(workDir, "certs.d") }

// testTool is the program in test images: $NODEAGENT_TESTTOOL, or built now.
func testTool() (string, error) {
	if tool := os.Getenv("NODEAGENT_TESTTOOL"); tool != "" {
		return tool, nil
	}
	tool := filepath.Join(workDir, "testtool")
	build := exec.Command("go", "build", "-o", tool, "github.com/nodeagent/nodeagent/test/images/testtool")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the test tool: %w: %s", err, out)
	}
	return tool, nil
}

func startRegistry() (*testRegistry, error) {
	s, err := registry.Start(registry.Config{})
	if err != nil {
		return nil, err
	}
	r := &testRegistry{s}
	if err := os.MkdirAll(r.hostsDir(), 0o755); err != nil {
		return nil, err
	}
	tool, err := testTool()
	if err != nil {
		return nil, err
	}
	base := append(busyboxEntries(), images.Executable("bin/testtool", tool))
	layer, err := images.NewLayer(images.Gzip, base...)
	if err != nil {
		return nil, fmt.Errorf("%w (install busybox-static)", err)
	}
	bb := func(cfg images.Config, extra ...images.Entry) (images.Image, error) {
		if cfg.Env == nil {
			cfg.Env = []string{"PATH=/bin:/usr/bin", "FROM_IMAGE=yes"}
		}
		if cfg.Cmd == nil && cfg.Entrypoint == nil {
			cfg.Cmd = []string{"/bin/sh"}
		}
		layers := []images.Layer{layer}
		if len(extra) > 0 {
			l, err := images.NewLayer(images.Gzip, extra...)
			if err != nil {
				return images.Image{}, err
			}
			layers = append(layers, l)
		}
		return images.New(cfg, layers...)
	}
	for _, i := range []struct {
		ref   *string
		name  string
		cfg   images.Config
		extra []images.Entry
	}{
		{ref: &busybox, name: "busybox"},
		// busybox takes its applet from the name; a wrapper makes it id.
		{ref: &setuid, name: "setuid", extra: []images.Entry{{Name: "bin/suid", Mode: 0o4755, Source: tool}}},
		{ref: &userUID, name: "user-uid", cfg: images.Config{User: "1002"}},
		{ref: &userName, name: "user-name", cfg: images.Config{User: "web"}},
		{ref: &grouped, name: "grouped", cfg: images.Config{User: "1000"}},
		{ref: &pictures, name: "pictures", extra: []images.Entry{images.Dir("art"), images.File("art/monet", "water"), images.Symlink("art/out", "/etc"), images.Symlink("up", "../../../..")}},
		{ref: &stopper, name: "stopper", cfg: images.Config{StopSignal: "SIGUSR1"}},
		{ref: &volumes, name: "volumes", cfg: images.Config{Volumes: []string{"/data"}, WorkingDir: "/work/here", Entrypoint: []string{"/bin/echo", "entry"}, Cmd: []string{"cmd"}}},
	} {
		img, err := bb(i.cfg, i.extra...)
		if err != nil {
			return nil, err
		}
		*i.ref = s.Addr + "/e2e/" + i.name + ":1"
		if err := images.Push(context.Background(), *i.ref, img); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func busyboxEntries() []images.Entry {
	out := []images.Entry{images.Executable("bin/busybox", "/bin/busybox")}
	for _, d := range []string{"etc", "proc", "sys", "dev", "root", "run", "var", "var/run", "usr", "usr/bin"} {
		out = append(out, images.Dir(d))
	}
	out = append(out, images.Entry{Name: "tmp", Typeflag: '5', Mode: 0o1777})
	for _, a := range []string{
		"sh", "cat", "echo", "ls", "id", "sleep", "true", "false", "head", "tr", "seq", "tty", "stty", "printf", "mount", "umount",
		"touch", "chmod", "chown", "hostname", "nc", "ip", "netstat", "kill", "ps", "dd", "mkdir", "rm", "grep", "awk", "sed", "wc",
		"readlink", "stat", "env", "pwd", "ulimit", "yes", "mknod", "df", "nslookup", "ping", "wget", "httpd", "ln", "sync", "date",
		"cut", "sort", "test", "expr", "od", "tail", "mv", "cp", "top", "find", "setsid", "usleep", "pidof", "nproc", "taskset", "unshare", "xxd", "md5sum", "mkfifo",
	} {
		out = append(out, images.Symlink("bin/"+a, "busybox"))
	}
	return append(out,
		images.File("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/var/www:/bin/sh\nnamed:x:1000:1000:named:/home/named:/bin/sh\n"),
		images.File("etc/group", "root:x:0:\nweb:x:34:\nnamed:x:1000:\nfromimage:x:50000:named\n"))
}

func pull(ctx context.Context, n *node.Node, ref string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	r, err := n.Images().PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		return "", fmt.Errorf("pull %s: %w", ref, err)
	}
	return r.ImageRef, nil
}

func pullAll(ctx context.Context, n *node.Node) error {
	for _, ref := range []string{busybox, setuid, userUID, userName, grouped, pictures, stopper, volumes} {
		if _, err := pull(ctx, n, ref); err != nil {
			return err
		}
	}
	return nil
}
