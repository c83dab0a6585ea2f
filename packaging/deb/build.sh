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
install -D -m 644 "$here/../../LICENSE" "$tree/usr/share/doc/nodeagent/copyright"
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
