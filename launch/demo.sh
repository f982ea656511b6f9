#!/usr/bin/env bash
# Hear it: makes an environment, installs the package, renders the demo page. Nothing else is downloaded.
#   bash launch/demo.sh [OUTPUT_FOLDER]
# DEEPASMR_VENV: place of the environment (default .venv). DEEPASMR_PYTHON: the Python to make it with.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-out/demo}"
source launch/environment.sh
make_environment ".[zh,judge]"
echo "speaking ..."
"$venv/bin/deepasmr" demo --out "$out"
