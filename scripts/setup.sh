#!/usr/bin/env bash
# Makes the virtual environment $1 from python $2 and installs requirements.lock and this tree into it.
set -u
venv=$1
python=$2
log=$venv.log

fail() {
  printf 'setup: %s\n' "$1" >&2
  exit 1
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "no Python 3.11 as '$python': install it, or name another: make PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "'$python' has no venv module: install it (Debian and Ubuntu: apt-get install python3.11-venv)"
command -v "${CXX:-g++}" >/dev/null || command -v clang++ >/dev/null ||
  fail "no C++ compiler: install g++ (Debian and Ubuntu: apt-get install g++)"
free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
if [ ! -e "$venv/bin/ray" ] && [ "$free_kb" -lt $((4 * 1024 * 1024)) ]; then
  fail "only $((free_kb / 1024)) MB free here: 4 GB are needed (a CUDA build of PyTorch takes 8 GB)"
fi

echo "setup: installing $(grep -c == requirements.lock) packages into $venv, once (1 to 5 minutes; details in $log)"
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  clear=
  [ -e "$venv/pyvenv.cfg" ] && clear=--clear # half made, by a run that was stopped; nothing else is ever cleared
  "$python" -m venv $clear "$venv" || fail "cannot make $venv with '$python'"
fi
[ -t 1 ] && tty=1 || tty=0
# The package under way: one line rewritten in place on a terminal, every twentieth elsewhere.
show() {
  awk -v tty="$tty" '
    /^Collecting/ { n++; if (tty || n % 20 == 1) { printf "setup: %3d  %-60.60s%s", n, $2, tty ? "\r" : "\n"; fflush() } }
    /^Installing collected/ { printf "setup: unpacking %-60s\n", "(about a minute)"; fflush() }'
}
"$venv/bin/python" -m pip install --progress-bar off --no-compile -r requirements.lock 2>&1 | tee "$log" | show
status=${PIPESTATUS[0]}
if [ "$status" -ne 0 ]; then
  if grep -qE 'No space left' "$log"; then
    fail "the disk is full: free 4 GB and run make again"
  elif grep -qE 'name resolution|NewConnectionError|Timeout|unreachable|ProxyError|from versions: none' "$log"; then
    fail "the package index cannot be reached: connect, or set pip's index, and run make again (details in $log)"
  fi
  fail "$(grep -m1 '^ERROR' "$log" || echo "pip failed with status $status") (details in $log)"
fi
"$venv/bin/python" -m pip install -q --no-deps --no-build-isolation -e . >>"$log" 2>&1 ||
  fail "cannot install this tree: $(tail -n 1 "$log")"
echo "setup: compiling the CPU kernels"
"$venv/bin/python" -c 'from services.compute import native; native.build(native.cache_folder())' >>"$log" 2>&1 ||
  echo "setup: they cannot be compiled here, slower ones will be used (details in $log)"
echo "setup: done"
