package spec

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// User is the identity of a container's first process, as the status shows it.
type User struct {
	UID, GID uint32
	Groups   []uint32 // supplemental groups, ascending, without duplicates
}

// CRI returns u as ContainerStatus.user wants it.
func (u *User) CRI() *runtimeapi.ContainerUser {
	if u == nil {
		return nil
	}
	l := &runtimeapi.LinuxContainerUser{Uid: int64(u.UID), Gid: int64(u.GID)}
	for _, g := range u.Groups {
		l.SupplementalGroups = append(l.SupplementalGroups, int64(g))
	}
	return &runtimeapi.ContainerUser{Linux: l}
}

// maxID is what libcontainer takes for a uid or gid.
const maxID = math.MaxInt32

func (b *builder) user() error {
	ask, err := b.userString()
	if err != nil {
		return err
	}
	policy := b.sc.GetSupplementalGroupsPolicy()
	if policy != runtimeapi.SupplementalGroupsPolicy_Merge && policy != runtimeapi.SupplementalGroupsPolicy_Strict {
		return invalid("linux.security_context.supplemental_groups_policy", policy, "Merge or Strict")
	}
	files := userFiles{kernel: b.kernel, rootfs: b.in.Rootfs}
	u, err := lookupUser(ask, policy == runtimeapi.SupplementalGroupsPolicy_Merge, &files)
	if err != nil {
		return err
	}
	for _, g := range b.sc.GetSupplementalGroups() {
		if g < 0 || g > maxID {
			return invalid("linux.security_context.supplemental_groups", g, "0 to %d", maxID)
		}
		u.Groups = append(u.Groups, uint32(g))
	}
	slices.Sort(u.Groups)
	u.Groups = slices.Compact(u.Groups)
	b.usr = u
	b.spec.Process.User = specs.User{UID: u.UID, GID: u.GID, AdditionalGids: u.Groups}
	return nil
}

// userString combines run_as_username, run_as_user, run_as_group and the
// image's USER into "user[:group]"; "" is root.
func (b *builder) userString() (string, error) {
	name, uid, gid := b.sc.GetRunAsUsername(), b.sc.GetRunAsUser(), b.sc.GetRunAsGroup()
	for f, v := range map[string]*runtimeapi.Int64Value{"run_as_user": uid, "run_as_group": gid} {
		if v != nil && (v.GetValue() < 0 || v.GetValue() > maxID) {
			return "", invalid("linux.security_context."+f, v.GetValue(), "0 to %d", maxID)
		}
	}
	if strings.ContainsAny(name, ":\x00") {
		return "", invalid("linux.security_context.run_as_username", name, "a user name without ':'")
	}
	user := name
	if user == "" && uid != nil {
		user = strconv.FormatInt(uid.GetValue(), 10)
	}
	switch {
	case user == "" && gid != nil:
		return "", invalid("linux.security_context.run_as_group", gid.GetValue(), "unset without run_as_user or run_as_username")
	case user == "":
		return b.image.User, nil
	case gid != nil:
		return user + ":" + strconv.FormatInt(gid.GetValue(), 10), nil
	}
	return user, nil
}

// lookupUser resolves "user[:group]", each a number or a name. A number that
// passwd does not know has group 0. merge adds the groups that /etc/group
// lists the user in. The primary group is always among the groups.
func lookupUser(ask string, merge bool, files *userFiles) (*User, error) {
	userPart, groupPart, _ := strings.Cut(ask, ":")
	if strings.Contains(groupPart, ":") {
		return nil, invalid("user", ask, "user or user:group")
	}
	uid, isUID, err := numericID("user", userPart)
	if err != nil {
		return nil, err
	}
	gid, isGID, err := numericID("group", groupPart)
	if err != nil {
		return nil, err
	}
	if userPart == "" {
		isUID = true
	}

	u := &User{UID: uid}
	entry, found, err := files.user(func(e passwdEntry) bool {
		if isUID {
			return e.uid == uid
		}
		return e.name == userPart
	})
	switch {
	case err != nil:
		return nil, err
	case found:
		u.UID, u.GID = entry.uid, entry.gid
	case !isUID:
		return nil, fmt.Errorf("user %q: no such user in the image's /etc/passwd: %w", userPart, errdefs.ErrNotFound)
	}
	switch {
	case isGID:
		u.GID = gid
	case groupPart != "":
		g, found, err := files.group(groupPart)
		if err != nil {
			return nil, err
		}
		if !found {
			return nil, fmt.Errorf("group %q: no such group in the image's /etc/group: %w", groupPart, errdefs.ErrNotFound)
		}
		u.GID = g
	}
	u.Groups = []uint32{u.GID}
	if merge && found {
		more, err := files.groupsOf(entry.name)
		if err != nil {
			return nil, err
		}
		u.Groups = append(u.Groups, more...)
	}
	return u, nil
}

