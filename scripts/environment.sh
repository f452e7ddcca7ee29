# Sourced by demo.sh and test.sh, with the requirement files as arguments: a Python environment that has them.
# The active environment (venv or conda) is used when there is one; else .venv is made on first use.

if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    echo "environment: the active one, ${VIRTUAL_ENV:-$CONDA_PREFIX}"
    constraints=()
else
    if [ ! -x .venv/bin/python ]; then
        python=$(command -v python3 || command -v python || true)
        if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "error: Python 3.11 or newer is needed (python3 on the PATH)" >&2
            exit 2
        fi
        echo "environment: making .venv (first use)"
        "$python" -m venv .venv
    else
        echo "environment: .venv"
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
    constraints=(-c constraints.txt)
fi

stamp="${VIRTUAL_ENV:-$CONDA_PREFIX}/.beit-installed-$(cat "$@" constraints.txt | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    requirements=()
    for file in "$@"; do requirements+=(-r "$file"); done
    echo "environment: installing what is missing from $* (torch with its CUDA libraries: several GB, some minutes)"
    if ! log=$(python -m pip install --disable-pip-version-check "${requirements[@]}" ${constraints[@]+"${constraints[@]}"} 2>&1); then
        echo "$log" | tail -n 15 >&2
        echo "error: pip could not install $*; with another torch already there, install by hand and try again" >&2
        exit 2
    fi
    touch "$stamp"
fi
