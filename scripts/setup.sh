# Sourced by demo.sh and test.sh: `setup_environment FILE...` makes a virtual environment with these requirements files
# and sets PYTHON to its interpreter. It lies in $ARCFACE_VENV, or .venv; nothing is installed again until a file
# changes.

setup_environment() {
    local venv="${ARCFACE_VENV:-.venv}" wanted
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: python3 of version 3.10 or newer is needed (found: $(python3 --version 2>&1 || true))" >&2
        exit 2
    fi
    if [ ! -x "$venv/bin/python3" ]; then
        if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
            echo "error: $venv holds something else than a virtual environment; set ARCFACE_VENV to a new directory" >&2
            exit 2
        fi
        echo "+ python3 -m venv $venv"
        if ! python3 -m venv "$venv"; then
            rm -rf "$venv"
            echo "error: python3 cannot make virtual environments; Debian, Ubuntu: apt-get install python3-venv" >&2
            exit 2
        fi
    fi
    unset PYTHONPATH PYTHONHOME  # torchvision fails at import beside another torch than its own
    PYTHON="$(cd "$venv/bin" && pwd)/python3"
    wanted="$(cat "$@" | sha256sum)"
    if ! grep -qsxF "$wanted" "$venv/installed-requirements"; then
        echo "+ pip install$(printf -- ' -r %s' "$@")    (with PyTorch about 5 GB: some minutes)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check $(printf -- ' -r %s' "$@")
        echo "$wanted" >> "$venv/installed-requirements"
    fi
}
