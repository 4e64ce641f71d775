#!/usr/bin/env bash
# Style and tests of the program's own files, in the repository's own environment:
#     bash scripts/test.sh [arguments of pytest]
# such as tests/test_files.py, or -k WORDS for the tests whose names fit. All of them take five to ten minutes
# on two cores: one process per core, eight at most, takes one file after another (-n 0: this process alone).
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
source scripts/venv.sh
ruff check --config pyproject.toml buffer distill utils scripts tests
export OMP_NUM_THREADS=1  # otherwise each process would take all cores
# In the order of the files: those with the most tests, which pytest-xdist puts first, do not take longest.
python -m pytest -c pyproject.toml --confcutdir=tests --numprocesses=auto --maxprocesses=8 --dist=loadfile \
    --no-loadscope-reorder "$@"
