#!/bin/sh
# Builds the training text.  usage: make_text.sh OUT.txt
# Takes the novels from the installed Debian package r-cran-janeaustenr, from the .deb
# named in $DEB, or downloads the .deb (it is unpacked, not installed: no R is needed).
set -eu

out=${1:?usage: make_text.sh OUT.txt}
here=$(cd "$(dirname "$0")" && pwd)
package=r-cran-janeaustenr
rdb=usr/lib/R/site-library/janeaustenr/data/Rdata.rdb
want=e504a5057d48f1adeb48e0ed206c19c5aca6475f58a523a0c2b09033aff1ad4b

tmp=$(mktemp -d)
trap 'rm -rf "$tmp" "$out.part"' EXIT
if [ -z "${DEB:-}" ] && [ -f "/$rdb" ]; then
    root=
else
    if [ -z "${DEB:-}" ]; then
        (cd "$tmp" && apt-get -q -o APT::Sandbox::User=root download "$package" >&2)
        DEB=$(ls "$tmp"/"$package"_*.deb)
    fi
    dpkg-deb -x "$DEB" "$tmp/root"
    root=$tmp/root
fi

perl "$here/novels.pl" "$root/$rdb" >"$out.part"
got=$(sha256sum <"$out.part" | cut -d' ' -f1)
if [ "$got" != "$want" ]; then
    echo "make_text.sh: text has sha256 $got, expected $want: the package's data changed" >&2
    exit 1
fi
mv "$out.part" "$out"
echo "$out: $(wc -c <"$out") bytes, $(wc -w <"$out") words"
