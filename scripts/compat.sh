#!/bin/sh
# Runs the tests of what leans on transformers' insides with another version of it; the environment stays as it is.
# Usage: scripts/compat.sh PYTHON VERSION
set -eu
python=$1 version=$2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT INT TERM
"$python" -m pip install -q --progress-bar off --no-deps --target "$folder" "transformers==$version"
export PYTHONPATH=".:$folder"
"$python" -c "import sys, transformers; sys.exit(transformers.__version__ != '$version')"
echo "compat: transformers $version"
"$python" -m pytest tests/contract tests/unit/encoder tests/unit/checkpoint/test_import_*.py \
    tests/unit/text/test_prompt*.py tests/unit/training/test_held_share.py
