#!/usr/bin/env bash
# Resolves `.[dev]` in a new environment made by python $1, keeps PyTorch's version, and writes requirements.lock.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
torch=${TORCH:-$(grep '^torch==' requirements.lock)}
echo "lock: resolving with $torch (another: make lock TORCH=torch==X.Y.Z); a few minutes"
"$1" -m venv "$folder"
"$folder/bin/python" -m pip install -q --progress-bar off '.[dev]' "$torch"
{
  echo "# Exact versions of the whole environment, which \`make\` installs from. Made by a clean resolution of \`.[dev]\` for"
  echo "# Python 3.11 on Linux x86-64; to renew it: \`make lock\`. PyTorch carries no local version tag, so that the same line"
  echo "# takes whichever build (CPU or CUDA) the package index in use offers."
  "$folder/bin/python" -m pip freeze --all | grep -vE '^(pip==|focusllava |nvidia-|triton==|cuda-)' |
    sed 's/^\(torch==[0-9.]*\)+.*/\1/' | sort -f
} >"$folder/requirements.lock"
mv "$folder/requirements.lock" requirements.lock
echo "lock: $(grep -c == requirements.lock) packages"
