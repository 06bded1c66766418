"""`dist-reg bench`: what things cost, each benchmark a file of this package."""

import click

from dist_reg.cli.bench.kernels import kernels
from dist_reg.cli.bench.step import step


@click.group("bench")
def command() -> None:
    """Measure what a method and its kernels cost."""


command.add_command(kernels)
command.add_command(step)
