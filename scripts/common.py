"""What scripts have in common: a command line, and a report as JSON."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from utils.files import check_output, given, write_json
from utils.program.command_line import Parser
from utils.program.machine import environment


def script_parser(description: str, json: str = "", key: str = "environment") -> Parser:
    """
    Args:
        json: what `--json` writes; empty: there is no such option.
        key: by which one that it wrote before is known.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    if json:
        parser.add_argument("--json", type=output("--json", f"json:{key}"), metavar="FILE",
                            help=f"write {json} to this file")
    return parser


def output(option: str, kind: str) -> Callable[[str], Path]:
    """The type of an option: a file that will be written, refused at once if it cannot be, or if another kind of file
    is there (`utils.files.check_output`)."""
    def checked(path: str) -> Path:
        check_output(option, path, kind, {})
        return given(path)

    return checked


def save_report(path: Path | None, report: dict[str, Any]) -> None:
    """Writes what was measured on the CPU, if that is asked for, with what it was measured by."""
    if path:
        write_json(path, report | {"environment": environment(torch.device("cpu"))})
