# Sourced by the scripts here: finds a Python, makes the environment, installs the package quietly (demo.sh, test.sh);
# prints a command instead of running it (gke.sh, tpu_vm.sh); runs each step once (mini.sh, mixture.sh).

venv="${DEEPASMR_VENV:-.venv}"

# Prints the first Python of version 3.11 or later.
find_python() {
  local candidate
  for candidate in ${DEEPASMR_PYTHON:-} python3.12 python3.13 python3.11 python3 python; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "no Python 3.11 or later with venv was found; install one (Debian: apt install python3-venv)" \
    "or name it: DEEPASMR_PYTHON=/path/to/python3" >&2
  return 1
}

# make_environment SPEC: an environment in $venv that has the package of this folder with these extras. One that has them
# already, installed after the last change of setup.py, is left alone: that needs no network.
make_environment() {
  if [ ! -x "$venv/bin/python" ]; then
    local python
    python="$(find_python)"
    echo "making an environment in $venv with $("$python" --version) ..."
    "$python" -m venv "$venv"
  fi
  local stamp="$venv/installed"
  if [ "$stamp" -nt setup.py ] && [ "$(cat "$stamp")" = "$PWD $1" ]; then
    return
  fi
  echo "installing (a minute or two the first time) ..."
  rm -f "$stamp"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$1"
  echo "$PWD $1" >"$stamp"
}

# do_it COMMAND: runs it, or prints it, quoted, where $dry is set.
do_it() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# step NAME COMMAND: runs the command once; $runs notes those that are done.
step() {
  local name="$1"
  shift
  if [ -f "$runs/$name.done" ]; then
    echo "== $name: done before"
    return
  fi
  echo "== $name: $*"
  "$@"
  touch "$runs/$name.done"
}

# whole OUT COMMAND: runs a command that makes the dataset OUT. Exit code 1 is as good as 0 if OUT is there as a whole:
# records were left out, which the command names.
whole() {
  local out="$1" code=0
  shift
  "$@" || code=$?
  [ "$code" != 1 ] || [ ! -f "$out/dataset_info.json" ] || code=0
  return "$code"
}
