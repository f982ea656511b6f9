#!/usr/bin/env bash
# Hear it: makes an environment, installs the package, renders the demo page. Nothing else is downloaded.
#   bash launch/demo.sh [OUTPUT_FOLDER]     (default out/demo in the repository)
# DEEPASMR_VENV: place of the environment (default .venv). DEEPASMR_PYTHON: the Python to make it with.
set -euo pipefail
case "${1:-}" in -*) sed -n "2,4p" "$0"; exit 0 ;; esac
out="${1:-}"
if [ -n "$out" ] && [ "${out#/}" = "$out" ]; then
  out="$PWD/$out" # in the folder of the caller
fi
cd "$(dirname "$0")/.."
out="${out:-out/demo}"
source launch/environment.sh
make_environment ".[zh,judge]"
echo "speaking ..."
"$venv/bin/deepasmr" demo --out "$out"
