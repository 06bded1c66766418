"""The files of a report, each written whole or not at all."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dist_reg.errors import UserError, reason
from dist_reg.report import plots, text
from dist_reg.report.curves import Point
from dist_reg.report.rows import rows
from dist_reg.report.summary import Summary

LAST = "train_seconds"
"""The last column, whatever further sets other rows have."""


def write(summary: Summary, folder: Path) -> list[Path]:
    """Write the tables and pictures of `summary` into `folder`; returns their paths.

    report.csv, report.md, report.tex and report.png; report.curves.csv and report.curves.png where a log could be read;
    report.examples.png where a task was trained on several numbers of examples; report.layers.png where runs logged
    something for every layer.

    Raises:
        UserError: a file that cannot be written.
    """
    blocks = [table.block for table in summary.tables]
    table = rows(summary)
    columns = [*dict.fromkeys(key for row in table for key in row if key != LAST), LAST]
    written = [
        _whole(folder / "report.csv", lambda path: _csv(path, columns, table)),
        _whole(folder / "report.md", lambda path: path.write_text(text.markdown(summary), encoding="utf-8")),
        _whole(folder / "report.tex", lambda path: path.write_text(text.latex(summary), encoding="utf-8")),
        _whole(folder / "report.png", lambda path: plots.save(plots.score_figures(blocks), path)),
    ]
    if summary.curves:
        names = [field.name for field in fields(Point)]
        points = [asdict(point) for point in summary.curves]
        drawn = plots.curve_figures(list(summary.curves))
        written += [
            _whole(folder / "report.curves.csv", lambda path: _csv(path, names, points)),
            _whole(folder / "report.curves.png", lambda path: plots.save(drawn, path)),
        ]
    if examples := plots.example_figures(blocks):
        written.append(_whole(folder / "report.examples.png", lambda path: plots.save(examples, path)))
    if layers := plots.by_layer(blocks):
        by_layer = plots.layer_figures(layers)
        written.append(_whole(folder / "report.layers.png", lambda path: plots.save(by_layer, path)))
    return written


def _whole(path: Path, fill: Callable[[Path], Any]) -> Path:
    """Let `fill` write beside `path`, and put what it wrote in its place; returns `path`."""
    partial = path.with_name(f".{path.name}")
    try:
        fill(partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"report: {path} cannot be written: {reason(error)}; --out writes to another folder."
        ) from None
    finally:
        _remove(partial)
    return path


def _remove(partial: Path) -> None:
    try:
        partial.unlink(missing_ok=True)
    except OSError:
        return


def _csv(path: Path, columns: list[str], table: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)
