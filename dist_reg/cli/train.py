"""`dist-reg train RUN.yaml [key=value ...]`."""

from __future__ import annotations

from pathlib import Path

import click

from dist_reg.config import load_run
from dist_reg.errors import Stopped
from dist_reg.launch.failure import FINISHED, STOPPED, record_end
from dist_reg.stopping import listening


@click.command("train")
@click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
def command(run_file: Path, overrides: tuple[str, ...]) -> None:
    """Train, evaluate and export what RUN.yaml describes.

    An unfinished run in the same folder is resumed from its newest whole checkpoint; a finished one is reported. On SIGUSR1
    or SIGTERM it saves, ends with exit code 75, and the same command goes on from there.
    """
    with listening():
        run = load_run(run_file, overrides)
        from dist_reg.run import train

        try:
            train(run)
        except Stopped:
            # While signals are still heard: torchrun ends who leaves last with one.
            record_end(STOPPED)
            raise
        record_end(FINISHED)
