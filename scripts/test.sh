#!/usr/bin/env bash
# Style and tests of the program's own files, in the repository's own environment:
#     bash scripts/test.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
ruff check --config pyproject.toml buffer distill utils scripts tests
python -m pytest -c pyproject.toml --confcutdir=tests "$@"
