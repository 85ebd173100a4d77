#!/usr/bin/env bash
# The linter, the formatting check, the type checker and the tests (with --all the slow ones too), in an environment that it makes;
# arguments go to pytest.
#
#     bash scripts/test.sh
#     bash scripts/test.sh tests/test_losses.py -k plackett
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
setup_environment test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# one thread per process and one process per core: a file's tests share their models
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "$(.venv/bin/python -c 'import os; print(min(8, os.cpu_count()))')" --dist loadfile "$@"
