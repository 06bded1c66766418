"""`dist-reg bench`: what things cost, each benchmark a file of this package."""

import click

from dist_reg.cli.bench.step import step


@click.group("bench")
def command() -> None:
    """Measure what a method costs."""


command.add_command(step)
