#!/usr/bin/env bash
# Run the tests in a virtual environment that this script creates. Arguments go to pytest:
#     bash scripts/test.sh -m "not slow"    # at most three minutes
#     bash scripts/test.sh -k parity
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_environment requirements.txt tests/requirements.txt scripts/requirements.txt
# Two processes, a file of tests in each: many tests wait, for a time limit or for a program that has one thread.
exec "$PYTHON" -m pytest tests -q --numprocesses 2 --dist loadfile "$@"
