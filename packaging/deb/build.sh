#!/bin/sh
# Makes a Debian package of an installed tree:
#
#	build.sh TREE VERSION OUT.deb
#
# TREE is what `make install DESTDIR=TREE PREFIX=/usr` filled; it is changed.
set -eu
tree=$1 version=$2 out=$3
here=$(dirname "$0")

find "$tree/usr/share/man" -type f -name '*.8' -exec gzip -9n {} +
install -D -m 644 "$here/copyright" "$tree/usr/share/doc/nodeagent/copyright"
install -D -m 644 "$here/lintian-overrides" "$tree/usr/share/lintian/overrides/nodeagent"
maintainer=$(sed -n 's/^Maintainer: //p' "$here/control")
printf 'nodeagent (%s) unstable; urgency=medium\n\n  * Built from the tree of this version.\n\n -- %s  %s\n' \
	"$version" "$maintainer" "$(date -R -u -d "@${SOURCE_DATE_EPOCH:-$(date +%s)}")" | gzip -9n > "$tree/usr/share/doc/nodeagent/changelog.gz"
chmod 644 "$tree/usr/share/doc/nodeagent/changelog.gz"
install -d "$tree/DEBIAN"
sed -e "s/@VERSION@/$version/" -e "s/@ARCH@/$(dpkg --print-architecture)/" \
	-e "s/@SIZE@/$(du -sk "$tree" | cut -f1)/" "$here/control" > "$tree/DEBIAN/control"
(cd "$tree" && find etc -type f -printf '/%p\n') > "$tree/DEBIAN/conffiles"
for script in postinst prerm postrm; do
	install -m 755 "$here/$script" "$tree/DEBIAN/$script"
done
(cd "$tree" && find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | sort -z | xargs -0 md5sum) > "$tree/DEBIAN/md5sums"
install -d "$(dirname "$out")"
dpkg-deb --root-owner-group -Zgzip -z6 --build "$tree" "$out" >/dev/null
echo "$out"