// numericID parses s as an id; ok is false for a name.
func numericID(what, s string) (id uint32, ok bool, err error) {
	if s == "" || strings.Trim(strings.TrimPrefix(s, "-"), "0123456789") != "" || s == "-" {
		return 0, false, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > maxID {
		return 0, false, invalid(what, s, "0 to %d", maxID)
	}
	return uint32(n), true, nil
}

// userFiles reads passwd and group of one rootfs, each at most once.
type userFiles struct {
	kernel        Kernel
	rootfs        string
	passwd, grp   []byte
	passwdRead    bool
	groupFileRead bool
}

func (f *userFiles) user(match func(passwdEntry) bool) (passwdEntry, bool, error) {
	if !f.passwdRead {
		data, err := f.read("/etc/passwd")
		if err != nil {
			return passwdEntry{}, false, err
		}
		f.passwd, f.passwdRead = data, true
	}
	for line := range bytes.Lines(f.passwd) {
		if e, ok := parsePasswd(line); ok && match(e) {
			return e, true, nil
		}
	}
	return passwdEntry{}, false, nil
}

func (f *userFiles) group(name string) (gid uint32, found bool, err error) {
	err = f.eachGroup(func(e groupEntry) bool {
		if e.name == name {
			gid, found = e.gid, true
		}
		return !found
	})
	return gid, found, err
}

func (f *userFiles) groupsOf(user string) (gids []uint32, err error) {
	err = f.eachGroup(func(e groupEntry) bool {
		if e.name != user && slices.Contains(e.members, user) {
			gids = append(gids, e.gid)
		}
		return true
	})
	return gids, err
}

func (f *userFiles) eachGroup(yield func(groupEntry) bool) error {
	if !f.groupFileRead {
		data, err := f.read("/etc/group")
		if err != nil {
			return err
		}
		f.grp, f.groupFileRead = data, true
	}
	for line := range bytes.Lines(f.grp) {
		if e, ok := parseGroup(line); ok && !yield(e) {
			return nil
		}
	}
	return nil
}

func (f *userFiles) read(name string) ([]byte, error) {
	data, err := f.kernel.ReadInRootfs(f.rootfs, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s of the image: %w", name, err)
	}
	return data, nil
}

type passwdEntry struct {
	name     string
	uid, gid uint32
}

// parsePasswd parses "name:password:uid:gid:...". A line whose ids are not
// numbers in range is no entry: taking it as 0 would make its user root.
func parsePasswd(line []byte) (passwdEntry, bool) {
	f := strings.Split(string(bytes.TrimSpace(line)), ":")
	if len(f) < 4 || f[0] == "" || f[0][0] == '#' {
		return passwdEntry{}, false
	}
	uid, ok1, err1 := numericID("uid", f[2])
	gid, ok2, err2 := numericID("gid", f[3])
	if !ok1 || !ok2 || err1 != nil || err2 != nil {
		return passwdEntry{}, false
	}
	return passwdEntry{name: f[0], uid: uid, gid: gid}, true
}

type groupEntry struct {
	name    string
	gid     uint32
	members []string
}

// parseGroup parses "name:password:gid:member,member".
func parseGroup(line []byte) (groupEntry, bool) {
	f := strings.Split(string(bytes.TrimSpace(line)), ":")
	if len(f) < 3 || f[0] == "" || f[0][0] == '#' {
		return groupEntry{}, false
	}
	gid, ok, err := numericID("gid", f[2])
	if !ok || err != nil {
		return groupEntry{}, false
	}
	e := groupEntry{name: f[0], gid: gid}
	if len(f) > 3 && f[3] != "" {
		e.members = strings.Split(f[3], ",")
	}
	return e, true
}
