#!/usr/bin/env bash
# Every result of README's Fashion-MNIST tables, from the real data to the tables and plots:
#     bash scripts/reproduce.sh --small     # a laptop's CPU, some hours
#     bash scripts/reproduce.sh             # a GPU, the published network
# It goes on where it was stopped. `--list` prints the commands, `--help` says the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
exec python scripts/reproduce.py "$@"
