"""One number of several comparisons side by side.

    python -m experiments.reporting.side_by_side FOLDER ...

Prints two Markdown tables of methods × folders (each a folder that ``compare`` wrote): the average
accuracy, and its paired difference from ``classp-matrix``'s. The folders keep their order; the
methods are sorted by their mean accuracy over the folders that have all of them, if there are such.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.arguments import script_parser
from experiments.errors import UserError, exit_code
from experiments.reporting.report import COLUMNS, cell, table_rows
from experiments.running.records import Results

KEYS = ("average_accuracy", "extension_difference")
"""The columns of :data:`experiments.reporting.report.COLUMNS` that there is a table of."""

Table = Mapping[str, Mapping[str, Any]]
"""The rows of a comparison, by method."""


def side_by_side(folders: Sequence[Path]) -> list[str]:
    """Return a Markdown table for each of :data:`KEYS`.

    Raises:
        UserError: a folder has no finished run, or several settings of a method.
    """
    tables = {folder.name: _read(folder) for folder in folders}
    methods = _sorted(list(tables.values()))
    pages = []
    for column in (column for column in COLUMNS if column.key in KEYS):
        lines = [["method", *tables], ["---", *["---:"] * len(tables)]]
        for method in methods:
            rows = [table.get(method) for table in tables.values()]
            lines.append(
                [method, *("" if r is None else cell(column, r[column.key]) for r in rows)]
            )
        pages.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return pages


def _read(folder: Path) -> Table:
    finished = [result for result in Results(folder).load() if "error" not in result]
    if not finished:
        raise UserError(f"there are no finished runs in {folder / 'runs'}")
    rows = table_rows(finished)
    table = {row["name"]: row for row in rows}
    if len(table) < len(rows):
        raise UserError(f"{folder} has several settings of a method; give folders of compare")
    return table


def _sorted(tables: Sequence[Table]) -> list[str]:
    methods = list(dict.fromkeys(method for table in tables for method in table))
    whole = [table for table in tables if set(methods) == set(table)] or list(tables)

    def mean(method: str) -> float:
        return fmean(table[method]["average_accuracy"][0] for table in whole if method in table)

    return sorted(methods, key=mean, reverse=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = script_parser("experiments.reporting.side_by_side", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    folders = parser.parse_args(arguments).folders
    return exit_code(lambda: print("\n\n".join(side_by_side(folders))))


if __name__ == "__main__":
    sys.exit(main())
