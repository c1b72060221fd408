#!/usr/bin/env bash
# Puts the headers of ONNX Runtime 1.21 into a folder: those of Debian trixie's libonnxruntime-dev,
# from the mirror that this Debian machine uses. Nothing is installed.
#
#     plugins_trt/fetch_onnxruntime_headers.sh build/onnxruntime
set -euo pipefail
out=$(realpath -m "$1")
mirror=$( (cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null || true) |
  sed -nE 's/^(URIs:|deb (\[[^]]*\] )?) *([^ ]+).*/\3/p' | grep -m 1 '/debian/*$')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/lists/partial "$work"/cache/archives/partial
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" > "$work/list"
apt=(apt-get -qq -o "Dir::Etc::sourcelist=$work/list" -o Dir::Etc::sourceparts=-
     -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root)
cd "$work"
"${apt[@]}" update
"${apt[@]}" download libonnxruntime-dev
dpkg-deb -x libonnxruntime-dev_*.deb unpacked
mkdir -p "$out"
cp -r unpacked/usr/include/onnxruntime "$out/include"
cp unpacked/usr/share/doc/libonnxruntime-dev/copyright "$out/"
