# Sourced by the other scripts, in the repository's directory.
#
# `choose_python` sets PYTHON, unless it is set, for a script that installs nothing: the active environment's python3,
# else that of $ARCFACE_VENV (default: .venv, where demo.sh installs) if it exists, else python3.
#
# `setup_environment FILE...` creates a virtual environment in $ARCFACE_VENV (default:
# .venv), installs these requirements files, and sets PYTHON to its interpreter. It installs them again only when a
# file has changed.

choose_python() {
    local venv="${ARCFACE_VENV:-.venv}"
    [ -z "${PYTHON:-}" ] || return 0
    PYTHON=python3
    # conda's "base" is always active, and rarely on purpose.
    if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ] && [ -x "$venv/bin/python3" ]; then
        PYTHON="$venv/bin/python3"
    fi
}

setup_environment() {
    local venv="${ARCFACE_VENV:-.venv}" checksum
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: python3 3.10 or newer is required (found: $(python3 --version 2>&1 || true))" >&2
        exit 2
    fi
    if [ ! -x "$venv/bin/python3" ]; then
        if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
            echo "error: $venv is not a virtual environment; set ARCFACE_VENV to a new directory" >&2
            exit 2
        fi
        echo "+ python3 -m venv $venv"
        if ! python3 -m venv "$venv"; then
            rm -rf "$venv"
            echo "error: python3 cannot create virtual environments; on Debian: apt-get install python3-venv" >&2
            exit 2
        fi
    fi
    unset PYTHONPATH PYTHONHOME  # torchvision does not import with a torch from elsewhere
    PYTHON="$(cd "$venv/bin" && pwd)/python3"
    checksum="$(cat "$@" | sha256sum)"
    if ! grep -qsxF "$checksum" "$venv/installed-requirements"; then
        echo "+ pip install$(printf -- ' -r %s' "$@")    (about 5 GB with PyTorch; takes minutes)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check $(printf -- ' -r %s' "$@")
        echo "$checksum" >> "$venv/installed-requirements"
    fi
}
