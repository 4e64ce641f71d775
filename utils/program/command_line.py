"""Command line and YAML → config (`utils.config`); a mistake in either is refused here.

Values come from the defaults, the YAML of `--cfg`, what the given options imply (`known`), and `--key value`; later
sources win, and all are parsed by the same rules. Paths on the command line are relative to the current folder. Paths
in a YAML and in the defaults are relative to the repository's root, where the published `../dataset/` and
`../buffer_storage/` mean `dataset/` and `buffer_storage/`.
"""

import argparse
import os
import shutil
import typing
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, Literal

import yaml

from utils import files
from utils.config import GROUPS, Config, about, defaults, from_root, has_effect, hints_of, is_path, make, path_options
from utils.errors import UserError, note, unknown_names


def parse(config_type: type[Config], description: str, arguments: list[str] | None = None, yaml_file: bool = False,
          known: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Config:
    """The command line (default: `sys.argv`) as a validated config.

    Args:
        yaml_file: accept `--cfg FILE`, a YAML whose keys are options.
        known: options as typed → values of others that they imply, used instead of the defaults.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of bounds, an unreadable YAML.
    """
    config, given = config_of(config_type, typed(config_type, description, arguments, yaml_file), known)
    unused = [name for name in given if not has_effect(config, name)]
    if unused:
        note(f"accepted, but without effect: {', '.join(unused)}")
    return config


def typed(config_type: type, description: str, arguments: list[str] | None = None, yaml_file: bool = False,
          other_defaults: dict[str, Any] | None = None, **more: str) -> dict[str, str]:
    """The options of a command line as typed, by name.

    Args:
        other_defaults: defaults for the help, where they are not those of `config_type`.
        more: further options that name a file, with their help.

    Raises:
        UserError: an unknown option, or an argument that is not an option.
    """
    options, rest = _parser(config_type, description, yaml_file, other_defaults, more).parse_known_args(arguments)
    if rest and rest[0].startswith("--"):
        unknown = [each.split("=")[0] for each in rest if each.startswith("--")]
        raise unknown_names("option", unknown, _useful(config_type, "--"))
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; options are written --key value (see --help)")
    return {name.replace("-", "_"): value for name, value in vars(options).items()}


def config_of(config_type: type[Config], options: dict[str, str],
              known: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> tuple[Config, list[str]]:
    """The config of options as typed, and the names of the options given here or in the YAML.

    Args:
        options: by name; `cfg` is the path of the YAML.
        known: see `parse`.

    Raises:
        UserError: see `parse`.
    """
    options = dict(options)
    path = options.pop("cfg", None)
    hints = hints_of(config_type)
    for name in (name for name, value in options.items() if value == "" and name in hints):
        # Empty would silently mean "unset", or "write nothing".
        if type(None) in typing.get_args(hints[name]) or about(name, config_type)["writes"]:
            raise UserError(f"--{name} '': it is empty; give a value, or leave it out")
    from_yaml = read_yaml(path, config_type) if path is not None else {}
    paths = path_options(config_type)
    root_values = paths | from_yaml
    for name in paths:
        if is_path(name, root_values[name], config_type):
            root_values[name] = from_root(root_values[name])
        if is_path(name, options.get(name), config_type):
            options[name] = os.path.abspath(os.path.expanduser(options[name]))
    others = known(options) if known else {}
    try:
        return make(config_type, **root_values | others | options), [*from_yaml | options]
    except UserError as error:
        name = str(error).split()[0].removeprefix("--")
        if name in from_yaml and name not in options:
            raise UserError(f"--cfg {path}: {error}") from error
        raise


def read_yaml(path: str, config_type: type) -> dict[str, Any]:
    """The options of a `--cfg` file, as text.

    Raises:
        UserError: it cannot be read, is not YAML, or has a key that is unknown or given twice.
    """
    try:
        # The base loader leaves every value as text, so that a YAML and the command line are parsed by the same rules.
        values = files.read_yaml(path, yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"--cfg {path or repr(path)}: {error.strerror}; give the path of a YAML file such as "
                        "configs/MiniFashion/ConvIN/IPC1.yaml") from error
    except ValueError as error:
        raise UserError(f"--cfg {path} {error}") from error
    known = {field.name for field in fields(config_type)}
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        raise UserError(f"--cfg {path}: {unknown_names('key', unknown, _useful(config_type))}")
    return values


def _useful(config_type: type, prefix: str = "") -> list[str]:
    """The options to suggest: those that have an effect."""
    return [prefix + field.name for field in fields(config_type) if about(field.name, config_type)["effect"]]


def not_empty(text: str) -> str:
    """The `type` of a path: an empty one would be the current folder, which nobody means."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a path")
    return text


class Parser(argparse.ArgumentParser):
    """Raises a `UserError` for any mistake on a command line."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see --help)")


def _parser(config_type: type, description: str, yaml_file: bool, other_defaults: dict[str, Any] | None,
            more: dict[str, str]) -> Parser:
    width = min(shutil.get_terminal_size().columns, 100)
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    usage="%(prog)s " + ("--cfg FILE " if yaml_file else "") + "[--key value …]",
                    formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=width))
    if yaml_file:
        parser.add_argument("--cfg", metavar="FILE", required=True, help="YAML of options; --key value overrides it")
    for name, text in more.items():
        parser.add_argument(f"--{name}", type=not_empty, metavar="FILE", help=text)
    default = defaults(config_type) | (other_defaults or {})
    groups = {group: parser.add_argument_group(f"{group} options") for group in GROUPS}
    for field in sorted(fields(config_type), key=lambda field: not field.default.json_schema_extra["effect"]):
        extra = about(field.name, config_type)
        hint = hints_of(config_type)[field.name]
        shown = default[field.name]
        text = extra["help"] + ("" if extra["effect"] else " (no effect)") + (
            "" if shown == "" else f" [{'unset' if shown is None else shown}]")
        metavar = "|".join(typing.get_args(hint)) if typing.get_origin(hint) is Literal else field.name.upper()
        optional = {"nargs": "?", "const": "True"} if hint is bool else {}
        groups[extra["group"]].add_argument(f"--{field.name}", metavar=metavar, help=text.replace("%", "%%"),
                                            **optional)
    return parser
