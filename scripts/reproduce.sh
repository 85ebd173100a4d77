#!/usr/bin/env bash
# What the papers state, checked: needs Python 3.10 or newer with pip.
#
#     bash scripts/reproduce.sh            # everything: results/ and docs/results.md; what is finished is not repeated
#     bash scripts/reproduce.sh --quick    # one seed of some experiments: the same in runs/quick/
#     bash scripts/reproduce.sh --exact    # all that needs no language model, in a few minutes: results/, docs/results.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=results
page=docs/results.md
options=()
programs=(scripts/experiments/[a-z]*.py)
case "$*" in
    "") ;;
    --quick)
        results=runs/quick
        page=runs/quick/results.md
        options=(--quick)
        ;;
    --exact) programs=() ;;
    *)
        echo "usage: bash scripts/reproduce.sh [--quick | --exact]" >&2
        exit 2
        ;;
esac
source scripts/environment.sh
setup_environment plot
SECONDS=0  # counted by the shell
.venv/bin/python scripts/bandits.py --output-dir "$results"
for program in ${programs[@]+"${programs[@]}"}; do
    .venv/bin/python "$program" --output-dir "$results" ${options[@]+"${options[@]}"}
done
.venv/bin/python scripts/results.py --results-dir "$results" --output "$page"
echo "$((SECONDS / 60)) min $((SECONDS % 60)) s in all"
