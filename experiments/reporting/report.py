"""A comparison's report, from results alone: tables, figures and one page with all of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import UserError
from ..protocol.methods import family_of
from ..protocol.tuned_settings import Source, explain
from ..running.files import write_atomically
from ..running.records import RECORDS, describe_failure
from .figures import CAPTIONS, draw_figures
from .html import render
from .tables import (
    ACCURACIES,
    COSTS,
    FAMILY,
    REFERENCE,
    SUMMARY,
    TITLE_KEYS,
    Result,
    Row,
    cells,
    csv_table,
    describe,
    flat,
    markdown_table,
    plain_table,
    present,
    table_rows,
)


def write_report(results: Sequence[Result], folder: Path, failures: Sequence[Result] = ()) -> str:
    """Write ``table.md``, ``table.csv``, the figures and ``report.html``; return the table as text.

    The page gathers all of it in one file that opens without network.

    Args:
        results: results of one benchmark and scenario, at least one, in any order.
        folder: where to.
        failures: failed runs beside them; they are listed under the table.

    Raises:
        UserError: the folder cannot be written, or holds a foreign file of such a name.
    """
    require_no_foreign(folder)
    rows = table_rows(results)
    config = results[0]["config"]
    title = f"{config['benchmark']}, {config['scenario']}-incremental"
    costs = [column for column in COSTS if any(row[column.key] for row in rows)]
    explained = [*present(rows, ACCURACIES), *costs]
    failed = sorted(describe_failure(failure) for failure in failures)
    missing = _missing_seeds(rows, results)
    sources = _sources(rows)
    commands = sorted({result.get("command", "") for result in results} - {""})
    common, own = _settings(rows)
    figures = draw_figures(rows, title)
    parts = [
        f"# {title}",
        sources,
        *(f"Made by `{command}`." for command in commands),
        markdown_table(rows),
        "Time and memory:",
        markdown_table(rows, costs),
        *(f"**Failed:** {line}" for line in failed),
        *(f"**{line}**" for line in missing),
        _INTERVALS,
        "\n".join(
            [f"* {column.heading}: {column.meaning}" for column in explained]
            + ([f"* family: {FAMILY}"] if len({family_of(row["name"]) for row in rows}) > 1 else [])
        ),
        "Figures, which `python -m experiments report FOLDER` draws:",
        "\n".join(f"* `{name}`: {CAPTIONS[name]}." for name in figures),
        f"All runs: {common}. Settings:",
        "\n".join(f"* {method}: {values}" for method, values in own),
    ]
    page = render(
        figures,
        CAPTIONS,
        title=title,
        sources=sources,
        commands=commands,
        accuracies=cells(rows, SUMMARY),
        costs=cells(rows, costs),
        reference=REFERENCE,
        failed=failed,
        missing=missing,
        intervals=_INTERVALS,
        columns=explained,
        common=common,
        own=own,
        # The versions and machines that the runs were made with.
        environments=sorted({describe(result.get("environment", {})) for result in results}),
    )
    write_atomically(folder / "table.md", "\n\n".join(parts) + "\n")
    write_atomically(folder / "table.csv", csv_table(rows))
    for name, content in figures.items():
        write_atomically(folder / name, content)
    write_atomically(folder / "report.html", page)
    failed = [f"FAILED {line}" for line in failed]
    return "\n".join([title, sources, plain_table(rows), *failed, *missing])


def require_no_foreign(folder: Path) -> None:
    """Check that no file in the folder would be replaced that a report has not written.

    Raises:
        UserError: there is one.
    """
    table = folder / "table.md"
    with suppress(OSError, ValueError):
        if (folder / RECORDS).is_file() or _INTERVALS in table.read_text(encoding="utf-8"):
            return
    for name in ("table.md", "table.csv", "report.html", *CAPTIONS):
        if (folder / name).exists():
            raise UserError(
                f"{folder / name} is there and no report of a comparison has written it; name "
                f"another folder, or move it away"
            )


_INTERVALS = (
    "n: number of seeds, one run each. After ±: half the width of the 95 % confidence "
    "interval (Student's t over the seeds); without it there is one seed, or the value does "
    "not depend on the seed. –: the method has no such value, or there is nothing to compare."
)

_SOURCES = {
    "searched": "searched on validation data",
    "first-experience": "searched on validation data of the first experience",
    "transferred": "searched on validation data of another stream or with another model",
    "published": "from a paper",
    "default": "defaults, not tuned",
    "given": "given by the user",
}


def _sources(rows: Sequence[Row]) -> str:
    """Return where the rows' settings come from, in a sentence."""
    order = {kind: place for place, kind in enumerate(_SOURCES)}
    used: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: (order.get(row["source"], -1), row["method"])):
        text = _source(row)
        used[text] = f"{used[text]}, {row['method']}" if text in used else row["method"]
    if len(used) == 1:
        return f"Settings: {next(iter(used))}, for all methods."
    listed = "; ".join(f"{text}: {methods}" for text, methods in used.items())
    return f"Settings, NOT of the same kind for all methods: {listed}."


def _source(row: Row) -> str:
    """Return where a row's setting comes from; of one that was given in part, both."""
    kinds = {key: Source.parse(text).kind for key, text in row["sources"].items()}
    given = [key for key, kind in kinds.items() if kind == "given"]
    if not given:
        return _SOURCES.get(row["source"], str(row["source"]))
    others = sorted(set(kinds.values()) - {"given", "default"}) or ["default"]
    rest = f", the rest {_SOURCES.get(others[0], others[0])}" if len(given) < len(kinds) else ""
    return f"{' and '.join(given)} {_SOURCES['given']}{rest}"


def _missing_seeds(rows: Sequence[Row], results: Sequence[Result]) -> list[str]:
    """Return a sentence if the rows are not over the same seeds."""
    seeds = len({result["config"]["seed"] for result in results})
    fewer = [f"{row['method']} {row['n']} of {seeds}" for row in rows if row["n"] < seeds]
    if not fewer:
        return []
    return [
        f"Not all rows have the same seeds: {'; '.join(fewer)}. The others failed or were not run; "
        f"a difference is over the seeds of both rows."
    ]


def _settings(rows: Sequence[Row]) -> tuple[str, list[tuple[str, str]]]:
    """Return what all runs have in common, and each row's own values with its label."""
    first = rows[0]["config"]
    same = [key for key in first if all(row["config"][key] == first[key] for row in rows)]
    common = {key: value for key, value in flat(first).items() if key in same}
    own = []
    for row in rows:
        values = {k: v for k, v in flat(row["config"]).items() if k not in (*TITLE_KEYS, *common)}
        known = {key: value for key, value in values.items() if key in row["sources"]}
        rest = describe(values, list(known))
        own.append((row["method"], "; ".join(filter(None, [explain(known, row["sources"]), rest]))))
    return describe(common, TITLE_KEYS), own
