package metrics

import (
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// deviceName is the name of a block device, "/dev/sda", or "8:0" if the kernel
// has none (btrfs, tmpfs).
func deviceName(major, minor uint32) string {
	number := strconv.FormatUint(uint64(major), 10) + ":" + strconv.FormatUint(uint64(minor), 10)
	target, err := os.Readlink("/sys/dev/block/" + number)
	if err != nil {
		return number
	}
	return "/dev/" + filepath.Base(target)
}

// deviceOf names the device of the filesystem at path, "" if it is not there.
func deviceOf(path string) string {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return ""
	}
	return deviceName(unix.Major(st.Dev), unix.Minor(st.Dev))
}
