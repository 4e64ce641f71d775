"""What scripts have in common: a command line, and a report as JSON."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import check_output, given, write_json
from utils.program.command_line import Parser

if TYPE_CHECKING:
    import torch


class ScriptParser(Parser):
    """The command line of a script, whose files to write are refused at once where they cannot be (`check_output`)."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)
        self._kinds: dict[str, str] = {}  # of the files to write, by option

    def add_output(self, name: str, kind: str, help: str) -> None:
        self._kinds[name] = kind
        self.add_argument(f"--{name}", type=given, metavar="FILE", help=help)

    def parse_args(self, *arguments: Any) -> argparse.Namespace:
        options = super().parse_args(*arguments)
        files = {name: getattr(options, name) for name in self._kinds if getattr(options, name)}
        for name, path in files.items():
            check_output(f"--{name}", path, self._kinds[name],
                         {f"--{other}": files[other] for other in files if other != name})
        return options


def script_parser(description: str, json: str = "", key: str = "report_of") -> ScriptParser:
    """
    Args:
        json: what `--json` writes; empty: there is no such option.
        key: by which one that it wrote before is known.
    """
    parser = ScriptParser(description)
    if json:
        parser.add_output("json", f"json:{key}", f"write {json} to this file")
    return parser


def save_report(path: Path | None, report: dict[str, Any], device: "str | torch.device" = "cpu") -> None:
    """Writes what was measured on a device, if that is asked for, with what it was measured by."""
    if path:
        import torch  # which a command line is parsed without

        from utils.program.machine import environment

        write_json(path, {"report_of": Path(sys.argv[0]).name} | report
                   | {"environment": environment(torch.device(device))})
