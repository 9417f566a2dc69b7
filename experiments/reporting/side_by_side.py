"""One number of several comparisons side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from ..errors import UserError
from ..running.records import Results
from .tables import COLUMNS, Row, cell, markdown, table_rows, with_families

KEYS = ("average_accuracy", "extension_difference")
"""The columns of :data:`experiments.reporting.tables.COLUMNS` that there is a table of."""


def side_by_side(folders: Sequence[Path]) -> list[str]:
    """Return a Markdown table of methods × folders for each of :data:`KEYS`.

    The average accuracy comes first, then its paired difference from ``classp-matrix``'s. The
    folders keep their order. The methods are sorted by their mean accuracy over the folders that
    have all of them, if there are such.

    Args:
        folders: what ``compare`` wrote.

    Raises:
        UserError: a folder has no finished run, or several settings of a method.
    """
    tables = {folder.name: _read(folder) for folder in folders}
    methods = _sorted(tables)
    return [
        markdown(
            with_families(
                [
                    ["method", *tables],
                    *(
                        [
                            method,
                            *(
                                cell(column, table[method][column.key]) if method in table else ""
                                for table in tables.values()
                            ),
                        ]
                        for method in methods
                    ),
                ],
                methods,
            )
        )
        for column in COLUMNS
        if column.key in KEYS
    ]


def _read(folder: Path) -> dict[str, Row]:
    """Return the rows of a comparison, by method."""
    finished = [result for result in Results(folder).load() if "error" not in result]
    if not finished:
        raise UserError(f"there are no finished runs in {folder / 'runs'}")
    rows = table_rows(finished)
    table: dict[str, Row] = {row["name"]: row for row in rows}
    if len(table) < len(rows):
        raise UserError(f"{folder} has several settings of a method; give folders of compare")
    return table


def _sorted(tables: Mapping[str, Mapping[str, Row]]) -> list[str]:
    accuracy = pd.DataFrame(
        {
            folder: {method: row["average_accuracy"][0] for method, row in table.items()}
            for folder, table in tables.items()
        }
    )
    whole = accuracy.dropna(axis="columns")
    means = (accuracy if whole.empty else whole).mean(axis="columns")
    return [str(method) for method in means.sort_values(ascending=False, kind="stable").index]
