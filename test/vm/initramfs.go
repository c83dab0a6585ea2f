package main

import (
	"bytes"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// initModules reach the disk; what they depend on is found in modules.dep.
var initModules = []string{"virtio_pci", "virtio_blk", "crc32c_generic", "ext4"}

// initScript mounts what Debian's own initramfs mounts before init, /run with
// the same options: it is noexec there. The tests are a unit of this boot.
const initScript = `#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /run /root
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs -o nodev,noexec,nosuid sys /sys
/bin/busybox mount -t tmpfs -o nodev,noexec,nosuid,size=10%,mode=0755 tmpfs /run
for m in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$m; done
while ! [ -b /dev/vda ]; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 -o rw,noatime /dev/vda /root
/bin/busybox mkdir -p /run/systemd/system/multi-user.target.wants
/bin/busybox cp /host-tests.service /run/systemd/system/
/bin/busybox ln -s ../host-tests.service /run/systemd/system/multi-user.target.wants/
for d in dev proc sys run; do /bin/busybox mount --move /$d /root/$d; done
exec /bin/busybox switch_root /root /sbin/init
`

// testUnit unpacks the payload, runs it, and sends what it prints to the host.
const testUnit = `[Unit]
Description=Tests of the host
After=basic.target dbus.service apparmor.service
[Service]
Type=exec
StandardInput=null
TasksMax=infinity
LimitNOFILE=1048576
Environment=HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ExecStart=/bin/sh -c 'until [ -e /dev/virtio-ports/results ]; do sleep 0.1; done; exec >/dev/virtio-ports/results 2>&1; mkdir -p /payload; [ -e /payload/steps ] || tar -xf /dev/vdb -C /payload; exec sh /payload/run.sh'
`

// writeBoot makes what is added to the image's initramfs at each run, in the
// same file: the kernel unpacks one archive after the other.
func writeBoot(base, out string) error {
	data, err := os.ReadFile(base)
	if err != nil {
		return err
	}
	var a archive
	a.add("init", 0o100755, 0, 0, []byte(initScript))
	a.add("host-tests.service", 0o100644, 0, 0, []byte(testUnit))
	a.end()
	return os.WriteFile(out, append(data, a.Bytes()...), 0o644)
}

// writeInitramfs makes a cpio archive: busybox and the modules.
func writeInitramfs(root, kernel, out string) error {
	modules := filepath.Join(root, "lib/modules", kernel)
	order, err := moduleOrder(filepath.Join(modules, "modules.dep"))
	if err != nil {
		return err
	}
	var a archive
	for _, d := range []string{"bin", "modules", "dev"} {
		a.add(d, 0o40755, 0, 0, nil)
	}
	a.add("dev/console", 0o20600, 5, 1, nil)
	busybox, err := os.ReadFile(filepath.Join(root, "bin/busybox"))
	if err != nil {
		return err
	}
	a.add("bin/busybox", 0o100755, 0, 0, busybox)
	var names []string
	for _, m := range order {
		data, err := os.ReadFile(filepath.Join(modules, m))
		if err != nil {
			return err
		}
		names = append(names, path.Base(m))
		a.add("modules/"+path.Base(m), 0o100644, 0, 0, data)
	}
	a.add("modules/order", 0o100644, 0, 0, []byte(strings.Join(names, "\n")+"\n"))
	a.end()
	return os.WriteFile(out, a.Bytes(), 0o644)
}

// moduleOrder lists initModules and what they need, in the order to load.
func moduleOrder(depFile string) ([]string, error) {
	data, err := os.ReadFile(depFile)
	if err != nil {
		return nil, err
	}
	needs := map[string][]string{} // file -> files it needs
	files := map[string]string{}   // name -> file
	for line := range strings.Lines(string(data)) {
		file, deps, _ := strings.Cut(strings.TrimSpace(line), ":")
		needs[file] = strings.Fields(deps)
		files[strings.ReplaceAll(strings.TrimSuffix(path.Base(file), ".ko"), "-", "_")] = file
	}
	var order []string
	var add func(file string)
	add = func(file string) {
		if slices.Contains(order, file) {
			return
		}
		for _, d := range needs[file] {
			add(d)
		}
		order = append(order, file)
	}
	for _, m := range initModules {
		file, ok := files[m]
		if !ok {
			return nil, fmt.Errorf("the kernel has no module %s", m)
		}
		add(file)
	}
	return order, nil
}

// archive is a cpio archive in the "newc" format (initramfs buffer format,
// kernel Documentation/driver-api/early-userspace/buffer-format.rst).
type archive struct {
	bytes.Buffer
	inode int
}

func (a *archive) add(name string, mode, major, minor int, data []byte) {
	a.inode++
	fmt.Fprintf(a, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0)
	a.WriteString(name + "\x00")
	a.pad()
	a.Write(data)
	a.pad()
}

func (a *archive) end() { a.add("TRAILER!!!", 0, 0, 0, nil) }

func (a *archive) pad() {
	for a.Len()%4 != 0 {
		a.WriteByte(0)
	}
}
