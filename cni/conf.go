package cni

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
)

// confDir finds the network configuration in a directory: the first .conflist, .conf or .json file in
// lexical order, as every user of libcni expects. A file that cannot be used is an error and not skipped:
// the next one might put pods on the wrong network.
type confDir struct {
	dir string

	mu   sync.Mutex // guards what was loaded last
	path string
	mark fileMark
	list *libcni.NetworkConfigList
	err  error
}

// fileMark tells whether a file is still the one that was loaded.
type fileMark struct {
	size  int64
	mtime time.Time
	ino   uint64
}

// current is the configuration in force, nil for the built-in network. It costs a listing of the
// directory and a stat.
func (d *confDir) current() (*libcni.NetworkConfigList, error) {
	if d.dir == "" {
		return nil, nil
	}
	files, err := libcni.ConfFiles(d.dir, []string{".conflist", ".conf", ".json"})
	if err != nil {
		return nil, fmt.Errorf("list CNI configurations: %w", err)
	}
	if len(files) == 0 {
		return nil, nil
	}
	sort.Strings(files)
	return d.load(files[0])
}

func (d *confDir) load(path string) (*libcni.NetworkConfigList, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read CNI configuration: %w", err)
	}
	mark := markOf(st)
	d.mu.Lock()
	defer d.mu.Unlock()
	if path == d.path && mark == d.mark {
		return d.list, d.err
	}
	list, err := parse(path)
	if err == nil && len(list.Plugins) == 0 {
		err = fmt.Errorf("no plugins in it")
	}
	if err != nil {
		list, err = nil, fmt.Errorf("CNI configuration %s: %w: %w", path, err, errdefs.ErrFailedPrecondition)
	}
	d.path, d.mark, d.list, d.err = path, mark, list, err
	return list, err
}

func parse(path string) (*libcni.NetworkConfigList, error) {
	if filepath.Ext(path) == ".conflist" {
		return libcni.NetworkConfFromFile(path)
	}
	//lint:ignore SA1019 single configurations are deprecated but still what many nodes have
	conf, err := libcni.ConfFromFile(path)
	if err != nil {
		return nil, err
	}
	if conf.Network.Type == "" {
		return nil, fmt.Errorf("no plugin type in it")
	}
	//lint:ignore SA1019 see above
	return libcni.ConfListFromConf(conf)
}
