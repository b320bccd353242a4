#!/usr/bin/env bash
# Run the tests in a virtual environment that this script creates. Arguments go to pytest:
#     bash scripts/test.sh -m "not slow"    # six minutes on two cores
#     bash scripts/test.sh -k parity
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_environment requirements.txt tests/requirements.txt scripts/requirements.txt
# Two processes: many tests wait, for a time limit or for a program that has one thread. More threads than cores would
# wait for one another; those of the programs that tests start do so without using a core.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
exec "$PYTHON" -m pytest tests -q --numprocesses 2 --dist worksteal "$@"
