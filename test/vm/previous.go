package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// previousCommit is an earlier state of this tree with other records, tables
// and unit: what hosts are upgraded from.
const previousCommit = "80d86aae7e1f3cb54a3e539ded69b5d93905dd70"

// ensurePrevious makes the package of an earlier commit, unless the cache has
// it. A clone without that commit upgrades from the same tree with a lower
// version instead.
func ensurePrevious(ctx context.Context, cache, commit string) (string, error) {
	deb := filepath.Join(cache, "previous-"+commit[:min(12, len(commit))]+".deb")
	if _, err := os.Stat(deb); err == nil {
		return deb, nil
	}
	if command(ctx, "git", "cat-file", "-e", commit+"^{commit}") != nil {
		fmt.Printf("this clone does not have commit %s: the upgrade is from the same build with another version\n", commit)
		deb = filepath.Join(cache, "previous-same.deb")
		return deb, command(ctx, "make", "deb", "VERSION=0.0.0", "DEB="+deb)
	}
	fmt.Printf("building the package that is upgraded, of commit %s (kept for the next run)\n", commit)
	src, err := os.MkdirTemp(cache, "previous-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(src)
	archive := src + ".tar"
	defer os.Remove(archive)
	if err := command(ctx, "git", "archive", "-o", archive, commit); err != nil {
		return "", err
	}
	if err := command(ctx, "tar", "-C", src, "-xf", archive); err != nil {
		return "", err
	}
	if err := command(ctx, "make", "-C", src, "deb", "VERSION=0.0.0", "DEB="+deb+".new"); err != nil {
		return "", err
	}
	return deb, os.Rename(deb+".new", deb)
}
