"""`dist-reg train RUN.yaml [key=value ...]`."""

from __future__ import annotations

from pathlib import Path

import click

from dist_reg.config import load_run


@click.command("train")
@click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
def command(run_file: Path, overrides: tuple[str, ...]) -> None:
    """Train, evaluate and export what RUN.yaml describes.

    An unfinished run in the same folder is resumed from its newest whole checkpoint; a finished one is reported.
    """
    run = load_run(run_file, overrides)
    from dist_reg.run import train

    train(run)
