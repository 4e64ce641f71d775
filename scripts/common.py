"""What scripts share: the command line, and the report as JSON."""

import argparse
import contextlib
import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import check_outputs, resolved, write_json
from utils.program.command_line import Parser, not_empty

if TYPE_CHECKING:
    import torch


class ScriptParser(Parser):
    """A script's command line. Output files that cannot be written are refused at once (`check_outputs`).

    Args:
        json: what `--json` writes, by `save_report`; empty: there is no such option.
    """

    def __init__(self, description: str, json: str = "") -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)
        self.register("type", Path, lambda text: Path(not_empty(text)))
        self._kinds: dict[str, str] = {}  # option → kind of its output file
        if json:
            self.add_output("json", report_kind(), f"write {json} to this file")

    def add_output(self, name: str, kind: str, help: str) -> None:
        self._kinds[name] = kind
        self.add_argument(f"--{name}", type=lambda text: resolved(not_empty(text)), metavar="FILE", help=help)

    def parse_args(self, *arguments: Any) -> argparse.Namespace:
        options = super().parse_args(*arguments)
        check_outputs({f"--{name}": getattr(options, name) for name in self._kinds if getattr(options, name)},
                      {f"--{name}": kind for name, kind in self._kinds.items()})
        return options


def positive(text: str, kind: type[float] = int) -> float:
    """The `type` of an option that counts something."""
    with contextlib.suppress(ValueError):
        if 0 < (number := kind(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"{text!r}: give a {'whole' if kind is int else 'finite'} number above 0")


positive_float = partial(positive, kind=float)


def report_kind() -> str:
    """The kind of a file, as `check_outputs` takes it, that `save_report` wrote for this script."""
    return f"json:report_of={Path(sys.argv[0]).name}"


def save_report(path: Path | None, report: dict[str, Any], device: "str | torch.device") -> None:
    """Writes a report, if there is a path for it, with the script's name and the environment of the device."""
    if path:
        import torch  # slow to import, and not needed to parse a command line

        from utils.program.machine import environment

        write_json(path, {"report_of": Path(sys.argv[0]).name} | report
                   | {"environment": environment(torch.device(device))})
