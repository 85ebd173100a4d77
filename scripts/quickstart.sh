#!/usr/bin/env bash
# SFT, then DPO, from a fresh machine to a report: needs Python 3.10 or newer with pip, takes arguments of quickstart.py.
#
#     bash scripts/quickstart.sh
set -euo pipefail
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$scripts/environment.sh"
setup_environment plot
exec "$scripts/../.venv/bin/python" "$scripts/quickstart.py" "$@"
