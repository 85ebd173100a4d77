#!/usr/bin/env bash
# What the papers state, checked: needs Python 3.10 or newer with pip.
#
#     bash scripts/reproduce.sh --exact    # all that needs no language model, in a few minutes: results/, docs/results.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "$*" != "--exact" ]; then
    echo "usage: bash scripts/reproduce.sh --exact" >&2
    exit 2
fi
source scripts/environment.sh
setup_environment plot
.venv/bin/python scripts/bandits.py --output-dir results
.venv/bin/python scripts/results.py
