"""Configs made from text or typed values, and the meaning of their values.

`1e-5` is a number, `False` is false, `None` and `null` mean no value.
"""

import contextlib
import os
import re
import reprlib
import typing
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from utils.config.options import HOW_MUCH, OWN_SIZES, DataConfig
from utils.errors import UserError, shortened
from utils.files import REPOSITORY

Config = TypeVar("Config", bound=DataConfig)


def make(config_type: type[Config], **values: Any) -> Config:
    """A config from values given as text, numbers or lists.

    Raises:
        UserError: a value is wrong; the message names the first such option and what is allowed.
    """
    try:
        return config_type(**{name: _spelt(name, value, config_type) for name, value in values.items()})
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else "config"
        message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
        message = message.split(", unable")[0].replace("String should have", "it must have")
        message = message.replace("a valid boolean", "True or False")
        if isinstance(bound := next(iter(problem.get("ctx", {}).values()), None), float):
            message = re.sub(r"[\d.]+$", f"{bound:g}", message)  # 1e-10 rather than all its zeros
        value = values.get(name) if isinstance(values.get(name), str) else reprlib.repr(values.get(name))
        raise UserError(f"--{name} {shortened(value) or repr(value)}: {message}") from None


def as_dict(config: DataConfig) -> dict[str, Any]:
    """All options by name, ready for YAML or JSON."""
    return {field.name: getattr(config, field.name) for field in fields(config)}


def has_effect(config: DataConfig, name: str) -> bool:
    """Whether an option does anything, given the others."""
    effect = about(name, type(config))["effect"]
    return getattr(config, effect) if isinstance(effect, str) else effect


@cache
def hints_of(config_type: type, include_extras: bool = False) -> Mapping[str, Any]:
    """`typing.get_type_hints`, which takes long for all the options of a program."""
    return typing.get_type_hints(config_type, include_extras=include_extras)


def _spelt(name: str, value: Any, config_type: type) -> Any:
    """The value, with spellings that YAML and the command line allow converted to what the type accepts."""
    hint = hints_of(config_type)[name]
    if isinstance(value, str) and type(None) in typing.get_args(hint) and value.lower() in ("none", "null", "~", ""):
        return None
    if isinstance(value, str) and value.startswith("[") and list[int] in typing.get_args(hint):
        with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
            return yaml.load(value, yaml.BaseLoader)
    if isinstance(value, str) and re.fullmatch(r"[+-]?\.inf", value, re.IGNORECASE):  # as YAML writes infinity
        return value.replace(".", "")
    return value


def about(name: str, config_type: type) -> dict[str, Any]:
    """What an option's field states: group, effect, decides, writes, help."""
    field = next(field for field in fields(config_type) if field.name == name)
    return field.default.json_schema_extra | {"help": field.default.description}


def from_root(value: Any) -> Any:
    """A path from a YAML or a default, made absolute: `../x` and `./x` mean `x` at the repository's root."""
    if not value or not isinstance(value, str):
        return value
    value = os.path.expanduser(value)
    while value.startswith(("../", "./")):
        value = value.split("/", 1)[1]
    return os.path.normpath(REPOSITORY / value)


def from_repository(value: Any) -> Any:
    """A path inside the repository made relative to it, as in saved configs; any other value unchanged."""
    return str(value).removeprefix(f"{REPOSITORY}{os.sep}") if isinstance(value, str | Path) else value


def influential(config: DataConfig) -> dict[str, Any]:
    """The options that affect the result, with paths inside the repository made relative to it."""
    return {name: from_repository(value) for name, value in as_dict(config).items()
            if about(name, type(config))["decides"] and has_effect(config, name)}


def identity(config: DataConfig) -> dict[str, Any]:
    """The options that identify a run: all that affect the result except its length and its paths (files are identified
    by checksum)."""
    return canonical({name: value for name, value in influential(config).items()
                     if about(name, type(config))["decides"] is True and not is_path(name, value, type(config))})


def canonical(options: dict[str, Any]) -> dict[str, Any]:
    """The options with equivalent values made equal: a dataset's own size is an unset `res`, `subset` matters for
    ImageNet only, and a gradient through all steps is an unset `adjoint_steps`."""
    dataset, same = str(options.get("dataset")), {}
    if options.get("res") in OWN_SIZES.get(dataset, ()):
        same["res"] = None
    if "subset" in options and dataset in OWN_SIZES and dataset != "ImageNet":
        same["subset"] = DataConfig.subset
    if options.get("adjoint_steps") and options["adjoint_steps"] == options.get("syn_steps"):
        same["adjoint_steps"] = None
    return options | same


def image_size(config: DataConfig) -> tuple[int, int]:
    """(H, W) of a config's images, known before they are read."""
    res = config.res if config.dataset in ("ImageNet", "ImageFolder") else None
    height, _, width = str(res or OWN_SIZES[config.dataset][0]).partition("x")
    return int(height), int(width or height)


def how_much(config: DataConfig) -> dict[str, int]:
    """The options that set how far a run goes."""
    return {name: value for name, value in as_dict(config).items()
            if about(name, type(config))["decides"] == HOW_MUCH}


def path_options(config_type: type) -> dict[str, Any]:
    """The options that are or may be paths, with their defaults."""
    hints = hints_of(config_type, include_extras=True)
    return {field.name: field.default.default for field in fields(config_type)
            if {"path", "path or name"} & set(map(str, typing.get_args(hints[field.name])))}


def is_path(name: str, value: Any, config_type: type) -> bool:
    """Whether an option's value is a path; if the option also takes a name, the suffix decides."""
    kinds = typing.get_args(hints_of(config_type, include_extras=True)[name])
    return bool(value) and ("path" in kinds or ("path or name" in kinds and str(value).endswith(".safetensors")))


def defaults(config_type: type) -> dict[str, Any]:
    """The default of each option, with paths as in `influential`."""
    rooted = {name: from_root(value) for name, value in path_options(config_type).items()
              if is_path(name, value, config_type)}
    return {name: from_repository(value) for name, value in as_dict(make(config_type, **rooted)).items()}


def changed(options: dict[str, Any], config_type: type) -> dict[str, Any]:
    """The options whose meaning differs from the defaults, in order of declaration; unknown ones last."""
    default, meant = defaults(config_type), canonical(options)
    names = [*(name for name in default if name in options), *(name for name in options if name not in default)]
    return {name: options[name] for name in names if name not in default or meant[name] != default[name]}


def worth_giving(options: dict[str, Any], config_type: type) -> dict[str, Any]:
    """The options to give a program to reproduce these: dataset, network and all that differ from the defaults."""
    names = {field.name for field in fields(config_type)}
    known = {name: value for name, value in options.items() if name in names}
    return {name: known[name] for name in ("dataset", "model") if name in known} | changed(known, config_type)


def value_in_words(value: Any) -> Any:
    """An option's value as messages show it; no value is `unset`, as in `--help`."""
    return "unset" if value is None or value == "" else value


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The options whose meaning differs from before, in words; empty if there are none."""
    before, now = canonical(before), canonical(now)
    return ", ".join(f"{name} ({value_in_words(before[name])} there, {value_in_words(value)} here)"
                     for name, value in now.items() if name in before and before[name] != value)
