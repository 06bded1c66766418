"""`dist-reg report DIR`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_reg.errors import UserError, make_folder

NUMBERS = ("seeds", "best", "p", "p Holm", "train s")
WIDTH = 100
"""Columns of the screen, in a pipe or a file."""


@click.command("report")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the files. Default: DIR.")
@click.option(
    "--test",
    type=click.Choice(["t-test", "bootstrap", "none"]),
    default="t-test",
    show_default=True,
    help="How groups are compared with the baseline, on runs paired by data seed and seed.",
)
@click.option(
    "--baseline", metavar="LABEL", help="What they are compared with, as the table names it. Default: plain."
)
@click.option("--mix", is_flag=True, help="Take runs whose settings differ, as groups of their own.")
def command(folder: Path, out: Path | None, test: str, baseline: str | None, mix: bool) -> None:
    """Summarise the finished runs below DIR: means over seeds, each group against plain fine-tuning with interval and p.

    Prints the tables; writes report.csv, .md, .tex and .png, and the learning curves as report.curves.csv and .png.
    """
    if test == "none" and baseline is not None:
        raise UserError(
            f"--baseline {baseline} is for a comparison, and --test none asks for none; leave one out."
        )
    show(folder, out=out, test=test, baseline=baseline, mix=mix)


def show(
    folder: Path,
    *,
    out: Path | None = None,
    test: str = "t-test",
    baseline: str | None = None,
    mix: bool = False,
) -> None:
    """Print the tables of the runs below `folder`, and write the report to `out`, or there."""
    from dist_reg import report
    from dist_reg.report import rows, runs

    found = report.read_runs(folder)
    summary = report.summarise(
        found,
        test=test,
        baseline=runs.PLAIN if baseline is None else baseline,
        mix=mix,
        unfinished=len(runs.unfinished(folder)),
    )
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    columns = rows.header(summary)
    for table in summary.tables:
        console.print(rows.title(table.block), style="bold", highlight=False, markup=False)
        screen = Table(box=None, pad_edge=False)
        for column in columns:
            screen.add_column(column, justify="right" if column in NUMBERS else "left", overflow="fold")
        for line in rows.cells(summary, table):
            screen.add_row(*(Text(cell.text + "*" * cell.mark, "bold" if cell.bold else "") for cell in line))
        console.print(screen)
        console.print()
    for note in (*summary.legend, *summary.notes):
        console.print(note, highlight=False, markup=False)
    if out is not None:
        make_folder(out, "--out")
    written = report.write(summary, out or folder)
    names = ", ".join(path.name for path in written)
    console.print(f"written to {out or folder}: {names}", highlight=False, markup=False, soft_wrap=True)
