# Sourced by quickstart.sh and test.sh.
#
# setup_environment EXTRA makes .venv in the repository root with this project and one group of its optional
# dependencies (plot, test). A later call returns at once unless pyproject.toml or constraints.txt have changed.

setup_environment() {
    local extra="$1" root python stamp wanted
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    python="${PYTHON:-python3}"
    stamp="$root/.venv/.installed-$extra"
    wanted="$(cd "$root" && cksum pyproject.toml constraints.txt)" || return 2
    if [ -x "$root/.venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return 0
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: $python is not Python 3.10 or newer; install one and name it: PYTHON=/path/to/python3 bash ..." >&2
        return 2
    fi
    if ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
        if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "error: $python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
            return 2
        fi
        echo "making $root/.venv"
        "$python" -m venv --clear "$root/.venv" || return 2
    fi
    # the stamp comes last, so that an interrupted installation is taken up again
    "$root/.venv/bin/python" -m pip install --disable-pip-version-check -e "$root[$extra]" -c "$root/constraints.txt" &&
        echo "$wanted" >"$stamp"
}
