#!/usr/bin/env bash
# Check it: makes an environment, installs the package with what the tests need, runs ruff and the tests.
#   bash launch/test.sh [PYTEST ARGUMENTS]
# DEEPASMR_VENV: place of the environment (default .venv). DEEPASMR_PYTHON: the Python to make it with.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment ".[dev,zh,judge,normalize]"
echo "ruff ..."
"$venv/bin/ruff" check setup.py deepasmr_jax configs data launch notebooks tests # not what a user keeps beside them
echo "pytest ..."
"$venv/bin/pytest" -n 2 --dist loadfile --no-loadscope-reorder --durations=25 "$@"
