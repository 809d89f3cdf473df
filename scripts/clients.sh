#!/usr/bin/env bash
# Makes in folder $2, with python $1, an environment for each client of tests/clients, and installs Node's in place.
# An environment whose requirements have not changed is left as it is.
set -u
python=$1
folder=$2
here=tests/clients

fail() {
  printf 'clients: %s\n' "$1" >&2
  exit 1
}

install() { # name, file, pip's further options: into the name's environment, what pip says into its log
  "$folder/$1/bin/python" -m pip install -q --progress-bar off --no-compile -r "$2" "${@:3}" >>"$folder/$1.log" 2>&1 ||
    fail "$1: $(grep -m1 '^ERROR' "$folder/$1.log" || echo 'pip failed') (details in $folder/$1.log)"
}

command -v npm >/dev/null || fail "no npm: install Node 18 or later (Debian and Ubuntu: apt-get install nodejs npm)"
mkdir -p "$folder"
for file in "$here"/requirements/*.txt; do
  name=$(basename "$file" .txt)
  bare=$here/requirements/$name.no-deps # packages whose own requirements are not wanted
  [ -e "$bare" ] || bare=
  cat "$file" $bare | cmp -s - "$folder/$name/installed" && continue
  echo "clients: $name ($(grep -c == "$file") packages)"
  "$python" -m venv --clear "$folder/$name" || fail "cannot make $folder/$name with '$python'"
  install "$name" "$file"
  [ -z "$bare" ] || install "$name" "$bare" --no-deps
  cat "$file" $bare >"$folder/$name/installed"
done
cmp -s "$here/node/package-lock.json" "$here/node/node_modules/.installed" && exit
echo "clients: node ($(node --version))"
npm ci --prefix "$here/node" --no-audit --no-fund --ignore-scripts >"$folder/node.log" 2>&1 ||
  fail "node: npm ci failed (details in $folder/node.log)"
cp "$here/node/package-lock.json" "$here/node/node_modules/.installed"
