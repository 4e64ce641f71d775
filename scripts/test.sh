#!/usr/bin/env bash
# Style and tests of the program's own files, in the repository's own environment:
#     bash scripts/test.sh [arguments of pytest]
# such as tests/test_files.py, or -k WORDS for the tests whose names fit. All of them take about twenty minutes.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
source scripts/venv.sh
ruff check --config pyproject.toml buffer distill utils scripts tests
python -m pytest -c pyproject.toml --confcutdir=tests "$@"
