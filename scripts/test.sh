#!/usr/bin/env bash
# The test suite, in a virtual environment that this script makes. Arguments go to pytest:
#     bash scripts/test.sh -k parity
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_environment requirements.txt tests/requirements.txt scripts/requirements.txt
exec "$PYTHON" -m pytest tests -q "$@"
