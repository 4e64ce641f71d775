"""The templates, page.html with the macros that draw a page and card_template.md, and their filters and helpers:
pictures, paths and options as HTML, text as Markdown."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from distill.result_files import images_tested
from utils.config import value_in_words

HERE = Path(__file__).parent


def png(pixels: Tensor) -> str:
    """[C, H, W] uint8 → a PNG in base64."""
    array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(array.numpy()).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def line(text: Any) -> str:
    return " ".join(str(text).split())


def markdown(text: Any) -> str:
    """Text on one line, with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_\[\]<>|&~$#!])", r"\\\1", line(text))


def markdown_code(text: Any) -> str:
    """Text as inline code; backticks, which would end it, become apostrophes."""
    return f"`{line(text).replace('`', chr(39))}`"


def markdown_block(text: str, language: str = "") -> str:
    """Lines as a code block, with a fence longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=jinja2.select_autoescape(["html"]),
                               trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
                               keep_trailing_newline=True)
TEMPLATES.filters |= {"png": png, "markdown": markdown, "code": markdown_code, "block": markdown_block,
                      "images_tested": images_tested}
draw: Any = TEMPLATES.get_template("page.html").module
"""The macros of page.html by name; each returns HTML."""


def document(title: str, kind: str, name: str, lead: list[str], sections: list[tuple[str, str, Markup]]) -> str:
    """A whole page of sections (id, heading, content). Its security policy keeps the browser from fetching anything."""
    style = (HERE / "report.css").read_text(encoding="utf-8")
    return draw.document(title, kind, name, lead, sections, style).lstrip()


def joined(*parts: Markup) -> Markup:
    return Markup("").join(parts)


def code(text: Any) -> Markup:
    """A name, a value or a path as code; a browser may break a path after each folder."""
    return Markup("<code>%s</code>") % Markup("/<wbr>").join(str(text).split("/"))


def option(value: Any) -> Markup:
    """An option's value."""
    return code(value_in_words(value))
