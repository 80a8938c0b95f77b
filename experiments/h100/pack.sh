#!/bin/sh
# A folder with all that run.sh needs, for a machine that has a GPU but not this repository: ./run.sh in it.
# usage: experiments/h100/pack.sh FOLDER [KL]   (from the repository root, after make ARCH=x86-64-v3)
set -eu
to=$1
kl=${2:-build/kl}
mkdir -p "$to/lib" "$to/tests/golden" "$to/experiments/h100"
cp "$kl" "$to/kl"
strip "$to/kl"
cp -r tests/golden/kda "$to/tests/golden/"
cp experiments/h100/run.sh "$to/experiments/h100/"
ldd "$kl" | awk '$3 ~ /(cjson|pcre2|openblas|gfortran|quadmath|gomp)/ { print $3 }' | while read -r library; do
    cp -L "$library" "$to/lib/"
done
cat >"$to/run.sh" <<'END'
#!/bin/sh
cd "$(dirname "$0")" && LD_LIBRARY_PATH="$PWD/lib:${LD_LIBRARY_PATH:-}" exec sh experiments/h100/run.sh ./kl "${1:-out}" "${2:-verify sanitize bench}"
END
chmod +x "$to/run.sh" "$to/experiments/h100/run.sh"
du -sh "$to"
