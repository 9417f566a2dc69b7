"""The report as one HTML page that needs nothing beside it: no network, script or other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(figures: Mapping[str, bytes], captions: Mapping[str, str], **values: Any) -> str:
    """Return the page.

    Args:
        figures: PNG files by name.
        captions: of these.
        **values: what else ``report.html`` names.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    shown = [
        {"caption": captions[name], "data": base64.b64encode(content).decode()}
        for name, content in figures.items()
    ]
    return environment.get_template("report.html").render(figures=shown, **values)
