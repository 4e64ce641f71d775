"""What scripts have in common: a command line, and a report as JSON."""

import argparse
from pathlib import Path
from typing import Any

import torch

from utils.files import check_writable, given, write_json
from utils.program.command_line import Parser
from utils.program.machine import environment


def script_parser(description: str, json: str = "") -> Parser:
    """
    Args:
        json: what `--json` writes; empty: there is no such option.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    if json:
        parser.add_argument("--json", type=writable, metavar="FILE", help=f"write {json} to this file")
    return parser


def writable(path: str) -> Path:
    """The type of an option: a file that will be written, refused at once if it cannot be."""
    check_writable(path)
    return given(path)


def save_report(path: Path | None, report: dict[str, Any]) -> None:
    """Writes what was measured on the CPU, if that is asked for, with what it was measured by."""
    if path:
        write_json(path, report | {"environment": environment(torch.device("cpu"))})
