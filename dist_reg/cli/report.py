"""`dist-reg report DIR`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table


@click.command("report")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Summarise the finished runs below DIR: table on screen, report.csv, report.md and report.png in DIR."""
    show(folder)


def show(folder: Path) -> None:
    """Print the table of the runs below `folder` and write it there."""
    from dist_reg import report

    groups = report.group(report.read_results(folder))
    table = report.rows(groups)
    header, cells = report.texts(table)
    screen = Table(*header, box=None, pad_edge=False)
    for line in cells:
        screen.add_row(*line)
    console = Console()
    console.print(screen, highlight=False, markup=False)
    metrics = " and ".join(dict.fromkeys(row["metric"] for row in table))
    console.print(f"mean (standard deviation over seeds) of {metrics}, in percent", highlight=False)
    written = report.write(folder, table, groups)
    console.print("written: " + ", ".join(str(path) for path in written), highlight=False, soft_wrap=True)
