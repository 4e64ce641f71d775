#!/usr/bin/env bash
# Every row of results/FashionMNIST/*/tables.md, from the real data to the tables and plots:
#     bash scripts/reproduce.sh --small     # a laptop's CPU, a small network, some hours
#     bash scripts/reproduce.sh --cpu       # a CPU, the published network, a day
#     bash scripts/reproduce.sh             # a GPU, the published network
# It resumes where it was stopped. --list prints the commands, and `python scripts/reproduce.py --help` says the rest.
set -euo pipefail
source "$(dirname "$0")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
exec python "$root/scripts/reproduce.py" "$@"
