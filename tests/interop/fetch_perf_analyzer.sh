#!/usr/bin/env bash
# Puts NVIDIA's perf_analyzer into a folder, as FOLDER/perf_analyzer, with the libraries that it
# needs: it is built for a newer C library than Debian 12 has, so it gets those of Debian trixie,
# from the mirror that this Debian machine uses. Nothing is installed. For x86-64.
#
#     tests/interop/fetch_perf_analyzer.sh build/perf_analyzer
set -euo pipefail
out=$(realpath -m "$1")
python=${PYTHON:-python3}
mirror=$( (cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null || true) |
  sed -nE 's/^(URIs:|deb (\[[^]]*\] )?) *([^ ]+).*/\3/p' | grep -m 1 '/debian/*$')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$work" \
  --platform manylinux_2_38_x86_64 --python-version 3.12 perf-analyzer==2.60.0
mkdir -p "$work"/lists/partial "$work"/cache/archives/partial "$work"/files
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" > "$work/list"
apt=(apt-get -qq -o "Dir::Etc::sourcelist=$work/list" -o Dir::Etc::sourceparts=-
     -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root)
cd "$work"
"${apt[@]}" update
"${apt[@]}" download libc6 libstdc++6 libgcc-s1 libssl3t64 zlib1g libzstd1
for package in *.deb; do dpkg-deb -x "$package" files; done
python3 -m zipfile -e perf_analyzer-*.whl wheel
mkdir -p "$out/lib"
cp -a files/usr/lib/x86_64-linux-gnu/*.so* "$out/lib/"
install -m 755 wheel/perf_analyzer/bin/perf_analyzer "$out/perf_analyzer.bin"
cat > "$out/perf_analyzer" <<'RUN'
#!/bin/sh
here=$(dirname "$(realpath "$0")")
exec "$here/lib/ld-linux-x86-64.so.2" --library-path "$here/lib" "$here/perf_analyzer.bin" "$@"
RUN
chmod +x "$out/perf_analyzer"
"$out/perf_analyzer" --version
